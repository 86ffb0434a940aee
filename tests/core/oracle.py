"""A cache as lists, and an interpreter that runs one schedule on it and on the rings side by side.

An entry is a number that no other entry of the test has, so that any mix-up shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

WINDOW, SLACK, CAPACITY, ROWS = 5, 3, 24, 3
Op = tuple[str, int, tuple[int, ...]]  # what, a number, a number a row: each is brought into range when it is run


@dataclass
class Lists:
    """What rows hold, how far each may go back, and at which lengths a recurrence was copied."""

    rows: list[list[float]]
    floor: list[int] = field(default_factory=list)
    kept: list[set[int]] = field(default_factory=list)
    back: bool = True  # whether rows go back, other than by dropping a round

    def __post_init__(self) -> None:
        self.floor = self.floor or [0] * len(self.rows)
        self.kept = self.kept or [{0} for _ in self.rows]

    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def step(self, new: list[list[float]]) -> None:
        for b, entries in enumerate(new):
            start = len(self.rows[b])
            if entries:
                self.kept[b] = {n for n in self.kept[b] if n <= start} | {start}
            self.rows[b] += entries
            self.floor[b] = max(self.floor[b], len(self.rows[b]) - SLACK)

    def may_forget(self, b: int, n: int, leased: bool) -> bool:
        target = len(self.rows[b]) - n
        return n == 0 or (
            self.back and target >= self.floor[b] and (not leased or target == 0 or target in self.kept[b])
        )

    def forget(self, b: int, n: int) -> None:
        self.rows[b] = self.rows[b][: len(self.rows[b]) - n]

    def gather(self, index: list[int]) -> None:
        for name in ("rows", "floor", "kept"):
            setattr(self, name, [copy.deepcopy(getattr(self, name)[i]) for i in index])


@dataclass
class Subject:
    """One cache under test beside its lists, with the marks taken of it."""

    rings: Any
    lists: Lists
    marks: list[dict[str, Any]] = field(default_factory=list)


def model(core: SimpleNamespace, leased: bool) -> Any:
    """A model with every kind of state; the windows meet and miss powers of two."""
    spec = core.spec.StateSpec
    states = [
        spec("key", "attention", (2, 1), None, axis=1),
        spec("short", "sliding", (2, 1), 2, axis=1),
        spec("key5", "sliding", (2,), WINDOW, axis=0),
        spec("conv", "conv", (2,), 3, axis=1),
        spec("copies", "recurrent", (1, 2), 1),
    ]
    if leased:
        states.append(spec("lease", "recurrent", (2, 2), 1, leased=True))
    logged = core.spec.LayerSpec(
        1,
        "test",
        (spec("recurrent", "recurrent", (1,), 1, dtype=torch.float64, leased=True),),
        log=(
            spec("inputs", "log", (1,), 0, dtype=torch.float64),
            spec("gates", "log", (1,), 0, dtype=torch.float64),
        ),
    )
    return core.spec.ModelSpec((core.spec.LayerSpec(0, "test", tuple(states)), logged)).with_logs()


class Sum:
    """s = 3 s + x mod 10^6 + 3, exact and sensitive to order; its oracle is `total`."""

    inputs, gates, query = ((1,),), ((1,),), (1,)

    def chunk(self, taken: Any, query: Any, state: Any, count: Any = None, at: Any = None) -> Any:
        inputs, gates = taken
        last, outputs, states = state.clone(), [], [state.clone()]
        for t in range(inputs.shape[1]):
            alive = gates[:, t] != 0
            if count is not None:
                alive &= (t < count)[:, None]
            last = torch.where(alive, (3 * last + inputs[:, t]) % 1_000_003, last)
            outputs.append(last * query[:, t])
            states.append(last)
        y = torch.stack(outputs, 1) if outputs else inputs
        marks = None if at is None else torch.stack(states, 1).gather(1, at[..., None])
        return y, last, marks

    def step(self, taken: Any, query: Any, state: Any) -> Any:
        y, last, _ = self.chunk([part[:, None] for part in taken], query[:, None], state)
        state.copy_(last)
        return y[:, 0]

    def fold(self, taken: Any, state: Any, count: Any) -> None:
        state.copy_(self.chunk(taken, torch.ones_like(taken[1]), state, count)[1])


def total(entries: list[float]) -> float:
    s = 0.0
    for x in entries:
        s = (3 * s + x) % 1_000_003
    return s


def run(
    core: SimpleNamespace,
    schedule: list[Op],
    *,
    fixed: bool,
    leased: bool,
    on_device: bool,
    back: bool = True,
    store: str = "dense",
) -> None:
    """Run a schedule and assert after every operation that rings and lists agree.

    on_device: the form of a step that compiled code takes, in which the host knows no length.
    """
    core.ring.FIRST_SLOTS = 3  # so that rings grow several times within a schedule
    rings = core.states.States(
        model(core, leased),
        capacity=CAPACITY if fixed else None,
        slack=SLACK,
        rows=ROWS,
        dtype=torch.float32,
        device="cpu",
        back=back,
        store=core.stores[store],
    )
    recurrence = core.replay.Operators({"1.recurrent": Sum()})
    rings.bind(recurrence)
    subjects = [Subject(rings, Lists([[] for _ in range(ROWS)], back=back))]
    addresses = [b.data_ptr() for b in rings.buffers()]
    fresh = iter(range(1, 10**6))
    for what, number, each in schedule:
        subject = subjects[number % len(subjects)]
        rows = len(subject.lists.rows)
        per_row = [each[b % len(each)] for b in range(rows)]
        if what == "step":
            _step(core, subject, number % 10, None, on_device, fresh)
        elif what == "ragged":
            tokens = number % 10
            _step(core, subject, tokens, [min(n, tokens) for n in per_row], on_device, fresh)
        elif what == "speculate" and leased:  # such a state is overwritten as its model goes
            with core.round.Round(subject.rings, 1):
                with_error(core.errors.StepError, subject.rings.open, 1)
        elif what == "speculate":
            accepted = [n % (number % (SLACK + 1) + 1) for n in per_row]
            _step(core, subject, number % (SLACK + 1), None, on_device, fresh, accepted if number % 5 else [])
        elif what == "rollback":
            _rollback(core, subject, [n % (SLACK + 2) for n in per_row], leased)
        elif what == "reset":
            subject.rings.reset()
            subject.lists = Lists([[] for _ in range(ROWS if fixed else rows)], back=back)
            _stale(subject)
        elif what == "gather":
            room = ROWS if fixed else ROWS + 2
            index = [n % rows for n in per_row[: 1 + number % room]] + [0] * (number % 2 if rows < room else 0)
            subject.rings.gather(torch.tensor(index))
            subject.lists.gather(index)
            _stale(subject)
        elif what == "checkpoint":
            mark = {"mark": subject.rings.checkpoint(), "lists": copy.deepcopy(subject.lists), "stale": False}
            subject.marks.append(mark)
        elif what == "restore" and subject.marks:
            mark = subject.marks[sum(each) % len(subject.marks)]
            if mark["stale"]:
                with_error(core.errors.StaleMarkError, subject.rings.restore, mark["mark"])
            else:
                subject.rings.restore(mark["mark"])
                subject.lists = copy.deepcopy(mark["lists"])
        elif what == "fork" and len(subjects) < 3:
            subjects.append(Subject(subject.rings.fork(), copy.deepcopy(subject.lists)))
        for other in subjects:
            _agree(core, other)
    if fixed:
        assert addresses == [b.data_ptr() for b in rings.buffers()], "a fixed buffer moved"


def _step(
    core: Any,
    s: Subject,
    tokens: int,
    count: list[int] | None,
    on_device: bool,
    fresh: Any,
    accepted: list[int] | None = None,
) -> None:
    """One pass; a speculative round, if there is something `accepted`, which is without a commit if that is empty."""
    rings, rows = s.rings, len(s.lists.rows)
    start = s.lists.lengths()
    taken = [tokens] * rows if count is None else count
    round_ = None
    if accepted is not None:
        if not tokens:
            with_error(core.errors.OptionError, core.round.Round, rings, tokens)
            return
        round_ = core.round.Round(rings, tokens)
        round_.__enter__()
    if rings.capacity is not None and any(n + t > CAPACITY for n, t in zip(start, taken, strict=True)):
        with_error(core.errors.CapacityError, rings.open, tokens, None if count is None else torch.tensor(count))
        if round_ is not None:
            round_.__exit__(None, None, None)
        return
    new = [[float(next(fresh)) for _ in range(n)] for n in taken]
    given = None if count is None else torch.tensor(count)
    compiled = on_device and rings.capacity is not None
    with _as_compiled() if compiled else nullcontext():
        step = rings.open(tokens, given)
        step.write()
    ids = torch.full((rows, tokens), -7.0)  # padding that no state may take in
    for b, entries in enumerate(new):
        ids[b, : len(entries)] = torch.tensor(entries)
    for name in ("key", "short", "key5"):
        ring = rings[f"0.{name}"]
        window = ring.spec.window
        if window is not None and tokens:
            seen = ring.extend(_spread(ids, ring), step)
            for b, row in enumerate(s.lists.rows):
                first = 0 if not ring.wraps else max(0, start[b] - window + 1)
                whole = row + new[b]
                values = _flat(seen, ring)[b]
                for position in range(start[b], len(whole)):
                    for q in range(max(0, position - window + 1), position + 1):
                        assert values[q - first] == whole[q], (name, b, position, q)
        else:
            ring.put(_spread(ids, ring), step)
    for name, n in (("conv", 3), ("copies", 1)):
        ring = rings[f"0.{name}"]
        assert _flat(ring.past(n, step), ring) == [([0.0] * n + row)[len(row) :] for row in s.lists.rows]
        ring.put(_spread(ids, ring), step)
    if "0.lease" in rings:
        lease = rings["0.lease"]
        lease.keep(step)
        last = [entries[-1] if entries else float(lease.entry[b, 0, 0]) for b, entries in enumerate(new)]
        lease.write(torch.tensor(last)[:, None, None].expand_as(lease.entry).clone(), step)
    state, inputs = rings["1.recurrent"], ids[..., None].double()
    log = rings.log("1.recurrent") if rings.back or round_ is not None else None
    ones = torch.ones_like(inputs)
    outputs = core.replay.run(Sum(), (inputs, ones), ones, state, step, log)
    for b, row in enumerate(s.lists.rows):
        want = [total(row + new[b][: t + 1]) for t in range(len(new[b]))]
        assert outputs[b, : len(want), 0].tolist() == want, ("recurrent", b)
    rings.close(step)
    if round_ is not None:
        assert accepted is not None
        if accepted and tokens:
            with_error(core.errors.RowsError, round_.commit, torch.tensor([tokens + 1] * rows))
            with_error(core.errors.StepError, rings.checkpoint)
            round_.commit(torch.tensor(accepted))
            new = [entries[:n] for entries, n in zip(new, accepted, strict=True)]
        else:
            new = [[] for _ in new]
        round_.__exit__(None, None, None)
        taken = [tokens] * rows
    for b in range(rows):  # what a round has written over cannot be gone back to, whatever it keeps
        s.lists.floor[b] = max(s.lists.floor[b], min(start[b] + taken[b] - SLACK, start[b]))
    s.lists.step(new)
    for mark in s.marks:
        below = [n < m and t for n, t, m in zip(start, taken, mark["lists"].lengths(), strict=False)]
        mark["stale"] = mark["stale"] or any(below)


@contextmanager
def _as_compiled() -> Iterator[None]:
    """Have steps opened in the form of compiled code."""
    compiling = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = compiling


def _rollback(core: Any, s: Subject, forget: list[int], leased: bool) -> None:
    forget = [min(n, len(row)) for n, row in zip(forget, s.lists.rows, strict=True)]
    if all(s.lists.may_forget(b, n, leased) for b, n in enumerate(forget)):
        s.rings.rollback(torch.tensor(forget))
        for b, n in enumerate(forget):
            s.lists.forget(b, n)
    else:
        with_error(core.errors.RollbackError, s.rings.rollback, torch.tensor(forget))


def _agree(core: Any, s: Subject) -> None:
    assert s.rings.lengths.tolist() == s.lists.lengths()
    longest = max(s.lists.lengths())
    now = core.step.Step(0, s.rings.clock.lengths, torch.zeros_like(s.rings.clock.lengths))
    for name, n in (("key", longest), ("short", 2), ("key5", WINDOW), ("conv", 3), ("copies", 1)):
        ring = s.rings[f"0.{name}"]
        if n <= ring.capacity:
            want = [([0.0] * n + row)[len(row) :] for row in s.lists.rows]
            assert _flat(ring.past(n, now), ring) == want, name
    if "0.lease" in s.rings:
        entry = s.rings["0.lease"].entry
        assert entry[:, 0, 0].tolist() == entry[:, 1, 1].tolist() == [row[-1] if row else 0.0 for row in s.lists.rows]
    assert s.rings["1.recurrent"].entry[:, 0].tolist() == [total(row) for row in s.lists.rows]


def _stale(s: Subject) -> None:
    for mark in s.marks:
        mark["stale"] = True


def _spread(ids: torch.Tensor, ring: Any) -> torch.Tensor:
    """(B, T) to (B, *D) with time at the ring's axis."""
    shape = [len(ids), *[1] * len(ring.spec.shape)]
    shape.insert(ring.axis, ids.shape[1])
    full = [len(ids), *ring.spec.shape]
    full.insert(ring.axis, ids.shape[1])
    return ids.view(shape).expand(full)


def _flat(entries: torch.Tensor, ring: Any) -> list[list[float]]:
    """The number of each entry, which all its elements must agree on: (B, n)."""
    rows = entries.movedim(ring.axis, 1).flatten(2)
    assert bool((rows == rows[..., :1]).all())
    return rows[..., 0].tolist()


def with_error(error: type[Exception], call: Any, *args: Any) -> None:
    try:
        call(*args)
    except error:
        return
    raise AssertionError(f"{call.__name__} was not refused")
