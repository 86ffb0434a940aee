"""Pages that rows and forks share: every store reads what it would alone, and a page is held as often as is counted."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import oracle
import paged_oracle
import pytest
import torch
from torch import Tensor

from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.paged import PAGE, Paged
from statecache.storage.pool import Pool, Table
from statecache.storage.store import Places

CORE = oracle.core("statecache")
H, D = 2, 4
BYTES = H * PAGE * D * 4  # of a page


@pytest.mark.parametrize("seed", range(200))
def test_stores_that_share_pages_read_what_they_would_alone(seed: int) -> None:
    paged_oracle.run(CORE, seed)


def filled(rows: int = 1, slots: int = 4 * PAGE, **options: Any) -> Paged:
    made = Paged(rows, slots, (H, D), axis=2, dtype=torch.float32, device=torch.device("cpu"), **options)
    made.write(slice(0, slots), torch.rand(rows, H, slots, D))
    return made


def read(store: Paged) -> Tensor:
    return store.read(slice(0, store.slots)).clone()


def put(store: Paged, slot: int, value: float = 7.0) -> None:
    store.write(slice(slot, slot + 1), torch.full((store.rows, H, 1, D), value))


def held(*stores: Paged) -> int:
    """Pages that these stores hold, each once."""
    pools = {id(s.table.pool): s.table.pool for s in stores if s.table is not None}
    return sum(pool.pages for pool in pools.values())


def nbytes(*stores: Paged) -> int:
    return sum({id(b): b.nbytes for store in stores for b in store.buffers()}.values())


def take(store: Paged, rows: list[int]) -> None:
    changes = Changes()
    move = store.taken(rows, 4 * PAGE, changes)
    for step in (changes.make, lambda: move(changes), changes.make):
        step()


# ---- what is shared


def test_a_fork_of_full_pages_takes_no_memory() -> None:
    store = filled()
    before = nbytes(store)
    other = store.fork([4 * PAGE])
    assert nbytes(store, other) == before and held(store, other) == 4
    assert torch.equal(read(store), read(other))


def test_a_fork_takes_the_page_that_is_written_next_and_no_other() -> None:
    store = filled()
    before, was = nbytes(store), read(store)
    other = store.fork([2 * PAGE + 3])
    assert nbytes(store, other) == before + BYTES and held(store, other) == 4 + 1
    assert torch.equal(read(other)[:, :, : 2 * PAGE + 3], was[:, :, : 2 * PAGE + 3])


def test_what_was_forked_goes_on_in_order() -> None:
    store = filled()
    forks = [store.fork([2 * PAGE + 3]) for _ in range(3)]
    address = store.read(slice(0, 1)).data_ptr()
    for slot in range(2 * PAGE + 3, 4 * PAGE):
        put(store, slot)
    assert store.read(slice(0, 1)).data_ptr() == address and held(store, *forks) == 4 + 3


def test_pages_are_added_as_they_are_written() -> None:
    store = filled()
    take(store, [0] * 8)
    assert held(store) == 4
    rows = torch.arange(8)[:, None]
    for n, slot in enumerate((0, 1, PAGE, 2 * PAGE + 1), 1):
        store.write(Places(rows[:2], torch.full((2, 1), slot)), torch.rand(2, H, 1, D))
        assert held(store) == 4 + 2 * (1, 1, 2, 3)[n - 1]
    put(store, 0)  # every row's: the two that have it already, and the last of the others, keep theirs
    assert held(store) == 4 + 2 * 3 + 5


def test_blank_pages_are_none() -> None:
    store = filled(rows=2)
    other = store.fork([PAGE, 0])
    store.grow(40 * PAGE)
    other.grow(50 * PAGE)
    assert held(store, other) == 2 * 4
    assert not other.read(slice(PAGE, 50 * PAGE)).any() and other.read(slice(0, 50 * PAGE)).shape[2] == 50 * PAGE
    put(other, 45 * PAGE)
    assert held(store, other) == 2 * 4 + 2


def test_pages_of_a_fork_that_is_dropped_are_used_again() -> None:
    store = filled()
    kept, other = store.fork([4 * PAGE]), store.fork([4 * PAGE])
    for slot in range(0, 4 * PAGE, PAGE):
        put(other, slot)
    most, was = nbytes(store, kept, other), read(kept)
    assert most == (4 + 4) * BYTES
    for _ in range(3):
        other = store.fork([4 * PAGE])
        for slot in range(0, 4 * PAGE, PAGE):
            put(other, slot)
        assert nbytes(store, kept, other) == most and nbytes(store) == nbytes(kept) == 4 * BYTES
    del other
    assert held(store, kept) == 4 and nbytes(store, kept) == 4 * BYTES
    assert torch.equal(read(kept), was)


def test_rows_that_share_nothing_any_more_are_in_order_again() -> None:
    store = filled()
    other = store.fork([2 * PAGE])
    put(other, 0)
    assert other.whole is None
    was = read(other)
    del store
    put(other, 0)
    assert other.whole is not None and other.table is None
    assert torch.equal(read(other), was)
    assert nbytes(other) == 4 * BYTES


def test_rows_that_are_chosen_and_not_repeated_are_copied() -> None:
    store = filled(rows=8)
    was = read(store)
    take(store, [5, 2])
    assert store.table is None and nbytes(store) == 2 * 4 * BYTES and torch.equal(read(store), was[[5, 2]])


@pytest.mark.parametrize("options", [{"shares": False}, {"static": True}])
def test_nothing_is_shared_at_fixed_addresses_or_apart(options: dict[str, Any]) -> None:
    store = filled(3, **options)
    was = read(store)
    other = store.fork([4 * PAGE] * 3)
    take(store, [0, 0, 2])
    assert store.table is None and other.table is None
    assert torch.equal(read(store), was[[0, 0, 2]]) and torch.equal(read(other), was)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))])
def test_copies_have_memory_of_their_own_and_no_more_than_they_need(copied: Callable[[Paged], Paged]) -> None:
    store = filled(rows=3)
    was = read(store)
    first = store.fork([4 * PAGE] * 3)
    take(store, [1])  # a view of a slab that has the others' pages, too
    assert store.whole is not None
    other = copied(store)
    put(other, 0)
    assert torch.equal(read(store), was[[1]]) and torch.equal(read(first), was)
    assert nbytes(other) == 4 * BYTES < nbytes(store)
    assert len(pickle.dumps(store)) < 6 * BYTES
    del first, store


def test_pages_that_go_on_in_the_next_row_are_not_whole() -> None:
    pool = Pool(torch.rand(3, H, 2 * PAGE, D), 2, PAGE)
    table = Table(pool, [[0, 1], [2, 3], [4, 5]])
    assert pool.whole([[1, 2]]) is None and pool.whole([[3, 4]]) is None
    assert [view.shape[1] for view in pool.views([1, 2, 3, -1, -1])] == [PAGE, 2 * PAGE, 2 * PAGE]
    assert pool.whole([[2, 3], [4, 5]]) is not None
    del table


# ---- several forks at once


def test_forks_in_several_threads_write_apart() -> None:
    store = filled(slots=8 * PAGE)
    was, wrong = read(store), []

    def work(other: Paged, number: int) -> None:
        mine = was.clone()
        for n in range(60):
            slot = (number + 5 * n) % (8 * PAGE)
            further = other.fork([8 * PAGE])
            put(other, slot, 100.0 * number + n)
            mine[:, :, slot] = 100.0 * number + n
            if n % 3 == 0:
                other = further if torch.equal(read(further)[:, :, :slot], mine[:, :, :slot]) else other
                mine = read(other)
            if not torch.equal(read(other), mine):
                wrong.append((number, n))

    threads = [threading.Thread(target=work, args=(store.fork([8 * PAGE]), number)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(read(store), was)
    del threads, thread
    gc.collect()
    assert held(store) == 8 and store.table is not None and not store.table.pool.shared


# ---- through states


def states(store: Any, rows: int = 1) -> States:
    key = StateSpec("key", "attention", (H, D), None, axis=1)
    spec = ModelSpec((LayerSpec(0, "test", (key,)),))
    return States(spec, slack=4, rows=rows, dtype=torch.float32, device="cpu", store=store)


def feed(of: States, tokens: int, count: list[int] | None = None, seed: int = 0) -> Tensor:
    step = of.open(tokens, count)
    ring = of["0.key"]
    random = torch.Generator().manual_seed(seed)
    seen = ring.extend(torch.rand(of.rows, H, tokens, D, generator=random), step, exact=True)  # type: ignore[union-attr]
    of.close(step)
    return seen.clone()


def test_forks_and_repeated_rows_of_states_share_all_but_what_they_write() -> None:
    of, exact = states(Paged), states(Dense)
    for each in (of, exact):
        feed(each, 50 * PAGE + 3)
    whole = of.nbytes().by_kind["attention"]
    forks = [(of.fork(), exact.fork()) for _ in range(3)]
    for fork, _ in forks:
        fork.gather([0] * 4)
    all_of = [of, *(fork for fork, _ in forks)]

    def total() -> int:
        return sum({id(b): b.nbytes for each in all_of for b in each["0.key"].buffers()}.values())

    assert total() <= whole + 4 * BYTES  # three pages, and a slab has twice as many as those before it
    for n in range(20):
        for seed, (fork, other) in enumerate(forks):
            other.gather([0] * 4) if not n else None
            count = [1, n % 2, 1, 1] if n > 10 else None
            for each in (fork, other):
                each.rollback([0, 0, n % 3, 0] if n > 5 else 0)
            assert torch.equal(feed(fork, 1, count, 100 * seed + n), feed(other, 1, count, 100 * seed + n))
        assert torch.equal(feed(of, 1, seed=n), feed(exact, 1, seed=n))
    assert total() <= whole + 3 * 4 * 3 * 2 * BYTES


def test_what_rows_write_is_known_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    of = states(Paged, 2)
    feed(of, 3 * PAGE, [40, 20])
    fork = of.fork()
    assert isinstance(fork["0.key"].store, Paged) and fork["0.key"].store.whole is None

    def waits(self: Tensor) -> Any:
        raise AssertionError("what the device alone knows is waited for")

    step = fork.open(3, [3, 1])
    monkeypatch.setattr(Tensor, "tolist", waits)
    fork["0.key"].put(torch.rand(2, H, 3, D), step)
    fork.close(step)


def test_marks_of_what_was_forked_come_back() -> None:
    of = states(Paged, 2)
    feed(of, 30)
    mark, was = of.checkpoint(), feed(of, 1).clone()
    forks = [of.fork() for _ in range(2)]
    of.restore(mark)
    for fork in forks:
        fork.rollback(1)
        feed(fork, 1, seed=5)
    of.restore(mark)
    assert torch.equal(feed(of, 1), was)


def test_a_clone_in_inference_mode_goes_on_outside_of_it() -> None:
    of = states(Paged, 2)
    feed(of, 30)
    with torch.inference_mode():
        fork = of.fork()
        fork.gather([0, 0, 1])
        feed(fork, 1)
        last = fork.fork()
    del of
    feed(last, 3)
    feed(fork, 3)
    del last
    with torch.inference_mode():
        feed(fork, 3)
    feed(fork, 3)
    assert fork.lengths.tolist() == [37 + 3] * 3


def test_compiled_code_leaves_counting_to_the_host() -> None:
    of, exact = states(Paged), states(Dense)
    for each in (of, exact):
        feed(each, 2 * PAGE + 3)
    torch._dynamo.reset()
    forks, compiled = [of.fork(), exact.fork()], torch.compile(feed, backend="eager")
    for fork in forks:
        fork.gather([0, 0])
    for n in range(3):
        assert torch.equal(*(compiled(each, 1, seed=n) for each in forks))
        assert torch.equal(*(compiled(each, 1, seed=n) for each in (of, exact)))
    assert torch.equal(*(feed(each, 1) for each in forks))
