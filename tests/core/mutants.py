"""Mutants of the core: what is wrong with each, and the line that makes it so."""

from __future__ import annotations

# module: what is wrong: (what stands there once, what stands there instead)
MUTANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "spec": {
        "a ring has no slots for its slack": (
            "self.window + slack\n",
            "self.window\n",
        ),
        "a log has fewer slots than the slack": (
            "slack + (slack + 1) // 2",
            "slack - 1",
        ),
        "rings of a window never hold all": (
            "and self.window + slack > capacity)",
            "and self.window > capacity)",
        ),
    },
    "storage.dense": {
        "growth forgets the last slot": (
            "wider.narrow(self.axis, 0, self.slots).copy_(self.data)",
            "wider.narrow(self.axis, 0, self.slots - 1).copy_(self.data.narrow(self.axis, 0, self.slots - 1))",
        ),
        "rows are taken in the order they have": (
            "changes.copy(data, self.data, rows)",
            "changes.copy(data, self.data, sorted(rows))",
        ),
        "what stands before the slots moves as the first of it": (
            "        for part in parts:\n",
            "        for part in parts[:1]:\n",
        ),
        "one slot too few moves along": (
            "self.data.narrow(self.axis, 0, used)",
            "self.data.narrow(self.axis, 0, used - 1)",
        ),
        "clearing some rows clears the first ones": (
            "else sorted(set(rows))",
            "else range(len(set(rows)))",
        ),
    },
    "storage.changes": {
        "nothing is kept aside": (
            "    aside = {row for",
            "    aside = {row for row in ()} and {row for",
        ),
        "what is read late is not kept aside": (
            "if row in moved and not (late[row] and not late[to])}",
            "if row in moved and not late[to] and not late[row]}",
        ),
        "rows that trade places are all copied at once": (
            "late[pair[0]] is turn] for turn in (False, True))",
            "late[pair[0]] is turn] for turn in (True, False))",
        ),
        "what was kept aside goes to other rows": (
            "dict(zip(aside, kept.unbind(0), strict=True))",
            "dict(zip(aside[::-1], kept.unbind(0), strict=True))",
        ),
        "what is kept aside is read before it is there": (
            "    for copied in rounds:\n        _copy",
            "    for copied in rounds[::-1]:\n        _copy",
        ),
        "buffers before one that has no room aside stay as they are": (
            "            _rounds(rounds)\n            size",
            "            [copied.clear() for copied in rounds]\n            size",
        ),
        "what is large is copied by nobody": (
            "                to.copy_(what)\n",
            "                pass\n",
        ),
        "what makes many is forgotten": (
            "            torch._foreach_copy_(*alike.pop(kind))\n",
            "            alike.pop(kind)\n",
        ),
        "what is large is zeroed by nobody": (
            "            tensor.zero_()\n",
            "            pass\n",
        ),
    },
    "storage.coded": {
        "runs lie across the slots where these come last": (
            "self.last = axis == len(shape) + 1",
            "self.last = False",
        ),
        "what is read keeps its slots before its numbers": (
            "return entries.transpose(-1, -2) if self.last else entries",
            "return entries",
        ),
        "a choice of rows clears them all": (
            "self.dense.clear(rows, changes)",
            "self.dense.clear(None, changes)",
        ),
        "all slots but the last move along": (
            "self.dense.taken(rows, used, changes)",
            "self.dense.taken(rows, max(used - 1, 0), changes)",
        ),
        "rows in use stay as many as they were": (
            "self.dense.use(rows)",
            "pass",
        ),
    },
    "storage.pool": {
        "what is held once more is not counted": (
            "= slab.counts[page - slab.first] + 1",
            "= max(slab.counts[page - slab.first], 1)",
        ),
        "what is given back stays counted": (
            "= slab.counts[page - slab.first] - 1",
            "= slab.counts[page - slab.first]",
        ),
        "a page is free while somebody holds it": (
            "            if not count:\n",
            "            if count < 2:\n",
        ),
        "nothing counts as shared": (
            "self._shares += count > 1",
            "self._shares += 0",
        ),
        "what was shared counts as shared for ever": (
            "self._shares -= count > 0",
            "self._shares -= 0",
        ),
        "a table that is dropped keeps its pages": (
            "self.pool.dropped.append(self.rows)",
            "pass",
        ),
        "a table holds its pages uncounted": (
            "        pool.hold(page for pages in rows for page in pages)\n",
            "",
        ),
        "other pages stand in a table than it holds": (
            "            self.rows[row][column] = page\n",
            "            pass\n",
        ),
        "pages that were taken and not used are lost": (
            "            self.exchange(taken, ())\n",
            "            pass\n",
        ),
        "pages of an operation that ended early are lost": (
            "        try:\n            yield taken\n        finally:\n            self.exchange(taken, ())\n",
            "        yield taken\n        self.exchange(taken, ())\n",
        ),
        "slabs stay when nothing of them is held": (
            "        self._slabs = [slab for slab in self._slabs if slab.held]\n",
            "",
        ),
        "pages of slabs that are gone stay free": (
            "sorted(page for page in self._free if self._slabs and page in self._slab(page))",
            "sorted(self._free)",
        ),
        "a new slab has the numbers of another": (
            "self._next + n, self._extra + n",
            "self._next, self._extra + n",
        ),
        "a run goes on into the next row": (
            "min(slab.each - (first - slab.first) % slab.each, len(pages) - at)",
            "len(pages) - at",
        ),
        "any pages behind each other are a run": (
            "pages[at + n] == first + n",
            "True",
        ),
        "a page lies in the first group": (
            "return slab.data[group].narrow(",
            "return slab.data[0].narrow(",
        ),
        "rows are whole whatever their pages": (
            "any(pages != list(range(first + b * each, first + (b + 1) * each)) for b, pages in enumerate(rows))",
            "False",
        ),
        "whole rows are the first ones": (
            "slab.data[group : group + len(rows)]",
            "slab.data[: len(rows)]",
        ),
    },
    "storage.paged": {
        "growth forgets the last page": (
            "self.whole.grow(_pages(slots, size) * size)",
            "self.whole.data.narrow(self.axis, self.slots - 1, 1).zero_(), self.whole.grow(_pages(slots, size) * size)",
        ),
        "pages become larger than those that there are": (
            "            if _pages(slots, size) * size < self.whole.slots:\n                size = self.size\n",
            "            size = size\n",
        ),
        "shared pages are written": (
            "            self._own(spans)\n",
            "",
        ),
        "a page that is held twice is not copied": (
            "left[page] > 1",
            "left[page] > 2",
        ),
        "each of two rows leaves a page to the other": (
            "                left[page] -= 1\n",
            "                left[page] -= 2\n",
        ),
        "a page of one's own comes empty": (
            "                pool.view(page).copy_(pool.view(rows[row][column]))\n            table.put",
            "                pool.view(page).zero_()\n            table.put",
        ),
        "a page is exchanged before it is filled": (
            "                pool.view(page).copy_(pool.view(rows[row][column]))\n            table.put(copied, new)\n",
            (
                "                old = pool.view(rows[row][column]), table.put([(row, column)], [page])\n"
                "                pool.view(page).copy_(old[0])\n"
            ),
        ),
        "a page that was never written need not be one's own": (
            "page == NONE or left[page]",
            "page != NONE and left[page]",
        ),
        "the last page that is written stays shared": (
            "range(at.start // self.size, _pages(at.stop, self.size))",
            "range(at.start // self.size, at.stop // self.size)",
        ),
        "rows stay in order when a page moves": (
            "        self.whole = None\n        for row",
            "        for row",
        ),
        "a view of the page before is kept": (
            "            self._views.pop(row, None)\n",
            "            pass\n",
        ),
        "rows that were cleared keep their views": (
            "[NONE] * len(places))\n            self.whole, self._views = None, {}",
            "[NONE] * len(places))\n            self.whole = None",
        ),
        "rows that grew keep their views": (
            "[NONE] * more\n            self.whole, self._views = None, {}",
            "[NONE] * more\n            self.whole = None",
        ),
        "clearing all of what is shared clears the others": (
            "        elif rows is None:\n            self._lay(self._rows_of_its_own())\n",
            "        elif rows is None and self.whole is not None:\n            self.whole.clear()\n",
        ),
        "a fork's last page comes empty": (
            "                pool.view(page).copy_(pool.view(rows[row][column]))\n                rows",
            "                pool.view(page).zero_()\n                rows",
        ),
        "a fork holds a page less": (
            "            pages[full:] = [NONE]",
            "            full = max(full - 1, 0)\n            pages[full:] = [NONE]",
        ),
        "a gather keeps a page less": (
            "self._paged(), _pages(used, self.size)",
            "self._paged(), used // self.size",
        ),
        "rows are chosen in the order they have": (
            "[list(table.rows[row]) for row in rows]",
            "[list(table.rows[row]) for row in sorted(rows)]",
        ),
        "rows that share nothing are never in order again": (
            "self._lay(self._in_order())",
            "self._lay(self._rows_of_its_own())",
        ),
        "a slice is read from its start on and no further": (
            "min(at.stop - first, n)",
            "n",
        ),
        "what is written begins anew in each page": (
            "                piece.copy_(new.narrow(axis, first, n))\n                first += n",
            "                piece.copy_(new.narrow(axis, 0, n))",
        ),
        "slots in a run are taken one by one, and wrongly": (
            "slice(runs[-1].start, slot + 1)",
            "slice(runs[-1].start + 1, slot + 1)",
        ),
    },
    "step": {
        "a value is put one slot early": (
            "torch.tensor([[first], [self.row]], device=self.device)",
            "torch.tensor([[first - 1], [self.row]], device=self.device)",
        ),
        "a value is put into the first row": (
            "torch.tensor([[first], [self.row]], device=self.device)",
            "torch.tensor([[first], [0]], device=self.device)",
        ),
        "where rows stand is said one slot late": (
            "known = self._spans(lambda start, count: start + first, n, capacity)",
            "known = self._spans(lambda start, count: start + first + 1, n, capacity)",
        ),
        "the newest tokens of a row are said to begin at its start": (
            "lambda start, count: start + count - capacity",
            "lambda start, count: start",
        ),
        "a window is said to begin at its row's start": (
            "lambda start, count: max(start - window + 1, 0)",
            "lambda start, count: start",
        ),
        "the window begins one too late": (
            "(start - window + 1).clamp(min=0)",
            "(start - window + 2).clamp(min=0)",
        ),
        "the second run of slots starts at one": (
            "self.runs(0, slot + n - capacity, capacity)",
            "self.runs(1, slot + n - capacity, capacity)",
        ),
        "positions below zero read what the slot holds": (
            "self.positions(-n, n) >= 0",
            "self.positions(-n, n) >= -9",
        ),
        "a row that takes nothing in writes its padding": (
            "device=self.count.device) < self.count[:, None]",
            "device=self.count.device) <= self.count[:, None]",
        ),
        "a row that takes less than a ring in writes before its end": (
            "t >= 0, at",
            "t >= -9, at",
        ),
        "the newest tokens are the first": (
            "t = self.count[:, None] + torch",
            "t = capacity + 0 * self.count[:, None] + torch",
        ),
        "what does not fit is written over the first slots": (
            "if self.end is not None:",
            "if True:",
        ),
        "one row's slots serve every row": (
            " and self.count is None and self.rows is None\n",
            " and self.count is None\n",
        ),
        "some rows are taken for the first ones": (
            "device=slot.device) if self.rows is None else self.rows",
            "device=slot.device)",
        ),
        "slots are shared by rings of other sizes": (
            "self._made[first, n, capacity] = self._at(",
            "self._made[first, n, 0] = self._made[first, n, capacity] = self._at(",
            "self._made.get((first, n, capacity))",
            "self._made.get((first, n, 0))",
        ),
        "the newest are shared by rings of other sizes": (
            'self._made["newest", capacity] = t',
            'self._made["newest", 0] = t',
            'self._made.get(("newest", capacity))',
            'self._made.get(("newest", 0))',
        ),
        "the reach is shared by rings of other windows": (
            'self._made["reach", window, capacity] =',
            'self._made["reach"] =',
            'self._made.get(("reach", window, capacity))',
            'self._made.get("reach")',
        ),
        "what rows take in is shared by rings that go round": (
            'self._made["takes", capacity] = made',
            'self._made["takes"] = made',
            'self._made.get(("takes", capacity))',
            'self._made.get("takes")',
        ),
        "what exists is shared by pasts of other lengths": (
            'self._made["held", n] =',
            'self._made["held"] =',
            'self._made.get(("held", n))',
            'self._made.get("held")',
        ),
        "the window reads new entries one early": (
            "window - 1 + order - start)",
            "window - 2 + order - start)",
        ),
        "a pass never says that it writes": (
            "            self.pending()\n",
            "            pass\n",
        ),
    },
    "ring": {
        "an admission puts both runs from the first entry on": (
            "new.narrow(self.axis - 1, done, size))\n            done",
            "new.narrow(self.axis - 1, 0, size))\n            done",
        ),
        "a chunk longer than the ring keeps its first entries": (
            "self._last(n, new), step, step.start + dropped",
            "new.narrow(self.axis, 0, n), step, step.start",
        ),
        "the past of a window is one entry short": (
            "held = min(step.start, window - 1)",
            "held = min(step.start, window - 2)",
        ),
        "put happens before the past is read": (
            "            seen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)\n            self.put",
            (
                "            self.put(new, step)\n"
                "            pieces = [self.past(held, step), new] if held else [new]\n"
                "            seen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)\n"
                "            self.put"
            ),
        ),
        "put happens before the device reads the past": (
            "        at, index = step.reach(window, self.capacity)\n",
            "        at, index = step.reach(window, self.capacity)\n        self.put(new, step)\n",
        ),
        "a pass over some rows sees all": (
            "seen if rows is None else seen.index_select(0, rows)",
            "seen",
        ),
        "the past before the first token is what the slot holds": (
            "return torch.where(self._spread(step.held(n), seen), seen, 0)",
            "return seen",
        ),
        "a row that takes nothing in loses an entry": (
            "if keep is not None:",
            "if False:",
        ),
        "a mark does not copy the windows": (
            "() if self.spec.window is None else (",
            "() if True else (",
        ),
        "a ring makes no room": (
            "        if wanted > self.capacity:",
            "        if wanted > self.capacity + 1:",
        ),
        "a ring grows past its limit": (
            "wider if self.limit is None else min(wider, self.limit)",
            "wider",
        ),
        "a row's value is one entry short": (
            "min(length, self.spec.window)",
            "min(length, self.spec.window - 1)",
        ),
        "a row's value is that of the first row": (
            "self.store.read(at)[row]",
            "self.store.read(at)[0]",
        ),
    },
    "lease": {
        "a copy is kept one slot late": (
            "Step(1, step.start - 1, taking",
            "Step(1, step.start, taking",
        ),
        "a rollback takes every row's copy": (
            "torch.where(moved, before,",
            "torch.where(moved | True, before,",
        ),
        "a lease is not copied before it changes": (
            "if self.copies is not None and step.tokens:",
            "if self.copies is not None and step.tokens > 1:",
        ),
        "an idle row's copy crowds out an older one": (
            "None if step.count is None else (step.count > 0).long()",
            "None",
        ),
        "copies of some rows are those of the first": (
            "taking, step.end, step.rows))",
            "taking, step.end))",
        ),
        "some rows read the states of the first": (
            "self.entry.index_select(0, rows)",
            "self.entry[: len(rows)]",
        ),
        "some rows write the states of the first": (
            "Places(rows[:, None],",
            "Places(torch.arange(len(rows))[:, None],",
        ),
        "a reset leaves the leased state": (
            "        self.store.clear(rows, changes)\n",
            "",
        ),
        "an empty mark leaves the leased state": (
            "        self.store.clear(None, changes)\n",
            "",
        ),
        "an empty mark leaves the base": (
            "            self.base.empty(changes)\n",
            "            pass\n",
        ),
        "a gather leaves the base": (
            "moves.append(self.base.taken(rows, length, changes))",
            "pass",
        ),
        "a gather leaves the copies": (
            "moves.append(self.copies.taken(rows, self.copies.capacity, changes))",
            "pass",
        ),
        "a mark does not copy what a lease goes back by": (
            "for held in each))",
            "for held in ()))",
            "other.load(copies[1:], changes)",
            "pass",
        ),
        "a value leaves the base": (
            "for lease in (self, self.base):",
            "for lease in (self,):",
        ),
        "a value of a row is the first row's": (
            "return self.entry[row : row + 1]\n",
            "return self.entry[:1]\n",
        ),
    },
    "clock": {
        "an unseen round keeps more than it brought": (
            "accepted = torch.minimum(accepted.clamp(min=0), torch.as_tensor(most, device=accepted.device))",
            "accepted = accepted.clamp(min=0)",
        ),
        "an unseen round counts a column": (
            "accepted, accepted.amax())",
            "accepted, 1)",
        ),
        "a pass over some rows is noted for the first": (
            "zip(rows, ends, strict=True)",
            "enumerate(ends)",
        ),
        "the host's reach does not rise": (
            "list(map(max, self.reach, lengths))",
            "list(self.reach)",
        ),
        "the device's reach does not rise": (
            "        used[REACH].clamp_(min=used[LENGTH])\n",
            "",
        ),
        "what a round wrote does not reach on": (
            "reach.clamp_(min=end)",
            "pass",
        ),
        "what a round wrote in some rows does not reach on": (
            "reach.index_copy_(0, step.rows, torch.maximum(reach.index_select(0, step.rows), torch.as_tensor(end)))",
            "pass",
        ),
        "a round's idle rows count as written": (
            "end = step.start + (step.tokens if step.count is None else step.count)\n        reach",
            "end = step.start + step.tokens\n        reach",
        ),
        "what is kept for good can be taken back": (
            " if self.back and self.slack else list(known.lengths)",
            "",
        ),
        "a row may go back one further": (
            "[max(n - self.slack, 0)",
            "[max(n - self.slack - 1, 0)",
        ),
        "a rollback may reach one below the floor": (
            "if n and target < least:",
            "if n and target + 1 < least:",
        ),
        "a copy need not be there": (
            "if n and copied is not None and target and target not in",
            "if n and copied is not None and target < 0 and target not in",
        ),
        "copies of what was taken back still count": (
            "copied.masked_fill_(copied > used[LENGTH], 0)",
            "pass",
        ),
        "idle rows count as having taken all in": (
            "used[LENGTH].add_(step.tokens if count is None else count)",
            "used[LENGTH].add_(step.tokens)",
        ),
        "some idle rows count as having taken all in": (
            "torch.full_like(step.rows, step.tokens) if count is None else count",
            "torch.full_like(step.rows, step.tokens)",
        ),
        "tokens of some rows are those of the first": (
            "used[LENGTH].index_add_(0, step.rows, more)",
            "used[LENGTH, : len(more)] += more",
        ),
        "the device's lengths of some rows are those of the first": (
            "length.index_copy_(0, step.rows, end)",
            "length[: len(end)] = end",
        ),
        "nobody notes that a row ran over": (
            "self.overflow.logical_or_((end > self.limit).any())",
            "pass",
        ),
        "copies of idle rows are noted": (
            "took = None if step.count is None else step.count > 0",
            "took = None",
        ),
        "copies are noted a slot late": (
            "slot = ((start - 1) % self.slack)[None]",
            "slot = (start % self.slack)[None]",
        ),
        "copies of uniform rows are noted a slot late": (
            "copied[(step.start - 1) % self.slack].fill_",
            "copied[step.start % self.slack].fill_",
        ),
        "copies of some rows are noted for the first": (
            "            copied[slot[0], step.rows] = new",
            "            copied[slot[0], torch.arange(len(new))] = new",
        ),
        "some rows stand where the first do": (
            "self.lengths.clone() if index is None else self.lengths.index_select(0, index)",
            "self.lengths.clone() if index is None else self.lengths[: len(index)].clone()",
        ),
        "some rows stand where the first do, in compiled code": (
            "            start = self.lengths.index_select(0, index)\n",
            "            start = self.lengths[: len(index)].clone()\n",
        ),
        "compiled code takes rows for uniform": (
            "elif count is None and not self.known.ragged:",
            "elif count is None:",
        ),
        "a step is a view of the lengths": (
            "            start = self.lengths.clone()\n        return Step(tokens, start, count, None",
            "            start = self.lengths\n        return Step(tokens, start, count, None",
        ),
        "rows are longer than the limit": (
            "if self.limit is not None and end > self.limit:",
            "if False:",
        ),
        "the bases of some rows are those of the first": (
            "            held.index_copy_(0, rows, base)\n",
            "            held[: len(base)] = base\n",
        ),
        "the bases do not move": (
            "            held.copy_(base)\n",
            "            pass\n",
        ),
        "the bases of uniform rows do not move": (
            "            held.fill_(base)\n",
            "            pass\n",
        ),
        "gathering leaves the lengths behind": (
            "revive(self.data.index_select(1, index), static=False)",
            (
                "self.data[:, : len(rows)].clone() if len(rows) <= self.data.shape[1] else "
                "self.data.index_select(1, index)"
            ),
        ),
        "the host gathers nothing": (
            "[numbers[row] for row in rows] for numbers",
            "numbers[: len(rows)] for numbers",
        ),
        "some rows are reset and keep their copies": (
            "for numbers in (self.data[LENGTH], self.data[REACH:]):",
            "for numbers in (self.data[LENGTH], self.data[REACH:COPIED]):",
        ),
        "some rows are reset and keep their reach": (
            "for numbers in (self.data[LENGTH], self.data[REACH:]):",
            "for numbers in (self.data[LENGTH], self.data[BASE:]):",
        ),
        "an admitted row can go back": (
            "reach, columns = length + self.slack, max(self.sync().width, length)",
            "reach, columns = length, max(self.sync().width, length)",
        ),
        "an admitted row's log begins at zero": (
            "((LENGTH, length), (BASE, length), (REACH, reach))",
            "((LENGTH, length), (REACH, reach))",
        ),
        "an admitted row keeps its copies": (
            "        self.data[:, row].zero_()\n",
            "",
        ),
        "a mark puts back nothing": (
            "        self._used.copy_(copied[0])\n",
            "",
        ),
        "a mark puts back an overflow": (
            "        self._used.copy_(copied[0])\n        self.overflow.zero_()\n",
            "        self._used.copy_(copied[0])\n",
        ),
        "the host never asks": (
            "(self.captured or self._seen != self.data._version)",
            "self.captured",
        ),
        "marks do not look at what the host has not seen": (
            "        self.unseen = self.known.lengths if self.unseen is None else self.unseen\n",
            "",
        ),
    },
    "replay": {
        "logs overflow by one": (
            "start + n - base <= log for",
            "start + n - base <= log + 1 for",
        ),
        "bases move too far": (
            "then = [max(base, start + n - slack)",
            "then = [max(base, start + n - slack + 1)",
        ),
        "bases move too little": (
            "then = [max(base, start + n - slack)",
            "then = [max(base, start + n - log - 1)",
        ),
        "the base may move past the tokens before the pass": (
            "inside = any(base > start for base, start in zip(then, starts, strict=True))",
            "inside = False",
        ),
        "uniform bases move one too far": (
            "Shift(first, base - first, None, None, base)",
            "Shift(first, base - first + 1, None, None, base)",
        ),
        "uniform bases move one too little": (
            "Shift(first, base - first, None, None, base)",
            "Shift(first, base - first - 1, None, None, base)",
        ),
        "uniform bases are said to move one too far": (
            "Shift(first, base - first, None, None, base)",
            "Shift(first, base - first, None, None, base + 1)",
        ),
        "uniform bases stand one late inside a pass": (
            "Shift(first, 0, None, base - step.start, base)",
            "Shift(first, 0, None, base - step.start + 1, base)",
        ),
        "rows are taken for uniform where bases are not": (
            "if isinstance(step.start, int) and known.count(known[0]) == len(known):",
            "if isinstance(step.start, int):",
        ),
        "ragged bases move over one too few": (
            "max(over, default=0), inside), then",
            "max(over, default=1) - 1, inside), then",
        ),
        "the device folds too far": (
            "slack if inside else log, min(",
            "slack - 1 if inside else slack - 1, min(",
        ),
        "the device folds too little": (
            "slack if inside else log, min(",
            "slack if inside else log + 1, min(",
        ),
        "the device folds over too few": (
            "log, min(step.tokens, log), inside)",
            "log, min(step.tokens, log) - 1, inside)",
        ),
        "the device never stands inside a pass": (
            "inside = step.tokens > log\n",
            "inside = False\n",
        ),
        "idle rows' bases move too": (
            "end = step.start + (step.tokens if step.count is None else step.count)\n    then",
            "end = step.start + step.tokens\n    then",
        ),
        "bases go back": (
            "torch.maximum(bases, torch.as_tensor(end - back, device=bases.device))",
            "torch.as_tensor(end - back, device=bases.device) + 0 * bases",
        ),
        "ragged bases are said to stay": (
            "return Shift(bases, most, then - bases, None, then)",
            "return Shift(bases, most, then - bases, None, bases)",
        ),
        "every row is folded over the most": (
            "base.read(step), shift.count)",
            "base.read(step), None)",
        ),
        "rows that stay are moved inside a pass": (
            "moves = (shift.at >= 0)",
            "moves = (shift.at >= -99)",
        ),
        "the state is folded from one entry later": (
            "self.read(recurrence, shift.first, shift.most,",
            "self.read(recurrence, shift.first + 1, shift.most,",
        ),
        "some rows fold the logs of the first": (
            "shift.most, step.on(self.state.device).rows)",
            "shift.most, None if step.rows is None else torch.arange(len(step.rows)))",
        ),
        "a long pass leaves the base where it was": (
            "            log.stand(states, here)\n",
            "            pass\n",
        ),
        "the log is not written": (
            "            ring.put(new.to(ring.dtype), step)\n",
            "            pass\n",
        ),
        "an accepted token is the one before": (
            "self.read(recurrence, here.start, most,",
            "self.read(recurrence, here.start - 1, most,",
        ),
        "every row accepts the most": (
            "self.state.write(_advance(recurrence, taken, self.state.read(step), count), step)",
            "self.state.write(_advance(recurrence, taken, self.state.read(step), None), step)",
        ),
        "some rows accept the log of the first": (
            "self.read(recurrence, here.start, most, here.rows)",
            "self.read(recurrence, here.start, most, None if here.rows is None else torch.arange(len(here.rows)))",
        ),
        "a rollback replays one too many": (
            "behind = [length - first for",
            "behind = [length - first + 1 for",
        ),
        "a rollback replays as many for every row": (
            "first, count = torch.tensor(bases, device=device), torch.tensor(behind, device=device)",
            "first = torch.tensor(bases, device=device)",
        ),
        "a rollback replays from the first row's base": (
            "            first, count = torch.tensor(bases, device=device), torch",
            "            count = torch",
        ),
        "a replay changes the base": (
            "after = base.entry.clone()",
            "after = base.entry",
        ),
        "a round moves the state": (
            "    if not step.tentative:\n        state.write(held, here)",
            "    if True:\n        state.write(held, here)",
        ),
        "a round's one token is taken into the state itself": (
            "held = held.clone() if step.tentative else held",
            "pass",
        ),
        "a chunk takes its padding in": (
            "taken, query, held, here.count, marks)",
            "taken, query, held, None, marks)",
        ),
        "one token that is none is taken in": (
            "        if here.count is not None:\n            one",
            "        if False:\n            one",
        ),
    },
    "snapshot": {
        "a mark never turns stale": (
            "and lengths[row] < mark.lengths[row]:",
            "and lengths[row] < 0:",
        ),
        "a mark turns stale though nothing below it was written": (
            "and lengths[row] < mark.lengths[row]:",
            "and lengths[row] <= mark.lengths[row]:",
        ),
        "a mark turns stale by rows that take nothing in": (
            "strict=True) if n]",
            "strict=True)]",
        ),
        "a mark of rows that were written is that of the first": (
            "chosen = range(len(lengths)) if rows is None else rows",
            "chosen = range(len(taken) or len(lengths))",
        ),
        "marks are as long as the shortest": (
            "[max(held[row] for held",
            "[min(held[row] for held",
        ),
        "no mark is long": (
            "not any(map(operator.lt, lengths, self.longest))",
            "not all(map(operator.lt, lengths, self.longest))",
        ),
        "a new mark is not measured": (
            "        self._held.add(mark)\n        self._measure()",
            "        self._held.add(mark)",
        ),
        "a change of rows leaves marks good": (
            "            if not fed or any(mark.lengths):\n",
            "            if False:\n",
        ),
    },
    "logs": {
        "logs are not folded": (
            "            log.fold(recurrence, step)\n",
            "            pass\n",
        ),
        "nothing is accepted": (
            "            log.accept(recurrence, step, most, count)\n",
            "            pass\n",
        ),
        "some rows' bases are those of the first": (
            "clock.bases.index_select(0, step.rows)",
            "clock.bases[: len(step.rows)]",
        ),
        "the host moves the bases of the first rows": (
            "        for row, base in zip(chosen, made[1], strict=True):\n            then[row] = base",
            "        for row, base in enumerate(made[1]):\n            then[row] = base",
        ),
        "what waits for its operator is forgotten": (
            "        self.behind = self.operators is None and",
            "        self.behind = False and",
        ),
    },
    "offload": {
        "what was written stays away": (
            "(always or home.version != buffer._version)",
            "always",
        ),
        "a part goes to the beginning": (
            "_narrow(self.host, self.axis, at), _narrow",
            "_narrow(self.host, self.axis, slice(0, at.stop - at.start)), _narrow",
        ),
        "parts of a ring that goes round are taken for one": (
            "runs(first, n, ring.capacity)",
            "runs(first, n, ring.capacity)[:1]",
        ),
    },
    "states": {
        "an unseen round takes nothing from its logs": (
            "self.logs.accept(step, step.tokens, clock.accept_unseen(step, accepted))",
            "clock.accept_unseen(step, accepted)",
        ),
        "an unseen round is asked how many rows it may have": (
            "or accepted.shape != (rows,):",
            "or len(accepted) < rows:",
        ),
        "an unseen round that was refused becomes a seen one": (
            '                raise RowsError(f"an unseen',
            '                self.unseen = False\n                raise RowsError(f"an unseen',
        ),
        "a mark is a view": (
            "    return changes.clone(held) if kept is held else kept\n",
            "    return kept\n",
        ),
        "a row that goes back to a point loses its keys": (
            " if not (snapshot.point and s.spec.window is None)]",
            "]",
        ),
        "a row goes back to a point that it does not reach": (
            "        if known.lengths[row] < point.length:",
            "        if False:",
        ),
        "a ring allocated late has slots for the step alone": (
            "            tokens += max(self.clock.known.lengths)",
            "            pass",
        ),
        "a round keeps all it brought": (
            "        if self.tentative is None:\n            self.clock.close",
            "        if True:\n            self.clock.close",
        ),
        "a round keeps one more": (
            'keep = whole_numbers(accepted, rows, "accepted tokens")',
            'keep = [n + 1 for n in whole_numbers(accepted, rows, "accepted tokens")]',
        ),
        "an open round can be marked": (
            (
                "        if self.tentative is not None:\n            return self._refuse_in_round()\n"
                "        if self.broken"
            ),
            "        if self.broken",
        ),
        "a round has two passes": (
            '        if self.torn:\n            return StepError("a spec',
            '        if False:\n            return StepError("a spec',
        ),
        "a round may overwrite a state": (
            "            allow(self._refuse_overwritten())\n",
            "            pass\n",
        ),
        "a round is as long as it likes": (
            "            return SlackError(",
            "            SlackError(",
        ),
        "a round forgets how far it wrote": (
            "            self.clock.wrote_ahead(now.step, now.after)\n",
            "            pass\n",
        ),
        "a compiled round leaves marks good": (
            "            if now.after is None:\n                self.marks.written(self.clock.known.lengths)\n",
            "",
        ),
        "a round's state is not brought up": (
            "            self.logs.accept(step, max(keep), count)\n",
            "",
        ),
        "rows do not make room in logs": (
            "        if self.slack and self.back:\n            self._shift(now)\n",
            "",
        ),
        "folding is not noted": (
            "        clock.stand(step.shift.base, step.rows, then)\n",
            "",
        ),
        "the host forgets where bases went": (
            "            now.after = replace(now.after, base=then)\n",
            "            pass\n",
        ),
        "rows that were gathered are looked at where they were": (
            "                state.use(len(wanted))\n",
            "                pass\n",
        ),
        "whoever began to write goes on with what is away": (
            "            self.held.enter(writing)  # others were looked at\n",
            "            pass\n",
        ),
        "a pass says nothing to marks": (
            "            self.marks.written(clock.known.lengths, now.rows, now.taken(clock.known))\n",
            "            pass\n",
        ),
        "compiled steps say nothing to marks": (
            "            self.marks.written(clock.unseen, taken=taken)\n",
            "",
        ),
        "compiled steps make marks of idle rows stale": (
            "self.marks.written(clock.unseen, taken=taken)",
            "self.marks.written(clock.unseen)",
        ),
        "an interrupted compiled pass leaves marks good": (
            "            self.marks.written(self.clock.known.lengths)  # a compiled",
            "            pass  # a compiled",
        ),
        "a growing cache makes no room": (
            "            self.reserve(now.step.end)\n",
            "            pass\n",
        ),
        "a growing cache makes no room for a value": (
            "            self.reserve(snapshot.length)\n",
            "            pass\n",
        ),
        "room is remembered though a ring is new": (
            "        self._room = 0  # look at every ring again\n",
            "",
        ),
        "an interrupted pass goes on": (
            '        if self.torn:\n            return StepError(\n                "the last forward pass',
            '        if False:\n            return StepError(\n                "the last forward pass',
        ),
        "an interrupted rollback goes on": (
            "        self.broken = what\n        yield\n        self.broken = None",
            "        yield",
        ),
        "a reset leaves what was interrupted": (
            "            self._pass = None\n            if chosen is None:",
            "            if chosen is None:",
        ),
        "a reset of some rows forgets that others wait for an operator": (
            "            if chosen is None:\n                self.logs.behind = False\n",
            "            self.logs.behind = False\n",
        ),
        "a restore leaves what was interrupted": (
            "            self._pass, self.logs.behind = None, mark.behind\n",
            "            self.logs.behind = mark.behind\n",
        ),
        "a restore forgets that states wait for an operator": (
            "self._pass, self.logs.behind = None, mark.behind",
            "self._pass, self.logs.behind = None, False",
        ),
        "what waits for an operator is a value": (
            "        if self.logs.behind:\n            raise StepError(",
            "        if False:\n            raise StepError(",
        ),
        "a restore leaves states that were first written after the mark": (
            "                        state.empty(changes)  # as before its first write, in whatever form it was kept\n",
            "                        pass\n",
        ),
        "a restore of an empty mark leaves the clock": (
            "                    self.clock.empty()\n",
            "                    pass\n",
        ),
        "a restore does not look whether the mark is good": (
            "        if mark.stale is not None:",
            "        if False:",
        ),
        "a rollback replays nothing": (
            "            self.logs.replay(clock, [n > 0 for n in forget])\n",
            "",
        ),
        "a rollback moves no copies": (
            "                state.rollback(length.to(state.device), moved.to(state.device))\n",
            "                pass\n",
        ),
        "a gather leaves the clock": (
            "            clock_moves()\n",
            "",
        ),
        "a gather leaves marks good": (
            '            self.marks.invalidate("rows were gathered since")\n',
            "",
        ),
        "a reset leaves marks good": (
            "            self.marks.invalidate(why)\n",
            "            pass\n",
        ),
        "a reset of rows leaves the states": (
            "                    state.reset(chosen, changes)\n",
            "                    if chosen is None:\n                        state.reset(chosen, changes)\n",
        ),
        "a reset leaves rows out of use": (
            "                        state.use(self.clock.rows)\n",
            "                        pass\n",
        ),
        "an admission leaves marks good": (
            '            self.marks.invalidate(f"row {row} was filled from a snapshot since")\n',
            "",
        ),
        "an admission leaves what the row held": (
            "for _, state in states if not fresh else ():",
            "for _, state in ():",
        ),
        "a value is a view": (
            "            seen = ((n, e.clone(memory_format=torch.contiguous_format)) for n, e in seen)\n",
            "            pass\n",
        ),
        "an admission allocates nothing": (
            "            if name not in self.held and name in self.declared:\n",
            "            if False:\n",
        ),
    },
}

