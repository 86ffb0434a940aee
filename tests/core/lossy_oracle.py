"""Rows of numbered tokens as the oracle of stores that round, and an interpreter that runs a schedule on both sides.

Every entry has a number of its own, and random vectors by that number. What a coded state holds of it is what the code
makes of the vector, once, bit for bit, whatever was done since. What a recurrence holds follows from where its states
were rounded, which is after every pass, where its base stands, and where a mark or a file had them at rest.

B rows, T new tokens, *D the shape of one entry.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from oracle import CAPACITY, ROWS, _as_compiled, with_error
from torch import Tensor

from statecache.models import file

NUMBERS = 1200  # of tokens that a schedule takes in, at most
WINDOW, SLACK = 5, 3
CPU = torch.device("cpu")
CODED = ("key", "value", "turned", "slide")  # by a lossy store for attention; the others are as they were given
OFF = {"bfloat16": 2**-8, "int8": 2**-6}  # how far a rounding may move a state, of the largest in its run
WHAT = [
    *["step"] * 5,
    *["ragged", "rows", "speculate", "rollback"] * 3,
    *["checkpoint", "restore", "restore", "admit"] * 2,
    *["copy", "copy", "save", "gather", "reset", "reset rows"],
]


@dataclass(frozen=True)
class Form:
    """What kind of cache runs a schedule. attention, recurrent: names of stores; on_device: as compiled code steps."""

    attention: str = "dense"
    recurrent: str | None = None
    dtype: torch.dtype = torch.float32
    fixed: bool = False
    on_device: bool = False
    offload: bool = False
    back: bool = True
    slack: int = SLACK


@dataclass(frozen=True)
class Row:
    """What a row took in: numbers, whether a code had each, and its recurrence: the state, and the base with its place.

    floor: how far the row may go back. off: what ever rounded its state.
    """

    state: Tensor
    base: Tensor
    numbers: tuple[int, ...] = ()
    coded: tuple[bool, ...] = ()
    at: int = 0
    floor: int = 0
    off: frozenset[str] = frozenset()


@dataclass
class Subject:
    """One cache under test, its rows, and the marks taken of it.

    behind: whether rows went back before anybody said what steps their states, which are then to come from their bases.
    """

    states: Any
    rows: list[Row]
    form: Form
    operators: Any
    marks: list[dict[str, Any]] = field(default_factory=list)
    behind: bool = False

    def lengths(self) -> list[int]:
        return [len(row.numbers) for row in self.rows]

    def all_stale(self) -> None:
        for mark in self.marks:
            mark["stale"] = True

    def written(self, starts: list[int], taken: list[int]) -> None:
        for mark in self.marks:
            longer = zip(starts, taken, mark["rows"], strict=False)
            mark["stale"] |= any(t and n < len(row.numbers) for n, t, row in longer)


class Halving:
    """s = s / 2 + x: a state is at most twice the largest x, and forgets what it was rounded by."""

    inputs, gates, query = ((2, 8),), ((1,),), (1,)

    def chunk(self, taken: Any, query: Any, state: Tensor, count: Any = None, at: Any = None) -> Any:
        inputs, gates = taken
        states = [state.clone()]
        for t in range(inputs.shape[1]):
            alive = gates[:, t] != 0
            if count is not None:
                alive &= (t < count)[:, None]
            states.append(torch.where(alive[..., None], states[-1] / 2 + inputs[:, t], states[-1]))
        y = torch.stack(states[1:], 1) if len(states) > 1 else inputs
        marks = None if at is None else torch.stack(states, 1)[torch.arange(len(state))[:, None], at]
        return y, states[-1], marks

    def step(self, taken: Any, query: Any, state: Tensor) -> Tensor:
        state.copy_(self.chunk([part[:, None] for part in taken], query, state)[1])
        return state.clone()

    def fold(self, taken: Any, state: Tensor, count: Any) -> None:
        state.copy_(self.chunk(taken, None, state, count)[1])


class Lossy:
    """The core with stores that round, a schedule's tokens, and what each store makes of them."""

    def __init__(self, core: SimpleNamespace, form: Form, seed: int) -> None:
        self.core, self.table, self.at_rest, self.form = core, core.table, core.at_rest, form
        spec, f32 = core.spec.StateSpec, torch.float32
        shapes = {
            "key": spec("key", "attention", (2, 16), axis=1),
            "value": spec("value", "attention", (9,), axis=0),
            "turned": spec("turned", "attention", (8,), axis=1),  # positions stand behind the numbers
            "narrow": spec("narrow", "attention", (2, 4), axis=1),  # no room for a scale
            "index": spec("index", "attention", (16,), axis=0),
            "slide": spec("slide", "sliding", (1, 8), WINDOW, axis=1),
            "conv": spec("conv", "conv", (8,), 3, axis=1),
        }
        state = spec("recurrent", "recurrent", (2, 8), 1, dtype=f32, leased=True)
        log = (spec("inputs", "log", (16,), 0, dtype=f32), spec("gates", "log", (1,), 0, dtype=f32))
        layers = (
            core.spec.LayerSpec(0, "test", tuple(shapes.values())),
            core.spec.LayerSpec(1, "test", (state,), log=log),
        )
        self.spec = core.spec.ModelSpec(layers)
        g = torch.Generator().manual_seed(seed)
        self.drawn: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        for name, each in shapes.items():
            sizes = 10 ** (2 * torch.rand(NUMBERS, *[1] * len(each.shape), generator=g) - 1)
            self.drawn[name] = (torch.randn(NUMBERS, *each.shape, generator=g) * sizes).to(form.dtype)
            self.kept[name] = self._once(form.attention, self.drawn[name]) if name in CODED else self.drawn[name]
        self.taken = torch.randn(NUMBERS, 2, 8, generator=g)
        self.fresh, self.nothing = iter(range(NUMBERS)), torch.zeros(2, 8)

    def _once(self, store: str, entries: Tensor) -> Tensor:
        """What a store makes of each entry by itself."""
        made = self.table.STORES[store].make(1, len(entries), entries.shape[1:], dtype=entries.dtype, device=CPU)
        every = slice(0, len(entries))
        made.write(every, entries[None])
        return made.read(every)[0].clone()

    # ---- recurrences

    def rounded(self, form: Form, row: Row, **states: Tensor) -> Row:
        """A row with these states, as a cache of this form keeps them."""
        if form.recurrent is None:
            return replace(row, **states)
        kept = {name: state.to(getattr(torch, form.recurrent)).float() for name, state in states.items()}
        return replace(row, off=row.off | {form.recurrent}, **kept)

    def rested(self, code: str | None, row: Row) -> Row:
        """A row whose states were at rest, in a code if that has a name."""
        if code is None:
            return row
        state, base = (self.at_rest.woken(code, self.at_rest.rested(code, s)) for s in (row.state, row.base))
        return replace(row, state=state, base=base, off=row.off | {code})

    def through(self, state: Tensor, numbers: tuple[int, ...]) -> Tensor:
        """The state after these tokens, nothing rounded on the way."""
        for number in numbers:
            state = state / 2 + self.taken[number]
        return state

    def moved(self, form: Form, row: Row) -> Row:
        """A row as it is in another row, of a cache of this form, where it does not go back."""
        n, coded = len(row.numbers), tuple(had or form.attention != "dense" for had in row.coded)
        return self.rounded(form, replace(row, coded=coded, at=n, floor=n), state=row.state, base=row.state)

    def empty(self) -> Row:
        return Row(self.nothing, self.nothing)

    # ---- caches

    def subject(self, form: Form, rows: int = ROWS) -> Subject:
        made = self.core.states.States(
            self.spec.with_logs() if form.slack else self.spec,
            capacity=CAPACITY if form.fixed else None,
            slack=form.slack,
            back=form.back,
            store=self.table.Stores(form.attention, form.recurrent),
            offload=form.offload,
            rows=rows,
            dtype=form.dtype,
            device="cpu",
            made_for=self.spec.digest(),
        )
        operators = self.core.replay.Operators({"1.recurrent": Halving()})
        made.logs.bind(operators)
        return Subject(made, [self.empty() for _ in range(rows)], form, operators)

    def beside(self, rnd: random.Random, form: Form) -> Form:
        """Another kind of cache, of the same stores or of those that round nothing."""
        attention = rnd.choice([self.form.attention] * 2 + ["dense"])
        recurrent = rnd.choice([self.form.recurrent] * 2 + [None])
        fixed = rnd.random() < 0.5
        offload = not fixed and rnd.random() < 0.5
        return replace(
            form,
            attention=attention,
            recurrent=recurrent,
            fixed=fixed,
            on_device=fixed and rnd.random() < 0.5,
            offload=offload,
            back=rnd.random() < 0.8,
            slack=rnd.randrange(6),
        )


