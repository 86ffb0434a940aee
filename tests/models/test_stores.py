"""A StateCache whose keys and values live in another store than `Dense`."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from contextlib import suppress
from typing import Any

import families
import pytest
import torch

import statecache as sc
from statecache import errors
from statecache.storage.coded import Coded
from statecache.storage.dense import Dense
from statecache.storage.paged import Paged
from statecache.storage.table import STORES

CLASSES = {"dense": Dense, "paged": Paged, "int8": Coded, "fp8": Coded}
NEAR = {"int8": 1 / 64, "fp8": 1 / 14}  # of the largest number that a head keeps of a position
each_store = pytest.mark.parametrize("store", STORES)


@pytest.fixture(scope="module")
def model() -> Any:
    return sc.prepare(families.build("qwen3_5")[0])


def fed(model: Any, store: str, **options: Any) -> sc.StateCache:
    cache = sc.StateCache(model.config.get_text_config(), store=store, slack=4, **options)
    ids = torch.randint(1, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece in ids.split([20, 1, 9], 1):
            model(piece, past_key_values=cache)
    return cache


def agree(store: str, seen: torch.Tensor, exact: torch.Tensor) -> None:
    if STORES[store].exactness == "bitwise":
        assert torch.equal(seen, exact)
    else:
        assert not torch.equal(seen, exact)
        assert bool(((seen - exact).abs() <= NEAR[store] * exact.abs().amax(-1, keepdim=True)).all())


@each_store
def test_keys_and_values_live_in_the_store_and_nothing_else(model: Any, store: str) -> None:
    cache = fed(model, store)
    kinds = {name: type(state.store) for name, state in cache.states.items()}
    assert {n: kind for n, kind in kinds.items() if kind is not Dense} == {
        n: CLASSES[store] for n in kinds if n.endswith(("key", "value")) and store != "dense"
    }
    assert any(n.endswith("key") for n in kinds) and any(n.endswith("recurrent") for n in kinds)


@each_store
@pytest.mark.parametrize("options", [{}, {"capacity": 64}], ids=["growing", "fixed"])
def test_what_the_first_layer_of_attention_holds_is_what_dense_holds(
    model: Any, store: str, options: dict[str, Any]
) -> None:
    cache, exact = fed(model, store, **options), fed(model, "dense", **options)
    layer = next(int(name.partition(".")[0]) for name in cache.states if name.endswith("key"))
    for name in ("keys", "values"):
        agree(store, getattr(cache.layers[layer], name)[..., :30, :], getattr(exact.layers[layer], name)[..., :30, :])


@each_store
@pytest.mark.parametrize("options", [{}, {"capacity": 64}], ids=["growing", "fixed"])
def test_rows_come_and_go_as_they_were_kept(model: Any, store: str, options: dict[str, Any]) -> None:
    cache = fed(model, store, **options)
    name = next(name for name in cache.states if name.endswith("key"))
    layer = int(name.partition(".")[0])

    def held(of: sc.StateCache) -> torch.Tensor:
        keys = of.held(layer, "key")
        assert keys is not None
        return keys[..., : int(of.lengths.max()), :].clone()

    was = held(cache)
    for other in (cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(held(other), was)
    mark = cache.checkpoint()
    cache.rollback(2)
    assert torch.equal(held(cache), was[..., :28, :])
    cache.restore(mark)
    assert torch.equal(held(cache), was)
    value = cache.snapshot(1)
    cache.gather([1, 0])
    assert torch.equal(held(cache), was[[1, 0]])
    cache.reset(rows=[1])
    cache.admit(1, value)  # what was read goes back as it was
    assert torch.equal(held(cache), was[[1, 1]])
    cache.reset()
    assert not cache.lengths.any()


@pytest.mark.parametrize("store", ["paged", "int8", "fp8"])
def test_a_compiled_step_is_one_graph_and_writes_what_an_eager_one_does(model: Any, store: str) -> None:
    cache, eager = (fed(model, store, capacity=64) for _ in range(2))
    addresses = [buffer.data_ptr() for buffer in cache.buffers()]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for n in range(3):
            one = torch.full((2, 1), 7 + n)
            got, want = step(one, past_key_values=cache).logits, model(one, past_key_values=eager).logits
            assert torch.allclose(got, want, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses


def apart(model: Any, pair: list[sc.StateCache], rnd: random.Random, number: int) -> None:
    """One of several things, done with both caches; logits are the same to the bit."""
    rows = pair[0].rows or 0
    what = rnd.choice(["token", "token", "token", "chunk", "some", "counts", "back", "gather", "round", "row"])
    draw = torch.Generator().manual_seed(number)
    tokens = {"chunk": 20, "counts": 3, "round": 4}.get(what, 1)
    ids = torch.randint(1, 60, (rows, tokens), generator=draw)
    counts = [rnd.randint(0, tokens) for _ in range(rows)]
    some = sorted(rnd.sample(range(rows), rnd.randint(1, rows)))
    index = [rnd.randrange(rows) for _ in range(rnd.randint(1, 4))]
    seen = []
    for cache in pair:
        if what == "gather":
            cache.gather(index)
        elif what == "row":
            cache.admit(index[0], cache.snapshot(index[-1]))
        elif what == "back":
            cache.rollback([min(n % 3, length) for n, length in zip(counts, cache.lengths.tolist(), strict=True)])
        elif what == "round":
            with cache.speculate(tokens) as round_:
                seen.append(model(ids, past_key_values=cache).logits)
                round_.commit(counts)
        else:
            if what == "some":
                cache.expect([1] * len(some), some)
            elif what == "counts":
                cache.expect(counts)
            logits = model(ids[some] if what == "some" else ids, past_key_values=cache).logits
            real = [tokens] * rows if what != "counts" else counts
            seen.append(torch.cat([row[:n] for row, n in zip(logits, real, strict=False)]))
    assert not seen or torch.equal(*seen), what


@pytest.mark.parametrize("name", ["qwen3_5", "lfm3"])
@torch.no_grad()
def test_forks_that_go_on_apart_write_what_those_of_dense_do(name: str) -> None:
    model, rnd = sc.prepare(families.build(name)[0]), random.Random(5)
    pairs = [[sc.StateCache(model.config.get_text_config(), store=store, slack=4) for store in ("paged", "dense")]]
    for cache in pairs[0]:
        cache.expect([70, 33])
        model(torch.randint(1, 60, (2, 70), generator=torch.Generator().manual_seed(0)), past_key_values=cache)
    for number in range(120):
        if len(pairs) < 5 and number % 8 == 0:
            pairs.append([cache.fork() for cache in rnd.choice(pairs)])
        elif number % 20 == 19:
            pairs.pop(rnd.randrange(len(pairs)))
        pair = rnd.choice(pairs)
        with suppress(errors.RollbackError):  # of the first, so that the second has not moved either
            apart(model, pair, rnd, number)


@torch.no_grad()
def test_forks_take_the_pages_that_they_write(model: Any) -> None:
    cache = sc.StateCache(model.config.get_text_config(), store="paged")
    model(torch.randint(1, 60, (1, 400)), past_key_values=cache)
    rows = {name: state for name, state in cache.states.items() if name.endswith(("key", "value"))}
    page = sum(state.buffers()[0].nbytes // -(-state.capacity // 16) for state in rows.values())

    def total(*caches: sc.StateCache) -> int:
        held = [of.states[name] for of in caches for name in rows]
        return sum({id(b): b.nbytes for state in held for b in state.buffers()}.values())

    whole, forks = total(cache), [cache.fork() for _ in range(4)]
    assert total(cache, *forks) == whole  # 400 tokens are 25 pages, all full
    assert cache.nbytes().by_kind["attention"] == whole
    for n, fork in enumerate(forks):
        model(torch.full((1, 1), n + 1), past_key_values=fork)
    assert total(cache, *forks) == whole + 4 * page
    model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert total(cache, *forks) == whole + 4 * page
    del fork, forks
    gc.collect()  # a cache and its layers know each other
    assert total(cache) == whole


@torch.no_grad()
def test_what_is_offloaded_shares_no_page(model: Any) -> None:
    config = model.config.get_text_config()
    pair = [sc.StateCache(config, store=store, offload=True, slack=4) for store in ("paged", "dense")]
    for cache in pair:
        model(torch.full((1, 40), 7), past_key_values=cache)
    pairs = [pair, [cache.fork() for cache in pair]]
    pairs[1][0].gather([0, 0, 0])
    pairs[1][1].gather([0, 0, 0])
    for n in range(12):
        for number, (paged, dense) in enumerate(pairs):
            ids = torch.arange(paged.rows or 0)[:, None] + 3 * n + number
            assert torch.equal(*(model(ids, past_key_values=cache).logits for cache in (paged, dense)))
    stores = [state.store for cache, _ in pairs for state in dict.values(cache.states.held)]
    paged = [store for store in stores if isinstance(store, Paged)]
    assert paged and all(store.table is None for store in paged)


def test_int8_halves_what_attention_takes_in_bfloat16(model: Any) -> None:
    sizes = {
        store: sc.StateCache(model.config, store=store, capacity=64, rows=2, dtype="bfloat16", device="cpu")
        .nbytes()
        .by_kind
        for store in ("dense", "int8")
    }
    assert 2 * sizes["int8"]["attention"] == sizes["dense"]["attention"] > 0
    assert all(sizes["int8"][kind] == n for kind, n in sizes["dense"].items() if kind != "attention")


@pytest.mark.parametrize("store", ["int4", "", None, 8, Dense])
def test_a_store_of_no_such_name_is_refused_by_name(store: Any) -> None:
    with pytest.raises(errors.OptionError, match="'dense', 'paged', 'int8', 'fp8'"):
        sc.StateCache(families.build("lfm2")[1], store=store)