# of what turns numbers into bytes, in storage.coded: what is wrong, and the line that makes it so
CODES: dict[str, tuple[str, ...]] = {
    "int8 rounds towards zero": ("(scaled / step).round()", "(scaled / step).trunc()"),
    "the largest int8 does not fit": ("exponent - 6)).nan", "exponent - 5)).nan"),
    "int8 reads its scale's bits as numbers": ("codes & -self._step(codes)", "codes & -1"),
    "a bit of the scale is lost": (
        "torch.arange(BITS, device=codes.device)",
        "torch.arange(BITS, device=codes.device) % 7",
    ),
    "the first int8 are clamped as the others": (".clamp(step - 128, 128 - step)", ".clamp(-127, 127)"),
    "a scale of fp8 is that of the number before it is rounded": ("keepdim=True), mantissa=3)", "keepdim=True))"),
    "fp8 has the scale of int8": ("exponent - 7)).nan", "exponent - 6)).nan"),
    "what is not finite reads as a number": ("largest.isfinite(), exponent, 255", "largest.isfinite(), exponent, 254"),
}

# of what keeps numbers in a narrower dtype, in storage.rounded
ROUNDS: dict[str, tuple[str, ...]] = {
    "a choice of rows clears them all": ("self.dense.clear(rows, changes)", "self.dense.clear(None, changes)"),
    "all slots but the last move along": (
        "self.dense.taken(rows, used, changes)",
        "self.dense.taken(rows, max(used - 1, 0), changes)",
    ),
    "rows in use stay as many as they were": ("self.dense.use(rows)", "pass"),
    "it says that it has as many slots as at first": ("        self.slots = slots\n", ""),
}

