"""Named rings under one clock: all that a model remembers, changed as a whole or not at all.

B rows, T new tokens.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from statecache.clock import Clock
from statecache.draft import Draft
from statecache.errors import MarkError, OptionError, RowsError, SlackError, StaleMarkError, StateCacheError, StepError
from statecache.replay import Fold, Replay, fold
from statecache.ring import Lease, Ring, Room, Step
from statecache.spec import KINDS, ModelSpec, Sizes, StateSpec


@dataclass(frozen=True)
class Capability:
    """Whether a cache can do something now; if not, `why`: the text of the error that trying would raise."""

    why: str | None = None

    def __bool__(self) -> bool:
        return self.why is None

    def __str__(self) -> str:
        return "yes" if self.why is None else f"no: {self.why}"


@dataclass(eq=False)
class Mark:
    """A point that `restore` comes back to, as often as wanted: lengths, and copies of what later steps overwrite."""

    owner: weakref.ref[Rings]
    lengths: list[int]
    clock: tuple[Tensor, ...] | None
    copies: Mapping[str, tuple[Tensor, ...]] = field(repr=False)
    stale: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies. They do not grow with the length."""
        held = [t for copies in self.copies.values() for t in copies] + list(self.clock or ())
        return sum(t.untyped_storage().nbytes() for t in held)


