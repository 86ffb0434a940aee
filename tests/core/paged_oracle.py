"""Stores that share pages, each beside a tensor of its own, and every page held as often as is counted."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from interruption import Interruption, Operators

CPU = torch.device("cpu")
OPERATIONS = ("write",) * 6 + ("fork",) * 3 + ("gather",) * 2 + ("drop", "clear", "grow", "copy", "pickle")


class Beside:
    """A paged store, and a tensor (B, C, *D) with what it must read where `known` (B, C) says that it is known."""

    def __init__(self, core: SimpleNamespace, store: Any, held: Tensor, known: Tensor) -> None:
        self.core, self.store, self.held, self.known = core, store, held, known

    @classmethod
    def of(cls, core: SimpleNamespace, store: Any) -> Beside:
        held = store.read(slice(0, store.slots)).movedim(store.axis, 1).clone()
        return cls(core, store, held, torch.ones(held.shape[:2], dtype=torch.bool))

    def agrees(self) -> None:
        """Each form of slots reads what is known."""
        store = self.store
        assert self.known.shape == (store.rows, store.slots)
        seen = store.read(slice(0, store.slots)).movedim(store.axis, 1)
        assert seen.shape == self.held.shape and torch.equal(seen[self.known], self.held[self.known])
        some, rows = torch.tensor([store.slots - 1, 0]), torch.arange(store.rows)[:, None]
        for at in (some, self.core.store.Places(rows, some.expand(len(rows), 2))):
            seen, there = store.read(at).movedim(store.axis, 1), self.known[:, some]
            assert torch.equal(seen[there], self.held[:, some][there])

    def write(self, rnd: random.Random, number: float, early: Any) -> None:
        """Write through any form of slots."""
        store, rows = self.store, list(range(self.store.rows))
        n = rnd.randint(0, store.slots)
        first = rnd.randint(0, store.slots - n)
        entries = torch.arange(len(rows) * n * self.held[0, 0].numel()).float() + number
        entries = entries.view(len(rows), n, *self.held.shape[2:])
        slots, form = torch.arange(first, first + n), rnd.choice(("slice", "slots", "places", "known"))
        at: Any = slice(first, first + n) if form == "slice" else slots
        if form in ("places", "known"):
            rows = rnd.sample(rows, rnd.randint(1, len(rows)))
            spans = [(row, [slice(first, first + n)]) for row in rows]
            at = self.core.store.Places(
                torch.tensor(rows)[:, None], slots.expand(len(rows), n), (lambda: spans) if form == "known" else None
            )
        known = self.known.clone()
        self.known[rows, first : first + n] = False  # until all is written
        entries = entries[: len(rows)]
        with early:
            store.write(at, entries.movedim(1, store.axis))
        for row, each in zip(rows, entries, strict=True):
            self.held[row, first : first + n] = each
            known[row, first : first + n] = True
        self.known = known

    def fork(self, used: list[int], early: Any) -> Beside:
        with early:
            store = self.store.fork(used)
        return Beside(self.core, store, self.held.clone(), self._within(used))

    def gather(self, rows: list[int], used: int, early: Any) -> None:
        with early:
            changes = self.core.changes.Changes()
            move = self.store.taken(rows, used, changes)
            changes.make()
            move(changes)
            changes.make()
        self.held, self.known = self.held[rows], self._within([used] * len(self.known))[rows]

    def clear(self, rows: list[int] | None, early: Any) -> None:
        chosen = slice(None) if rows is None else rows
        known = self.known.clone()
        self.known[chosen] = False
        with early:
            changes = self.core.changes.Changes()
            self.store.clear(rows, changes)
            changes.make()
        self.held[chosen], known[chosen] = 0, True
        self.known = known

    def grow(self, slots: int, early: Any) -> None:
        more = slots - self.store.slots
        with early:
            self.store.grow(slots)
        self.held = torch.cat([self.held, self.held.new_zeros(len(self.held), more, *self.held.shape[2:])], 1)
        self.known = torch.cat([self.known, self.known.new_zeros(len(self.known), more)], 1)

    def _within(self, used: list[int]) -> Tensor:
        return self.known & (torch.arange(self.known.shape[1]) < torch.tensor(used)[:, None])


def sound(stores: list[Any]) -> None:
    """Every page of a pool is held as often as it stands in the tables of these stores, all there are, or is free."""
    pools = {id(s.table.pool): s.table.pool for s in stores if s.table is not None}
    for pool in pools.values():
        tables = [s.table.rows for s in stores if s.table is not None and s.table.pool is pool]
        held = Counter(page for rows in tables for pages in rows for page in pages if page >= 0)
        assert pool.pages == len(held)
        assert pool.counts(held) == list(held.values())
        assert pool.shared == any(n > 1 for n in held.values())
        slabs = pool._slabs
        every = [slab.first + n for slab in slabs for n in range(len(slab.counts))]
        assert sorted([*held, *pool._free]) == every, "a page is held and free, or neither"
        assert all(slab.held for slab in slabs), "a slab of which nothing is held"


def run(core: SimpleNamespace, seed: int) -> None:
    """Change any of several stores that live at once, some changes ending at an operator, and look at all of them."""
    rnd = random.Random(seed)
    shape, axis = rnd.choice([((2, 3), 2), ((3,), 1), ((2, 3), 3), ((), 1)])
    rows, slots = rnd.randint(1, 3), rnd.choice((2, 5, 16, 33, 40))
    first = core.stores["paged"](rows, slots, shape, axis=axis, dtype=torch.float32, device=CPU)
    stores = [Beside.of(core, first)]
    del first  # what is dropped below is held by nobody else
    for number in range(30):
        early = Operators(rnd.randrange(16)) if seed % 2 and rnd.random() < 0.4 else nullcontext()
        with suppress(Interruption):  # it is as it was then, but for slots that were being written or cleared
            _change(rnd, stores, number, early)
        for place in range(len(stores)):
            stores[place].agrees()
        sound([each.store for each in stores])


def _change(rnd: random.Random, stores: list[Beside], number: int, early: Any) -> None:
    one, what = rnd.choice(stores), rnd.choice(OPERATIONS)
    rows, slots = one.store.rows, one.store.slots
    if what == "write":
        one.write(rnd, 1000 * number, early)
    elif what == "fork" and len(stores) < 5:
        stores.append(one.fork([rnd.choice((0, slots, rnd.randint(0, slots))) for _ in range(rows)], early))
    elif what == "gather":
        index = [rnd.randrange(rows) for _ in range(rnd.randint(1, 4))]
        one.gather(index, rnd.choice((slots, rnd.randint(0, slots))), early)
    elif what == "drop" and len(stores) > 1:
        stores.remove(one)
    elif what == "clear":
        one.clear(rnd.choice((None, [rnd.randrange(rows)], [rows - 1, 0])), early)
    elif what == "grow" and slots < 80:
        one.grow(slots + rnd.choice((1, 16, slots)), early)
    elif what in ("copy", "pickle"):
        one.store = copy.deepcopy(one.store) if what == "copy" else pickle.loads(pickle.dumps(one.store))
        assert one.store.table is None, "a copy shares nothing"
