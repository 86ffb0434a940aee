"""Rings: the entry of position p lives in slot p % C, for ever. The only file that knows the modulo.

B rows, T new tokens, C slots of a ring, *D the shape of one entry. Tensors carry time at the state's own axis; the
comments write them as (B, T, *D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statecache.spec import StateSpec
from statecache.storage.dense import Dense, keep_rows, revive, zeros

if TYPE_CHECKING:
    from statecache.replay import Replay

FIRST_SLOTS = 64  # of a ring that grows, beyond what its first write needs


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass: each row stands at `start` and takes in `count` of the pass's T tokens."""

    tokens: int  # T
    start: int | Tensor  # of every row: known to the host, or (1,) on the device; (B,) where rows may differ
    count: Tensor | None = None  # (B,), each 0..T; None: all T. With a count, start is (B,)
    end: int | None = None  # of the longest row, if the host knows it
    replay: Replay | None = None  # in a prepared model, with slack
    lasting: bool = False  # kept for good: nothing before its end can be taken back
    tip: bool | None = None  # of logged states: whether their tips stand at the start; None: they are left alone

    @property
    def shared(self) -> bool:
        """Whether one set of slots serves every row."""
        return isinstance(self.start, int) or (len(self.start) == 1 and self.count is None)

    def positions(self, first: int, n: int) -> Tensor:
        """Positions start + first, and the n - 1 after it: (n,), or (B, n) where rows may differ."""
        assert isinstance(self.start, Tensor)
        offsets = torch.arange(first, first + n, device=self.start.device)
        return self.start + offsets if self.shared else self.start[:, None] + offsets


@dataclass(frozen=True)
class Room:
    """How many rows and slots the rings of one cache get, and where."""

    rows: int
    capacity: int | None  # of a row, in tokens; None: rings grow
    slack: int
    dtype: torch.dtype
    device: torch.device


def offset(start: Tensor, window: int) -> Tensor:
    """The first position that a pass from `start` (any shape) on may look at: 0, or window - 1 before it."""
    return (start - window + 1).clamp(min=0)


