"""All that a model remembers: named rings and leases under one clock, changed as a whole or not at all.

B rows, R of them in a step, T new tokens.
"""

from __future__ import annotations

import copy
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from statecache.clock import Clock, Known, whole_numbers
from statecache.errors import (
    CapacityError,
    ConfigError,
    MarkError,
    OptionError,
    RotaryError,
    RowsError,
    SlackError,
    StaleMarkError,
    StateCacheError,
    StepError,
)
from statecache.lease import Lease
from statecache.logs import Logs
from statecache.offload import Offloaded
from statecache.one_pass import OnePass
from statecache.replay import Operators
from statecache.ring import Ring
from statecache.snapshot import Mark, Marks, Snapshot
from statecache.spec import KINDS, ModelSpec, Sizes, StateSpec, as_dtype
from statecache.step import Allocation, Landing, Step
from statecache.storage.at_rest import check_code, code_of, rested, woken
from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.store import MakeStore
from statecache.storage.table import Stores, apart

WAY_OUT = "reset(), or restore() a mark"


@dataclass(frozen=True)
class Capability:
    """Whether a cache can do something now; if not, `why`: the text of the error that trying would raise."""

    why: str | None = None

    def __bool__(self) -> bool:
        return self.why is None

    def __str__(self) -> str:
        return "yes" if self.why is None else f"no: {self.why}"


@dataclass(eq=False)
class Pass:
    """A step that is under way. It is dropped while it is open, torn afterwards, until it is whole and closed."""

    step: Step
    after: Known | None  # what the host knows once it is closed; None: nothing
    rows: list[int] | None
    operators: Operators | None
    stage: Literal["open", "shifting", "writing", "whole"] = "open"  # shifting: states behind logs are on their way
    span: tuple[int, int] | None = None  # the positions that it writes, once somebody asked

    def taken(self, before: Known) -> list[int]:
        """Tokens that each of its rows takes in, where it knows what the host will."""
        assert self.after is not None
        if self.rows is None:
            return list(map(operator.sub, self.after.lengths, before.lengths))
        return [self.after.lengths[row] - before.lengths[row] for row in self.rows]


