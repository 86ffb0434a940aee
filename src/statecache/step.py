"""One forward pass: which rows take part, where each stands, how many tokens it takes in, and the slots of these.

The entry of position p lives in slot p % C, for ever. This is the only file that knows the modulo; slots are computed
once a step, for all rings that are alike.

B rows, R of them in the step, T new tokens, C slots of a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from statecache.storage.store import MakeStore, Places, Slots, Span


@dataclass(frozen=True)
class Allocation:
    """How many rows and slots the states of one cache get, and where."""

    rows: int
    capacity: int | None  # of a row, in tokens; None: rings grow
    slack: int
    dtype: torch.dtype
    device: torch.device
    store: MakeStore


@dataclass(frozen=True)
class Standing:
    """What the host knows of a pass's rows, where they differ: which they are, where each stands, and its count."""

    rows: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]


class Landing:
    """Where entries are put that came from elsewhere: at the end of this row, which is to hold `length` tokens."""

    def __init__(self, row: int, length: int, device: torch.device) -> None:
        self.row, self.length, self.device = row, length, device
        self._steps: dict[int, Step] = {}

    def step(self, n: int) -> Step:
        """A pass that puts the last n entries, the same for all states: its numbers go to each device once."""
        made = self._steps.get(n)
        if made is None:
            first = self.length - n
            start, rows = torch.tensor([[first], [self.row]], device=self.device)
            known = Standing([self.row], [first], [n])
            made = self._steps[n] = Step(n, start, rows=rows, end=self.length, standing=known)
        return made


