"""Layers run by kernels against the same layers run by their modules, in float32, on tiny models."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from drawn import DEVICE

import statecache as sc
from statecache.kernels import delta_step, ssd_step
from statecache.models.fused import by_kernels, ways

STEPS = 2
DENSE = {"granitemoehybrid": {"num_local_experts": 0, "num_experts_per_tok": 0}}


def model_of(name: str) -> Any:
    model, _ = families.build(name, **DENSE.get(name, {}))
    return sc.prepare(model.to(DEVICE))


def texts(rows: int) -> torch.Tensor:
    return torch.randint(1, 90, (rows, 9 + STEPS), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def logits(
    model: Any, ids: torch.Tensor, kernels: bool, counts: list[int] | None = None, store: str | None = None
) -> torch.Tensor:
    """Of the steps after a prompt of nine tokens, of which row 1 is one behind. `store`: of recurrent states."""
    rows, kept = len(ids), {"dtype": torch.float32, "device": DEVICE, "recurrent_store": store}
    cache = sc.StateCache(model.config, capacity=32, slack=1, back=False, rows=rows, **kept)
    prompt = ids[:, :9]
    name = families.cache_arg(model)
    with torch.no_grad():
        cache.expect([9 if row != 1 else 8 for row in range(rows)])
        model(prompt, **{name: cache})
        out = []
        for n in range(9, 9 + STEPS):
            if counts is not None:
                cache.expect(counts)
            if kernels:
                with by_kernels(model):
                    out.append(model(ids[:, n : n + 1], **{name: cache}).logits)
            else:
                out.append(model(ids[:, n : n + 1], **{name: cache}).logits)
    return torch.cat(out, 1)


SLOW = () if DEVICE == "cuda" else pytest.mark.long  # in the interpreter
CASES = [("mamba2", 1), ("granitemoehybrid", 2), ("qwen3_5", 2)]
MORE = [("mamba2", 70), ("granitemoehybrid", 1), ("granitemoehybrid", 17), ("qwen3_5", 1), ("qwen3_5", 17)]


@pytest.mark.parametrize(("name", "rows"), [*CASES, *(pytest.param(*case, marks=SLOW) for case in MORE)])
def test_whole_layers_give_what_their_modules_give(name: str, rows: int) -> None:
    model = model_of(name)
    assert all(way.way == "whole" for way in ways(model)), list(map(str, ways(model)))
    ids = texts(rows)
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert not torch.equal(got, want)  # kernels did run


@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("mamba2", marks=SLOW)])
def test_layers_take_states_that_are_kept_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, taken = model_of(name), texts(2), []
    for kernel in (ssd_step, delta_step):
        own = kernel.step
        monkeypatch.setattr(
            kernel, "step", lambda *args, own=own, **kwargs: (taken.append(args[-3].dtype), own(*args, **kwargs))[1]
        )
    want, got = (logits(model, ids, kernels=each, store="bfloat16") for each in (False, True))
    first, second = ((got - want).abs().amax((0, 2)) / want.abs().max()).tolist()
    assert taken and set(taken) == {torch.bfloat16}
    assert 0 < first < 1e-5  # from the same states
    assert second < 1e-2  # from states of which a last place may be another


OTHERS = ["falcon_h1", "qwen3_next", "nemotron_h", "zamba2"]


@pytest.mark.parametrize("name", ["bamba", *(pytest.param(name, marks=SLOW) for name in OTHERS)])
def test_other_families_run_in_part(name: str) -> None:
    model = model_of(name)
    assert "in part" in {way.way for way in ways(model)}
    ids = texts(3)
    want, got = logits(model, ids, False, [1, 0, 1]), logits(model, ids, True, [1, 0, 1])
    alive = [0, 2]
    assert ((got - want)[alive].abs().max() / want.abs().max()).item() < 1e-5
    assert not torch.equal(got[alive], want[alive])


def test_a_model_is_left_as_it_was() -> None:
    model = model_of("qwen3_5")

    def own() -> dict[str, Any]:
        return {name: dict(vars(module)) for name, module in model.named_modules()}

    before = own()
    with by_kernels(model):
        assert own() != before
    assert own() == before


def test_what_is_unusual_goes_through_its_own_module() -> None:
    model = model_of("mamba2")
    layers = model.backbone.layers
    called = []
    layers[0].mixer.in_proj.register_forward_hook(lambda *_: called.append(0))
    layers[1].mixer.out_proj = torch.nn.Sequential(layers[1].mixer.out_proj)
    layers[2].mixer.in_proj.weight.data = layers[2].mixer.in_proj.weight.data.mT.contiguous().mT
    found = ways(model)
    assert [way.way for way in found] == ["in part", "in part", "in part", "whole"]
    assert "in_proj is hooked" in found[0].why
    assert "out_proj is a Sequential" in found[1].why
    assert "in_proj has an unusual weight" in found[2].why
    ids = texts(1)
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert len(called) == 2 * (1 + STEPS)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
