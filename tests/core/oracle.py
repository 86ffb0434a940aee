"""A cache as lists, and an interpreter that runs one schedule on it and on the states side by side.

An entry is a number that no other entry of the test has, so that any mix-up shows.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

WINDOW, SLACK, CAPACITY, ROWS = 5, 3, 24, 3
SUBJECTS = 4  # caches that one schedule has, at most
Op = tuple[str, int, tuple[int, ...]]  # what, a number, a number a row: each is brought into range when it is run

OFTEN = {  # every operation, and how often chance takes it
    "step": 5,  # a pass over all rows
    "ragged": 2,  # of which each takes in as many tokens as it likes
    "rows": 3,  # a pass over some rows only
    "speculate": 3,
    "rollback": 4,
    "checkpoint": 1,
    "restore": 2,
    "gather": 1,
    "reset": 1,
    "reset_rows": 1,
    "admit": 2,  # a row's states as a value, into a row of this cache or of another
    "fork": 1,
    "interrupt": 1,  # a pass or a rollback that ends half-way
}
WHAT = [what for what, often in OFTEN.items() for _ in range(often)]
ALL = [*WHAT, "point"]  # a row goes back, after a pass, to what it was


def core(package: str) -> SimpleNamespace:
    """The core, of statecache itself or of a mutant that was loaded under another name."""
    names = ("clock", "errors", "offload", "replay", "ring", "rotary", "round", "spec", "states", "step")
    names += ("storage.dense", "storage.paged", "storage.coded", "storage.rounded", "storage.store", "storage.changes")
    names += ("storage.table", "storage.at_rest")
    found = {name: importlib.import_module(f"{package}.{name}") for name in names}
    found["dense"] = found.pop("storage.dense")
    stores = {"dense": found["dense"].Dense, "paged": found.pop("storage.paged").Paged}
    coded, rounded = found.pop("storage.coded"), found.pop("storage.rounded")
    for name in ("store", "changes", "table", "at_rest"):
        found[name] = found.pop(f"storage.{name}")
    stores |= {"coded": partial(coded.Coded, Exact()), "rounded": partial(rounded.Rounded, torch.float64)}
    return SimpleNamespace(**found, coded=coded, stores=stores)


class Exact:
    """A code that rounds nothing: stores of codes are held to the lists by it, as those that round cannot be."""

    def width(self, numbers: int) -> int:
        return 8 * numbers

    def encode(self, runs: torch.Tensor) -> torch.Tensor:
        return _packed(runs.double()).view(torch.int8)

    def decode(self, codes: torch.Tensor, numbers: int) -> torch.Tensor:
        return _packed(codes).view(torch.float64)


def _packed(x: torch.Tensor) -> torch.Tensor:
    """A copy with the last axis at stride 1, which `contiguous` does not promise where it has one number."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Form:
    """What kind of cache runs a schedule.

    leased: a state of it is overwritten in place and copied. on_device: a step takes the form that compiled code has,
    in which the host knows no length. lazy: nothing is allocated before the first write. store: where entries live;
    "offload": in host memory, one layer at a time on the device. attention: the window of its widest layer, 0 for none:
    then rows can be longer than the capacity.
    """

    fixed: bool
    leased: bool
    on_device: bool = False
    back: bool = True
    lazy: bool = False
    store: str = "dense"
    attention: int | None = None
    slack: int = SLACK

    @property
    def longest(self) -> float:
        """The longest that a row can get."""
        return CAPACITY if self.fixed and self.attention != 0 else float("inf")

    def beside(self) -> Form:
        """Another kind, which a row's states can move to."""
        other = {"dense": "paged", "paged": "coded", "coded": "rounded", "rounded": "dense", "offload": "paged"}[
            self.store
        ]
        return replace(self, fixed=not self.fixed, back=True, store=other, slack=self.slack + 2)