def offset(start: Tensor, window: int) -> Tensor:
    """The first position that a pass from `start` (any shape) on may look at: 0, or window - 1 before it."""
    return (start - window + 1).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Shift:
    """How the states that logs go on from move, before a pass writes into logs that are full: the same for all layers.

    One that is to stand inside the pass is taken from the pass itself instead of the log.
    """

    first: int | Tensor  # where they stand: (R,) where rows may differ
    most: int  # entries that they are moved over, at most
    count: Tensor | None  # (R,) entries that each is; None: `most`
    at: int | Tensor | None  # of the pass's tokens, after how many they stand: (R,), negative where they stay
    base: int | Tensor  # where they stand then

    def on(self, device: torch.device) -> Shift:
        """The same for states on another device than the clock's."""

        def there(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return Shift(there(self.first), self.most, there(self.count), there(self.at), there(self.base))


class Step:
    """One forward pass: each row stands at `start` and takes in `count` of the pass's T tokens, the first ones.

    start: an int where the host knows it and it is the same for every row; else (1,) for all rows, or (R,).
    count: (R,), each 0..T; None for all T.
    end: the length of the longest row afterwards, if the host knows it.
    rows: (R,) long, the rows of the cache that take part; None for all.
    tentative: a speculative round's: what is written lies past the ends of the rows, which stay where they are.

    standing: what the host knows of its rows, where they differ.

    shift: how logs get room for it, if they must.

    The first write into a ring or a lease calls what is `pending`: until then nothing is changed, and the step can be
    dropped.
    """

    def __init__(
        self,
        tokens: int,
        start: int | Tensor,
        count: Tensor | None = None,
        end: int | None = None,
        rows: Tensor | None = None,
        tentative: bool = False,
        begin: Callable[[], None] | None = None,
        standing: Standing | None = None,
    ) -> None:
        self.tokens, self.start, self.count, self.end = tokens, start, count, end
        self.rows, self.tentative, self.standing = rows, tentative, standing
        self.plain = (
            tokens == 1 and count is None and rows is None and not tentative
        )  # one token of every row, for good
        self.shift: Shift | None = None
        self.pending = begin
        self._made: dict[Any, Any] = {}  # what was computed for one ring and serves others

    def starts(self, begin: Callable[[], None]) -> Step:
        """Have `begin` called before the first write."""
        self.pending = begin
        return self

    def write(self) -> None:
        """Say that states are about to change."""
        if self.pending is not None:
            self.pending()

    def on(self, device: torch.device) -> Step:
        """The same step for states on another device than the clock's."""
        if not isinstance(self.start, Tensor) or self.start.device == device:
            return self
        if device not in self._made:
            count, rows = (None if x is None else x.to(device) for x in (self.count, self.rows))
            start, write = self.start.to(device), self.write
            moved = Step(self.tokens, start, count, self.end, rows, self.tentative, write, self.standing)
            moved.shift = None if self.shift is None else self.shift.on(device)
            self._made[device] = moved
        step: Step = self._made[device]
        return step

    def starts_on(self, device: torch.device) -> Tensor:
        """Where the rows stand, on this device: (R,), or (1,) where all stand alike."""
        start = self.on(device).start
        return start if isinstance(start, Tensor) else torch.full((1,), start, device=device)

    def places(self, device: torch.device) -> Tensor:
        """The position of each of the pass's tokens: (R, T), or (1, T) where all rows stand alike."""
        offsets = torch.arange(self.tokens, device=device)
        if isinstance(self.start, int):
            return (offsets + self.start)[None]
        return self.start.to(device)[:, None] + offsets

    @property
    def shared(self) -> bool:
        """Whether one set of slots serves every row."""
        if isinstance(self.start, int):
            return True
        return len(self.start) == 1 and self.count is None and self.rows is None

    # ---- slots, where the host knows where every row stands

    def runs(self, first: int, n: int, capacity: int) -> list[slice]:
        """The slots of n positions from `first` on: at most two runs where n <= C."""
        slot = first % capacity
        if slot + n <= capacity:
            return [slice(slot, slot + n)]
        return [slice(slot, capacity), *self.runs(0, slot + n - capacity, capacity)]

    def _spans(self, first: Callable[[int, int], int], n: int, capacity: int) -> Callable[[], list[Span]] | None:
        """The slots of n positions of each row from `first(start, count)` on, when they are asked for."""
        here = self.standing
        if here is None:
            return None
        rows = list(zip(here.rows, here.starts, here.counts, strict=True))
        return lambda: [(row, self.runs(first(start, count), n, capacity)) for row, start, count in rows]

    # ---- slots, where the device knows it

    def positions(self, first: int, n: int) -> Tensor:
        """Positions start + first, and the n - 1 after it: (n,), or (R, n) where rows may differ."""
        made: Tensor | None = self._made.get((first, n))
        if made is None:
            assert isinstance(self.start, Tensor)
            offsets = torch.arange(first, first + n, device=self.start.device)
            made = self.start + offsets if self.shared else self.start[:, None] + offsets
            self._made[first, n] = made
        return made

    def slots(self, first: int, n: int, capacity: int) -> Slots:
        """The slots of these positions in rings of C slots."""
        made: Slots | None = self._made.get((first, n, capacity))
        if made is None:
            known = self._spans(lambda start, count: start + first, n, capacity)
            made = self._made[first, n, capacity] = self._at(self.positions(first, n) % capacity, known)
        return made

    def held(self, n: int) -> Tensor:
        """Which of the n positions before the step exist: (n,) or (R, n) bool."""
        made: Tensor | None = self._made.get(("held", n))
        if made is None:
            made = self._made["held", n] = self.positions(-n, n) >= 0
        return made

    def takes(self, capacity: int | None = None) -> Tensor | None:
        """Which of the T tokens rows take in, (T,) or (R, T) bool; None for all.

        capacity: of a ring without a window, which never goes round: what lies beyond it is not taken in either.
        """
        if self.end is not None:
            capacity = None  # the host has seen that all fits
        if self.count is None and capacity is None:
            return None
        made: Tensor | None = self._made.get(("takes", capacity))
        if made is None:
            if self.count is not None:
                made = torch.arange(self.tokens, device=self.count.device) < self.count[:, None]
            if capacity is not None:
                fits = self.positions(0, self.tokens) < capacity
                made = fits if made is None else made & fits
            assert made is not None
            self._made["takes", capacity] = made
        return made

    def newest(self, capacity: int) -> tuple[Tensor, Tensor, Slots]:
        """Of more tokens than a ring has slots, the last C that each row takes in: which, if there are so many, where.

        (R, C) each.
        """
        made: tuple[Tensor, Tensor, Slots] | None = self._made.get(("newest", capacity))
        if made is None:
            assert self.count is not None and isinstance(self.start, Tensor)
            t = self.count[:, None] + torch.arange(-capacity, 0, device=self.count.device)  # below 0: no such token
            known = self._spans(lambda start, count: start + count - capacity, capacity, capacity)
            at = self._at((self.start[:, None] + t) % capacity, known)
            made = self._made["newest", capacity] = t.clamp(min=0), t >= 0, at
        return made

    def reach(self, window: int, capacity: int) -> tuple[Slots, Tensor]:
        """What tokens see through a window: the slots of window - 1 entries, and indices (R or 1, window - 1 + T).

        The indices put these entries and the new ones behind them in order of position, from `offset(start)` on.
        """
        made: tuple[Slots, Tensor] | None = self._made.get(("reach", window, capacity))
        if made is None:
            assert isinstance(self.start, Tensor)
            start, first = self.start.view(-1, 1), offset(self.start, window).view(-1, 1)
            order = first + torch.arange(window - 1 + self.tokens, device=start.device)  # positions
            index = torch.where(order < start, order - first, window - 1 + order - start)
            slot = order[:, : window - 1] % capacity
            known = self._spans(lambda start, count: max(start - window + 1, 0), window - 1, capacity)
            at = self._at(slot[0] if self.shared else slot, known)
            made = self._made["reach", window, capacity] = at, index.clamp(max=window - 2 + self.tokens)
        return made

    def _at(self, slot: Tensor, known: Callable[[], list[Span]] | None) -> Slots:
        if slot.dim() == 1:
            return slot
        rows: Tensor | None = self._made.get("rows")
        if rows is None:
            rows = torch.arange(len(slot), device=slot.device) if self.rows is None else self.rows
            rows = self._made["rows"] = rows[:, None]
        return Places(rows, slot, known)