class Ring:
    """Entries of one state, one ring a row."""

    def __init__(self, spec: StateSpec, room: Room, tokens: int = 0) -> None:
        """`tokens`: of the first step, which a growing ring makes room for."""
        assert spec.shape is not None
        self.spec, self.axis = spec, 1 + spec.axis
        self.limit = spec.limit(room.capacity, room.slack)
        self.wraps = not spec.holds_all(room.capacity, room.slack)
        slots = self.limit
        if room.capacity is None:
            first = tokens + max(tokens // 4, FIRST_SLOTS)
            slots = first if slots is None else min(first, slots)
        assert slots is not None
        self.store = Dense(
            room.rows,
            slots,
            spec.shape,
            axis=self.axis,
            dtype=spec.dtype_for(room.dtype),
            device=room.device,
            static=room.capacity is not None,
        )

    @property
    def capacity(self) -> int:
        return self.store.slots

    def reserve(self, end: int) -> None:
        """Make room for positions below `end`, as far as the limit allows: at least twice the slots, so seldom."""
        wanted = end if self.limit is None else min(end, self.limit)
        if wanted > self.capacity:
            # no ring has gone round yet: below the limit a slot is a position, in the wider ring too
            wider = max(wanted, 2 * self.capacity)
            self.store.grow(wider if self.limit is None else min(wider, self.limit))

    # ---- in a step

    def put(self, new: Tensor, step: Step) -> None:
        """Write the step's entries (B, T, *D); of a chunk longer than the ring, its last C."""
        n = min(step.tokens, self.capacity)
        if isinstance(step.start, int):
            dropped = step.tokens - n
            self._put_slices(new.narrow(self.axis, dropped, n) if dropped else new, step.start + dropped)
            return
        if step.count is None:
            position = step.positions(step.tokens - n, n)
            keep = None
            new = new.narrow(self.axis, step.tokens - n, n)
        else:
            t = step.count[:, None] + torch.arange(-n, 0, device=new.device)  # (B, n); below 0: no such token
            position, keep = step.start[:, None] + t, t >= 0
            shape = (*new.shape[: self.axis], n, *new.shape[self.axis + 1 :])
            new = new.gather(self.axis, self._spread(t.clamp(min=0)).expand(shape))
        if not self.wraps:  # a full ring without a window never goes round
            keep = position < self.capacity if keep is None else keep & (position < self.capacity)
        slot = position % self.capacity
        if keep is not None:  # a slot that gets no entry gets its own back
            new = torch.where(self._spread(keep), new, self.store.read(slot))
        self.store.write(slot, new)

    def past(self, n: int, step: Step) -> Tensor:
        """The n <= C entries before the step, oldest first; zero before the first token: (B, n, *D). May be a view."""
        if isinstance(step.start, int):
            held = min(n, step.start)
            pieces = [self.store.read(at) for at in self._slices(step.start - held, held)]
            if held < n:
                pieces.insert(0, self._nothing(n - held))
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
        position = step.positions(-n, n)
        return torch.where(self._spread(position >= 0), self.store.read(position % self.capacity), 0)

    def extend(self, new: Tensor, step: Step, exact: bool = False) -> Tensor:
        """Put the step's entries; return what its tokens may attend to, in the order of position: (B, S, *D).

        The first is position 0 without a window, else `offset(step.start)`. S is the whole ring without a window, and
        w - 1 + T with one, so that one graph serves every length; entries at or after the step's end are then junk
        that a causal mask hides. `exact`: without them, where the host knows the end.
        """
        window = self.spec.window
        if window is None or not self.wraps:
            self.put(new, step)
            if exact and step.end is not None:
                return self.store.read(slice(0, step.end))
            return self.store.all()
        if isinstance(step.start, int):
            held = min(step.start, window - 1)
            pieces = [self.past(held, step), new] if held else [new]
            if not exact and held < window - 1:
                pieces.append(self._nothing(window - 1 - held))
            seen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
            self.put(new, step)
            return seen
        # put would overwrite what its own first tokens read: the past is read before
        first = offset(step.start, window).view(-1, 1)
        start = step.start.view(-1, 1)
        order = first + torch.arange(window - 1 + step.tokens, device=new.device)  # positions, (B or 1, S)
        index = torch.where(order < start, order - first, window - 1 + order - start).clamp(
            max=window - 2 + step.tokens
        )
        slot = order[:, : window - 1] % self.capacity
        seen = torch.cat([self.store.read(slot[0] if step.shared else slot), new], self.axis)
        self.put(new, step)
        if step.shared:
            return seen.index_select(self.axis, index[0])
        return seen.gather(self.axis, self._spread(index).expand(seen.shape))

    # ---- between steps

    def take(self, rows: Tensor, length: int) -> None:
        """Keep these rows (n,) in this order. `length`: of the longest row."""
        self.store.take(rows, min(length, self.capacity))

    def reset(self, rows: int) -> None:
        """Be empty, with this many rows in use."""
        self.store.use(rows)
        # attention gives slots beyond a row's end the weight zero, and zero times the NaN of a past request is NaN
        self.store.clear()

    def rollback(self, length: Tensor, moved: Tensor) -> None:
        """Nothing to move: the entries before the new lengths are still there."""

    def snapshot(self) -> tuple[Tensor, ...]:
        """What a mark must copy: nothing where every entry stays until it is written again."""
        return () if self.spec.window is None else (self.store.all().clone(),)

    def load(self, copies: tuple[Tensor, ...]) -> None:
        """Put a snapshot back."""
        for copied in copies:
            self.store.load(copied)

    def buffers(self) -> list[Tensor]:
        return [self.store.data]

    # ---- slots

    def _slices(self, first: int, n: int) -> list[slice]:
        """The slots of n <= C positions from `first` on: at most two runs."""
        slot = first % self.capacity
        if slot + n <= self.capacity:
            return [slice(slot, slot + n)]
        return [slice(slot, self.capacity), slice(0, slot + n - self.capacity)]

    def _put_slices(self, new: Tensor, first: int) -> None:
        done = 0
        for at in self._slices(first, new.shape[self.axis]):
            n = at.stop - at.start
            self.store.write(at, new if n == new.shape[self.axis] else new.narrow(self.axis, done, n))
            done += n

    def _nothing(self, n: int) -> Tensor:
        data = self.store.all()
        return data.new_zeros(*data.shape[: self.axis], n, *data.shape[self.axis + 1 :])

    def _spread(self, at_slot: Tensor) -> Tensor:
        """(n,) or (B, n) to the rank of the store's tensors, time at their axis."""
        after = [1] * (self.store.data.dim() - self.axis - 1)
        if at_slot.dim() == 1:
            return at_slot.view(-1, *after)
        return at_slot.view(len(at_slot), *[1] * (self.axis - 1), -1, *after)


class Lease:
    """A state of window 1 that its model overwrites in place: one entry a row, and copies of the ones before.

    The copy of the state after position p lives in slot p % slack of a ring of its own, taken at the start of the step
    that follows p.
    """

    def __init__(self, spec: StateSpec, room: Room, tokens: int = 0) -> None:
        assert spec.shape is not None
        self.spec, self.rows, self.static = spec, room.rows, room.capacity is not None
        dtype = spec.dtype_for(room.dtype)
        self.data = zeros(room.rows, *spec.shape, dtype=dtype, device=room.device, static=self.static)
        self.tip: Tensor | None = None  # of a logged state, after each row's last token: see `statecache.replay`
        self.copies: Ring | None = None
        if room.slack and not spec.logged:
            self.copies = Ring(replace(spec, leased=False, window=room.slack), replace(room, slack=0))

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.data = revive(self.data, self.static)
        self.tip = None if self.tip is None else revive(self.tip, self.static)

    @property
    def entry(self) -> Tensor:
        """The state after each row's last token, to read and overwrite: (B, *D)."""
        self.cut()
        return self.data if self.rows == self.data.shape[0] else self.data[: self.rows]

    def cut(self) -> None:
        """Drop the history of gradients that a model left by overwriting the entry with gradients on."""
        if self.data.requires_grad:
            self.data.detach_()

    def put(self, state: Tensor) -> None:
        """Overwrite the entry with `state` (B, *D)."""
        self.entry.copy_(state.detach() if state.requires_grad else state)

    def put_tip(self, state: Tensor) -> None:
        """Have `state` (B, *D) as the tip."""
        if self.tip is None:
            self.tip = zeros(*state.shape, dtype=self.data.dtype, device=self.data.device, static=self.static)
        self.tip.copy_(state)

    def keep(self, step: Step) -> None:
        """Copy the entry before the step changes it, so that a rollback can come back to the step's start."""
        if self.copies is not None and step.tokens:
            taking = (
                None if step.count is None else (step.count > 0).long()
            )  # an idle row would crowd out an older copy
            self.copies.put(self.entry[:, None], Step(1, step.start - 1, taking))

    def reserve(self, end: int) -> None:
        """Make room for the copies of positions below `end`."""
        if self.copies is not None:
            self.copies.reserve(end)

    def take(self, rows: Tensor, length: int) -> None:
        self.data, self.rows, self.tip = keep_rows(self.data, rows, self.static), len(rows), None
        if self.copies is not None:
            self.copies.take(rows, self.copies.capacity)

    def reset(self, rows: int) -> None:
        self.rows = rows
        self.entry.zero_()
        if self.copies is not None:
            self.copies.reset(rows)

    def rollback(self, length: Tensor, moved: Tensor) -> None:
        """Take the copy made at each row's new length (B,), in the rows that moved (B,) bool."""
        if self.copies is not None:
            before = self.copies.past(1, Step(1, length, torch.ones_like(length)))[:, 0]
            moved = moved.view(-1, *[1] * (before.dim() - 1))
            self.entry.copy_(torch.where(moved, before, self.entry))

    def snapshot(self) -> tuple[Tensor, ...]:
        copies = () if self.copies is None else self.copies.snapshot()
        return (self.entry.clone(), *copies)

    def load(self, copies: tuple[Tensor, ...]) -> None:
        self.put(copies[0])
        if self.copies is not None:
            self.copies.load(copies[1:])

    def buffers(self) -> list[Tensor]:
        held = [self.data] if self.tip is None else [self.data, self.tip]
        return held if self.copies is None else held + self.copies.buffers()