@final
class States:
    """The states of a model, each a ring or a lease, under one clock.

    A step opens with every row's length and count, the layers read and write their states, and the step is closed once.
    With `rows`, `dtype` and `device` all is allocated at once; else each state when it is first written.

    `back`: whether rows can be rolled back; without it the slack serves speculative rounds alone, and costs less.
    `store`: where entries live: all of them in one that it makes, or as `Stores` says, or a name such as "int8".
    `offload`: in host memory, but for the layers in use.
    `made_for`: the digest of the model's specification, if `spec` is another form of it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        capacity: int | None = None,
        slack: int = 0,
        rows: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        back: bool = True,
        store: MakeStore | Stores | str = Dense,
        offload: bool = False,
        made_for: str | None = None,
    ) -> None:
        dtype, device = None if dtype is None else as_dtype(dtype), _device(device)
        _check_options(capacity, slack, rows, dtype)
        if offload and capacity is not None:
            raise OptionError(
                f"offload=True with capacity={capacity}: what stays at its address cannot leave the device: leave one "
                "out"
            )
        self.made_for = spec.digest() if made_for is None else made_for
        self.spec, self.capacity, self.slack, self.back = spec, capacity, slack, back
        self.store = Stores(store) if isinstance(store, str) else store
        self.dtype, self.device = dtype, device
        self.declared: dict[str, StateSpec] = dict(spec.states())
        self.offload = offload
        self.held: dict[str, Ring | Lease] = Offloaded() if offload else {}
        self._watch()
        self.logs = Logs(self.held, apart=self.offload)
        self.clock: Clock | None = None
        self.marks = Marks()
        self.tentative: int | None = None  # the most tokens of the speculative round that is open
        self.unseen = False  # whether that looks at no number
        self._pass: Pass | None = None
        self._inside: OnePass | None = None  # whose `with` block is being run
        self.broken: str | None = None  # what was interrupted half-way, until a reset or a restore
        self._room = 0  # the longest row that every growing ring has slots for
        if rows is not None and dtype is not None and self.device is not None:
            self.allocate_all(rows, dtype, self.device)

    def __getitem__(self, name: str) -> Ring | Lease:
        return self.held[name]

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def items(self) -> ItemsView[str, Ring | Lease]:
        """Every state that is allocated, with its name."""
        return self.held.items()

    def values(self) -> ValuesView[Ring | Lease]:
        """Every state that is allocated."""
        return self.held.values()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        allow(self._refuse_broken())
        return {**self.__dict__, "_pass": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._watch()

    # ---- what there is

    @property
    def rows(self) -> int | None:
        """Rows in use; None before the first forward."""
        return None if self.clock is None else self.clock.rows

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has taken in: (B,) long, a copy on the cache's device."""
        if self.clock is None:
            return torch.zeros(0, dtype=torch.long, device=self.device)
        self.settle()
        return self.clock.lengths.clone()

    def buffers(self) -> list[Tensor]:
        """The tensors that the cache holds. With a fixed capacity none of them ever moves."""
        held = [] if self.clock is None else self.clock.buffers()
        return held + [buffer for state in dict.values(self.held) for buffer in state.buffers()]

    def nbytes(self) -> Sizes:
        """Bytes allocated, by kind of state."""
        sizes = Counter(dict.fromkeys(KINDS, 0))
        for state in dict.values(self.held):  # wherever they are
            sizes[state.spec.kind] += sum(b.nbytes for b in state.buffers())
        sizes["clock"] = sum(b.nbytes for b in (self.clock.buffers() if self.clock else ()))
        return Sizes(dict(sizes))

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """What this cache can do now, and why not: each answer is the error that the method itself would raise.

        May wait for the device.
        """
        self.settle()
        return {name: Capability(None if error is None else str(error)) for name, error in self._refusals()}

    def _refusals(self) -> Iterator[tuple[str, StateCacheError | None]]:
        rows = self.clock.rows if self.clock else 0
        yield "step", self._refuse_broken()
        yield "checkpoint", self._refuse_broken()
        yield "fork", self._refuse_broken()
        yield "gather", self._refuse_empty("there are no rows before the first forward")
        empty = self._refuse_empty("nothing to forget: the cache is empty")
        yield "rollback", empty or self._refuse_rollback([1] * rows)
        yield "speculate", self._refuse_round(1)
        yield "reset", self._refuse_within()

    # ---- allocation

    def start(self, rows: int, device: torch.device) -> None:
        """Have a clock, for this many rows."""
        self.clock = Clock(
            Allocation(rows, self.capacity, self.slack, torch.long, device, Dense),
            self.spec.full_at(self.capacity, self.slack),
            self.back,
            self.spec.rotary,
        )

    def allocate_all(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have a clock, and room for every state whose shape is declared, in a model that computes in `dtype`."""
        self.start(rows, device)
        for name, state in self.declared.items():
            if state.shape is not None:
                self.allocate(name, dtype, device)

    def clock_for(self, rows: int, device: torch.device) -> Clock:
        """The clock, for a batch of this many rows. Raises RowsError where the cache holds others."""
        clock = self.clock
        if clock is not None and clock.rows != rows:
            if any(clock.sync().lengths):
                raise RowsError(
                    f"the batch has {rows} rows, and the cache holds {clock.rows}: select or repeat rows with gather()"
                )
            if self.capacity is not None:
                raise RowsError(
                    f"the batch has {rows} rows, and the cache was allocated with {clock.allocated} at fixed "
                    f"addresses: make it with rows={rows}, or without capacity="
                )
            self.marks.invalidate("the number of rows changed since")
            self.clock = None
            self.held.clear()
        if self.clock is None:
            self.start(rows, self.device or device)
        assert self.clock is not None
        return self.clock

    def declare(self, name: str, spec: StateSpec) -> None:
        """Add a state, or what its first write shows of it, to its layer."""
        index = int(name.split(".", maxsplit=1)[0])
        layers = list(self.spec.layers)
        layers[index] = layers[index].with_state(spec)
        self.spec, self.declared[name] = replace(self.spec, layers=tuple(layers)), spec

    def allocate(self, name: str, dtype: torch.dtype, device: torch.device, tokens: int = 0) -> Ring | Lease:
        """Make room for a state, in a model that computes in `dtype`. `tokens`: of the step that writes it first."""
        assert self.clock is not None
        spec = self.declared[name]
        if self.capacity is None:
            tokens += max(self.clock.known.lengths)  # a ring that is yet to grow has a slot for every position
        store = self.store.of(spec) if isinstance(self.store, Stores) else self.store
        store = apart(store) if self.offload else store
        room = Allocation(self.clock.allocated, self.capacity, self.slack, dtype, device, store)
        state = Lease(spec, room, self.back) if spec.leased else Ring(spec, room, tokens)
        if self.clock.rows != room.rows:
            state.use(self.clock.rows)
        if isinstance(state, Lease) and state.copies is not None:
            self.clock.copying = True
        self.held[name] = state
        self._room = 0  # look at every ring again
        return state

    def keep_logs(self) -> None:
        """Have recurrences roll back by logs instead of copies, from the tokens on that are held now."""
        if self.slack:
            self.marks.invalidate("a prepared model has gone on with the cache since", fed=True)  # copies are no log
            self.spec = self.spec.with_logs()
        self.declared = dict(self.spec.states())
        for name, state in self.held.items():
            if isinstance(state, Lease) and self.declared[name].logged:
                state.log_from_here(self.declared[name])
        if self.clock is not None:
            self.clock.copying = any(isinstance(s, Lease) and s.copies is not None for s in dict.values(self.held))
            self.clock.stay()
            if self.dtype is not None and self.device is not None:
                for name, spec in self.declared.items():
                    if spec.kind == "log":
                        self.allocate(name, self.dtype, self.device)

    # ---- a step

    @property
    def step(self) -> Step | None:
        """The step that is open."""
        return None if self._pass is None else self._pass.step

    @property
    def torn(self) -> bool:
        """Whether a pass has begun to write and was not closed."""
        now = self._pass
        # what is compiled does not say whether it wrote
        return now is not None and (now.stage != "open" or now.after is None)

    def open(
        self,
        tokens: int,
        count: Tensor | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        *,
        counted: Tensor | None = None,
        operators: Operators | None = None,
    ) -> Step:
        """Begin a pass of T `tokens` over some `rows`, None for all; of the b-th the first `count[b]`, None for all.

        Changes nothing: the first write does, and until then the step may be forgotten, by opening another. `counted`:
        the count on the device, if it is there already. `operators`: what steps the logged states from now on.
        Raises CapacityError, RotaryError, RowsError, StepError.
        """
        clock = self.clock
        assert clock is not None, "rows are known from the constructor or from the first write"
        self.check_pass(tokens)
        if self.tentative is not None:
            allow(self._refuse_overwritten())
        step, after = clock.open(tokens, count, rows, counted, self.tentative is not None, self.unseen)
        chosen = None if rows is None else [int(row) for row in rows]
        self._pass = Pass(step, after, chosen, operators)
        return step.starts(self._begin)

    @contextmanager
    def one_pass(
        self, tokens: int, count: Tensor | Sequence[int] | None = None, rows: Sequence[int] | None = None
    ) -> Iterator[OnePass]:
        """A pass of a model of one's own, for a `with` block: `open` as it says, and `close` where the block ends.

        An exception in the block leaves the states as they were where none was written yet, else a pass that is torn:
        all is refused then until `reset()`, or `restore()` of a mark. Raises StepError for a state that the block left
        out, and where something else changed the states in between.
        """
        allow(self._refuse_alone())
        step = self.open(tokens, count, rows)
        assert self.clock is not None
        device = self.clock.lengths.device
        now = self._inside = OnePass(self.held, step, self.clock.rows if rows is None else len(rows), device)
        try:
            yield now
        finally:
            self._inside, now.over = None, True
        if left := now.left():
            raise StepError(f"the pass wrote no state {', '.join(left)}: each is written once, by every pass")
        if self.step is not step:
            raise StepError("the states were changed within the pass: reset and restore them between passes")
        self.close(step)

    def moved(self) -> None:
        """Say that a whole step was run by what no Python sees, as a file of compiled code."""
        assert self.clock is not None
        self.clock.moved()

    def check_whole(self) -> None:
        """Raise StepError in a round, in a pass, or after one that was interrupted."""
        allow(self._refuse_broken())

    def check_pass(self, tokens: int) -> None:
        """Raise StepError or CapacityError where no pass of T `tokens` can begin, whatever rows hold."""
        allow(self._refuse_broken() if self.tentative is None else self._refuse_in(tokens))

    def _begin(self) -> None:
        """The first write of the pass that is open."""
        now, clock = self._pass, self.clock
        assert now is not None and clock is not None
        now.step.pending, now.stage = None, "writing"
        writing = self.held.now if isinstance(self.held, Offloaded) else None
        if now.after is not None and self.marks.longest:
            self.marks.written(clock.known.lengths, now.rows, now.taken(clock.known))
        if self.capacity is None and now.step.end is not None and now.step.end > self._room:
            self.reserve(now.step.end)
        if now.operators is not None and self.logs.operators is not now.operators:
            self.logs.bind(now.operators)
        self.logs.catch_up(clock)
        if self.slack and self.back:
            self._shift(now)
        if writing is not None and isinstance(self.held, Offloaded):
            self.held.enter(writing)  # others were looked at

    def _shift(self, now: Pass) -> None:
        """Make room in the logs, and move the states that these go on from."""
        clock, step = self.clock, now.step
        sizes = (s.limit(self.capacity, self.slack) for s in self.declared.values() if s.kind == "log")
        size = next(sizes, None)
        if clock is None or size is None:
            return
        taken = None if now.after is None else now.taken(clock.known)
        then = self.logs.room(step, clock, now.rows, taken, self.slack, size)
        if step.shift is None:
            return
        if now.after is not None and then is not None:
            now.after = replace(now.after, base=then)
        now.stage = "shifting"
        self.logs.fold(step)
        clock.stand(step.shift.base, step.rows, then)
        now.stage = "writing"

    def close(self, step: Step) -> None:
        """End the pass: its tokens are now part of the rows; in a speculative round, those that are accepted later."""
        now = self._pass
        assert self.clock is not None and now is not None and step is now.step
        step.write()
        now.stage = "whole"
        if self.tentative is None:
            self.clock.close(step, now.after)
            self._pass = None

    def _drop(self) -> None:
        """Forget a round's pass, whose writes lie past the ends of its rows."""
        wrote, now, self._pass = self.torn, self._pass, None
        if wrote and now is not None and self.clock is not None:
            self.clock.wrote_ahead(now.step, now.after)
            if now.after is None:
                self.marks.written(self.clock.known.lengths)

    def _watch(self) -> None:
        """Have what is offloaded ask here what a pass writes."""
        if isinstance(self.held, Offloaded):
            self.held.spans = weakref.WeakMethod(self._writes)

    def bring(self, layer: int) -> None:
        """Have a layer of what is offloaded on the device, as looking its states up does."""
        if isinstance(self.held, Offloaded):
            self.held.bring(str(layer))

    def _writes(self) -> tuple[int, int] | None:
        """The positions that the pass under way writes, from the first to before the last; None: any."""
        now, clock = self._pass, self.clock
        if now is None or now.after is None or now.step.end is None or clock is None:
            return None
        if now.span is None:
            lengths = clock.known.lengths if now.rows is None else [clock.known.lengths[row] for row in now.rows]
            now.span = max(min(lengths) - 1, 0), now.step.end  # a copy of a state is that of the token before
        return now.span

    def reserve(self, end: int) -> None:
        """Make room for rows of this length, as a pass up to it does."""
        for state in self.held.values():
            state.reserve(end)
        growing = [s.capacity for s in dict.values(self.held) if isinstance(s, Ring) and s.capacity != s.limit]
        self._room = min(growing) if growing else sys.maxsize

    # ---- a speculative round

    def check_round(self, max_tokens: int) -> None:
        """Raise SlackError for a round of more tokens than the slack, StepError within another."""
        self.settle()
        allow(self._refuse_round(max_tokens))

    def begin_round(self, max_tokens: int, unseen: bool = False) -> None:
        """What the next pass writes becomes part of the rows by `end_round` alone, as far as it says.

        unseen: no number is looked at, neither what the pass brings nor what is accepted, as in a captured round.
        """
        if unseen:
            allow(self._refuse_round(max_tokens))
        else:
            self.check_round(max_tokens)
        self.logs.catch_up(self.clock)
        self.tentative, self.unseen = max_tokens, unseen

    def end_round(self, accepted: Tensor | Sequence[int] | int | None = None) -> None:
        """Keep the first `accepted` tokens of the round's pass in each of its rows, an int for all; None keeps nothing.

        Of an unseen round they are a tensor on the clock's device, and as many as the pass brought at most.
        Raises StepError without a pass, RowsError for counts that do not fit it; nothing is changed then.
        """
        now, clock = self._pass, self.clock
        if accepted is None:
            self.tentative, self.unseen = None, False
            with self._changing("a speculative round"):
                self._drop()
            if now is not None and now.stage == "shifting":
                self.broken = "a speculative round"
            return
        if now is None or clock is None or now.stage != "whole":
            raise StepError("nothing to commit: the round had no whole forward pass")
        step = now.step
        rows = clock.rows if now.rows is None else len(now.rows)
        if self.unseen:
            if not isinstance(accepted, Tensor) or accepted.shape != (rows,):
                raise RowsError(f"an unseen round commits a tensor ({rows},) on the cache's device")
            self.tentative, self.unseen = None, False
            with self._changing("a commit"):
                self._drop()
                self.logs.accept(step, step.tokens, clock.accept_unseen(step, accepted))
            return
        keep = whole_numbers(accepted, rows, "accepted tokens")
        if now.after is not None:
            most = now.taken(clock.known)
        else:
            most = [step.tokens] * rows if step.count is None else step.count.tolist()
        for row, (n, of) in enumerate(zip(keep, most, strict=True)):
            if not 0 <= n <= of:
                raise RowsError(f"row {row} cannot keep {n} tokens: the pass brought it {of}")
        clock.sync()
        self.tentative = None
        with self._changing("a commit"):
            self._drop()
            count = clock.accept(step, now.after, now.rows, keep)
            self.logs.accept(step, max(keep), count)

    # ---- between steps

    def settle(self, refuse: bool = True) -> None:
        """Bring the host up to date, and find the marks that compiled steps since have made stale.

        Raises CapacityError after one that ran past the capacity, unless it is not to `refuse`.
        """
        clock = self.clock
        if clock is None:
            return
        now = clock.catch_up()
        if clock.unseen is not None:
            taken = [length > old for length, old in zip(now.lengths, clock.unseen, strict=True)]
            self.marks.written(clock.unseen, taken=taken)
            clock.unseen = None
        if refuse:
            clock.sync()

    @contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Changes within are made as a whole; when they are interrupted, nothing goes on but a reset or a restore."""
        self.broken = what
        yield
        self.broken = None

    def _together(self, apart: bool = False) -> Iterator[list[tuple[str, Ring | Lease]]]:
        """States with their names, those together that can change at once; `apart`: each for itself.

        What is offloaded is on the device, and changes, one after the other.
        """
        if self.offload or apart:
            for each in self.held.items():
                yield [each]
        else:
            yield list(self.held.items())

    def checkpoint(self, recurrent_store: str | None = None) -> Mark:
        """Mark this point for `restore`. Copies windowed and recurrent entries; for others the lengths do.

        `recurrent_store="int8"`: copies of recurrent states in a byte a number, which a restore brings back near what
        they were. Raises OptionError for another name.
        """
        check_code(recurrent_store)
        self.settle()
        allow(self._refuse_broken())
        self.logs.catch_up(self.clock)
        copies: dict[str, tuple[Tensor, ...]] = {}
        for states in self._together():
            changes = Changes()
            for name, state in states:
                code = code_of(state.spec, recurrent_store)
                copies[name] = tuple(_copied(code, held, changes) for held in state.snapshot())
            changes.make()
        mark = Mark(
            weakref.ref(self),
            [] if self.clock is None else list(self.clock.known.lengths),
            None if self.clock is None else self.clock.snapshot(),
            copies,
            self.logs.behind,
            recurrent_store,
        )
        self.marks.add(mark)
        return mark

    def restore(self, mark: Mark) -> None:
        """Come back to a mark, in place. A mark can be restored more than once.

        Raises MarkError for a mark of another cache, StaleMarkError where something written since overwrote it.
        """
        self.settle(refuse=False)
        allow(self._refuse_within())
        if mark.owner() is not self:
            raise MarkError("the mark was taken of another cache: restore it there, or fork() that cache")
        if self._pass is not None and self._pass.after is None and self.clock is not None:
            self.marks.written(self.clock.known.lengths)  # a compiled pass says nothing before it runs
        if mark.stale is not None:
            raise StaleMarkError(f"the mark is stale: {mark.stale}; take a new one with checkpoint()")
        with self._changing("a restore"):
            self._pass, self.logs.behind = None, mark.behind
            if self.clock is not None:
                if mark.clock is None:
                    self.clock.empty()
                else:
                    self.clock.load(mark.clock)
            for states in self._together(apart=mark.code is not None):  # woken all at once they would take much room
                changes = Changes()
                for name, state in states:
                    if name in mark.copies and any(mark.lengths):
                        code = code_of(state.spec, mark.code)
                        state.load(tuple(woken(code, copied) for copied in mark.copies[name]), changes)
                    elif any(mark.lengths):
                        state.reset(None, changes)  # it came later, and rows that hold tokens read it: as zero
                    else:
                        state.empty(changes)  # as before its first write, in whatever form it was kept
                changes.make()

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Passes within are gone at its end, of which only the device need know: it may be part of a captured graph.

        Copies what a mark does, but for logs where rows do not go back. After an exception within, nothing goes on but
        a reset or a restore.
        """
        clock, changes, back = self.clock, Changes(), Changes()
        assert clock is not None and not self.offload
        writes = [state for state in self.held.values() if self.back or state.spec.kind != "log"]
        kept = [(state, tuple(changes.clone(held) for held in state.snapshot())) for state in writes]
        changes.make()
        numbers = clock.data.clone()
        try:
            yield
        except BaseException:
            self.broken = "a look ahead"
            raise
        with self._changing("a look ahead"):
            for state, copies in kept:
                state.load(copies, back)
            back.make()
            clock.data.copy_(numbers)
            clock.moved()

    def rollback(self, tokens: int | Tensor | Sequence[int]) -> None:
        """Forget the last `tokens` (int, or (B,) long) of each row. No entry moves. May wait for the device once.

        Raises RollbackError where a row would go below what its states still hold; nothing is changed then.
        """
        self.settle()
        allow(self._refuse_broken())
        clock = self.clock
        if clock is None:
            if isinstance(tokens, int) and tokens == 0:
                return
            raise RowsError("nothing to forget: the cache is empty")
        forget = whole_numbers(tokens, clock.rows, "tokens to forget")
        allow(self._refuse_rollback(forget))
        if not any(forget):
            return
        with self._changing("a rollback"):
            clock.rollback(forget)
            length = clock.lengths
            moved = torch.tensor([n > 0 for n in forget], device=length.device)
            for state in self.held.values():
                state.rollback(length.to(state.device), moved.to(state.device))
            self.logs.replay(clock, [n > 0 for n in forget])

    def gather(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows, (n,) long, in this order: select, repeat, permute or drop.

        With a fixed capacity in place, at the same addresses, for n up to the rows allocated; else it reallocates, or
        has rows that are repeated share their pages.
        Raises RowsError for a row that does not exist, or more rows than a fixed cache has.
        """
        self.settle()
        allow(self._refuse_empty("there are no rows before the first forward"))
        clock = self.clock
        assert clock is not None
        index = torch.as_tensor(rows)
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise RowsError(f"rows to keep are a 1-d tensor of integers, not {index.dtype} {tuple(index.shape)}")
        wanted = index.tolist()
        bad = [row for row in wanted if not 0 <= row < clock.rows]
        if bad or not wanted:
            raise RowsError(f"rows {bad or wanted} of {clock.rows}: give at least one, each in 0..{clock.rows - 1}")
        if self.capacity is not None and len(wanted) > clock.allocated:
            raise RowsError(
                f"{len(wanted)} rows, and the cache was allocated with {clock.allocated} at fixed addresses: make it "
                f"with rows={len(wanted)}, or without capacity="
            )
        longest = max(clock.known.lengths)
        moves = (_moves([state for _, state in states], wanted, longest) for states in self._together())
        ready = moves if self.offload else list(moves)  # what is offloaded is there, and moves, one layer at a time
        clock_moves = clock.taken(wanted)
        with self._changing("a gather"):
            self.marks.invalidate("rows were gathered since")
            for move in ready:  # nothing of torch runs where rows do not move in place: it is all or nothing
                move()
            clock_moves()
            for state in self.held.values():
                state.use(len(wanted))

    @contextmanager
    def narrowed(self, rows: int) -> Iterator[None]:
        """Have the first `rows` alone in use within, at the same addresses: for a graph over fewer rows.

        The others keep what they hold. Makes marks stale. Needs a fixed capacity.
        """
        self.settle()
        allow(self._refuse_empty("there are no rows before the first forward"))
        clock = self.clock
        assert clock is not None and self.capacity is not None and 0 < rows <= clock.rows
        before = clock.rows
        if rows == before:
            yield
            return
        self.marks.invalidate("a graph over fewer rows was captured since")

        def use(n: int) -> None:
            clock.use(n)
            for state in self.held.values():
                state.use(n)

        use(rows)
        try:
            yield
        finally:
            use(before)

    def fork(self) -> States:
        """An independent copy. Pages of `Paged` stores are shared with it, and copied before either writes there."""
        self.settle()
        allow(self._refuse_broken())
        stores: dict[int, Any] = {}  # what a copy is to have in the place of a store, by its id
        if self.clock is not None and not self.offload:
            for state in self.held.values():
                stores |= state.forked(self.clock.known.lengths)
        other = copy.deepcopy(self, stores)
        operators = self.logs.operators
        if operators is not None:
            other.logs.bind(operators)
        return other

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty these rows, or all, in place; what was allocated stays, and without a choice all its rows are in use.

        Raises RowsError for a row that does not exist.
        """
        allow(self._refuse_within())
        chosen = None if rows is None else self._rows(rows)
        if chosen is not None:
            self.settle()
            allow(self._refuse_broken())
        why = "the cache was reset since" if chosen is None else f"rows {chosen} were reset since"
        with self._changing("a reset"):
            self.marks.invalidate(why)
            self._pass = None
            if chosen is None:
                self.logs.behind = False
            if self.clock is None:
                return
            self.clock.reset(chosen)
            for states in self._together():
                changes = Changes()
                for _, state in states:
                    if chosen is None:
                        state.use(self.clock.rows)
                    state.reset(chosen, changes)
                changes.make()

    # ---- one row as a value

    def snapshot(
        self, row: int, tokens: Sequence[int] | None = None, *, point: bool = False, view: bool = False
    ) -> Snapshot:
        """Take one row's states as a value, for `admit`. `tokens`: the ids that it holds, if the caller has them.

        `point`: without the states that have no window, for this row, or one with the same tokens, to go back to.
        `view`: good until the cache changes, without copies where entries lie in order and stay where they are.
        Raises RowsError for a row that does not exist, or another number of tokens.
        """
        self.settle()
        allow(self._refuse_empty("there are no rows before the first forward"))
        self.logs.catch_up(self.clock)
        row = self._rows([row])[0]
        if self.logs.behind:
            raise StepError(
                "the cache was rolled back after it was copied, and its recurrences follow with the next forward pass: "
                "run that first, or copy with fork()"
            )
        assert self.clock is not None
        length = self.clock.known.lengths[row]
        if tokens is not None and len(tokens) != length:
            raise RowsError(f"row {row} holds {length} tokens, not {len(tokens)}")
        taken = ((n, s) for n, s in self.held.items() if s.spec.kind != "log")
        seen = ((n, s.row(row, length)) for n, s in taken if not (point and s.spec.window is None))
        if not view or isinstance(self.held, Offloaded):  # which takes a layer away when the next one comes
            seen = ((n, e.clone(memory_format=torch.contiguous_format)) for n, e in seen)
        entries = dict(seen)
        ids = None if tokens is None else tuple(tokens)
        return Snapshot(length, entries, self.made_for, ids, self.clock.known.rotated[row], point)

    def admit(self, row: int, snapshot: Snapshot, *, fresh: bool = False) -> None:
        """Have this row hold what a snapshot does. It cannot go back before that. Other rows stay as they are.

        Entries of another dtype are rounded to that of the cache. To a point the row goes back: what has no window
        stays as it is. `fresh`: nothing has been written to the row yet, so nothing need be zeroed.
        Raises ConfigError for one of another model, CapacityError for one that is too long, RowsError for a row that
        does not exist, or does not reach a point, RotaryError for one with other rotary factors, StepError.
        """
        self.settle()
        allow(self._refuse_empty("there are no rows before the first forward: make the cache with rows="))
        row = self._rows([row])[0]
        clock = self.clock
        assert clock is not None
        if snapshot.made_for != self.made_for:
            raise ConfigError("the snapshot was taken of a cache for another model: make it from model.config")
        self._check_length(snapshot.length)
        if snapshot.point:
            self._check_point(row, snapshot)
        unknown = [name for name in snapshot.entries if name not in self.declared]
        if any(bool(snapshot.entries[name].any()) for name in unknown):
            raise ConfigError(
                f'state "{unknown[0]}": the snapshot holds one, and the cache declares none: make it from the same '
                "configuration as the cache of which the snapshot was taken"
            )
        for name, entries in snapshot.entries.items():
            if name not in self.held and name in self.declared:
                self.allocate(name, self.dtype or entries.dtype, self.device or entries.device, snapshot.length)
        if self.capacity is None:
            self.reserve(snapshot.length)
        with self._changing("an admission"):
            self.marks.invalidate(f"row {row} was filled from a snapshot since")
            if snapshot.point:  # columns go back with the row
                clock.rollback([n - snapshot.length if b == row else 0 for b, n in enumerate(clock.known.lengths)])
            landing = Landing(row, snapshot.length, clock.lengths.device)
            for states in self._together():
                changes = Changes()
                states = [(n, s) for n, s in states if not (snapshot.point and s.spec.window is None)]
                for _, state in states if not fresh else ():
                    state.reset([row], changes)
                changes.make()  # what comes is written over what was zeroed
                for name, state in states:
                    if snapshot.length and name in snapshot.entries:
                        state.admit(snapshot.entries[name].to(state.device, state.dtype), landing, changes)
                changes.make()
            clock.admit(row, snapshot.length, snapshot.rotated)

    def places(
        self, row: int, length: int, dtypes: Mapping[str, torch.dtype], device: torch.device
    ) -> dict[str, Tensor]:
        """Make room for a row of so many tokens: by state, where its entries (n, *D) are to be written, in order.

        For a row to which nothing was written yet, and which is then admitted, `fresh`. dtypes: of the entries that
        come, by state; others, and those that a store does not show in one piece, have no place.
        Raises CapacityError for a row that is too long.
        """
        self._check_length(length)
        for name in [n for n in dtypes if n in self.declared and n not in self.held]:
            self.allocate(name, self.dtype or dtypes[name], self.device or device, length)
        if self.capacity is None:
            self.reserve(length)
        if isinstance(self.held, Offloaded) or not length:
            return {}
        held = [(name, state) for name, state in self.held.items() if name in dtypes]
        return {name: state.row(row, length) for name, state in held if state.lies(length)}

    # ---- refusals

    def _check_length(self, length: int) -> None:
        if self.clock is not None and self.clock.limit is not None and length > self.clock.limit:
            raise CapacityError(
                f"the snapshot holds {length} tokens, and the cache was made with capacity={self.capacity}"
            )

    def _check_point(self, row: int, point: Snapshot) -> None:
        assert self.clock is not None
        known = self.clock.known
        if known.lengths[row] < point.length:
            raise RowsError(
                f"row {row} holds {known.lengths[row]} tokens, and the point {point.length}: only a row that has come "
                "from there goes back to it"
            )
        if known.rotated[row] != point.rotated:
            raise RotaryError(
                f"row {row}: its keys have been rotated anew since the point of {point.length} tokens: reset() the "
                "row, and feed its text again"
            )

    def _rows(self, rows: Sequence[int]) -> list[int]:
        count = 0 if self.clock is None else self.clock.rows
        chosen = [int(row) for row in rows]
        if not chosen or not all(0 <= row < count for row in chosen):
            raise RowsError(f"rows {chosen} of {count}: give at least one, each in 0..{count - 1}")
        return chosen

    def _refuse_within(self) -> StateCacheError | None:
        """Why nothing between steps can be done, where one is under way, or None."""
        if self._inside is not None:
            return StepError("a pass is under way: leave its `with` block first")
        return self._refuse_in_round()

    def _refuse_in_round(self) -> StateCacheError | None:
        if self.tentative is None:
            return None
        return StepError("a speculative round is open: commit() what it accepts, or leave its `with` block, first")

    def _refuse_round(self, tokens: int) -> StateCacheError | None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            return OptionError(f"max_tokens={tokens!r}: give the most tokens that the round's forward pass brings")
        if tokens > self.slack:
            return SlackError(
                f"a round of {tokens} tokens needs slots to go back: the cache was made with slack={self.slack}; "
                f"make it with slack={tokens} or more"
            )
        return self._refuse_broken()

    def _refuse_in(self, tokens: int) -> StateCacheError | None:
        """Why the round cannot have this pass, or None."""
        assert self.tentative is not None
        if self.torn:
            return StepError("a speculative round is one forward pass, and it has had it: commit(), and begin another")
        if tokens > self.tentative:
            return CapacityError(
                f"the pass brings {tokens} tokens, and the round was begun with max_tokens={self.tentative}: give "
                "more, up to the cache's slack="
            )
        return None

    def _refuse_overwritten(self) -> StateCacheError | None:
        """Why a round cannot have a pass that overwrites a state, or None."""
        overwritten = next((n for n, s in self.declared.items() if s.leased and not s.logged), None)
        if overwritten is None:
            return None
        return StepError(
            f'state "{overwritten}" is overwritten as the model goes, which no round can take back: '
            "statecache.prepare(model) first"
        )

    def _refuse_alone(self) -> StateCacheError | None:
        """Why no model of one's own can have a pass, or None."""
        if self._inside is not None:
            return self._refuse_within()
        if self.clock is None:
            return StepError("one_pass() needs states that are allocated: make them with rows=, dtype= and device=")
        for name, state in self.declared.items():
            if state.logged or state.kind == "log":
                return StepError(f'state "{name}" belongs to a log, which one_pass() does not keep: open() and close()')
            if name not in self.held:
                return StepError(f'state "{name}" was declared without a shape: give that of one entry')
        return None

    def _refuse_broken(self) -> StateCacheError | None:
        """Why nothing can go on from here, or None."""
        if self._inside is not None:
            return self._refuse_within()
        if self.tentative is not None:
            return self._refuse_in_round()
        if self.broken is not None:
            return StepError(f"{self.broken} was interrupted, so some states have changed and some have not: {WAY_OUT}")
        if self.torn:
            return StepError(
                "the last forward pass was interrupted, so some layers have taken in its tokens and some have not: "
                f"{WAY_OUT}"
            )
        return None

    def _refuse_empty(self, why: str) -> StateCacheError | None:
        return self._refuse_broken() or (RowsError(why) if self.clock is None else None)

    def _refuse_rollback(self, forget: list[int]) -> StateCacheError | None:
        assert self.clock is not None
        return self.clock.refuse(forget, self.clock.copying)


def allow(error: StateCacheError | None) -> None:
    if error is not None:
        raise error


def _copied(code: str | None, held: Tensor, changes: Changes) -> Tensor:
    """A copy for a mark, in a code if that has a name; else it is one once `changes` are made."""
    kept = rested(code, held)
    return changes.clone(held) if kept is held else kept


def _moves(states: Sequence[Ring | Lease], rows: Sequence[int], length: int) -> Callable[[], None]:
    """Prepare states to keep these rows, in this order, all at once. `length`: of the longest row."""
    changes = Changes()
    moves = [state.taken(rows, length, changes) for state in states]
    changes.make()

    def move() -> None:
        for each in moves:
            each(changes)
        changes.make()

    return move


def _device(device: torch.device | str | int | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f'device={device!r}: give a torch.device, or the name of one, as "cuda:0"') from error


def _check_options(capacity: int | None, slack: int, rows: int | None, dtype: torch.dtype | None) -> None:
    for name, value, least in (("capacity", capacity, 1), ("slack", slack, 0), ("rows", rows, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise OptionError(f"{name}={value!r}: give an integer of at least {least}")
    if capacity is not None and slack > capacity:
        raise OptionError(f"slack={slack} is more than capacity={capacity}: no row is long enough to forget that much")
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype}: entries are floating point; integer states declare themselves")