def run(lossy: Lossy, schedule: list[str], seed: int) -> None:
    """Run a schedule, and assert after every operation that states hold what rows say."""
    lossy.core.offload.AHEAD = False  # two layers would both stay
    lossy.core.offload.SMALL = 0  # all are small here
    lossy.core.ring.FIRST_SLOTS = 3  # so that rings grow several times within a schedule
    rnd, subjects = random.Random(seed), [lossy.subject(lossy.form)]
    for what in schedule:
        s = rnd.choice(subjects)
        made = OPERATIONS[what](lossy, s, rnd)
        if made is not None:
            subjects = [*subjects[-2:], made]
        for s in subjects:
            _agree(lossy, s)


# ---- passes


def _pass(
    lossy: Lossy,
    s: Subject,
    tokens: int,
    chosen: list[int] | None = None,
    count: list[int] | None = None,
    kept: list[int] | None = None,
) -> None:
    """A pass; in a round, where `kept` says what it keeps: nothing, if it is empty."""
    states, form, starts = s.states, s.form, s.lengths()
    rows = list(range(len(s.rows))) if chosen is None else chosen
    taken = [tokens] * len(rows) if count is None else count
    if form.fixed and any(starts[b] + n > CAPACITY for b, n in zip(rows, taken, strict=True)):
        return
    new = [tuple(next(lossy.fresh) for _ in range(n)) for n in taken]
    round_ = None
    if kept is not None:
        if s.behind:  # a round may not be what says it
            states.logs.bind(s.operators)
        round_ = lossy.core.round.Round(states, tokens)
        round_.__enter__()
    given = None if count is None else torch.tensor(count)
    with _as_compiled() if form.on_device else nullcontext():
        step = states.open(tokens, given, chosen, operators=s.operators)
        step.write()
    _catch_up(lossy, s)
    before = [s.rows[b] for b in rows]
    _layers(lossy, s, step, before, new)
    states.close(step)
    accepted = new
    if round_ is not None:
        accepted = [ids[:n] for ids, n in zip(new, kept, strict=True)] if kept else [() for _ in new]
        if kept:
            round_.commit(kept)
        round_.__exit__(None, None, None)
    wrote = dict(zip(rows, taken, strict=True))
    s.written(starts, [1 if form.on_device and round_ else wrote.get(b, 0) for b in range(len(s.rows))])
    states.settle()
    for b, row, ids, more in zip(rows, before, new, accepted, strict=True):
        s.rows[b] = _after(lossy, s, b, row, ids, more, round_ is not None)


