"""Entries in a narrower floating-point dtype than they are handed out in. Lossy.

For the states of recurrences, which are computed on in float32: they are read, stepped and written back, and so rounded
once a step. What is read can be written again without a change.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.store import Move, Slots


class Rounded:
    """Entries in `kept`, in `Dense`. What `read` gives is a copy, in `dtype`. See `Store`."""

    shows = False

    def __init__(
        self,
        kept: torch.dtype,
        rows: int,
        slots: int,
        shape: tuple[int, ...],
        *,
        axis: int = 1,
        dtype: torch.dtype,
        device: torch.device,
        static: bool = False,
    ) -> None:
        self.slots, self.dtype, self.kept = slots, dtype, kept
        self.dense = Dense(rows, slots, shape, axis=axis, dtype=kept, device=device, static=static)

    @property
    def plain(self) -> Tensor:
        return self.dense.plain

    def read(self, at: Slots) -> Tensor:
        return self.dense.read(at).to(self.dtype, copy=True)

    def write(self, at: Slots, entries: Tensor) -> None:
        self.dense.write(at, entries.detach().to(self.kept))

    def clear(self, rows: Sequence[int] | None, changes: Changes) -> None:
        self.dense.clear(rows, changes)

    def taken(self, rows: Sequence[int], used: int, changes: Changes) -> Move:
        return self.dense.taken(rows, used, changes)

    def fork(self, used: Sequence[int]) -> Rounded:
        return copy.deepcopy(self)

    def use(self, rows: int) -> None:
        self.dense.use(rows)

    def grow(self, slots: int) -> None:
        self.dense.grow(slots)
        self.slots = slots

    def buffers(self) -> list[Tensor]:
        return self.dense.buffers()
