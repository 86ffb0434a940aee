"""Entries in pages of a few slots, which rows and forks share until one of them writes there."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.pool import NONE, Pool, Table
from statecache.storage.store import Move, Slots, Span

PAGE = 16  # slots of a page, at most
P = ParamSpec("P")
T = TypeVar("T")


def untraced(run: Callable[P, T]) -> Callable[P, T]:
    """Keep `torch.compile` out of it. `torch.compiler.disable` alone imports the compiler, which takes two seconds."""
    made: list[Callable[P, T]] = []

    @wraps(run)
    def plainly(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:  # there is nothing yet to keep out
            return run(*args, **kwargs)
        if not made:
            made.append(torch.compiler.disable(run))  # type: ignore[no-untyped-call]
        return made[0](*args, **kwargs)

    return plainly


class Paged:
    """M pages of P slots each for the C slots of a row, the last one filled up. See `Store`.

    Rows begin as a `Dense` whose pages nobody counts. Once rows are repeated or forked, the pages of all of them are in
    a `Pool`, and a `table` says which are whose: one that is held more than once is copied before it is written. While
    a row's pages lie in order, slots in a run are a view, as in `Dense`; else what is read is put together. When
    nothing is shared any more, the next write puts rows in order again.

    Nothing is shared at fixed addresses, in a store of one slot, which every step writes whole, and without `shares`.
    """

    shows = False
    plain = None

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
        shares: bool = True,
    ) -> None:
        self.axis, self.slots, self.size = axis, slots, min(PAGE, slots)
        self.shares = shares and not static
        whole = _pages(slots, self.size) * self.size
        self._lay(Dense(rows, whole, shape, axis=axis, dtype=dtype, device=device, static=static))

    def __getstate__(self) -> dict[str, object]:
        """As rows of its own, in order."""
        whole = self.whole
        if whole is None:
            whole = self._in_order()
        elif whole.data.untyped_storage().nbytes() > whole.data.nbytes:  # of a slab with pages of others
            whole = Dense.over(whole.data.clone(), self.axis)
        kept = {name: value for name, value in self.__dict__.items() if name not in ("table", "_views")}
        return {**kept, "whole": whole}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({**state, "table": None, "_views": {}})

    def _lay(self, whole: Dense) -> None:
        """Have these rows, whose pages nobody counts."""
        self.whole: Dense | None = whole
        self.table: Table | None = None
        self._views: dict[int, list[Tensor]] = {}  # of a row's pages, all of them, in order
        self.use(whole.rows)

    def hold(self, table: Table, whole: Dense | None) -> None:
        self.table, self.whole, self._views = table, whole, {}
        self.use(len(table.rows))

    def use(self, rows: int) -> None:
        self.rows = rows
        if self.whole is not None:
            self.whole.use(rows)

    def read(self, at: Slots) -> Tensor:
        return self._read(at) if self.whole is None else self.whole.read(at)

    def write(self, at: Slots, entries: Tensor) -> None:
        if self.table is not None:
            self._write(at, entries)
            return
        assert self.whole is not None
        self.whole.write(at, entries)

    # ---- between steps

    def clear(self, rows: Sequence[int] | None, changes: Changes) -> None:
        if self.whole is not None and not self._shared():
            self.whole.clear(rows, changes)
        elif rows is None:
            self._lay(self._rows_of_its_own())
        else:
            table = self._paged()
            places = [(row, column) for row in set(rows) for column in range(len(table.rows[row]))]
            table.put(places, [NONE] * len(places))
            self.whole, self._views = None, {}

    def grow(self, slots: int) -> None:
        if self.whole is not None and not self._shared():
            size = min(PAGE, slots)
            if _pages(slots, size) * size < self.whole.slots:
                size = self.size
            self.whole.grow(_pages(slots, size) * size)
            self.slots, self.size = slots, size
            self._lay(self.whole)
            return
        table, more = self._paged(), _pages(slots, self.size) - _pages(self.slots, self.size)
        if more:
            for pages in table.rows:
                pages += [NONE] * more
            self.whole, self._views = None, {}
        self.slots = slots

    def taken(self, rows: Sequence[int], used: int, changes: Changes) -> Move:
        repeated = len(set(rows)) < len(rows)
        if self.whole is not None and not (self._sharing and (repeated or self._shared())):
            move = self.whole.taken(rows, used, changes)
            return lambda moves: self._moved(move, moves)
        table, kept = self._paged(), _pages(used, self.size)
        chosen = [list(table.rows[row]) for row in rows]
        whole = None if repeated else table.pool.whole(chosen)
        if whole is None:
            chosen = [pages[:kept] + [NONE] * (len(pages) - kept) for pages in chosen]
        made = Table(table.pool, chosen)
        dense = None if whole is None else Dense.over(whole, self.axis)
        return lambda _: self.hold(made, dense)

    def _moved(self, move: Move, changes: Changes) -> None:
        move(changes)
        assert self.whole is not None
        self._lay(self.whole)

    def fork(self, used: Sequence[int]) -> Paged:
        if not self._sharing:
            return copy.deepcopy(self)
        table = self._paged()
        pool, rows = table.pool, [list(pages) for pages in table.rows[: self.rows]]
        ends: list[tuple[int, int]] = []  # pages that either writes next: this one keeps them, and its rows their order
        for row, (pages, n) in enumerate(zip(rows, used, strict=True)):
            full = n // self.size
            if n % self.size and pages[full] != NONE:
                ends.append((row, full))
                full += 1
            pages[full:] = [NONE] * (len(pages) - full)
        with pool.taking(len(ends)) as new:
            for (row, column), page in zip(ends, new, strict=True):
                pool.view(page).copy_(pool.view(rows[row][column]))
                rows[row][column] = page
            held = Table(pool, rows)
        other = Paged.__new__(Paged)
        other.__dict__.update(self.__dict__)
        whole = pool.whole(rows)
        other.hold(held, None if whole is None else Dense.over(whole, self.axis))
        return other

    def buffers(self) -> list[Tensor]:
        if self.table is not None:
            return self.table.pool.buffers(self.table.rows)
        assert self.whole is not None
        return self.whole.buffers()

    # ---- whose pages are whose

    @property
    def _sharing(self) -> bool:
        """Whether rows and forks may hold pages together."""
        return self.shares and self.slots > 1

    def _shared(self) -> bool:
        """Whether a page may be held more than once."""
        return self.table is not None and self.table.pool.shared

    def _paged(self) -> Table:
        """Whose pages are whose, counted from now on."""
        if self.table is None:
            assert self.whole is not None
            data, each = self.whole.data, _pages(self.slots, self.size)
            rows = [list(range(b * each, (b + 1) * each)) for b in range(len(data))]
            self.table = Table(Pool(data, self.axis, self.size), rows)
        return self.table

    def _own(self, spans: list[Span]) -> None:
        """Have the pages at these slots held by their row alone, with what was in them."""
        table = self._paged()
        pool, rows = table.pool, table.rows
        places = list(
            dict.fromkeys(
                (row, column)
                for row, runs in spans
                for at in runs
                for column in range(at.start // self.size, _pages(at.stop, self.size))
            )
        )
        held = [rows[row][column] for row, column in places]
        left = dict(zip(held, pool.counts(held), strict=True))
        copied = []
        for place, page in zip(places, held, strict=True):
            if page == NONE or left[page] > 1:  # of the rows that hold it, the last may keep it
                copied.append(place)
                left[page] -= 1
        if not copied:
            return
        with pool.taking(len(copied)) as new:
            for (row, column), page in zip(copied, new, strict=True):
                pool.view(page).copy_(pool.view(rows[row][column]))
            table.put(copied, new)
        self.whole = None
        for row, _ in copied:
            self._views.pop(row, None)

    # ---- where pages are counted

    @untraced  # what is counted on the host is for no graph
    def _read(self, at: Slots) -> Tensor:
        return self._gathered(self._spans(at))

    @untraced
    def _write(self, at: Slots, entries: Tensor) -> None:
        if self._shared():
            spans = self._spans(at)
            self._own(spans)
            if self.whole is None:
                self._scatter(spans, entries.detach())
                return
        elif self.whole is None:
            self._lay(self._in_order())
        assert self.whole is not None
        self.whole.write(at, entries)

    def _spans(self, at: Slots) -> list[Span]:
        """The slots of each row, on the host. Waits for the device where it alone knows them."""
        if isinstance(at, slice):
            return [(row, [at]) for row in range(self.rows)]
        if isinstance(at, Tensor):
            runs = _runs(at.tolist())
            return [(row, runs) for row in range(self.rows)]
        if at.known is not None:
            return at.known()
        return list(zip(at.rows[:, 0].tolist(), map(_runs, at.slots.tolist()), strict=True))

    def _pieces(self, span: Span) -> list[Tensor]:
        """The entries of a row at these slots, as views (n, *D)."""
        row, runs = span
        axis, found = self.axis - 1, []
        if row not in self._views:
            table = self._paged()
            self._views[row] = table.pool.views(table.rows[row])
        for at in runs:
            first = 0
            for view in self._views[row]:
                n = view.shape[axis]
                start, stop = max(at.start - first, 0), min(at.stop - first, n)
                if start < stop:
                    found.append(view if stop - start == n else view.narrow(axis, start, stop - start))
                elif stop <= 0:
                    break
                first += n
        return found

    def _gathered(self, spans: list[Span]) -> Tensor:
        """The entries at these slots (R, n, *D)."""
        rows, blank = [self._pieces(span) for span in spans], self._paged().pool.view(NONE)
        if len(rows) == len(rows[0]) == 1:
            return rows[0][0][None]
        shape = [len(rows), *blank.shape]
        shape[self.axis] = sum(at.stop - at.start for at in spans[0][1])
        made = blank.new_empty(shape)
        for row, pieces in enumerate(rows if shape[self.axis] else ()):
            torch.cat(pieces, self.axis - 1, out=made[row])
        return made

    def _scatter(self, spans: list[Span], entries: Tensor) -> None:
        axis = self.axis - 1
        for span, new in zip(spans, entries, strict=True):
            first = 0
            for piece in self._pieces(span):
                n = piece.shape[axis]
                piece.copy_(new.narrow(axis, first, n))
                first += n

    def _in_order(self) -> Dense:
        """All rows, with pages of their own, in order."""
        table, made = self._paged(), self._rows_of_its_own()
        for row, pages in enumerate(table.rows):
            torch.cat(table.pool.views(pages), self.axis - 1, out=made.data[row])
        return made

    def _rows_of_its_own(self) -> Dense:
        """As many rows of zeros."""
        table = self._paged()
        blank, slots = table.pool.view(NONE), _pages(self.slots, self.size) * self.size
        shape = (*blank.shape[: self.axis - 1], *blank.shape[self.axis :])
        made = Dense(len(table.rows), slots, shape, axis=self.axis, dtype=blank.dtype, device=blank.device)
        made.use(self.rows)
        return made


def _pages(slots: int, size: int) -> int:
    """How many pages of this size hold so many slots."""
    return -(-slots // size)


def _runs(slots: Sequence[int]) -> list[slice]:
    """These slots, as few slices as there can be."""
    runs: list[slice] = []
    for slot in slots:
        if runs and runs[-1].stop == slot:
            runs[-1] = slice(runs[-1].start, slot + 1)
        else:
            runs.append(slice(slot, slot + 1))
    return runs
