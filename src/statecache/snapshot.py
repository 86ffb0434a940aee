"""What can be come back to: a mark, in place, and a snapshot, one row's states as a value.

n entries of a row, *D the shape of one entry.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from statecache.clock import Known


@dataclass(eq=False)
class Mark:
    """A point that `restore` comes back to, as often as wanted: lengths, and copies of what later steps overwrite."""

    owner: weakref.ref[object]
    lengths: list[int]
    clock: tuple[Tensor, Known] | None
    copies: Mapping[str, tuple[Tensor, ...]] = field(repr=False)
    behind: bool = False  # whether recurrences had yet to be brought to their rows' ends
    code: str | None = None  # of recurrent states' copies, see `storage.at_rest`
    stale: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies. They do not grow with the length."""
        held = [t for copies in self.copies.values() for t in copies] + ([] if self.clock is None else [self.clock[0]])
        return sum(t.untyped_storage().nbytes() for t in held)


class Marks:
    """The marks of one cache that are still held, and how long each row is in the longest of them.

    A row that stands at or beyond that length cannot write over any mark, which is all that a step has to look at.
    """

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Mark] = weakref.WeakSet()
        self.longest: list[int] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_held": None, "longest": []}  # marks are of one cache: its copies have none

    def __setstate__(self, state: dict[str, object]) -> None:
        self._held, self.longest = weakref.WeakSet(), []

    def __iter__(self) -> Iterator[Mark]:
        return (mark for mark in list(self._held) if mark.stale is None)

    def add(self, mark: Mark) -> None:
        """Look after this mark."""
        self._held.add(mark)
        self._measure()

    def written(self, lengths: Sequence[int], rows: Sequence[int] | None = None, taken: Sequence[int] = ()) -> None:
        """Rows of these `lengths` are about to be written from their ends on: marks of longer ones are stale.

        rows: those that are, None for all; taken: how many tokens each of them takes in, nothing for some.
        Said before a pass, since not every pass is closed: some are interrupted, and a round may keep nothing.
        """
        if not self.longest or not any(map(operator.lt, lengths, self.longest)):
            return
        chosen = range(len(lengths)) if rows is None else rows
        writing = [row for row, n in zip(chosen, taken or [1] * len(chosen), strict=True) if n]
        for mark in self:
            for row in writing:
                if row < len(mark.lengths) and lengths[row] < mark.lengths[row]:
                    mark.stale = (
                        f"row {row} was marked at {mark.lengths[row]} tokens and written again from {lengths[row]} on"
                    )
                    break
        self._measure()

    def invalidate(self, why: str, fed: bool = False) -> None:
        """All of them are stale; `fed`: those that hold tokens."""
        for mark in self:
            if not fed or any(mark.lengths):
                mark.stale = why
        self._measure()

    def _measure(self) -> None:
        lengths = [mark.lengths for mark in self]
        rows = max(map(len, lengths), default=0)
        self.longest = [max(held[row] for held in lengths if row < len(held)) for row in range(rows)]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One row's states as a value: put it into any row of a cache of the same model with `admit`.

    `entries`: of each state by name, (n, *D) in order of position, the last being that of the row's last token: all of
    them of a state without a window, else as many as the window; (1, *D) of a recurrence. `tokens`: the ids, if the
    caller gave them. `rotated`: see `Known`. `point`: whether states without a window are left out, so that only a row
    which begins with the same tokens can take it, and goes back to there; its bytes do not grow with the length.
    """

    length: int
    entries: Mapping[str, Tensor] = field(repr=False)
    made_for: str  # digest of what the model remembers
    tokens: tuple[int, ...] | None = None
    rotated: int = 0
    point: bool = False

    def on(self, device: torch.device) -> Snapshot:
        """The same on another device."""
        return replace(self, entries={name: entries.to(device) for name, entries in self.entries.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return sum(entries.numel() * entries.itemsize for entries in self.entries.values())