class Rings:
    """The states of a model, each a ring (or a lease), under one clock.

    A step opens with every row's length and count, the layers read and write their rings, and the step is closed once.
    With `rows`, `dtype` and `device` all is allocated at once; else each state when it is first written.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        capacity: int | None = None,
        slack: int = 0,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_options(capacity, slack, rows, dtype)
        self.spec, self.capacity, self.slack = spec, capacity, slack
        self.dtype, self.device = dtype, None if device is None else torch.device(device)
        self.states: dict[str, Ring | Lease] = {}
        self.clock: Clock | None = None
        self._declared: dict[str, StateSpec] = dict(spec.states())
        self._step: Step | None = None
        self._draft: Draft | None = None
        self.lasting = False  # whether a pass is kept for good, unless it is a round's: then it costs no replay
        self._tips = False  # whether the tips of logged states stand at the ends of the rows
        self._room = 0  # the longest row that every growing ring has slots for
        self._marks: weakref.WeakSet[Mark] = weakref.WeakSet()
        self._base: list[int] = []  # the lengths after the last call that was not a step
        if rows is not None and dtype is not None and self.device is not None:
            self._start_clock(rows, self.device)
            for name, state in self._declared.items():
                if state.shape is not None:
                    self._allocate(name, dtype, self.device)

    def __getitem__(self, name: str) -> Ring | Lease:
        return self.states[name]

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        allow(self._refuse_round())
        for state in self.states.values():
            if isinstance(state, Lease):
                state.cut()  # a tensor with a gradient's history can neither be copied nor pickled
        return {k: v for k, v in self.__dict__.items() if k != "_marks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _marks=weakref.WeakSet())

    # ---- what there is

    @property
    def rows(self) -> int | None:
        """Rows in use; None before the first forward."""
        return None if self.clock is None else self.clock.rows

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has taken in: (B,) long, a copy on the cache's device."""
        self._settle()
        if self.clock is None:
            return torch.zeros(0, dtype=torch.long, device=self.device)
        return self.clock.lengths.clone()

    def buffers(self) -> list[Tensor]:
        """The tensors that the cache holds. With a fixed capacity none of them ever moves."""
        held = [] if self.clock is None else self.clock.buffers()
        return held + [buffer for state in self.states.values() for buffer in state.buffers()]

    def nbytes(self) -> Sizes:
        """Bytes allocated, by kind of state."""
        sizes = Counter(dict.fromkeys(KINDS, 0))
        for state in self.states.values():
            sizes[state.spec.kind] += sum(b.untyped_storage().nbytes() for b in state.buffers())
        sizes["clock"] = sum(b.untyped_storage().nbytes() for b in (self.clock.buffers() if self.clock else ()))
        return Sizes(dict(sizes))

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """What this cache can do now, and why not: each answer is the error that the method itself would raise.

        May wait for the device.
        """
        self._settle()
        return {name: Capability(None if error is None else str(error)) for name, error in self._refusals()}

    def _refusals(self) -> Iterator[tuple[str, StateCacheError | None]]:
        rows = self.clock.rows if self.clock else 0
        yield "step", self._refuse_torn()
        yield "checkpoint", self._refuse_torn()
        yield "fork", self._refuse_torn()
        yield "gather", self._refuse_gather()
        yield "rollback", self._refuse_torn() or self._refuse_rollback([1] * rows)
        yield "speculate", self._refuse_draft(1)
        yield "reset", self._refuse_round()

    # ---- a step

    def open(self, tokens: int, count: Tensor | None = None, folds: Mapping[str, Fold] | None = None) -> Step:
        """Begin a pass of T `tokens`, of which row b takes in the first `count[b]`; all, if there is no count.

        `folds`: of each logged state, by its name; this makes room in the logs, before any layer runs.
        Raises CapacityError or StepError before anything is written.
        """
        assert self.clock is not None, "rows are known from the constructor or from the first write"
        if self._step is not None:
            raise StepError("a step is open already; close it first")
        if self._draft is not None:
            self._draft.check(tokens)
            overwritten = next((n for n, s in self._declared.items() if s.leased and not s.logged), None)
            if overwritten is not None:
                raise StepError(
                    f'state "{overwritten}" is overwritten as the model goes, which no round can take back: '
                    "statecache.prepare(model) first"
                )
        step = self.clock.open(tokens, count)
        if step.end is not None:
            self._overwrites(self.clock.taking())
        if self.capacity is None:
            self._reserve(max(self.clock.host) + tokens)
        if folds is not None and self.slack:
            replay = self.clock.replay(step, self.lasting)
            plain = self.lasting and self._draft is None  # a pass without a log
            step = replace(step, lasting=plain, replay=None if plain else replay)
            if self._draft is None:  # else they stay where they are, until something is committed
                tips = not plain and self.capacity is None and not torch.compiler.is_compiling()
                step = replace(step, tip=self._tips if tips else None)
            self._step = step
            for name, stepping in folds.items():
                self._fold(name, stepping, replay)
            self.clock.folded(replay)
        self._step = step
        return step

    def close(self, step: Step) -> None:
        """End the pass: its tokens are now part of the rows; in a speculative round, those that are accepted later."""
        assert self.clock is not None and step is self._step
        if self._draft is None:
            self.clock.close(step)
            self._tips = step.tip is not None
        else:
            self._draft.step, self._draft.taken = step, self.clock.taking()
            self.clock.drop()
        self._step = None

    def _fold(self, name: str, step: Fold, replay: Replay) -> None:
        state, layer = self.states.get(name), name.partition(".")[0]
        inputs, gates = (self.states.get(f"{layer}.{part}") for part in ("inputs", "gates"))
        if isinstance(inputs, Ring) and isinstance(gates, Ring):  # else nothing is logged yet
            assert isinstance(state, Lease)
            fold(step, state, (inputs, gates), replay)

    def _reserve(self, end: int) -> None:
        if end > self._room:
            for state in self.states.values():
                state.reserve(end)
            growing = [s.capacity for s in self.states.values() if isinstance(s, Ring) and s.capacity != s.limit]
            self._room = min(growing) if growing else sys.maxsize

    def _start_clock(self, rows: int, device: torch.device) -> None:
        room = Room(rows, self.capacity, self.slack, torch.long, device)
        self.clock = Clock(room, self.spec.full_at(self.capacity, self.slack))
        self._base = [0] * rows

    def _allocate(self, name: str, dtype: torch.dtype, device: torch.device, tokens: int = 0) -> Ring | Lease:
        """Make room for a state, in a model that computes in `dtype`. `tokens`: of the step that writes it first."""
        assert self.clock is not None
        spec = self._declared[name]
        room = Room(len(self.clock.length), self.capacity, self.slack, dtype, device)
        state = Lease(spec, room, tokens) if spec.leased else Ring(spec, room, tokens)
        if self.clock.rows != room.rows:
            state.reset(self.clock.rows)
        self.states[name] = state
        self._room = 0  # look at every ring again
        return state

    def speculate(self, max_tokens: int) -> Draft:
        """Begin a speculative round, as a context: one forward pass of T <= `max_tokens`, of which `commit` keeps some.

        Nothing is kept without a commit. Raises SlackError for more tokens than the slack, StepError in another round.
        """
        self._settle()
        allow(self._refuse_draft(max_tokens))
        return Draft(self, max_tokens)

    # ---- between steps

    def checkpoint(self) -> Mark:
        """Mark this point for `restore`. Copies windowed and recurrent entries; for others the lengths do."""
        self._settle()
        allow(self._refuse_torn())
        mark = Mark(
            weakref.ref(self),
            [] if self.clock is None else list(self.clock.host),
            None if self.clock is None else self.clock.snapshot(),
            {name: state.snapshot() for name, state in self.states.items()},
        )
        self._marks.add(mark)
        return mark

    def restore(self, mark: Mark) -> None:
        """Come back to a mark, in place. A mark can be restored more than once.

        Raises MarkError for a mark of another cache, StaleMarkError where something written since overwrote it.
        """
        self._settle(refuse=False)
        allow(self._refuse_round())
        if mark.owner() is not self:
            raise MarkError("the mark was taken of another cache: restore it there, or fork() that cache")
        self._announce(self._step)
        if mark.stale is not None:
            raise StaleMarkError(f"the mark is stale: {mark.stale}; take a new one with checkpoint()")
        if mark.clock is None or self.clock is None:
            self._empty()
            return
        self._drop_step()
        self.clock.load(mark.clock)
        for name, state in self.states.items():
            if name in mark.copies:
                state.load(mark.copies[name])
            else:
                state.reset(self.clock.rows)  # first written after the mark
        self._between()

    def rollback(self, tokens: int | Tensor | Sequence[int]) -> None:
        """Forget the last `tokens` (int, or (B,) long) of each row. No entry moves. May wait for the device once.

        Raises RollbackError where a row would go below what its states still hold; nothing is changed then.
        """
        self._settle()
        allow(self._refuse_torn())
        if self.clock is None:
            if isinstance(tokens, int) and tokens == 0:
                return
            raise RowsError("nothing to forget: the cache is empty")
        forget = self._per_row(tokens)
        allow(self._refuse_rollback(forget))
        n = torch.tensor(forget, device=self.clock.length.device)
        self.clock.rollback(n)
        length, moved = self.clock.lengths, n > 0
        if any(forget):
            for state in self.states.values():
                device = state.buffers()[0].device
                state.rollback(length.to(device), moved.to(device))
        self._between()

    def gather(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows, (n,) long, in this order: select, repeat, permute or drop.

        With a fixed capacity in place, at the same addresses, for n up to the rows allocated; else it reallocates.
        Raises RowsError for a row that does not exist, or more rows than a fixed cache has.
        """
        self._settle()
        allow(self._refuse_gather())
        assert self.clock is not None
        index = torch.as_tensor(rows)
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise RowsError(f"rows to keep are a 1-d tensor of integers, not {index.dtype} {tuple(index.shape)}")
        wanted = index.tolist()
        bad = [row for row in wanted if not 0 <= row < self.clock.rows]
        if bad or not wanted:
            raise RowsError(
                f"rows {bad or wanted} of {self.clock.rows}: give at least one, each in 0..{self.clock.rows - 1}"
            )
        if self.capacity is not None and len(wanted) > len(self.clock.length):
            raise RowsError(
                f"{len(wanted)} rows, and the cache was allocated with {len(self.clock.length)} at fixed addresses: "
                f"make it with rows={len(wanted)}, or without capacity="
            )
        longest = max(self.clock.host)
        for state in self.states.values():
            state.take(index.to(state.buffers()[0].device, torch.long), longest)
        self.clock.take(index.to(self.clock.length.device, torch.long))
        self._invalidate("rows were gathered since")
        self._between()

    def fork(self) -> Self:
        """An independent copy, allocated anew."""
        import copy

        self._settle()
        allow(self._refuse_torn())
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Be empty again, in place; what was allocated stays, and all its rows are in use."""
        allow(self._refuse_round())
        self._invalidate("the cache was reset since")
        self._empty()

    # ---- inside

    def _empty(self) -> None:
        self._drop_step()
        if self.clock is not None:
            self.clock.reset()
            for state in self.states.values():
                state.reset(self.clock.rows)
        self._between()

    def _drop_step(self) -> None:
        """Forget a step that was left open."""
        self._step = None
        if self.clock is not None:
            self.clock.drop()

    def _settle(self, refuse: bool = True) -> None:
        """Bring the host up to date, and find the marks that steps since the last such call have made stale.

        Raises CapacityError after a compiled step that ran past the capacity, unless it is not to `refuse`.
        """
        if self.clock is None:
            return
        now = self.clock.sync() if refuse else self.clock.catch_up()
        for mark in self._marks:
            for row, (base, length, marked) in enumerate(zip(self._base, now, mark.lengths, strict=False)):
                if base < min(length, marked) and mark.stale is None:
                    mark.stale = f"row {row} was marked at {marked} tokens and written again from {base} on"
        self._base = list(now)

    def _committed(self) -> None:
        """A speculative round has ended with tokens kept."""
        self._tips = False

    def _between(self) -> None:
        self._tips = False
        self._base = [] if self.clock is None else list(self.clock.host)

    def _overwrites(self, taken: list[int] | None) -> None:
        """Rows are about to be written from their ends on, each if it takes in tokens: marks of longer ones are stale.

        Said before a pass, since not every pass is closed: some are interrupted, and a round may keep nothing.
        """
        lengths = [] if self.clock is None else self.clock.host
        for mark in self._marks:
            for row, (length, marked) in enumerate(zip(lengths, mark.lengths, strict=False)):
                if length < marked and (taken is None or taken[row]):
                    why = f"row {row} was marked at {marked} tokens and written again from {length} on"
                    mark.stale = mark.stale or why

    def _announce(self, step: Step | None) -> None:
        """Say what a pass was about to write over, if it was a compiled one, which says nothing before it runs."""
        if step is not None and step.end is None:
            self._overwrites(None)

    def _invalidate(self, why: str) -> None:
        for mark in self._marks:
            mark.stale = mark.stale or why

    def _refuse_round(self) -> StateCacheError | None:
        if self._draft is None:
            return None
        return StepError("a speculative round is open: commit() what it accepts, or leave its `with` block, first")

    def _refuse_draft(self, tokens: int) -> StateCacheError | None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            return OptionError(f"max_tokens={tokens!r}: give the most tokens that the round's forward pass brings")
        if tokens > self.slack:
            return SlackError(
                f"a round of {tokens} tokens needs slots to go back: the cache was made with slack={self.slack}; "
                f"make it with slack={tokens} or more"
            )
        return self._refuse_torn()

    def _torn(self) -> bool:
        """Whether a pass was begun and not ended."""
        return self._step is not None

    def _refuse_torn(self) -> StateCacheError | None:
        if self._draft is not None:
            return self._refuse_round()
        if not self._torn():
            return None
        return StepError(
            "the last forward pass was interrupted, so some layers have taken in its tokens and some have not: "
            "reset(), or restore() a mark"
        )

    def _refuse_gather(self) -> StateCacheError | None:
        empty = self.clock is None
        return self._refuse_torn() or (RowsError("there are no rows before the first forward") if empty else None)

    def _refuse_rollback(self, forget: list[int]) -> StateCacheError | None:
        if self.clock is None:
            return RowsError("nothing to forget: the cache is empty")
        return self.clock.refuse(forget, any(isinstance(s, Lease) and s.copies for s in self.states.values()))

    def _per_row(self, tokens: int | Tensor | Sequence[int]) -> list[int]:
        assert self.clock is not None
        if isinstance(tokens, int):
            return [tokens] * self.clock.rows
        given = torch.as_tensor(tokens)
        if given.is_floating_point() or given.dtype == torch.bool or given.shape != (self.clock.rows,):
            raise RowsError(
                f"tokens to forget are one int, or a long tensor ({self.clock.rows},), "
                f"not {given.dtype} {tuple(given.shape)}"
            )
        return [int(n) for n in given.tolist()]


def allow(error: StateCacheError | None) -> None:
    if error is not None:
        raise error


def _check_options(capacity: int | None, slack: int, rows: int | None, dtype: torch.dtype | None) -> None:
    for name, value, least in (("capacity", capacity, 1), ("slack", slack, 0), ("rows", rows, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise OptionError(f"{name}={value!r}: give an integer of at least {least}")
    if capacity is not None and slack > capacity:
        raise OptionError(f"slack={slack} is more than capacity={capacity}: no row is long enough to forget that much")
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype}: entries are floating point; integer states declare themselves")