def _after(lossy: Lossy, s: Subject, b: int, row: Row, ids: tuple, more: tuple, tentative: bool) -> Row:
    """A row after a pass that brought `ids`, of which it keeps `more`."""
    form, start = s.form, len(row.numbers)
    numbers = row.numbers + more
    at = s.states.clock.known.base[b] if form.back and form.slack else len(numbers)
    made = replace(
        row,
        numbers=numbers,
        coded=row.coded + (form.attention != "dense",) * len(more),
        at=at,
        floor=max(row.floor, min(start + len(ids) - form.slack, len(numbers))),
    )
    if at > start:  # it stands inside the pass
        made = lossy.rounded(form, made, base=lossy.through(row.state, ids[: at - start]))
    elif at > row.at:
        made = lossy.rounded(form, made, base=lossy.through(row.base, row.numbers[row.at : at]))
    return lossy.rounded(form, made, state=lossy.through(row.state, more)) if more else made


def _catch_up(lossy: Lossy, s: Subject) -> None:
    if s.behind:
        s.rows = [lossy.rounded(s.form, row, state=lossy.through(row.base, row.numbers[row.at :])) for row in s.rows]
        s.behind = False


def _layers(lossy: Lossy, s: Subject, step: Any, before: list[Row], new: list[tuple]) -> None:
    """What a model's layers do in a pass, and see of it: what is kept, and of a long pass's own what it was given."""
    lossy_store = s.form.attention != "dense"
    for name, drawn in lossy.drawn.items():
        ring = s.states[f"0.{name}"]
        given = _columns([drawn[list(ids)] for ids in new], step.tokens, drawn.shape[1:]).movedim(1, ring.axis)
        if name == "conv":
            seen = ring.past(3, step).movedim(ring.axis, 1)
            for b, row in enumerate(before):
                n = min(3, len(row.numbers))
                assert torch.equal(seen[b, 3 - n :], _held(lossy, name, row)[len(row.numbers) - n :])
                assert not seen[b, : 3 - n].any()
            ring.put(given, step)
            continue
        seen = ring.extend(given, step).movedim(ring.axis, 1)
        for b, (row, ids) in enumerate(zip(before, new, strict=True)):
            n, window = len(row.numbers), ring.spec.window
            once = lossy.kept if lossy_store and not ring.wraps else lossy.drawn
            whole = torch.cat([_held(lossy, name, row), once[name][list(ids)]])
            first = max(0, n - window + 1) if window is not None and ring.wraps else 0
            least = first if window is None else max(0, n - window + 1)
            assert torch.equal(seen[b, least - first : len(whole) - first], whole[least:]), (name, b)
    inputs = _columns([lossy.taken[list(ids)] for ids in new], step.tokens, (2, 8))
    ones = torch.ones(len(new), step.tokens, 1)
    log = s.states.logs["1.recurrent"] if s.form.slack and (s.form.back or step.tentative) else None
    run_, held = lossy.core.replay.run, s.states["1.recurrent"]
    outputs = run_(s.operators["1.recurrent"], (inputs, ones), ones, held, step, log)
    for b, (row, ids) in enumerate(zip(before, new, strict=True)):
        for t in range(len(ids)):  # a pass rounds nothing on its way
            assert torch.equal(outputs[b, t], lossy.through(row.state, ids[: t + 1])), ("recurrent", b, t)