# of what no store that rounds nothing shows: what is wrong, the module, and the line that makes it so
LOSSY: dict[str, tuple[str, ...]] = {
    "what int8 reads it would write otherwise": ("storage.coded", "exponent - 6)).nan", "exponent - 5)).nan"),
    "an index is coded": ("storage.table", 'or spec.name == "index" ', ""),
    "few numbers are coded": ("storage.table", "spec.shape[-1] >= kind.least", "True"),
    "recurrent states are kept as they are": ("storage.table", "and self.recurrent is not None", "and False"),
    "convolutions are at rest in codes": ("storage.at_rest", 'spec.kind == "recurrent"', 'spec.kind != "log"'),
    "nothing is at rest in codes": ("storage.at_rest", 'name if spec.kind == "recurrent" else None', "None"),
    "a mark forgets in which code it is": (
        "states",
        "            recurrent_store,\n        )",
        "            None,\n        )",
    ),
    "a base that moves inside a pass is that of the row's end": (
        "replay",
        "new = states[:, 0]\n",
        "new = self.state.read(step)\n",
    ),
    "a rollback starts where the row stands": (
        "replay",
        "after = base.entry.clone()",
        "after = self.state.entry.clone()",
    ),
    "a copy that went back does not follow": (
        "logs",
        "if self.behind and clock is not None:",
        "if False:",
    ),
    "a round goes on from a state that is its own": (
        "replay",
        "held = held.clone() if step.tentative else held\n",
        "state.write(held, here)\n",
    ),
}

