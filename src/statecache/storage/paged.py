"""Entries in pages of a few slots, each found through a table. Rows move by the numbers of their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from statecache.storage.store import Move, Slots, revive, zeros

PAGE = 16  # slots of a page, at most


class Paged:
    """A pool of pages, P slots each, and a table (B, M) of the M pages that hold a row's C slots. See `Store`.

    Page n of the pool (B, M * P, *D) is the n % M-th of its n // M-th row. A row that is repeated gets pages of its
    own. While rows have their pages in the order of the pool, as they do until some are moved at fixed addresses, slots
    in a run are read as a view that lies as `Dense` does; else entries are gathered to be read.
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
    ) -> None:
        self.axis, self.static, self.slots, self.size = axis, static, slots, min(PAGE, slots)
        each = -(-slots // self.size)
        full = (rows, *shape[: axis - 1], each * self.size, *shape[axis - 1 :])
        self.pool = zeros(*full, dtype=dtype, device=device, static=static)
        self.table = zeros(rows, each, dtype=torch.long, device=device, static=static)
        self.table.copy_(torch.arange(rows * each, device=device).view(rows, each))
        self.rows, self.in_order = rows, True

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.pool, self.table = revive(self.pool, self.static), revive(self.table, self.static)

    def use(self, rows: int) -> None:
        self.rows = rows

    def read(self, at: Slots) -> Tensor:
        if self.in_order and isinstance(at, slice):
            return self._run(at)
        return self.pool[self._index(at)].movedim(1, self.axis)

    def write(self, at: Slots, entries: Tensor) -> None:
        if self.in_order and isinstance(at, slice):
            self._run(at).copy_(entries.detach())
        else:
            self.pool[self._index(at)] = entries.detach().movedim(self.axis, 1)

    def _run(self, at: slice) -> Tensor:
        """The entries themselves at these slots, where a row's pages lie one behind the other."""
        return self.pool[: self.rows].narrow(self.axis, at.start, at.stop - at.start)

    def _index(self, at: Slots) -> tuple[Tensor | slice, ...]:
        """Where entries of R rows lie in the pool, n each."""
        device = self.table.device
        if isinstance(at, tuple):
            rows, slot = at
        else:
            slot = torch.arange(at.start, at.stop, device=device) if isinstance(at, slice) else at
            rows = torch.arange(self.rows, device=device)[:, None]
        page, each = self.table[rows, slot // self.size], self.table.shape[1]
        return self._between(page // each, page % each * self.size + slot % self.size)

    def _between(self, first: Tensor, at: Tensor) -> tuple[Tensor | slice, ...]:
        # a slice between two index tensors moves both to the front: (R, n, *D)
        return (first, *[slice(None)] * (self.axis - 1), at)

    def _pages(self, numbers: Tensor) -> tuple[Tensor, tuple[Tensor | slice, ...]]:
        """The pool by pages, and where these lie in it."""
        each = self.table.shape[1]
        return torch.unflatten(self.pool, self.axis, (each, self.size)), self._between(numbers // each, numbers % each)

    # ---- between steps

    def clear(self, rows: Tensor | None = None) -> None:
        if rows is None:
            self.pool.zero_()
        else:
            pool, at = self._pages(self.table[rows].flatten())
            pool[at] = 0

    def grow(self, slots: int) -> None:
        held = self.read(slice(0, self.slots))
        shape = (*held.shape[1 : self.axis], *held.shape[self.axis + 1 :])
        rows, used = len(self.table), self.rows
        wider = Paged(rows, slots, shape, axis=self.axis, dtype=held.dtype, device=held.device, static=self.static)
        wider.use(used)
        wider.write(slice(0, self.slots), held)
        self.__dict__.update(wider.__dict__)

    def taken(self, rows: Tensor, used: int) -> Move:
        if self.static:
            return lambda: self._move(rows)
        with torch.inference_mode(False):
            pool = self.pool.index_select(0, rows)  # in order, since none of it moved in place
            table = torch.arange(len(rows) * self.table.shape[1], device=pool.device).view(len(rows), -1)
        return lambda: self._hold(pool, table)

    def _hold(self, pool: Tensor, table: Tensor) -> None:
        self.pool, self.table, self.rows = pool, table, len(table)

    def _move(self, rows: Tensor) -> None:
        """The first of each row that is kept takes its pages along; a repeated one is copied into pages left over."""
        chosen: list[int] = rows.tolist()
        owners, left = [], [row for row in range(len(self.table)) if row not in chosen]
        for place, row in enumerate(chosen):
            owners.append(row if row not in chosen[:place] else left.pop())
        table = self.table[torch.tensor(owners + left, device=self.table.device)]
        source = self.table[rows]
        pool, at = self._pages(table[: len(rows)])
        pool[at] = pool[self._pages(source)[1]]
        self.table.copy_(table)
        self.rows = len(rows)
        self.in_order = torch.equal(table.flatten(), torch.arange(table.numel(), device=table.device))

    def buffers(self) -> list[Tensor]:
        return [self.pool, self.table]