@dataclass
class Lists:
    """What rows hold, how far each may go back, and at which lengths a recurrence was copied."""

    rows: list[list[float]]
    slack: int
    back: bool = True  # whether rows go back, other than by dropping a round
    floor: list[int] = field(default_factory=list)
    kept: list[set[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.floor = self.floor or [0] * len(self.rows)
        self.kept = self.kept or [{0} for _ in self.rows]

    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def step(self, new: list[list[float]], written: list[int]) -> None:
        """Each row takes in `new` of the entries that were `written`; what these lie over cannot be gone back to."""
        for b, entries in enumerate(new):
            start = len(self.rows[b])
            if entries:
                self.kept[b] = {n for n in self.kept[b] if n <= start} | {start}
            self.rows[b] += entries
            self.floor[b] = max(self.floor[b], min(start + written[b] - self.slack, len(self.rows[b])))

    def may_forget(self, b: int, n: int, leased: bool) -> bool:
        target = len(self.rows[b]) - n
        return n == 0 or (
            self.back and target >= self.floor[b] and (not leased or target == 0 or target in self.kept[b])
        )

    def forget(self, b: int, n: int) -> None:
        self.rows[b] = self.rows[b][: len(self.rows[b]) - n]

    def become(self, b: int, entries: list[float]) -> None:
        """A row holds other entries, and cannot go back before their end."""
        self.rows[b], self.floor[b], self.kept[b] = list(entries), len(entries), set()

    def gather(self, index: list[int]) -> None:
        for name in ("rows", "floor", "kept"):
            setattr(self, name, [copy.deepcopy(getattr(self, name)[i]) for i in index])


@dataclass
class Subject:
    """One cache under test beside its lists, with the marks taken of it."""

    states: Any
    lists: Lists
    form: Form
    operators: Any  # a cache does not keep them alive
    marks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[list[float]]:
        return self.lists.rows

    def empty(self) -> None:
        rows = ROWS if self.form.fixed else len(self.rows)
        self.lists = Lists([[] for _ in range(rows)], self.form.slack, self.form.back)
        self.all_stale()

    def all_stale(self) -> None:
        for mark in self.marks:
            mark["stale"] = True

    def written(self, starts: list[int], taken: list[int]) -> None:
        """Rows were written from `starts` on, those that took anything in."""
        for mark in self.marks:
            below = [n < m and t for n, t, m in zip(starts, taken, mark["lists"].lengths(), strict=False)]
            mark["stale"] = mark["stale"] or any(below)

    def state(self, name: str, tokens: int = 0) -> Any:
        """A state by name, allocated if this is its first use."""
        if name in self.states:
            return self.states[name]
        return self.states.allocate(name, torch.float32, torch.device("cpu"), tokens)


@dataclass(frozen=True)
class Feed:
    """A pass: its columns, the rows it is over, how many tokens each takes in, and how many a round keeps of them.

    rows, count: None for all. kept: None outside a round; empty for a round without a commit. unseen: a round of which
    the host is to know nothing.
    """

    tokens: int
    rows: list[int] | None = None
    count: list[int] | None = None
    kept: list[int] | None = None
    unseen: bool = False


def model(core: SimpleNamespace, form: Form) -> Any:
    """A model with every kind of state; the windows meet and miss powers of two."""
    spec = core.spec.StateSpec
    states = [
        spec("short", "sliding", (2, 1), 2, axis=1),
        spec("key5", "sliding", (2,), WINDOW, axis=0),
        spec("conv", "conv", (2,), 3, axis=1),
        spec("copies", "recurrent", (1, 2), 1),
    ]
    if form.attention != 0:
        kind = "attention" if form.attention is None else "sliding"
        states.append(spec("key", kind, (2, 1), form.attention, axis=1))
    if form.leased:
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


class Interruption(Exception):
    """What ends an operation half-way."""


class Sum:
    """s = 3 s + x mod 10^6 + 3, exact and sensitive to order; its oracle is `total`."""

    inputs, gates, query = ((1,),), ((1,),), (1,)

    def __init__(self) -> None:
        self.fails = False

    def chunk(self, taken: Any, query: Any, state: Any, count: Any = None, at: Any = None) -> Any:
        if self.fails:
            raise Interruption
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


def run(core: SimpleNamespace, schedule: list[Op], form: Form) -> None:
    """Run a schedule and assert after every operation that states and lists agree."""
    core.offload.AHEAD = False  # two layers would both stay
    core.offload.SMALL = 0  # all are small here
    core.ring.FIRST_SLOTS = 3  # so that rings grow several times within a schedule
    core.dense.WHOLE, core.changes.ALONE = 64, 100  # so that each has states on either side
    core.changes.ASIDE, core.changes.MANY = 64, 4
    subjects = [subject(core, form)]
    first = subjects[0].states
    addresses = [b.data_ptr() for b in first.buffers()]
    fresh = iter(range(1, 10**6))
    for what, number, each in schedule:
        s = subjects[number % len(subjects)]
        per_row = [each[b % len(each)] for b in range(len(s.rows))]
        some = list(dict.fromkeys(n % len(per_row) for n in per_row))[: 1 + number % 2]
        tokens = number % 10
        if what == "step":
            _step(core, s, Feed(tokens), fresh)
        elif what == "ragged":
            _step(core, s, Feed(tokens, count=[min(n, tokens) for n in per_row]), fresh)
        elif what == "rows":
            count = [min(n, tokens) for n in each[: len(some)]] if len(each) >= len(some) else None
            _step(core, s, Feed(tokens, some, count), fresh)
        elif what == "speculate":
            _speculate(core, s, number, some, per_row, fresh)
        elif what == "reset":
            s.states.reset()
            s.empty()
        elif what == "checkpoint":
            mark = {"mark": s.states.checkpoint(), "lists": copy.deepcopy(s.lists), "stale": False}
            s.marks.append(mark)
        elif what == "restore" and s.marks:
            _restore(core, s, s.marks[sum(each) % len(s.marks)])
        elif what == "fork" and len(subjects) < SUBJECTS:
            states = s.states.fork() if number % 3 else copy.deepcopy(s.states)  # which does not know what steps it
            other = replace(s, states=states, lists=copy.deepcopy(s.lists), marks=[])
            subjects.append(other)
        elif s.states.clock is None:
            pass  # what follows needs rows
        elif what == "rollback":
            _rollback(core, s, [n % (s.form.slack + 2) for n in per_row])
        elif what == "gather":
            _gather(s, number, per_row)
        elif what == "reset_rows":
            s.states.reset(some)
            for b in some:
                s.lists.become(b, [])
            s.all_stale()
        elif what == "admit":
            place = sum(each) % min(len(subjects) + 1, SUBJECTS)
            if place == len(subjects):
                subjects.append(subject(core, s.form.beside()))
            _admit(core, s, each[0] % len(s.rows), subjects[place], each[-1])
        elif what == "point":
            _point(core, s, each[0] % len(s.rows), tokens, fresh)
        elif what == "interrupt":
            _interrupt(core, s, number, each)
        for s in subjects:
            _agree(core, s)
            sound(s)
    if form.fixed and not form.lazy:
        assert addresses == [b.data_ptr() for b in first.buffers()], "a fixed buffer moved"


def subject(core: SimpleNamespace, form: Form) -> Subject:
    where = {} if form.lazy else {"rows": ROWS, "dtype": torch.float32, "device": "cpu"}
    states = core.states.States(
        model(core, form),
        capacity=CAPACITY if form.fixed else None,
        slack=form.slack,
        back=form.back,
        store=core.stores.get(form.store, core.stores["dense"]),
        offload=form.store == "offload",
        **where,
    )
    operators = core.replay.Operators({"1.recurrent": Sum()})
    states.logs.bind(operators)
    return Subject(states, Lists([[] for _ in range(ROWS)], form.slack, form.back), form, operators)


# ---- passes


def _step(core: SimpleNamespace, s: Subject, feed: Feed, fresh: Iterator[int]) -> None:
    """One pass, in a speculative round where the feed keeps only some of it."""
    states, tokens, lengths = s.states, feed.tokens, s.lists.lengths()
    chosen = list(range(len(s.rows))) if feed.rows is None else feed.rows
    taken = [tokens] * len(chosen) if feed.count is None else feed.count
    before = [s.rows[b] for b in chosen]
    over = any(len(row) + n > s.form.longest for row, n in zip(before, taken, strict=True))
    unseen = feed.unseen and s.form.fixed and not over
    states.clock_for(len(s.rows), torch.device("cpu"))
    round_ = None
    if feed.kept is not None:
        round_ = core.round.Round(states, tokens, unseen=unseen)
        round_.__enter__()
        with_error(core.errors.StepError, states.checkpoint)
    compiled = s.form.on_device and s.form.fixed
    given = None if feed.count is None else torch.tensor(feed.count)
    if over and not (compiled and round_ is None):
        with_error(core.errors.CapacityError, states.open, tokens, given, feed.rows)
        if round_ is not None:
            round_.__exit__(None, None, None)
        return
    new = [[float(next(fresh)) for _ in range(n)] for n in taken]
    with _as_compiled() if compiled else nullcontext():
        step = states.open(tokens, given, feed.rows, operators=s.operators)
        step.write()
    _layers(core, s, step, before, new, over)
    states.close(step)
    kept = new
    if round_ is not None:
        kept = _end(core, states, round_, feed, new, unseen)
    written, entries = [0] * len(s.rows), [[] for _ in s.rows]
    for b, n, each in zip(chosen, taken, kept, strict=True):
        written[b], entries[b] = n, each
    if over:
        s.written(lengths, [min(n, int(s.form.longest) - length) for n, length in zip(written, lengths, strict=True)])
        for refused in (states.checkpoint, lambda: states.open(1), lambda: states.gather([0])):
            with_error(core.errors.CapacityError, refused)
        _way_out(core, s, tokens)
        return
    # a compiled round says nothing of its rows: all of them count as written
    s.written(lengths, [1] * len(s.rows) if (compiled or unseen) and round_ is not None else written)
    s.lists.step(entries, written)


def _layers(
    core: SimpleNamespace, s: Subject, step: Any, before: list[list[float]], new: list[list[float]], over: bool
) -> None:
    """What the layers of a model do in a pass over rows that hold `before` and take in `new`, and see of it."""
    ids = torch.full((len(new), step.tokens), -7.0)  # padding that no state may take in
    for b, entries in enumerate(new):
        ids[b, : len(entries)] = torch.tensor(entries)
    whole = [row + entries for row, entries in zip(before, new, strict=True)]
    for name in ("short", "key", "key5"):
        if name == "key" and s.form.attention == 0:
            continue
        ring = s.state(f"0.{name}", step.tokens)
        window = ring.spec.window
        if not step.tokens:
            ring.put(_spread(ids, ring), step)
            continue
        seen = _flat(ring.extend(_spread(ids, ring), step), ring)
        for b, row in enumerate(before if not over else ()):
            if window is None:
                assert seen[b][: len(whole[b])] == whole[b], (name, b)
                continue
            first = 0 if not ring.wraps else max(0, len(row) - window + 1)
            for position in range(len(row), len(whole[b])):
                for q in range(max(0, position - window + 1), position + 1):
                    assert seen[b][q - first] == whole[b][q], (name, b, position, q)
    for name, n in (("conv", 3), ("copies", 1)):
        ring = s.state(f"0.{name}", step.tokens)
        assert _flat(ring.past(n, step), ring) == _last(before, n), name
        ring.put(_spread(ids, ring), step)
    if s.form.leased:
        lease = s.state("0.lease")
        lease.keep(step)
        last = lease.read(step).clone()
        for b, entries in enumerate(new):
            if entries:
                last[b] = entries[-1]
        lease.write(last, step)
    state, inputs = s.state("1.recurrent"), ids[..., None].double()
    for name in ("1.inputs", "1.gates"):
        s.state(name, step.tokens)
    log = s.states.logs["1.recurrent"] if s.form.back or step.tentative else None
    ones = torch.ones_like(inputs)
    outputs = core.replay.run(Sum(), (inputs, ones), ones, state, step, log)
    for b, row in enumerate(before):
        want = [total(row + new[b][: t + 1]) for t in range(len(new[b]))]
        assert outputs[b, : len(want), 0].tolist() == want, ("recurrent", b)


def _end(
    core: SimpleNamespace, states: Any, round_: Any, feed: Feed, new: list[list[float]], unseen: bool
) -> list[list[float]]:
    """End a round, and give what it keeps of the new entries."""
    kept = [[] for _ in new]
    with_error(core.errors.StepError, states.checkpoint)
    with_error(core.errors.StepError, lambda: states.open(1))
    if feed.kept and unseen:
        for wrong in (feed.kept, torch.tensor([1] * (len(new) + 1))):
            with_error(core.errors.RowsError, round_.commit, wrong)
        whole = [n == len(entries) for n, entries in zip(feed.kept, new, strict=True)]
        round_.commit(torch.tensor([n + 3 * all_ for n, all_ in zip(feed.kept, whole, strict=True)]))  # clamped
    elif feed.kept:
        with_error(core.errors.RowsError, round_.commit, torch.tensor([feed.tokens + 1] * len(new)))
        round_.commit(torch.tensor(feed.kept))
    if feed.kept:
        kept = [entries[:n] for entries, n in zip(new, feed.kept, strict=True)]
    round_.__exit__(None, None, None)
    return kept


def _speculate(
    core: SimpleNamespace, s: Subject, number: int, some: list[int], per_row: list[int], fresh: Iterator[int]
) -> None:
    tokens = number % (s.form.slack + 1)
    with_error(core.errors.SlackError, core.round.Round, s.states, s.form.slack + 1)
    if not tokens:
        with_error(core.errors.OptionError, core.round.Round, s.states, tokens)
        return
    if s.form.leased:  # such a state is overwritten as its model goes
        s.states.clock_for(len(s.rows), torch.device("cpu"))
        with core.round.Round(s.states, tokens):
            with_error(core.errors.StepError, s.states.open, tokens)
        return
    rows = some if number % 3 == 0 else None
    of = len(s.rows) if rows is None else len(rows)
    count = [min(n, tokens) for n in per_row[:of]] if per_row[0] % 2 else None
    kept = [n % (m + 1) for n, m in zip(reversed(per_row[:of]), count or [tokens] * of, strict=True)]
    _step(core, s, Feed(tokens, rows, count, kept if number % 5 else [], unseen=number % 7 > 3), fresh)


@contextmanager
def _as_compiled() -> Iterator[None]:
    """Have steps opened in the form of compiled code."""
    compiling = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = compiling


# ---- between passes


def _restore(core: SimpleNamespace, s: Subject, mark: dict[str, Any]) -> None:
    if mark["stale"]:
        with_error(core.errors.StaleMarkError, s.states.restore, mark["mark"])
    else:
        s.states.restore(mark["mark"])
        s.lists = copy.deepcopy(mark["lists"])


def _rollback(core: SimpleNamespace, s: Subject, forget: list[int]) -> None:
    forget = [min(n, len(row)) for n, row in zip(forget, s.rows, strict=True)]
    if all(s.lists.may_forget(b, n, s.form.leased) for b, n in enumerate(forget)):
        s.states.rollback(torch.tensor(forget))
        for b, n in enumerate(forget):
            s.lists.forget(b, n)
    else:
        with_error(core.errors.RollbackError, s.states.rollback, torch.tensor(forget))


def _gather(s: Subject, number: int, per_row: list[int]) -> None:
    rows, room = len(s.rows), ROWS if s.form.fixed else ROWS + 2
    index = [n % rows for n in per_row[: 1 + number % room]] + [0] * (number % 2 if rows < room else 0)
    s.states.gather(torch.tensor(index))
    s.lists.gather(index)
    s.all_stale()


def _admit(core: SimpleNamespace, source: Subject, row: int, into: Subject, place: int) -> None:
    """Put a row's states into a row of a cache, which may be of another kind."""
    into.states.clock_for(len(into.rows), torch.device("cpu"))
    if source.states.logs.behind:
        with_error(core.errors.StepError, source.states.snapshot, row)
        return
    snapshot, place = source.states.snapshot(row), place % len(into.rows)
    assert snapshot.length == len(source.rows[row])
    if snapshot.length > into.form.longest:
        with_error(core.errors.CapacityError, into.states.admit, place, snapshot)
        return
    into.states.admit(place, snapshot)
    into.lists.become(place, source.rows[row])
    into.all_stale()


def _point(core: SimpleNamespace, s: Subject, row: int, tokens: int, fresh: Iterator[int]) -> None:
    """Take a row's point, let all rows go on, and have this one go back there."""
    if s.states.logs.behind:
        with_error(core.errors.StepError, partial(s.states.snapshot, point=True), row)
        return
    point, then = s.states.snapshot(row, point=True), list(s.rows[row])
    assert not [name for name in point.entries if s.states.declared[name].window is None]
    _step(core, s, Feed(tokens), fresh)
    if len(s.rows[row]) < len(then):  # the pass ran past the capacity, and what led out of that was shorter
        with_error(core.errors.RowsError, s.states.admit, row, point)
    elif s.rows[row][: len(then)] == then:
        s.states.admit(row, point)
        s.lists.become(row, then)
        s.all_stale()


def _interrupt(core: SimpleNamespace, s: Subject, number: int, each: tuple[int, ...]) -> None:
    """A pass, or a rollback, that ends half-way; nothing goes on but a restore or a reset."""
    recurrence = s.operators["1.recurrent"]
    tokens = 1 + number % 3
    forget = [int(s.lists.may_forget(b, 1, s.form.leased) and row != []) for b, row in enumerate(s.rows)]
    if number % 2 and any(forget):
        recurrence.fails = True
        try:
            s.states.rollback(forget)
        except Interruption:
            pass
        else:  # the log had nothing to replay
            for b, n in enumerate(forget):
                s.lists.forget(b, n)
            return
        finally:
            recurrence.fails = False
    elif max(s.lists.lengths()) + tokens <= s.form.longest:
        with _as_compiled() if s.form.on_device and s.form.fixed else nullcontext():
            step = s.states.open(tokens, operators=s.operators)
        ring = s.state("0.key5", tokens)
        ring.put(_spread(torch.full((len(s.rows), tokens), -9.0), ring), step)
        s.written(s.lists.lengths(), [tokens] * len(s.rows))
    else:
        return
    for refused in (
        lambda: s.states.open(1),
        lambda: s.states.rollback(0),
        lambda: s.states.gather([0]),
        lambda: s.states.reset([0]),
        lambda: s.states.snapshot(0),
        lambda: core.round.Round(s.states, 1),
        s.states.checkpoint,
    ):
        with_error(core.errors.StepError, refused)
    _way_out(core, s, sum(each))


def _way_out(core: SimpleNamespace, s: Subject, number: int) -> None:
    """Come back to a mark, if one is good; else be empty."""
    mark = s.marks[number % len(s.marks)] if s.marks else None
    if mark is not None:
        _restore(core, s, mark)
    if mark is None or mark["stale"]:
        s.states.reset()
        s.empty()


# ---- what must hold after every operation


def _agree(core: SimpleNamespace, s: Subject) -> None:
    """States hold what lists hold."""
    if s.states.clock is None:
        assert not any(s.rows)
        return
    assert s.states.lengths.tolist() == s.lists.lengths()
    longest = max(s.lists.lengths())
    now = core.step.Step(0, s.states.clock.lengths, torch.zeros_like(s.states.clock.lengths))
    for name, n in (
        ("key", min(longest, s.form.attention or longest)),
        ("short", 2),
        ("key5", WINDOW),
        ("conv", 3),
        ("copies", 1),
    ):
        ring = s.states.held.get(f"0.{name}")
        if ring is not None and n <= ring.capacity:
            assert _flat(ring.past(n, now), ring) == _last(s.rows, n), name
    if "0.lease" in s.states:
        entry = s.states["0.lease"].entry
        assert entry[:, 0, 0].tolist() == entry[:, 1, 1].tolist() == [row[-1] if row else 0.0 for row in s.rows]
    if "1.recurrent" in s.states and not s.states.logs.behind:
        assert s.states["1.recurrent"].entry[:, 0].tolist() == [total(row) for row in s.rows]


def sound(s: Subject) -> None:
    """The host knows the device's numbers, these are in order, and every store has the rows and the slots for them."""
    clock = s.states.clock
    if clock is None:
        return
    known = clock.known
    lengths, _, reach, base = clock.data[:4, : clock.rows].tolist()
    assert (lengths, reach, base) == (known.lengths, known.reach, known.base)
    assert int(clock.columns) == known.width >= max(lengths) and known.ragged == (len(set(lengths)) > 1)
    floors = clock.floors
    assert floors == s.lists.floor if s.form.back else floors == lengths
    assert all(0 <= b <= f <= n <= r for b, f, n, r in zip(base, floors, lengths, reach, strict=True))
    for name, state in dict.items(s.states.held):  # looked at where they are
        assert getattr(state.store, "dense", state.store).rows == clock.rows, name
        limit = None if state.spec.leased else state.spec.limit(s.states.capacity, s.form.slack)
        assert limit is None or state.store.slots <= limit, name
        if state.spec.window is None:
            assert state.store.slots >= max(lengths), name
        if state.spec.kind == "log" and s.form.back:
            held = [min(n, m + s.form.slack) - b for n, m, b in zip(reach, lengths, base, strict=True)]
            assert limit is not None and max(held) <= limit, name


# ---- entries as numbers


def _last(rows: Sequence[list[float]], n: int) -> list[list[float]]:
    """The last n entries of each row, zeros where there are fewer."""
    return [([0.0] * n + row)[len(row) :] for row in rows]


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
    raise AssertionError(f"{call} was not refused")