# of what schedules do not come by, in the same form: how rows are rotated, passes of a model of one's own, fewer rows
BESIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "rotary": {
        "a row of the length of a change is rotated as beyond it": (
            "if n < length), default=0)",
            "if n <= length), default=0)",
        ),
        "the first change is the last": ("return max((n + 1 for n", "return min((n + 1 for n"),
        "the row before the change is the shortest": ("max((n + 1 for n in", "max((n for n in"),
        "no row ends where it is": ("is not None and n >= length]", "is not None and n > length]"),
        "rows end where factors change last": ("return min(ends, default=None)", "return max(ends, default=None)"),
        "rows beyond the last change go on": (
            "            return length\n        ends = ",
            "            return None\n        ends = ",
        ),
        "dynamic factors are all alike": (
            "            return length\n        return max",
            "            return self.always + 1\n        return max",
        ),
        "dynamic factors do not change at first": (
            "(*self.once, self.always) if n is not None)",
            "self.once or (99,))",
        ),
        "a capacity that reaches the change is refused": ("limit > self.first:", "limit >= self.first:"),
        "no limit is a short one": ("if limit is None or limit >", "if limit is not None and limit >"),
        "rows that take in nothing are looked at": ("            if end == length:\n                continue\n", ""),
        "rows are those of the pass": ("b if chosen is None else chosen[b], self", "b, self"),
        "rows are rotated as before the pass": (
            "self.shortest(end)\n            if length",
            "self.shortest(length)\n            if length",
        ),
        "empty rows keep what they were": ("if length and rotated[row] != wanted", "if rotated[row] != wanted"),
        "what a row holds is not looked at": ("if length and rotated[row] != wanted", "if False"),
        "rows of a pass may differ": ("if first is not None and wanted", "if False and wanted"),
        "rows are compared to the first of all": ("wanted != after[first[0]]", "wanted != after[0]"),
        "nothing is noted": ("            after[row] = wanted\n", ""),
        "what is noted is the caller's": ("after, first = list(rotated), None", "after, first = rotated, None"),
    },
    "one_pass": {
        "all tokens are real": ("        if real is None:\n", "        if True:\n"),
        "a window shows one entry less": (
            "ring.past(ring.spec.window, self._step)",
            "ring.past(ring.spec.window, self._step)[:, 1:]",
        ),
        "a window shows the tokens before the past": (
            "[ring.past(ring.spec.window, self._step), new]",
            "[new, ring.past(ring.spec.window, self._step)]",
        ),
        "a window stands along the first axis": ("self._step), new], ring.axis)", "self._step), new], 1)"),
        "a window is shown and not kept": ("        ring.put(new, self._step)\n", ""),
        "a window is kept and then shown": (
            "        seen = torch.cat([ring.past",
            "        ring.put(new, self._step)\n        seen = torch.cat([ring.past",
        ),
        "a state with every entry has a window": ("if ring.spec.window is None:\n", "if False:\n"),
        "attention is shown all slots": ("self._step, exact=True)", "self._step, exact=False)"),
        "keys are counted from the first slot": ("if ring.spec.window is not None and ring.wraps:", "if False:"),
        "keys of rings that hold all are counted from the window": (" and ring.wraps:", ":"),
        "keys outside the window are visible": ("keys, ring.spec.window)", "keys, None)"),
        "what is visible is asked before it is there": ("if name not in self._written:\n", "if False:\n"),
        "what is visible is of the tokens alone": (
            "self._written[name] = seen.shape[ring.axis]\n        return seen\n\n    def visible",
            "self._written[name] = new.shape[ring.axis]\n        return seen\n\n    def visible",
        ),
        "what is read is a view": ("lease.read(self._step).clone()", "lease.read(self._step)"),
        "nothing is kept for a rollback": ("        lease.keep(self._step)\n", ""),
        "what is kept for a rollback is the new state": (
            "        lease.keep(self._step)\n        lease.write(state, self._step)\n",
            "        lease.write(state, self._step)\n        lease.keep(self._step)\n",
        ),
        "nothing is written": ("        lease.write(state, self._step)\n", ""),
        "a pass that is over goes on": ("        if self.over:\n", "        if False:\n"),
        "a state is written twice": ("if name in self._written and not again:", "if False:"),
        "no state is left out": ("if name not in self._written]", "if False]"),
        "a state without a name is made up": ("        if name not in self._held:\n", "        if False:\n"),
        "a state that is overwritten has entries": ("        if isinstance(state, Lease):\n", "        if False:\n"),
        "entries are overwritten": ("        if isinstance(state, Ring):\n", "        if False:\n"),
        "time stands first": ("shape.insert(ring.axis - 1, self.tokens)", "shape.insert(0, self.tokens)"),
        "any shape will do": ("if tuple(new.shape[1:]) != expected:", "if False:"),
        "any number of rows will do": ("        if len(new) != self._rows:\n", "        if False:\n"),
        "any dtype will do": ("        if new.dtype != state.dtype:\n", "        if False:\n"),
        "any device will do": ("        if new.device != state.device:\n", "        if False:\n"),
        "a gradient is kept": ("if new.requires_grad and torch.is_grad_enabled():", "if False:"),
    },
    "states": {
        "a pass is over the rows of the cache, chosen or not": (
            "self.clock.rows if rows is None else len(rows), device)",
            "self.clock.rows, device)",
        ),
        "a pass that is over is not told so": ("self._inside, now.over = None, True", "self._inside = None"),
        "a pass ends though states are left out": ("        if left := now.left():\n", "        if left := None:\n"),
        "a pass ends and no row moves": ("        self.close(step)\n\n    def moved", "\n    def moved"),
        "fewer rows leave marks good": (
            '        self.marks.invalidate("a graph over fewer rows was captured since")\n',
            "",
        ),
        "fewer rows are those of the clock alone": (
            "            for state in self.held.values():\n                state.use(n)\n",
            "",
        ),
        "fewer rows are those of the states alone": ("            clock.use(n)\n", "            pass\n"),
        "fewer rows are all": ("        use(rows)\n        try:", "        try:"),
        "fewer rows stay": ("            use(before)\n", "            pass\n"),
    },
    "clock": {
        "rows in use stay as many as they were": (
            "        self.rows = rows\n        self._look()\n        self.read()\n        self.unseen",
            "        self._look()\n        self.read()\n        self.unseen",
        ),
        "the rows that were in use are looked at": (
            "        self.rows = rows\n        self._look()\n        self.read()",
            "        self.rows = rows\n        self.read()",
        ),
        "what is known is of the rows that were in use": (
            "        self._look()\n        self.read()\n        self.unseen",
            "        self._look()\n        self.unseen",
        ),
        "what is unseen is of the rows that were in use": (
            "        self.read()\n        self.unseen = None\n\n    @property\n    def allocated",
            "        self.read()\n\n    @property\n    def allocated",
        ),
    },
}
