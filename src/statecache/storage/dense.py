"""Entries in one tensor, as they come."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from statecache.storage.changes import Changes
from statecache.storage.store import Move, Places, Slots, revive, zeros

WHOLE = 1 << 20  # bytes of a row that moves as a whole, however few of its slots are used


class Dense:
    """(B, C, *D), with the slot axis C moved to `axis`; at a fixed address if `static`. See `Store`."""

    shows = True

    def __init__(
        self,
        rows: int,
        slots: int,
        shape: tuple[int, ...],
        *,
        axis: int = 1,
        dtype: torch.dtype,
        device: torch.device,
        static: bool = False,
    ) -> None:
        self.axis, self.static = axis, static
        full = (rows, *shape[: axis - 1], slots, *shape[axis - 1 :])
        self.hold(zeros(*full, dtype=dtype, device=device, static=static), rows)

    @classmethod
    def over(cls, data: Tensor, axis: int) -> Dense:
        """A store whose rows and slots are this tensor's, at addresses that may move."""
        made = cls.__new__(cls)
        made.axis, made.static = axis, False
        made.hold(data, len(data))
        return made

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.hold(revive(self.data, self.static), self.rows)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_used"}

    def hold(self, data: Tensor, rows: int) -> None:
        self.data, self.slots = data, data.shape[self.axis]
        self.use(rows)

    def use(self, rows: int) -> None:
        self.rows = rows
        self._used = self.data if rows == self.data.shape[0] else self.data[:rows]

    @property
    def plain(self) -> Tensor:
        return self._used

    def read(self, at: Slots) -> Tensor:
        if isinstance(at, slice):
            return self._used.narrow(self.axis, at.start, at.stop - at.start)
        if isinstance(at, Tensor):
            return self._used.index_select(self.axis, at)
        return self._used[self._index(at)].movedim(1, self.axis)

    def write(self, at: Slots, entries: Tensor) -> None:
        if entries.requires_grad:
            entries = entries.detach()
        if isinstance(at, slice):
            self.read(at).copy_(entries)
        elif isinstance(at, Tensor):
            self._used.index_copy_(self.axis, at, entries)
        else:
            self._used[self._index(at)] = entries.movedim(self.axis, 1)

    def _index(self, at: Places) -> tuple[Tensor | slice, ...]:
        # a slice between two index tensors moves both to the front: (R, n, *D)
        return (at.rows, *[slice(None)] * (self.axis - 1), at.slots)

    # ---- between steps

    def clear(self, rows: Sequence[int] | None, changes: Changes) -> None:
        changes.zero(self.data, None if rows is None else sorted(set(rows)))

    def grow(self, slots: int) -> None:
        shape = (*self.data.shape[: self.axis], slots, *self.data.shape[self.axis + 1 :])
        wider = zeros(*shape, dtype=self.data.dtype, device=self.data.device, static=self.static)
        wider.narrow(self.axis, 0, self.slots).copy_(self.data)
        self.hold(wider, self.rows)

    def taken(self, rows: Sequence[int], used: int, changes: Changes) -> Move:
        if self.static:
            return lambda moves: self._move(rows, used, moves)
        with torch.inference_mode(False):
            data = self.data.new_empty(len(rows), *self.data.shape[1:])
        changes.copy(data, self.data, rows)
        return lambda _: self.hold(data, len(rows))

    def fork(self, used: Sequence[int]) -> Dense:
        return copy.deepcopy(self)

    def _move(self, rows: Sequence[int], used: int, changes: Changes) -> None:
        whole = self.data.shape[1:]
        if math.prod(whole) * self.data.itemsize <= WHOLE:
            used = self.slots
        held = self.data.narrow(self.axis, 0, used)
        # what stands before the slots, as heads, apart: each is one piece of memory
        parts = [held] if used == self.slots or self.axis == 1 else held.flatten(1, self.axis - 1).unbind(1)
        for part in parts:
            changes.take(part, rows)
        self.use(len(rows))

    def buffers(self) -> list[Tensor]:
        return [self.data]