def _step(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    _pass(lossy, s, rnd.choice([1, 1, 1, 2, 3, rnd.randrange(12)]))


def _ragged(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    tokens = rnd.randrange(1, 10)
    _pass(lossy, s, tokens, count=[rnd.randint(0, tokens) for _ in s.rows])


def _some(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    tokens, rows = rnd.choice([1, 1, rnd.randrange(1, 10)]), rnd.sample(range(len(s.rows)), rnd.randint(1, len(s.rows)))
    _pass(lossy, s, tokens, rows, rnd.choice([None, [rnd.randint(0, tokens) for _ in rows]]))


def _speculate(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    if not s.form.slack:
        with_error(lossy.core.errors.SlackError, lossy.core.round.Round, s.states, 1)
        return
    tokens = rnd.randint(1, s.form.slack)
    rows = rnd.choice([None, rnd.sample(range(len(s.rows)), rnd.randint(1, len(s.rows)))])
    of = len(s.rows) if rows is None else len(rows)
    count = rnd.choice([None, [rnd.randint(0, tokens) for _ in range(of)]])
    kept = [rnd.randint(0, n) for n in count or [tokens] * of]
    _pass(lossy, s, tokens, rows, count, rnd.choice([kept, kept, kept, []]))


# ---- between passes


def _rollback(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    forget = [rnd.randint(0, min(s.form.slack, n)) for n in s.lengths()]
    target = [n - f for n, f in zip(s.lengths(), forget, strict=True)]
    if any(f and (t < row.floor or not s.form.back) for f, t, row in zip(forget, target, s.rows, strict=True)):
        with_error(lossy.core.errors.RollbackError, s.states.rollback, forget)
        return
    s.states.rollback(forget)
    for b, (n, f) in enumerate(zip(target, forget, strict=True)):
        row = s.rows[b]
        if f:
            state = lossy.through(row.base, row.numbers[row.at : n])
            s.rows[b] = lossy.rounded(s.form, replace(row, numbers=row.numbers[:n], coded=row.coded[:n]), state=state)
    s.behind |= any(forget) and s.form.slack > 0 and s.states.logs.operators is None


def _checkpoint(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    code = rnd.choice([None, "int8"])
    rested = [lossy.rested(code, row) for row in s.rows]
    rows = [lossy.rounded(s.form, row, state=row.state, base=row.base) for row in rested]
    s.marks.append({"mark": s.states.checkpoint(code), "rows": rows, "stale": False, "behind": s.behind})


def _restore(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    if not s.marks:
        return
    mark = rnd.choice(s.marks)
    if mark["stale"]:
        with_error(lossy.core.errors.StaleMarkError, s.states.restore, mark["mark"])
    else:
        s.states.restore(mark["mark"])
        s.rows, s.behind = list(mark["rows"]), mark["behind"]


def _gather(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    index = [rnd.randrange(len(s.rows)) for _ in range(rnd.randint(1, ROWS))]
    s.states.gather(index)
    s.rows = [s.rows[n] for n in index]
    s.all_stale()


def _reset(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    s.states.reset()
    s.rows, s.behind = [lossy.empty() for _ in range(ROWS if s.form.fixed else len(s.rows))], False
    s.all_stale()


def _reset_rows(lossy: Lossy, s: Subject, rnd: random.Random) -> None:
    b = rnd.randrange(len(s.rows))
    s.states.reset([b])
    s.rows[b] = lossy.empty()
    s.all_stale()


def _copy(lossy: Lossy, s: Subject, rnd: random.Random) -> Subject:
    """Another cache that holds the same, and goes on by itself, or back; only a fork knows what steps its states."""
    make = rnd.choice([lambda of: of.fork(), copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))])
    made = Subject(make(s.states), list(s.rows), s.form, s.operators, behind=s.behind)
    if rnd.random() < 0.7:
        _rollback(lossy, made, rnd)
    return made


def _admit(lossy: Lossy, s: Subject, rnd: random.Random) -> Subject | None:
    """Put a row as a value into one of this cache, or of another kind."""
    b, into = rnd.randrange(len(s.rows)), s
    if rnd.random() < 0.5:
        into = lossy.subject(lossy.beside(rnd, s.form))
    if s.behind:
        with_error(lossy.core.errors.StepError, s.states.snapshot, b)
        return None
    place, value = rnd.randrange(len(into.rows)), s.states.snapshot(b)
    if into.form.fixed and value.length > CAPACITY:
        with_error(lossy.core.errors.CapacityError, into.states.admit, place, value)
        return None
    row = s.rows[b]
    into.states.admit(place, value)
    into.rows[place] = lossy.moved(into.form, row)
    into.all_stale()
    return None if into is s else into


def _save(lossy: Lossy, s: Subject, rnd: random.Random) -> Subject | None:
    """Go on from a file, in a cache of another kind."""
    code, form = rnd.choice([None, "int8"]), lossy.beside(rnd, s.form)
    if s.behind or (form.fixed and max(s.lengths()) > CAPACITY):
        return None
    made = lossy.subject(form)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        file.write(path, s.states, fingerprint=None, recurrent_store=code)
        described = file.describe(path)
        places = [{} for _ in s.rows]
        longest = max(range(len(s.rows)), key=s.lengths().__getitem__)
        for b in [longest, *range(len(s.rows))]:
            places[b] = made.states.places(b, described.lengths[b], described.dtypes(b), CPU)
        for b, value in enumerate(file.read(path, described, places)):
            made.states.admit(b, value, fresh=True)
            made.rows[b] = lossy.moved(form, lossy.rested(code, s.rows[b]))
    return made


OPERATIONS: dict[str, Callable[[Lossy, Subject, random.Random], Subject | None]] = {
    "step": _step,
    "ragged": _ragged,
    "rows": _some,
    "speculate": _speculate,
    "rollback": _rollback,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "gather": _gather,
    "reset": _reset,
    "reset rows": _reset_rows,
    "copy": _copy,
    "admit": _admit,
    "save": _save,
}


# ---- what must hold after every operation


def _agree(lossy: Lossy, s: Subject) -> None:
    assert s.states.lengths.tolist() == s.lengths()
    clock, longest = s.states.clock, max(s.lengths())
    now = lossy.core.step.Step(0, clock.lengths, torch.zeros_like(clock.lengths))
    for name in lossy.drawn:
        ring = s.states[f"0.{name}"]
        n = longest if ring.spec.window is None else ring.spec.window
        seen = ring.past(n, now).movedim(ring.axis, 1)
        for b, row in enumerate(s.rows):
            m = min(n, len(row.numbers))
            assert torch.equal(seen[b, n - m :], _held(lossy, name, row)[len(row.numbers) - m :]), (name, b)
            assert not seen[b, : n - m].any()
    for b, row in enumerate(() if s.behind else s.rows):
        assert torch.equal(s.states["1.recurrent"].entry[b], row.state), ("recurrent", b)
        exact = lossy.through(lossy.nothing, row.numbers)
        largest = max([2 * lossy.taken[n].abs().max() for n in row.numbers], default=0)  # that a state can be
        # each rounding is of the largest, and halved by every token since
        assert bool(((row.state - exact).abs() <= 2 * sum(OFF[what] for what in row.off) * largest).all())


def _held(lossy: Lossy, name: str, row: Row) -> Tensor:
    """What a state holds of each of a row's tokens: (n, *D)."""
    numbers = list(row.numbers)
    if name not in CODED:
        return lossy.drawn[name][numbers]
    if len(set(row.coded)) < 2:
        return (lossy.kept if any(row.coded) else lossy.drawn)[name][numbers]
    coded = torch.tensor(row.coded, dtype=torch.bool).view(-1, *[1] * (lossy.drawn[name].dim() - 1))
    return torch.where(coded, lossy.kept[name][numbers], lossy.drawn[name][numbers])


def _columns(rows: list[Tensor], tokens: int, shape: tuple[int, ...]) -> Tensor:
    """Entries of each row (n, *D) as a pass has them, (B, T, *D), with junk behind."""
    made = torch.full((len(rows), tokens, *shape), -7.0, dtype=rows[0].dtype)
    for b, row in enumerate(rows):
        made[b, : len(row)] = row
    return made
