"""States change as a whole or not at all: what is refused changes nothing, and what is refused says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import Sum
from torch import Tensor

from statecache.errors import CapacityError, ConfigError, OptionError, RowsError, StateCacheError, StepError
from statecache.lease import Lease
from statecache.replay import Operators
from statecache.ring import Ring
from statecache.round import Round
from statecache.snapshot import Marks
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.step import Step
from statecache.storage.changes import Changes
from statecache.storage.coded import Coded
from statecache.storage.dense import Dense
from statecache.storage.paged import Paged

KEY, CONV = StateSpec("key", "attention", (1,), None), StateSpec("conv", "conv", (1,), 3)
LEASE = StateSpec("recurrent", "recurrent", (2,), 1, leased=True)


def states(*specs: StateSpec, rows: int = 3, **options: Any) -> States:
    spec = ModelSpec((LayerSpec(0, "test", specs or (KEY, CONV)),))
    return States(spec, rows=rows, dtype=torch.float32, device="cpu", **options)


def feed(of: States, tokens: int, value: float = 1.0, **choice: Any) -> Step:
    """A whole pass that puts one value everywhere."""
    step = of.open(tokens, **choice)
    rows = of.rows if step.rows is None else len(step.rows)
    for state in of.held.values():
        if isinstance(state, Ring):
            state.put(torch.full((rows, tokens, 1), value), step)
    of.close(step)
    return step


def content(of: States) -> list[list[float]]:
    """All that the cache holds, the clock included."""
    return [buffer.flatten().tolist() for buffer in of.buffers()]


REFUSED: list[tuple[Callable[[States], object], type[StateCacheError], str]] = [
    (lambda s: s.open(2, [1, 3, 2]), StepError, r"row 1 cannot take in 3 tokens: the pass brings 2"),
    (lambda s: s.open(2, [1, -1, 2]), StepError, r"row 1 cannot take in -1 tokens: the pass brings 2"),
    (lambda s: s.open(2, torch.tensor([0, 0, 3])), StepError, r"row 2 cannot take in 3 tokens"),
    (lambda s: s.open(2, [1, 1]), RowsError, r"tokens to take in are one int, or .* not list \(2,\)"),
    (lambda s: s.open(2, torch.tensor([1.0, 1, 1])), RowsError, r"not torch.float32 \(3,\)"),
    (lambda s: s.open(2, rows=[0, 0]), RowsError, r"a pass over rows \[0, 0\] of 3: give each once, in 0\.\.2"),
    (lambda s: s.open(2, rows=[1, 3]), RowsError, r"a pass over rows \[1, 3\] of 3: give each once, in 0\.\.2"),
    (lambda s: s.open(2, rows=[-1]), RowsError, r"a pass over rows \[-1\] of 3"),
    (lambda s: s.open(2, rows=[]), RowsError, r"a pass over rows \[\] of 3"),
    (lambda s: s.open(9, [0, 9, 0]), CapacityError, r"row 1 holds 4 tokens and the step brings 9 more; .*capacity=8"),
    (lambda s: s.open(9, [9], [2]), CapacityError, r"row 2 holds 4 tokens and the step brings 9 more; .*capacity=8"),
    (lambda s: s.gather([0, 3]), RowsError, r"rows \[3\] of 3: give at least one, each in 0\.\.2"),
    (lambda s: s.reset([0, 3]), RowsError, r"rows \[0, 3\] of 3: give at least one, each in 0\.\.2"),
    (lambda s: s.snapshot(3), RowsError, r"rows \[3\] of 3"),
    (lambda s: s.snapshot(0, tokens=[1, 2]), RowsError, r"row 0 holds 4 tokens, not 2"),
    (lambda s: s.admit(3, s.snapshot(0)), RowsError, r"rows \[3\] of 3"),
    (lambda s: s.admit(0, states(KEY).snapshot(0)), ConfigError, r"taken of a cache for another model"),
    (lambda s: s.admit(0, longer(9)), CapacityError, r"the snapshot holds 9 tokens, .* capacity=8"),
    (lambda s: s.admit(2, longer(5, point=True)), RowsError, r"row 2 holds 4 tokens, and the point 5: only a row that"),
]  # fmt: skip


def longer(tokens: int, point: bool = False) -> Any:
    """A row of a growing cache, as a value."""
    other = states()
    feed(other, tokens)
    return other.snapshot(0, point=point)


@pytest.mark.parametrize(("refused", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_is_refused_says_why_and_changes_nothing(
    refused: Callable[[States], object], error: type[StateCacheError], text: str
) -> None:
    of = states(capacity=8, slack=2)
    feed(of, 4)
    before, mark = content(of), of.checkpoint()
    with pytest.raises(error, match=text):
        refused(of)
    assert content(of) == before
    of.restore(mark)
    feed(of, 1)


@pytest.mark.parametrize("capacity", [None, 8])
@pytest.mark.parametrize("store", [Dense, Paged])
def test_a_gather_that_fails_in_the_second_state_has_changed_none(
    capacity: int | None, store: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = states(capacity=capacity, slack=2, store=store)
    feed(of, 4, count=[1, 2, 4])
    before, lengths, prepared = content(of), of.lengths.tolist(), 0
    taken = Ring.taken

    def fails(self: Ring, rows: list[int], length: int, changes: Changes) -> Any:
        nonlocal prepared
        prepared += 1
        if prepared == 2:
            raise MemoryError
        return taken(self, rows, length, changes)

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "taken", fails)
        with pytest.raises(MemoryError):
            of.gather([2, 0])
    assert content(of) == before and of.lengths.tolist() == lengths
    of.gather([2, 0])
    assert of.lengths.tolist() == [4, 1]


def test_a_gather_that_fails_while_it_moves_leaves_nothing_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    of = states(capacity=8, slack=2)
    feed(of, 4)

    def fails(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(of["0.conv"].store, "_move", fails)
        with pytest.raises(MemoryError):
            of.gather([2, 0])
    with pytest.raises(StepError, match="a gather was interrupted, so some states have changed and some have not"):
        of.open(1)
    of.reset()
    feed(of, 1)


def kernel(lease: Lease, step: Step, new: Tensor) -> Tensor:
    """What 2 s + new comes to, in place where the loan says to write."""
    loan = lease.lend(step)
    after = 2 * loan.buffer[:, loan.read] + new
    if loan.write is not None:
        loan.buffer[:, loan.write] = after
    return after


@pytest.mark.parametrize("capacity", [None, 8])
def test_a_kernel_that_updates_what_it_is_lent_does_as_a_write(capacity: int | None) -> None:
    lent, written = (states(LEASE, capacity=capacity, slack=2) for _ in range(2))
    for new in torch.randn(4, 3, 2):
        for of in (lent, written):
            lease, step = of["0.recurrent"], of.open(1)
            assert isinstance(lease, Lease)
            lease.keep(step)
            if of is lent:
                kernel(lease, step, new)
            else:
                lease.write(2 * lease.read(step) + new, step)
            of.close(step)
    for forget in (0, 1, 1):
        for of in (lent, written):
            of.rollback(forget)
        assert torch.equal(lent["0.recurrent"].entry, written["0.recurrent"].entry)  # type: ignore[union-attr]


def test_a_kernel_must_not_write_in_a_round() -> None:
    log = tuple(StateSpec(name, "log", (1,), 0) for name in ("inputs", "gates"))
    recurrent = StateSpec("recurrent", "recurrent", (1,), 1, leased=True)
    spec = ModelSpec((LayerSpec(0, "test", (recurrent,), log=log),)).with_logs()
    of, operators = States(spec, slack=2, rows=1, dtype=torch.float32, device="cpu"), Operators({"0.recurrent": Sum()})
    of.logs.bind(operators)
    lease = of["0.recurrent"]
    assert isinstance(lease, Lease)
    lease.put(torch.ones(1, 1))
    with Round(of, 1):
        step = of.open(1)
        assert lease.lend(step).write is None
        assert kernel(lease, step, torch.ones(1, 1)).item() == 3
        of.close(step)
    assert lease.entry.item() == 1


def test_lending_begins_the_pass() -> None:
    of = states(LEASE)
    lease = of["0.recurrent"]
    assert isinstance(lease, Lease)
    lease.lend(of.open(1))
    with pytest.raises(StepError, match="the last forward pass was interrupted"):
        of.open(1)


def test_a_paged_store_lends_nothing() -> None:
    of = states(LEASE, store=Paged)
    lease = of["0.recurrent"]
    assert isinstance(lease, Lease)
    with pytest.raises(TypeError, match='state "recurrent": a Paged store lends no buffer'):
        lease.lend(of.open(1))
    of.close(of.open(1))  # and nothing had begun


def test_a_row_as_a_value_is_of_its_time() -> None:
    of = states(capacity=8, slack=2)
    feed(of, 4)
    value = of.snapshot(1, tokens=[5, 6, 7, 8])
    feed(of, 1, value=9.0)
    assert (value.length, value.tokens) == (4, (5, 6, 7, 8))
    assert {name: entries.flatten().tolist() for name, entries in value.entries.items()} == {
        "0.key": [1.0] * 4,
        "0.conv": [1.0] * 3,
    }
    assert value.nbytes == 4 * (4 + 3)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_goes_back_to_a_point_and_others_stay(rows: int) -> None:
    of = states(rows=rows)
    feed(of, 4)
    point, whole = of.snapshot(0, point=True), of.snapshot(0)
    assert list(point.entries) == ["0.conv"] and point.nbytes == 4 * 3
    feed(of, 5, value=9.0)
    others = [of.snapshot(row) for row in range(1, rows)]
    for _ in range(2):  # as often as wanted
        of.admit(0, point)
        assert of.lengths.tolist() == [4, *[9] * (rows - 1)]
        for now, then in zip([of.snapshot(row) for row in range(rows)], [whole, *others], strict=True):
            assert all(torch.equal(now.entries[name], entries) for name, entries in then.entries.items())
    assert of.clock is not None and of.clock.known.width == (4 if rows == 1 else 9)
    oracle_of = content(of)
    feed(of, 2, value=7.0, rows=[0])
    assert of.snapshot(0).entries["0.key"].flatten().tolist() == [1.0] * 4 + [7.0] * 2
    assert content(of) != oracle_of


@pytest.mark.parametrize("rows", [None, [0], [0, 2]])
def test_marks_of_rows_that_stand_at_their_ends_are_not_looked_at(
    rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = states(slack=2)
    feed(of, 4)
    marks = [of.checkpoint() for _ in range(100)]
    looks, look = 0, Marks.__iter__

    def counted(self: Marks) -> Any:
        nonlocal looks
        looks += 1
        return look(self)

    monkeypatch.setattr(Marks, "__iter__", counted)
    for _ in range(3):
        feed(of, 1, rows=rows)
    assert looks == 0
    of.restore(marks[0])
    of.rollback(1)
    feed(of, 1)
    assert looks and all(mark.stale for mark in marks)
    looks = 0
    feed(of, 1)
    assert looks == 0, "a stale mark is looked at no more"


def test_the_oracle_sees_a_clock_that_is_wrong() -> None:
    tested = oracle.subject(oracle.core("statecache"), oracle.Form(fixed=True, leased=False))
    oracle.sound(tested)
    tested.states.clock.data[2, 1] += 1
    with pytest.raises(AssertionError):
        oracle.sound(tested)


def test_a_store_is_called_by_its_name() -> None:
    of = states(StateSpec("key", "attention", (2, 8)), store="int8")
    assert isinstance(of["0.key"].store, Coded)
    with pytest.raises(OptionError, match="store='int9': give one of"):
        states(store="int9")


def test_only_an_unseen_round_is_unseen() -> None:
    of = states(KEY, slack=2, rows=2, capacity=4)
    with Round(of, 2, unseen=True) as ahead:
        with pytest.raises(StepError, match="no whole forward pass"):
            ahead.commit(torch.tensor([0, 0]))
        of.close(of.open(2, torch.tensor([2, 1])))
        with pytest.raises(RowsError, match="an unseen round commits a tensor"):
            ahead.commit([2, 0])
        ahead.commit(torch.tensor([2, 0]))
    assert of.lengths.tolist() == [2, 0]
    with Round(of, 2, unseen=True):
        of.close(of.open(2))
    with pytest.raises(CapacityError, match="row 0 holds 2 tokens and the step brings 3 more"):
        of.open(3)


def test_counts_on_the_device_lie_side_by_side() -> None:
    of, apart = states(KEY, rows=2), torch.tensor([[2, 9], [1, 9]])[:, 0]  # a column of what was uploaded at once
    count = of.open(2, [2, 1], counted=apart).count
    assert count is not None and count.is_contiguous() and count.tolist() == [2, 1]
