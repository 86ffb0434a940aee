"""Pages that several stores hold, counted, and the slabs in which they lie.

P slots of a page, *D the shape of one entry. Tensors carry slots at the store's own axis; the comments write them as
(n, *D). Numbers and counts are on the host.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from statecache.storage.store import zeros

NONE = -1  # no page: its slots were never written, and read as zero

Rows = list[list[int]]  # the numbers of each row's pages, in the order of their slots


@dataclass(eq=False)
class Slab:
    """Pages in one tensor (G, N * P, *D): number `first` + n is the n % N-th of group n // N."""

    data: Tensor
    first: int
    each: int  # N
    counts: list[int] = field(init=False)  # how often each is held
    held: int = 0  # pages that are held at all

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.data) * self.each)

    def __contains__(self, page: int) -> bool:
        return 0 <= page - self.first < len(self.counts)


class Pool:
    """The pages of one state, in a cache and its forks. It grows by slabs; pages that nobody holds are used again.

    A page that is held more than once is not written. Stores in several threads may hold pages of one pool.
    """

    def __init__(self, home: Tensor, axis: int, size: int) -> None:
        """`home`: rows (B, M * P, *D) with slots at `axis`; page b * M + m is the m-th of row b. P is the `size`."""
        self.axis, self.size = axis, size
        self.dropped: deque[Rows] = deque()  # what tables gave back: at any moment, in any thread, under no lock
        shape = list(home.shape[1:])
        shape[axis - 1] = 1
        self._blank = zeros(*shape, dtype=home.dtype, device=home.device, static=False)
        self._lock = threading.Lock()
        self._slabs = [Slab(home, 0, home.shape[axis] // size)]
        self._free: list[int] = []  # a heap: what is taken one after the other shall lie so
        self._next = len(self._slabs[0].counts)  # the number of the next slab's first page
        self._extra = 0  # pages of all slabs but the first
        self._shares = 0  # over all pages, how many times more often they are held than once

    @property
    def shared(self) -> bool:
        """Whether any page is held more than once."""
        if self.dropped:
            with self._lock:
                self._sweep()
        return self._shares > 0

    @property
    def pages(self) -> int:
        """How many pages are held."""
        with self._lock:
            self._sweep()
            return sum(slab.held for slab in self._slabs)

    def buffers(self, rows: Rows) -> list[Tensor]:
        """The slabs in which these rows have pages."""
        found = {self._slab(pages[at]) for pages in rows for at, _ in self._runs(pages) if pages[at] != NONE}
        return [slab.data for slab in self._slabs if slab in found]

    # ---- who holds what

    def hold(self, pages: Iterable[int]) -> None:
        """Count these pages once more."""
        with self._lock:
            self._sweep()
            self._hold(pages)

    def exchange(self, old: Iterable[int], new: Iterable[int]) -> None:
        """Count `new` pages once more, and `old` ones once less."""
        with self._lock:
            self._hold(new)
            self._give(old)

    def counts(self, pages: Iterable[int]) -> list[int]:
        """How often each is held; 0 for none."""
        with self._lock:
            self._sweep()
            return [0 if page == NONE else self._slab(page).counts[page - self._slab(page).first] for page in pages]

    @contextmanager
    def taking(self, n: int) -> Iterator[list[int]]:
        """Pages with anything in them, held for a block; those that nobody else holds at its end are free again."""
        with self._lock:
            self._sweep()
            if n > len(self._free):
                self._grow(n - len(self._free))
            taken = [heapq.heappop(self._free) for _ in range(n)]
            self._hold(taken)
        try:
            yield taken
        finally:
            self.exchange(taken, ())

    # ---- what is in them

    def views(self, pages: Sequence[int]) -> list[Tensor]:
        """The entries of these pages, in as few views (n, *D) as they lie in."""
        return [self.view(pages[at], n) for at, n in self._runs(pages)]

    def view(self, page: int, n: int = 1) -> Tensor:
        """The entries of n pages that lie one behind the other, from this one on: (n * P, *D)."""
        if page == NONE:
            shape = list(self._blank.shape)
            shape[self.axis - 1] = n * self.size
            return self._blank.expand(shape)
        slab = self._slab(page)
        group, place = divmod(page - slab.first, slab.each)
        return slab.data[group].narrow(self.axis - 1, place * self.size, n * self.size)

    def whole(self, rows: Rows) -> Tensor | None:
        """The entries of all these rows as one view (B, M * P, *D), if their pages lie so."""
        first, each = rows[0][0], len(rows[0])
        if first == NONE:
            return None
        slab = self._slab(first)
        group, place = divmod(first - slab.first, slab.each)
        if place or slab.each != each or group + len(rows) > len(slab.data):
            return None
        if any(pages != list(range(first + b * each, first + (b + 1) * each)) for b, pages in enumerate(rows)):
            return None
        return slab.data if len(rows) == len(slab.data) else slab.data[group : group + len(rows)]

    # ---- inside

    def _slab(self, page: int) -> Slab:
        slabs = self._slabs  # another thread may put a list in its place
        return slabs[bisect_right(slabs, page, key=lambda slab: slab.first) - 1]

    def _runs(self, pages: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Which of these pages lie one behind the other: where each run begins, and how many they are."""
        at = 0
        while at < len(pages):
            n = self._run(pages, at)
            yield at, n
            at += n

    def _run(self, pages: Sequence[int], at: int) -> int:
        """How many of these pages lie one behind the other, from the at-th on."""
        first, n = pages[at], 1
        if first == NONE:
            while at + n < len(pages) and pages[at + n] == NONE:
                n += 1
            return n
        slab = self._slab(first)
        most = min(slab.each - (first - slab.first) % slab.each, len(pages) - at)  # a run ends with its group
        while n < most and pages[at + n] == first + n:
            n += 1
        return n

    def _hold(self, pages: Iterable[int]) -> None:
        slab = self._slabs[0] if self._slabs else None
        for page in pages:
            if page == NONE:
                continue
            if slab is None or page not in slab:
                slab = self._slab(page)
            count = slab.counts[page - slab.first] = slab.counts[page - slab.first] + 1
            self._shares += count > 1
            slab.held += count == 1

    def _give(self, pages: Iterable[int]) -> None:
        slab, left = self._slabs[0] if self._slabs else None, False
        for page in pages:
            if page == NONE:
                continue
            if slab is None or page not in slab:
                slab = self._slab(page)
            count = slab.counts[page - slab.first] = slab.counts[page - slab.first] - 1
            self._shares -= count > 0
            if not count:
                slab.held -= 1
                heapq.heappush(self._free, page)
                left = left or not slab.held
        if left:
            self._shrink()

    def _sweep(self) -> None:
        """Take back what tables that were dropped held."""
        while self.dropped:
            for pages in self.dropped.popleft():
                self._give(pages)

    def _grow(self, n: int) -> None:
        """Have n more pages, and twice as many as were added before: seldom."""
        n = max(n, self._extra)
        shape = [1, *self._blank.shape]
        shape[self.axis] = n * self.size
        data = zeros(*shape, dtype=self._blank.dtype, device=self._blank.device, static=False)
        slab = Slab(data, self._next, n)
        self._free = sorted([*self._free, *range(self._next, self._next + n)])
        self._slabs, self._next, self._extra = [*self._slabs, slab], self._next + n, self._extra + n

    def _shrink(self) -> None:
        """Let slabs go of which no page is held."""
        self._slabs = [slab for slab in self._slabs if slab.held]
        self._free = sorted(page for page in self._free if self._slabs and page in self._slab(page))
        self._extra = sum(len(slab.counts) for slab in self._slabs if slab.first)


class Table:
    """The pages that the rows of one store hold, for as long as it lives: dropped, it gives them back."""

    def __init__(self, pool: Pool, rows: Rows) -> None:
        self.pool = pool
        self.rows: Rows = []
        pool.hold(page for pages in rows for page in pages)
        self.rows = rows

    def __del__(self) -> None:
        if self.rows:
            self.pool.dropped.append(self.rows)  # counted by whoever looks next: this may run at any moment

    def put(self, places: Sequence[tuple[int, int]], pages: Sequence[int]) -> None:
        """Hold these pages at these places, row and column, instead of what is there."""
        old = [self.rows[row][column] for row, column in places]
        self.pool.exchange(old, pages)
        for (row, column), page in zip(places, pages, strict=True):
            self.rows[row][column] = page
