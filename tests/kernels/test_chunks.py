"""The kernels of many tokens against the plain operators in float64, on fresh inputs; and prompts through them."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from drawn import DEVICE, HALF, NAN, draw, error
from torch import Tensor

import statecache as sc
from statecache import kernels
from statecache.decode import feed as feeding
from statecache.kernels import conv_chunk, delta_chunk, lightning_chunk, ssd_chunk, tokens
from statecache.models.fused import norms_by_kernels
from statecache.ops import conv, gated_delta, lightning, ssd

CLOSE = 2e-6


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what kernels are to write begin as NaN."""
    own = torch.Tensor.new_empty

    def full(x: Tensor, size: Any, **kwargs: Any) -> Tensor:
        new = own(x, size, **kwargs)
        return new.fill_(NAN) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", full)


def cut(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """A part of a wider tensor whose other channels are poisoned, as projections and convolutions give it."""
    *most, heads, size = shape
    wide = torch.full((*most, heads * size + 3), NAN, dtype=dtype, device=DEVICE)
    wide[..., : heads * size] = draw(*most, heads * size, dtype=dtype, scale=scale)
    return wide[..., : heads * size].unflatten(-1, (heads, size))


def log_decays(*shape: int) -> Tensor:
    """From almost none to a token that nothing outlasts."""
    return -(draw(*shape) * 2 - 2).exp()


def raised(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: v.double() if v is not None and v.is_floating_point() else v for k, v in given.items()}


def extra(rows: int, T: int, counted: bool, marked: bool) -> dict[str, Tensor | None]:
    """Counts of zero and of all tokens, and marks at both ends of a sequence and inside."""
    beside = [[n % (T + 1), 99] for n in (0, T, T // 2 + 1, 3)][:rows]  # a column of what was uploaded at once
    count = torch.tensor(beside, device=DEVICE)[:, 0] if counted else None
    at = torch.tensor([[0, T, T // 2], [T // 3, T, 1], [T, T, 0], [5 % T, 0, T]][:rows], device=DEVICE)
    return {"count": count, "at": at if marked else None}


def check(kernel: Any, plain: Any, given: dict[str, Tensor | None], tolerance: float = CLOSE, **more: Any) -> None:
    want, got = plain.chunk(**raised(given)), kernel.chunk(**given, **more)
    at, count = given["at"], given["count"]
    assert (got[2] is None) == (at is None)
    y, expected = got[0], want[0]
    assert y.dtype == got[1].dtype == torch.float32 and y.shape == expected.shape
    if count is not None:  # behind its count a row's outputs are junk
        there = torch.arange(y.shape[1], device=DEVICE) < count[:, None]
        y, expected = y[there], expected[there]
    pairs = [(y, expected), *zip(got[1:], want[1:], strict=True)]
    for part, right in pairs:
        if part is not None and right.numel():
            assert error(part, right) < tolerance


SLOW = () if DEVICE == "cuda" else pytest.mark.long  # in the interpreter
ALL, NONE, SOME, MOST = (True, True, True), (False, False, False), (True, False, True), (False, True, True)
ODD = [ALL, NONE, *(pytest.param(*each, marks=SLOW) for each in (SOME, MOST))]  # counted, begun, marked
# rows, tokens, key heads, value heads, key size, value size
DELTAS = [(3, 70, 2, 4, 32, 24), (1, 129, 1, 1, 20, 40), (2, 5, 2, 2, 16, 16), (4, 33, 1, 3, 8, 5)]
WIDE = [(2, 200, 2, 2, 128, 128), (1, 150, 1, 2, 256, 64), (33, 20, 2, 2, 64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("counted", "begun", "marked"), ODD)
@pytest.mark.parametrize("shape", [*DELTAS, *(pytest.param(each, marks=SLOW) for each in WIDE)])
def test_the_delta_rule_is_the_plain_operator(
    shape: Any, counted: bool, begun: bool, marked: bool, dtype: torch.dtype
) -> None:
    rows, T, J, H, K, V = shape
    given = {
        "q": cut(rows, T, J, K, dtype=dtype),
        "k": cut(rows, T, J, K, dtype=dtype),
        "v": cut(rows, T, H, V, dtype=dtype),
        "g": log_decays(rows, T, H),
        "beta": draw(rows, T, H).sigmoid().mul(2).to(dtype),
        "state": draw(rows, H, K, V) if begun else None,
        **extra(rows, T, counted and rows <= 4, marked and rows <= 4),
    }
    check(delta_chunk, gated_delta, given)


@pytest.mark.parametrize("part", [16, 32])
def test_the_delta_rule_of_keys_that_are_all_alike(part: int) -> None:
    given = {
        "q": draw(1, 64, 1, 32),
        "k": draw(1, 1, 1, 32).expand(1, 64, 1, 32) + draw(1, 64, 1, 32, scale=1e-3),
        "v": draw(1, 64, 1, 32),
        "g": torch.full((1, 64, 1), -1e-3, device=DEVICE),
        "beta": torch.full((1, 64, 1), 1.5, device=DEVICE),
        "state": draw(1, 1, 32, 32),
        **extra(1, 64, False, True),
    }
    check(delta_chunk, gated_delta, given, tolerance=2e-5, part=part)


# rows, tokens, heads, head size, groups, state size
SSDS = [(3, 70, 4, 24, 2, 20), (1, 200, 2, 40, 1, 16), (2, 5, 2, 16, 1, 33), (4, 33, 3, 5, 3, 8)]
WIDE_SSDS = [(2, 200, 4, 64, 1, 128), (1, 150, 2, 128, 1, 256), (33, 20, 2, 64, 1, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("counted", "begun", "marked"), ODD)
@pytest.mark.parametrize("shape", [*SSDS, *(pytest.param(each, marks=SLOW) for each in WIDE_SSDS)])
def test_ssd_is_the_plain_operator(shape: Any, counted: bool, begun: bool, marked: bool, dtype: torch.dtype) -> None:
    rows, T, H, P, G, N = shape
    given = {
        "x": cut(rows, T, H, P, dtype=dtype),
        "dt": draw(rows, T, H).sub(2).exp(),
        "A": -draw(H).exp(),
        "B": cut(rows, T, G, N, dtype=dtype),
        "C": cut(rows, T, G, N, dtype=dtype),
        "state": draw(rows, H, P, N) if begun else None,
        **extra(rows, T, counted and rows <= 4, marked and rows <= 4),
    }
    check(ssd_chunk, ssd, given)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("runs", [2, 3, 5])
def test_a_sequence_cut_into_runs_is_one_sequence(runs: int, begun: bool) -> None:
    given = {
        "x": draw(2, 300, 2, 16),
        "dt": draw(2, 300, 2).sub(4).exp(),
        "A": -draw(2).exp(),
        "B": draw(2, 300, 1, 16),
        "C": draw(2, 300, 1, 16),
        "state": draw(2, 2, 16, 16, scale=30.0) if begun else None,
        **extra(2, 300, False, True),
    }
    check(ssd_chunk, ssd, given, runs=runs)


def test_a_long_sequence_goes_through_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ROOM", 4 * 64 * 64)  # of SSD's scores, four chunks; of the delta rule's parts, one
    common = {"state": draw(1, 2, 16, 16), **extra(1, 400, False, True)}
    x, y = draw(1, 400, 2, 16), draw(1, 400, 2, 16)
    check(ssd_chunk, ssd, {"x": x, "dt": -log_decays(1, 400, 2), "A": -draw(2).exp(), "B": y, "C": x, **common})
    check(delta_chunk, gated_delta, {"q": x, "k": y, "v": x, "g": log_decays(1, 400, 2), "beta": y[..., 0], **common})


@pytest.mark.parametrize(("counted", "begun", "marked"), ODD)
def test_lightning_attention_is_the_plain_operator(counted: bool, begun: bool, marked: bool) -> None:
    alive = torch.ones(3, 70, 1, device=DEVICE)
    alive[1, 20:30] = 0
    given = {
        **{name: cut(3, 70, 2, 24, dtype=HALF) for name in ("q", "k", "v")},
        "alive": alive,
        "slope": draw(2).exp(),
        "state": draw(3, 2, 24, 24) if begun else None,
        **extra(3, 70, counted, marked),
    }
    check(lightning_chunk, lightning, given)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("rows", "T", "C", "W"), [(2, 37, 140, 4), (1, 1, 5, 3), (3, 16, 129, 2)])
def test_the_convolution_is_the_plain_operator(
    rows: int, T: int, C: int, W: int, silu: bool, dtype: torch.dtype
) -> None:
    x, weight = cut(rows, T, 1, C, dtype=dtype)[:, :, 0], draw(C, 1, W, dtype=dtype).squeeze(1)
    for bias in (None, draw(C, dtype=dtype)):
        for past in (None, draw(rows, W - 1, C, dtype=dtype).mT):
            up = [None if t is None else t.double() for t in (x, weight, bias, past)]
            want = conv.chunk(up[0], up[1], up[2], up[3], silu)  # type: ignore[arg-type]
            got = conv_chunk.chunk(x, weight, bias, past, silu)
            assert got.dtype == dtype
            assert error(got, want) < (CLOSE if dtype == torch.float32 else 1e-2)


# ---- through whole models

SMALLER = {"qwen3_5": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}}


def course(model: Any) -> Tensor:
    """Logits of a prompt, of one behind it for rows that differ, of a round and after a rollback."""
    name = families.cache_arg(model)
    ids = torch.randint(1, 90, (2, 40), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    cache = sc.StateCache(model.config, slack=4)

    def fed(begin: int, end: int) -> Tensor:
        return model(ids[:, begin:end], **{name: cache}).logits  # type: ignore[no-any-return]

    with torch.no_grad():
        out = [fed(0, 17)]
        cache.expect([7, 5])
        out.append(fed(17, 24)[:, :5])
        with cache.speculate(4) as draft:
            out.append(fed(24, 28))
            draft.commit(torch.tensor([3, 1], device=DEVICE))
        out.append(fed(28, 30))
        cache.rollback(torch.tensor([3, 2], device=DEVICE))
        out.append(fed(30, 32))
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", ["qwen3_5", *(pytest.param(name, marks=SLOW) for name in ("mamba2", "minimax"))])
def test_prompts_through_kernels_give_what_plain_ones_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = families.build(name, **SMALLER.get(name, {}))
    sc.prepare(model.to(DEVICE))
    got = course(model)
    monkeypatch.setattr(kernels, "serves", lambda *_: False)
    want = course(model)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert not torch.equal(got, want)  # kernels did run


@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("mamba2", marks=SLOW)])
def test_norms_of_a_prompt_go_through_kernels_and_are_given_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = families.build(name)
    sc.prepare(model.to(DEVICE))
    prompt = torch.randint(1, 90, (1, 9), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    used = []
    with torch.no_grad():
        want = feeding.feed(model, sc.StateCache(model.config), prompt)
        monkeypatch.setattr(feeding, "MANY", 9)
        monkeypatch.setattr(feeding, "norms_by_kernels", lambda model: (used.append(model), norms_by_kernels(model))[1])
        got = feeding.feed(model, sc.StateCache(model.config), prompt)
    assert used == [model]
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    before = {name for name, module in model.named_modules() if "forward" in vars(module)}
    with norms_by_kernels(model):
        assert before < {name for name, module in model.named_modules() if "forward" in vars(module)}
    with pytest.raises(ZeroDivisionError), norms_by_kernels(model):
        raise ZeroDivisionError
    assert before == {name for name, module in model.named_modules() if "forward" in vars(module)}


def test_what_kernels_do_not_serve() -> None:
    x = draw(2, 3)
    weight = torch.nn.Parameter(x)

    def serves(*tensors: Tensor | None) -> bool:
        return kernels.serves("ssd_chunk", *tensors)

    assert serves(x, None, weight.detach())
    assert not serves(x.double())
    assert not serves(x, x.as_subclass(torch.nn.Buffer))
    assert not serves(x, weight)
    with torch.no_grad():
        assert serves(x, weight)
    assert not serves(x.to("meta"))


def test_a_device_that_is_too_small_runs_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = families.build("mamba2")
    sc.prepare(model.to(DEVICE))
    ids, calls = torch.randint(1, 90, (1, 9)).to(DEVICE), []

    def too_large(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise kernels.too_large()(300_000, 100_000, "shared memory")

    monkeypatch.setattr(kernels, "_refused", set())
    monkeypatch.setattr(ssd_chunk, "chunk", too_large)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="the kernel ssd_chunk does not fit .* shared memory"):
            got = model(ids, **{families.cache_arg(model): sc.StateCache(model.config)}).logits
        assert calls == [1]  # and is not tried again
        monkeypatch.setattr(kernels, "serves", lambda *_: False)
        want = model(ids, **{families.cache_arg(model): sc.StateCache(model.config)}).logits
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


@pytest.mark.parametrize("own", [99 << 10, 227 << 10])
def test_chunks_are_as_long_as_a_device_has_room_for(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "shared", lambda _: own)
    device, small = torch.device("cuda"), own < tokens.AMPLE
    assert [tokens.block(n, device, 128) for n in (1, 17, 4096)] == [16, 32, 32 if small else 64]
    assert tokens.block(4096, device, 256) == (16 if small else 32)
