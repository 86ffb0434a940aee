"""What the rows of a cache should hold, as lists: the oracle's side of every operation. No tensors.

Nothing is changed in place, so that what was, what is and what would be can be kept side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Held:
    """The ids of each row, the shortest length that it may go back to, and where its recurrences were copied.

    No rows at all: nobody has said yet how many there are.
    """

    rows: list[list[int]] = field(default_factory=list)
    floor: list[int] = field(default_factory=list)
    kept: list[frozenset[int]] = field(default_factory=list)

    @staticmethod
    def nothing(rows: int) -> Held:
        """That many empty rows."""
        return Held([[] for _ in range(rows)], [0] * rows, [frozenset({0})] * rows)

    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]

    def opened(self, taken: list[int], slack: int) -> Held:
        """A pass of so many tokens a row has begun: states are folded no farther than the ends of their rows."""
        ends = zip(self.floor, self.lengths(), taken, strict=True)
        return Held(self.rows, [max(low, min(n + t - slack, n)) for low, n, t in ends], self.kept)

    def fed(self, new: list[list[int]], slack: int) -> Held:
        """A pass has brought each row these ids."""
        rows = [row + ids for row, ids in zip(self.rows, new, strict=True)]
        floor = [max(low, len(row) - slack) for low, row in zip(self.floor, rows, strict=True)]
        starts = zip(self.kept, self.lengths(), new, strict=True)
        kept = [frozenset({n for n in was if n <= start} | {start}) if ids else was for was, start, ids in starts]
        return Held(rows, floor, kept)

    def without(self, forget: list[int]) -> Held:
        """The last tokens of each row are forgotten, so many."""
        return Held(
            [row[: len(row) - n] for row, n in zip(self.rows, forget, strict=True)],
            self.floor,
            self.kept,
        )

    def of(self, index: list[int]) -> Held:
        """These rows, in this order."""
        return Held(*([part[i] for i in index] for part in (self.rows, self.floor, self.kept)))

    def may_forget(self, forget: list[int], copied: bool) -> bool:
        """Whether these tokens can be taken back. `copied`: only to where the recurrences were copied."""
        ends = zip(forget, self.lengths(), self.floor, self.kept, strict=True)
        return all(n == 0 or (end - n >= low and (not copied or end - n in kept | {0})) for n, end, low, kept in ends)

    def most(self, copied: bool) -> list[int]:
        """The most that each row may forget."""
        if not copied:
            return [end - low for end, low in zip(self.lengths(), self.floor, strict=True)]
        ends = zip(self.lengths(), self.floor, self.kept, strict=True)
        return [max(end - n for n in {end, *kept, 0} if low <= n <= end) for end, low, kept in ends]
