"""Rotary factors that change with the length of a row, so that keys rotated before and after do not go together.

transformers has two such kinds: longrope, which has other factors beyond the length it was first trained with, and
dynamic, which has others at every length beyond. A pass takes one set for all of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from statecache.errors import RotaryError


@dataclass(frozen=True)
class Rotary:
    """How the factors by which a model rotates its keys change with the length of a row.

    They change once beyond each length of `once`, and at every token beyond `always`. `kind`: what a configuration
    calls it.
    """

    kind: str
    once: tuple[int, ...] = ()
    always: int | None = None

    def shortest(self, length: int) -> int:
        """The shortest row that is rotated as a row of this length is; 0 for the factors of short rows."""
        if self.always is not None and length > self.always:
            return length
        return max((n + 1 for n in self.once if n < length), default=0)

    def longest(self, length: int) -> int | None:
        """The longest row that is rotated as a row of this length is; None for no end."""
        if self.always is not None and length > self.always:
            return length
        ends = [n for n in (*self.once, self.always) if n is not None and n >= length]
        return min(ends, default=None)

    @property
    def first(self) -> int:
        """The longest row before any change."""
        return min(n for n in (*self.once, self.always) if n is not None)

    @property
    def told(self) -> str:
        """What errors say of it."""
        beyond = [f"beyond {n} tokens" for n in self.once]
        if self.always is not None:
            beyond.append(f"with every token beyond {self.always}")
        return f"the rotary factors ({self.kind}) change with the length of a row, {' and '.join(beyond)}"

    def check_unseen(self, limit: int | None) -> None:
        """Raise RotaryError where rows of up to `limit` tokens, None for no end, could come to change their factors.

        For a step of which the host does not know how long its rows are.
        """
        if limit is None or limit > self.first:
            raise RotaryError(
                f"a compiled or captured step does not show how long its rows are, and {self.told}: run it eagerly, or "
                f"make the cache with capacity={self.first} or less"
            )

    def rotate(
        self, rotated: Sequence[int], chosen: Sequence[int] | None, lengths: Sequence[int], ends: Sequence[int]
    ) -> list[int]:
        """By row, the shortest row that is rotated alike, after a pass that takes rows from `lengths` to `ends` tokens.

        `rotated`: the same before it, of all rows; `chosen`: which of them the pass is over, None for all.
        Raises RotaryError where the keys that a row holds are rotated otherwise, or rows of the pass differ.
        """
        after, first = list(rotated), None
        for b, (length, end) in enumerate(zip(lengths, ends, strict=True)):
            if end == length:
                continue
            row, wanted = b if chosen is None else chosen[b], self.shortest(end)
            if length and rotated[row] != wanted:
                raise RotaryError(
                    f"row {row} holds {length} tokens and the step makes them {end}, but {self.told}: the keys that it "
                    "holds would have to be rotated anew; reset() the row and feed its whole text at once"
                )
            if first is not None and wanted != after[first[0]]:
                raise RotaryError(
                    f"rows {first[0]} and {row} are {first[1]} and {end} tokens long after the step, but {self.told}, "
                    "and one forward pass takes one set of them: feed these rows in passes of their own"
                )
            after[row] = wanted
            first = first or (row, end)
        return after
