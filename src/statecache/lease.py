"""Leases: a state that its model updates in place, one entry a row.

B rows, R of them in a step, *D the state's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statecache.ring import Ring
from statecache.spec import StateSpec
from statecache.step import Allocation, Landing, Step
from statecache.storage.changes import Changes
from statecache.storage.store import Move, Places, Store, fixed, put_back, whole

ONE = slice(0, 1)


@dataclass(frozen=True, eq=False)
class Loan:
    """What a kernel needs to update a state by itself: (B, n, *D), the slot to read, and the one to write, if any.

    The buffer has the dtype that the state is kept in, which may be narrower than the one to compute in.
    """

    buffer: Tensor
    read: int
    write: int | None


class Lease:
    """A state of window 1 that its model overwrites: the state after each row's last token.

    To go back, one of two: `copies` of the states before, of which that after position p lies in slot p % slack, taken
    at the start of the step that follows p; or `base`, the state where a log of what came since begins. See
    `statecache.replay`. `shown`: the entry itself, None where the store can only make copies of it.
    """

    def __init__(self, spec: StateSpec, room: Allocation, back: bool = True) -> None:
        """`back`: whether rows are to go back, other than by dropping a speculative round."""
        assert spec.shape is not None
        self.spec, self.room, self.back = spec, room, back
        self.store = room.store(
            room.rows,
            1,
            spec.shape,
            axis=1,
            dtype=spec.dtype_for(room.dtype),
            device=room.device,
            static=room.capacity is not None,
        )
        self.device, self.dtype = self.store.buffers()[0].device, spec.dtype_for(room.dtype)
        self.copies: Ring | None = None
        self.base: Lease | None = None
        self._look()
        if room.slack and spec.logged:
            self.log_from_here(spec)
        elif room.slack:
            self.copies = Ring(replace(spec, leased=False, window=room.slack), replace(room, slack=0))

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._look()

    def __getstate__(self) -> dict[str, object]:
        self.detach()  # a tensor with a gradient's history can neither be copied nor pickled
        return {name: value for name, value in self.__dict__.items() if name != "shown"}

    def log_from_here(self, spec: StateSpec) -> None:
        """Roll back by a log from now on, as `spec` says, instead of by copies."""
        self.spec, self.copies = spec, None
        if self.back:
            rows = len(self.entry)
            # rows that were gathered may be more than were allocated, where they do not keep their addresses
            room = replace(self.room, slack=0, rows=max(rows, self.room.rows))
            base = Lease(replace(spec, logged=False), room)
            base.use(rows)
            base.store.write(ONE, self.store.read(ONE))
            self.base = base

    # ---- in a step

    @property
    def entry(self) -> Tensor:
        """The state after each row's last token: (B, *D). Where the store can show it, to read and overwrite."""
        if self.shown is None:
            return self.store.read(ONE).squeeze(1)
        if self.shown.requires_grad:
            self.detach()
            assert self.shown is not None
        return self.shown

    def detach(self) -> None:
        """Drop the history of gradients that a model left by overwriting the entry with gradients on."""
        if self.shown is not None and self.shown.requires_grad:
            for buffer in self.store.buffers():
                buffer.detach_()
            self._look()

    def lend(self, step: Step) -> Loan:
        """The state for a kernel that reads and writes it itself; in a speculative round it must not write.

        Raises TypeError where the store keeps it in another form.
        """
        held = self.store.plain
        if held is None:
            raise TypeError(f'state "{self.spec.name}": a {type(self.store).__name__} store lends no buffer')
        step.write()
        return Loan(held, 0, None if step.tentative else 0)

    def read(self, step: Step) -> Tensor:
        """The states of the step's rows (R, *D); of all rows where the store can show them, to overwrite in place."""
        rows = step.on(self.device).rows
        return self.entry if rows is None else self.entry.index_select(0, rows)

    def write(self, state: Tensor, step: Step) -> None:
        """Overwrite the states of the step's rows by `state` (R, *D)."""
        step.write()
        if state is self.shown:
            return
        rows = step.on(self.device).rows
        if rows is None:
            self.put(state)
        else:
            self.store.write(Places(rows[:, None], torch.zeros_like(rows)[:, None]), state[:, None])

    def put(self, state: Tensor) -> None:
        """Overwrite every row by `state` (B, *D)."""
        if self.shown is None:
            self.store.write(ONE, state[:, None])
        else:
            self.entry.copy_(state.detach() if state.requires_grad else state)

    def keep(self, step: Step) -> None:
        """Copy the entry before the step changes it, so that a rollback can come back to the step's start."""
        if self.copies is not None and step.tokens:
            step.write()
            # an idle row would crowd out an older copy
            taking = None if step.count is None else (step.count > 0).long()
            self.copies.put(self.read(step)[:, None], Step(1, step.start - 1, taking, step.end, step.rows))

    # ---- between steps

    def reserve(self, end: int) -> None:
        """Make room for the copies of positions below `end`."""
        if self.copies is not None:
            self.copies.reserve(end)

    def taken(self, rows: Sequence[int], length: int, changes: Changes) -> Move:
        """Prepare to keep these rows in this order, and then to `use` so many."""
        moves = [self.store.taken(rows, 1, changes)]
        if self.base is not None:
            moves.append(self.base.taken(rows, length, changes))
        if self.copies is not None:
            moves.append(self.copies.taken(rows, self.copies.capacity, changes))

        def move(changes: Changes) -> None:
            for each in moves:
                each(changes)

        return move

    def forked(self, lengths: Sequence[int]) -> dict[int, Store]:
        """A fork of the store of its copies, as of a ring's; states are written as a whole, so nobody shares them."""
        return {} if self.copies is None else self.copies.forked([self.copies.capacity] * len(lengths))

    def use(self, rows: int) -> None:
        """Have this many rows in use."""
        self.store.use(rows)
        for other in (self.base, self.copies):
            if other is not None:
                other.use(rows)
        self._look()

    def reset(self, rows: Sequence[int] | None, changes: Changes) -> None:
        """Zero these rows, None for all."""
        self.detach()
        self.store.clear(rows, changes)
        for other in (self.base, self.copies):
            if other is not None:
                other.reset(rows, changes)

    def empty(self, changes: Changes) -> None:
        """Be as before the first token."""
        self.detach()
        self.store.clear(None, changes)
        if self.base is not None:
            self.base.empty(changes)

    def rollback(self, length: Tensor, moved: Tensor) -> None:
        """Take the copy made at each row's new length (B,), in the rows that moved (B,) bool."""
        if self.copies is not None:
            before = self.copies.past(1, Step(1, length, end=0))[:, 0]
            moved = moved.view(-1, *[1] * (before.dim() - 1))
            self.put(torch.where(moved, before, self.entry))

    def snapshot(self) -> tuple[Tensor, ...]:
        """What a mark must copy: the entry (B, 1, *D), and what it needs to go back from there. Perhaps views."""
        self.detach()
        further = [other.snapshot() for other in (self.base, self.copies) if other is not None]
        return (whole(self.store), *(held for each in further for held in each))

    def load(self, copies: tuple[Tensor, ...], changes: Changes) -> None:
        """Put copies of a snapshot back."""
        self.detach()
        put_back(self.store, copies[0], 1, changes)
        for other in (self.base, self.copies):
            if other is not None:
                other.load(copies[1:], changes)

    def row(self, row: int, length: int) -> Tensor:
        """A row's state (1, *D); of a convolution its inputs in order, (n, C), as rings give them. May be a view."""
        if self.spec.kind == "conv":
            inputs = self.entry[row].movedim(-1, 0)
            return inputs[max(len(inputs) - length, 0) :]
        return self.entry[row : row + 1]

    def lies(self, length: int) -> bool:
        """Whether what `row` gives is the entry itself, to be overwritten, and all that there is of it."""
        return self.shown is not None and self.base is None and self.spec.kind != "conv"

    def admit(self, entries: Tensor, landing: Landing, changes: Changes) -> None:
        """Put what `row` gave of another lease into the row where it lands."""
        self.detach()
        if self.spec.kind == "conv":
            inputs, entries = entries, entries.new_zeros(1, *self.entry.shape[1:])
            entries[0, ..., entries.shape[-1] - len(inputs) :] = inputs.movedim(0, -1)
        for lease in (self, self.base):
            if lease is None:
                continue
            if lease.store.plain is None:
                lease.write(entries, landing.step(1))
            else:
                changes.copy(lease.store.plain[landing.row], entries)

    def buffers(self) -> list[Tensor]:
        others = [other.buffers() for other in (self.base, self.copies) if other is not None]
        return [*self.store.buffers(), *(buffer for buffers in others for buffer in buffers)]

    # ---- inside

    def _look(self) -> None:
        """Look at the entry where it now lies; None where the store can only make copies of it."""
        self.shown: Tensor | None = None
        if self.store.shows:
            entry = self.store.read(ONE).squeeze(1)
            self.shown = fixed(entry) if self.room.capacity is not None else entry
