"""A StateCache whose recurrent states are kept in bfloat16: computed on as before, and rounded once a step."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch

import statecache as sc
from statecache import errors
from statecache.storage.dense import Dense
from statecache.storage.rounded import Rounded
from statecache.storage.table import STORES

NAMES = ["qwen3_5", "mamba2", "jamba", "recurrent_gemma", "minimax"]
OPTIONS = [{}, {"capacity": 64}, {"slack": 4}, {"capacity": 64, "slack": 4}, {"slack": 4, "back": False}]
BELOW = 0.03  # of the largest logit


def prepared(name: str) -> Any:
    return sc.prepare(families.build(name)[0])


@pytest.fixture(scope="module")
def model() -> Any:
    return prepared("qwen3_5")


def new_cache(model: Any, **options: Any) -> sc.StateCache:
    return sc.StateCache(model.config.get_text_config(), **{"recurrent_store": "bfloat16", **options})


def fed(model: Any, pieces: tuple[int, ...] = (20, 1, 1, 8), **options: Any) -> tuple[sc.StateCache, torch.Tensor]:
    """A cache of two rows of 30 tokens, and the logits of the last."""
    cache, name = new_cache(model, **options), families.cache_arg(model)
    ids = torch.randint(1, 60, (2, sum(pieces)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece in ids.split(list(pieces), 1):
            logits = model(piece, **{name: cache}).logits[:, -1]
    return cache, logits


def states(cache: sc.StateCache) -> dict[str, torch.Tensor]:
    found = {n: cache.held(int(n.partition(".")[0]), n.partition(".")[2]) for n in cache.states if "recurrent" in n}
    return {n: state.clone() for n, state in found.items() if state is not None}


@pytest.mark.parametrize("name", NAMES)
def test_recurrent_states_alone_are_kept_in_bfloat16_and_logits_stay_near(name: str) -> None:
    model = prepared(name)
    for options in OPTIONS:
        (cache, near), (dense, exact) = fed(model, **options), fed(model, recurrent_store=None, **options)
        kinds = {n: type(state.store) for n, state in cache.states.items()}
        assert kinds == {n: Rounded if n.endswith("recurrent") else Dense for n in kinds}
        sizes, full = cache.nbytes().by_kind, dense.nbytes().by_kind
        assert sizes == {**full, "recurrent": full["recurrent"] // 2} and sizes["recurrent"] > 0
        assert 0 < ((near - exact).abs().max() / exact.abs().max()).item() < BELOW


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_pass_computes_in_float32_and_rounds_what_it_leaves(name: str, tokens: int) -> None:
    model = prepared(name)
    cache, _ = fed(model)
    exact = new_cache(model, recurrent_store=None, rows=2, dtype="float32", device="cpu")
    for row in range(2):
        exact.admit(row, cache.snapshot(row))
    before, ids = states(cache), tiny.draw(2, tokens)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), states(exact).values(), strict=True))
    with torch.no_grad():
        got, want = (model(ids, **{families.cache_arg(model): each}).logits for each in (cache, exact))
    assert torch.equal(got, want)
    for n, state in states(exact).items():
        assert torch.equal(states(cache)[n], state.bfloat16().float()) and not torch.equal(state, before[n])


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_rows_come_and_go_as_they_were_kept(model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    cache, _ = fed(model, **options)
    was = states(cache)

    def same(of: sc.StateCache, rows: list[int] | None = None) -> bool:
        return all(torch.equal(s, was[n] if rows is None else was[n][rows]) for n, s in states(of).items())

    for other in (cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert same(other)
    mark = cache.checkpoint()
    with torch.no_grad():
        model(tiny.draw(2, 2), past_key_values=cache)
    assert not same(cache)
    cache.restore(mark)
    assert same(cache)
    cache.save(tmp_path / "rows")
    for other in ({"capacity": 80}, {"slack": 3}):
        assert same(sc.StateCache.load(tmp_path / "rows", model, recurrent_store="bfloat16", **other))
        assert same(sc.StateCache.load(tmp_path / "rows", model, **other))  # exact from there on
    value = cache.snapshot(1)
    cache.gather([1, 0])
    assert same(cache, [1, 0])
    cache.reset(rows=[1])
    cache.admit(1, value)  # what was read goes back as it was
    assert same(cache, [1, 1])


@pytest.mark.parametrize("options", [{"slack": 6}, {"slack": 6, "capacity": 64}], ids=str)
def test_rolling_back_and_rounds_stay_near_what_was_fed(model: Any, options: dict[str, Any]) -> None:
    ids = tiny.draw(2, 40)
    with torch.no_grad():
        exact = model(ids).logits[:, -1]
        cache = new_cache(model, **options)
        model(ids[:, :20], past_key_values=cache)
        for at in range(20, 30):
            model(ids[:, at : at + 1], past_key_values=cache)
        cache.rollback(5)
        with cache.speculate(6) as tentative:
            model(ids[:, 25:31], past_key_values=cache)
            tentative.commit(4)
        assert cache.lengths.tolist() == [29, 29]
        near = model(ids[:, 29:], past_key_values=cache).logits[:, -1]
    assert 0 < ((near - exact).abs().max() / exact.abs().max()).item() < BELOW


def test_a_compiled_step_is_one_graph_and_writes_what_an_eager_one_does() -> None:
    model = sc.prepare(families.build("mamba2", num_hidden_layers=2)[0])
    name = families.cache_arg(model)
    (cache, _), (eager, _) = (fed(model, capacity=64) for _ in range(2))
    addresses = [buffer.data_ptr() for buffer in cache.buffers()]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in range(3):
            one = torch.full((2, 1), 7 + n)
            got, want = step(one, **{name: cache}).logits, model(one, **{name: eager}).logits
            assert torch.allclose(got, want, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses


def test_offloaded_states_are_what_states_on_the_device_are(model: Any) -> None:
    got, want = fed(model, offload=True)[1], fed(model)[1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_both_kinds_of_states_may_be_rounded(model: Any, store: str) -> None:
    (cache, near), (_, exact) = fed(model, store=store), fed(model, recurrent_store=None)
    assert 0 < ((near - exact).abs().max() / exact.abs().max()).item() < 3 * BELOW
    sizes = cache.nbytes().by_kind
    assert sizes["recurrent"] and sizes["attention"] == fed(model, store=store)[0].nbytes().by_kind["attention"]


# ---- what makes no sense


@pytest.mark.parametrize("store", ["float16", "", 16, torch.bfloat16])
def test_a_store_of_no_such_name_is_refused_by_name(model: Any, store: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"recurrent_store=.*: give None, or 'bfloat16'"):
        new_cache(model, recurrent_store=store)


@pytest.mark.parametrize("store", STORES)
def test_a_store_of_keys_and_values_is_refused_by_name(model: Any, store: str) -> None:
    with pytest.raises(errors.OptionError, match=rf"'{store}': .*; those of store= are for keys and values"):
        new_cache(model, recurrent_store=store)


def test_a_model_without_recurrent_states_is_refused() -> None:
    with pytest.raises(errors.OptionError, match="this lfm2 model has no recurrent state: leave it out"):
        new_cache(prepared("lfm2"))


def test_an_unprepared_model_is_refused_when_its_cache_is_made(nobody_prepared: None) -> None:
    config = families.build("mamba2")[1]
    with pytest.raises(errors.OptionError, match=r"a mamba2 model as it is overwrites the states .*prepare"):
        sc.StateCache(config, recurrent_store="bfloat16")


def test_an_unprepared_model_beside_a_prepared_one_is_refused_before_it_writes(model: Any) -> None:
    plain, cache = families.build("qwen3_5")[0], new_cache(model)
    with (
        pytest.raises(errors.OptionError, match="a qwen3_5_text model as it is overwrites the states"),
        torch.no_grad(),
    ):
        plain(tiny.draw(2, 3), **{families.cache_arg(plain): cache})
    assert cache.rows is None
    with torch.no_grad():
        model(tiny.draw(2, 3), past_key_values=cache)
    assert cache.lengths.tolist() == [3, 3]
