"""Changes made together are those made one by one, in as few launches as there are kinds of tensors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import statecache.storage.changes
from statecache.snapshot import Mark, Snapshot
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.storage.changes import Changes, order
from statecache.storage.dense import Dense

# ---- in which order rows move


def every_choice(rows: int) -> Iterator[tuple[int, ...]]:
    return itertools.chain.from_iterable(itertools.product(range(rows), repeat=n) for n in range(1, rows + 1))


def test_rows_end_where_they_belong_and_no_round_reads_what_it_writes() -> None:
    for choice in [*every_choice(4), (1, 2, 3, 4, 0), (4, 3, 2, 1, 0), (2, 0, 1, 4, 5, 3), (1, 2, 3, 4, 5, 5)]:
        aside, first, then = order(choice)
        held = dict(enumerate(range(6)))
        kept = {row: held[row] for row in aside}
        for pairs in (first, then):
            assert not {to for to, _ in pairs} & {row for _, row in pairs if row not in kept}, choice
            held |= {to: kept.get(row, held[row]) for to, row in pairs}
        assert tuple(held[n] for n in range(len(choice))) == choice


@pytest.mark.parametrize(
    ("choice", "aside"),
    [
        ((0, 1, 2), 0),
        ((2, 2, 2), 0),
        ((0, 0, 1), 0),
        ((1, 2, 2), 0),
        ((1, 0), 1),
        ((1, 2, 0), 2),
        ((3, 2, 1, 0), 2),
        ((1, 2, 3, 0), 2),
    ],
)
def test_at_most_half_of_the_rows_that_trade_places_are_kept_aside(choice: tuple[int, ...], aside: int) -> None:
    assert len(order(choice)[0]) == aside


def test_rows_that_stay_are_not_touched() -> None:
    assert order([0, 1, 5, 3]) == ([], [(2, 5)], [])


# ---- what is made of them


@pytest.fixture(params=[(1 << 23, 1 << 28, 512), (64, 1, 3), (0, 100, 1)], ids=["together", "some", "each alone"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip(("ALONE", "ASIDE", "MANY"), request.param, strict=True):
        monkeypatch.setattr(statecache.storage.changes, name, size)


def several() -> list[Tensor]:
    """Tensors of several dtypes and sizes, and views that are not in one piece."""
    made = [torch.randn(4, 3), torch.randn(4, 2, 5), torch.randn(4, 7).bfloat16(), torch.arange(40).view(4, 10)]
    return [*made, torch.randn(4, 6, 5)[:, 2:4], torch.randn(2, 4, 3).transpose(0, 1), torch.randn(4, 0)]


@pytest.mark.usefixtures("sizes")
def test_copies_and_zeros_of_any_tensors() -> None:
    changes, tensors, others = Changes(), several(), several()
    was = [t.clone() for t in tensors]
    cloned = [changes.clone(t) for t in tensors]
    for t in others:
        changes.zero(t, [1, 2])
    with Launches():
        changes.make()
    assert all(map(torch.equal, cloned, was)) and all(map(torch.equal, tensors, was))
    assert all(not t[1:3].any() and t[0].any() and t[3].any() for t in others if t.numel())
    for t, what in zip(tensors, others, strict=True):
        changes.copy(t, what)
    changes.copy(cloned[0], was[0].double().mul(2))  # of another dtype
    changes.zero(cloned[1], [])
    changes.copy(cloned[0][:0], was[0], [])
    assert all(map(torch.equal, tensors, was)), "nothing changes before make()"
    with Launches():
        changes.make()
    assert all(map(torch.equal, tensors, others)) and torch.equal(cloned[0], 2 * was[0])
    with Launches():
        changes.make()
    assert torch.equal(cloned[0], 2 * was[0]), "what was made is over"
    assert torch.equal(cloned[1], was[1]), "no rows are not all"


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("rows", [(1, 0, 2, 3), (3, 2, 1, 0), (1, 2, 3, 0), (2, 2), (3, 0, 1), (0, 1, 2, 3)])
def test_rows_move_in_place(rows: tuple[int, ...]) -> None:
    changes, tensors = Changes(), several()
    was = [t.clone() for t in tensors]
    for t in tensors:
        changes.take(t, rows)
    with Launches():
        changes.make()
    for t, before in zip(tensors, was, strict=True):
        assert torch.equal(t[: len(rows)], before[list(rows)]) and torch.equal(t[len(rows) :], before[len(rows) :])


@pytest.mark.parametrize("room", [1 << 28, 200], ids=["at once", "a few at a time"])
def test_no_more_is_kept_aside_at_once_than_there_is_room_for(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.storage.changes, "ASIDE", room)
    changes, tensors = Changes(), [torch.randn(2, 25) for _ in range(6)]  # of each, 100 bytes aside
    for t in tensors:
        changes.take(t, (1, 0))
    with Launches() as seen:
        changes.make()
    assert seen.by["_foreach_copy_"] == 3 * (1 if room > 200 else 3)


@pytest.mark.parametrize(("many", "calls", "moves"), [(512, 1, 3), (6, 5, 3 * 5), (1, 10, 3 * 10)])
def test_no_more_pieces_are_alive_at_once_than_are_quicker(
    many: int, calls: int, moves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statecache.storage.changes, "MANY", many)
    changes, held = Changes(), [torch.randn(4, 5) for _ in range(10)]
    picked = [torch.empty(3, 5) for _ in held]
    for to, what in zip(picked, held, strict=True):
        changes.copy(to, what, [2, 0, 0])
    with Launches() as seen:
        changes.make()
    assert seen.by == {"_foreach_copy_": calls}
    assert all(torch.equal(to, what[[2, 0, 0]]) for to, what in zip(picked, held, strict=True))
    was = [t.clone() for t in held]
    for t in held:
        changes.take(t, (1, 0))
    with Launches() as seen:
        changes.make()
    assert seen.by == {"_foreach_copy_": moves}
    assert all(torch.equal(t, before[[1, 0, 2, 3]]) for t, before in zip(held, was, strict=True))


@pytest.mark.parametrize("used", [2, 9])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_rows_of_a_long_store_move_their_first_slots(axis: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.storage.dense, "WHOLE", 0)
    store = Dense(3, 9, (2, 4), axis=axis, dtype=torch.float32, device=torch.device("cpu"), static=True)
    store.data.normal_()
    was, changes = store.data.clone(), Changes()
    store.taken([2, 0], used, changes)(changes)
    with Launches() as seen:
        changes.make()
    slots = was.narrow(axis, 0, used)
    assert torch.equal(store.data.narrow(axis, 0, used)[:2], slots[[2, 0]])
    assert torch.equal(store.data.narrow(axis, used, 9 - used), was.narrow(axis, used, 9 - used))
    assert torch.equal(store.data[2], was[2])
    assert seen.by == {"_foreach_copy_": 2}, "two rounds, since every row, or head of it, is in one piece"


# ---- launches of a whole cache


class Launches(TorchDispatchMode):
    """Counts the operators of its block that launch something on a GPU: no views, no allocations."""

    FREE = ("empty", "empty_like", "new_empty", "lift_fresh", "detach", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_foreach"):
            each = [t for tensors in args for t in tensors]
            assert all(t.is_contiguous() and t.device == each[0].device for t in each), "torch copies them one by one"
            assert all(len({t.dtype for t in tensors}) == 1 for tensors in args), "torch copies them one by one"
            assert all(len({t.stride() for t in alike}) == 1 for alike in zip(*args, strict=True)), "and these, too"
        if not func.is_view and name not in self.FREE:
            self.by[name] += 1
        return func(*args, **(kwargs or {}))


def many(layers: int, capacity: int | None, logs: bool, store: str = "dense") -> States:
    """States of every kind in each layer, three rows of eight tokens each, in two dtypes."""
    attends = (StateSpec("key", "attention", (2, 8), axis=1), StateSpec("slide", "sliding", (2, 8), 5, axis=1))
    conv = StateSpec("conv", "conv", (4,), 3, axis=1)
    recurrent = StateSpec("recurrent", "recurrent", (2, 8), 1, dtype=torch.float32, leased=True)
    log = tuple(StateSpec(name, "log", (8,), 0) for name in ("inputs", "gates"))
    spec = ModelSpec(tuple(LayerSpec(n, "test", (*attends, conv, recurrent), log=log) for n in range(layers)))
    spec = spec.with_logs() if logs else spec
    of = States(spec, capacity=capacity, slack=4, rows=3, dtype=torch.bfloat16, device="cpu", store=store)
    for row in range(3):
        of.admit(row, Snapshot(8, {}, of.made_for))
    for state in of.values():
        for buffer in state.buffers():
            buffer.random_(0, 9)
    return of


OPERATIONS: dict[str, tuple[Callable[[States, Mark], object], int]] = {  # and how many launches each may take
    "checkpoint": (lambda s, mark: s.checkpoint(), 3),  # of two dtypes, and of the clock
    "restore": (lambda s, mark: s.restore(mark), 4),
    "reset of some rows": (lambda s, mark: s.reset([0, 2]), 4),
    "reset": (lambda s, mark: s.reset(), 4),
    "gather that trades places": (lambda s, mark: s.gather([2, 1, 0]), 8),
    "gather that repeats": (lambda s, mark: s.gather([0, 0, 0]), 4),
}


@pytest.mark.parametrize("logs", [False, True], ids=["copies", "logs"])
@pytest.mark.parametrize("capacity", [None, 16], ids=["growing", "fixed"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_deep_model_takes_no_more_launches_than_a_shallow_one(
    operation: str, capacity: int | None, logs: bool
) -> None:
    run, most = OPERATIONS[operation]
    for layers in (1, 2, 24):
        of = many(layers, capacity, logs)
        mark = of.checkpoint()
        with Launches() as seen:
            run(of, mark)
        assert seen.by.total() <= most, dict(seen.by)


def test_a_gather_that_changes_nothing_moves_nothing() -> None:
    of = many(24, 16, logs=True)
    with Launches() as seen:
        of.gather([0, 1, 2])
    assert seen.by == {"index_select": 1, "copy_": 1}, "of the clock alone"


@pytest.mark.parametrize("store", ["paged", "int8"])
def test_rows_of_a_snapshot_are_numbered_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For stores that are not one tensor: what lands in all of them lands at the same places."""
    uploads, make = 0, torch.tensor

    def counted(*args: Any, **options: Any) -> Tensor:
        nonlocal uploads
        uploads += 1
        return make(*args, **options)

    of = many(24, 16, logs=False, store=store)
    of["23.key"].store.write(slice(0, 16), torch.randn(3, 2, 16, 8).bfloat16())
    value = of.snapshot(0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", counted)
        of.admit(1, value)
    assert 0 < uploads <= 3, "one for each number of entries: of keys, of the window, of a state"
    assert torch.equal(of.snapshot(1).entries["23.key"], value.entries["23.key"])
