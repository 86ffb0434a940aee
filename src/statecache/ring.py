"""Rings: the newest entries of one state, in the slots that a step gives them.

B rows, R of them in a step, T new tokens, C slots of a ring, *D the shape of one entry. Tensors carry time at the
state's own axis; the comments write them as (R, T, *D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statecache.spec import StateSpec
from statecache.step import Allocation, Landing, Step
from statecache.storage.changes import Changes
from statecache.storage.store import Move, Store, put_back, whole

FIRST_SLOTS = 64  # of a ring that grows, beyond what its first write needs


class Ring:
    """Entries of one state, one ring a row."""

    def __init__(self, spec: StateSpec, room: Allocation, tokens: int = 0) -> None:
        """`tokens`: of the first step, which a growing ring makes room for."""
        assert spec.shape is not None
        self.spec, self.axis = spec, 1 + spec.axis
        self.limit = spec.limit(room.capacity, room.slack)
        self.wraps = not spec.holds_all(room.capacity, room.slack)
        slots = self.limit
        if room.capacity is None:
            first = tokens + max(tokens // 4, FIRST_SLOTS)
            slots = first if slots is None else min(first, slots)
        assert slots is not None
        self.store = room.store(
            room.rows,
            slots,
            spec.shape,
            axis=self.axis,
            dtype=spec.dtype_for(room.dtype),
            device=room.device,
            static=room.capacity is not None,
        )
        self.device, self.dtype = self.store.buffers()[0].device, spec.dtype_for(room.dtype)

    @property
    def capacity(self) -> int:
        return self.store.slots

    def reserve(self, end: int) -> None:
        """Make room for positions below `end`, as far as the limit allows: at least twice the slots, so seldom."""
        wanted = end if self.limit is None else min(end, self.limit)
        if wanted > self.capacity:
            # no ring has gone round yet: below the limit a slot is a position, in the wider ring too
            wider = max(wanted, 2 * self.capacity)
            self.store.grow(wider if self.limit is None else min(wider, self.limit))

    # ---- in a step

    def put(self, new: Tensor, step: Step) -> None:
        """Write the step's entries (R, T, *D); of a chunk longer than the ring its last C, which may come alone."""
        step.write()
        n = min(step.tokens, self.capacity)
        dropped = step.tokens - n
        if isinstance(step.start, int):
            self._put_runs(self._last(n, new), step, step.start + dropped)
            return
        step = step.on(new.device)
        keep: Tensor | None
        if dropped and step.count is not None:
            index, keep, at = step.newest(self.capacity)
            shape = (*new.shape[: self.axis], n, *new.shape[self.axis + 1 :])
            new = new.gather(self.axis, self._spread(index, new).expand(shape))
        else:
            new = self._last(n, new)
            keep, at = step.takes(None if self.wraps else self.capacity), step.slots(dropped, n, self.capacity)
        if keep is not None:  # a slot that gets no entry gets its own back
            new = torch.where(self._spread(keep[..., -n:], new), new, self.store.read(at))
        self.store.write(at, new)

    def past(self, n: int, step: Step) -> Tensor:
        """The n <= C entries before the step, oldest first; zero before the first token: (R, n, *D). May be a view."""
        if isinstance(step.start, int):
            held = min(n, step.start)
            runs = step.runs(step.start - held, held, self.capacity)
            pieces = [self.store.read(at) for at in runs]
            if held < n:
                pieces.insert(0, self._nothing(n - held, pieces[0]))
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
        step = step.on(self.device)
        seen = self.store.read(step.slots(-n, n, self.capacity))
        return torch.where(self._spread(step.held(n), seen), seen, 0)

    def extend(self, new: Tensor, step: Step, exact: bool = False) -> Tensor:
        """Put the step's entries; return what its tokens may attend to, in the order of position: (R, S, *D).

        The first is position 0 without a window, else `offset(step.start)`. S is the whole ring without a window, and
        w - 1 + T with one, so that one graph serves every length; entries at or after the step's end are then junk
        that a causal mask hides. `exact`: without them, where the host knows the end.
        """
        window = self.spec.window
        if window is None or not self.wraps:
            self.put(new, step)
            slots = self.capacity if step.end is None or not exact else max(1, step.end)  # no model expects none
            seen = self.store.read(slice(0, slots))
            rows = step.on(new.device).rows
            return seen if rows is None else seen.index_select(0, rows)
        if isinstance(step.start, int):
            held = min(step.start, window - 1)
            pieces = [self.past(held, step), new] if held else [new]
            if not exact and held < window - 1:
                pieces.append(self._nothing(window - 1 - held, new))
            seen = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
            self.put(new, step)
            return seen
        # put would overwrite what its own first tokens read: the past is read before
        step = step.on(new.device)
        at, index = step.reach(window, self.capacity)
        seen = torch.cat([self.store.read(at), new], self.axis)
        self.put(new, step)
        if step.shared:
            return seen.index_select(self.axis, index[0])
        return seen.gather(self.axis, self._spread(index, seen).expand(seen.shape))

    # ---- between steps

    def taken(self, rows: Sequence[int], length: int, changes: Changes) -> Move:
        """Prepare to keep these rows in this order, and then to `use` so many. `length`: of the longest row."""
        return self.store.taken(rows, min(length, self.capacity), changes)

    def forked(self, lengths: Sequence[int]) -> dict[int, Store]:
        """A fork of its store, by the id of the store, for a copy of the ring. `lengths`: of the rows in use."""
        return {id(self.store): self.store.fork([min(length, self.capacity) for length in lengths])}

    def use(self, rows: int) -> None:
        """Have this many rows in use."""
        self.store.use(rows)

    def reset(self, rows: Sequence[int] | None, changes: Changes) -> None:
        """Zero these rows, None for all."""
        # attention gives slots beyond a row's end the weight zero, and zero times the NaN of a past request is NaN
        self.store.clear(rows, changes)

    def empty(self, changes: Changes) -> None:
        """Be as before the first token: nothing to do, since entries before position zero read as zero."""

    def rollback(self, length: Tensor, moved: Tensor) -> None:
        """Nothing to move: the entries before the new lengths are still there."""

    def snapshot(self) -> tuple[Tensor, ...]:
        """What a mark must copy: nothing where every entry stays until it is written again. Perhaps views."""
        return () if self.spec.window is None else (whole(self.store),)

    def load(self, copies: tuple[Tensor, ...], changes: Changes) -> None:
        """Put copies of a snapshot back, perhaps into more slots."""
        for copied in copies:
            put_back(self.store, copied, self.axis, changes)

    def row(self, row: int, length: int) -> Tensor:
        """A row's entries that its next step may read, oldest first, up to that of `length`: (n, *D). May be a view."""
        seen = [self.store.read(at)[row] for at in self._kept(length)]
        whole = seen[0] if len(seen) == 1 else torch.cat(seen, self.axis - 1)
        return whole.movedim(self.axis - 1, 0)

    def lies(self, length: int) -> bool:
        """Whether what `row` gives of a row of `length` tokens are the entries themselves, to be overwritten."""
        return self.store.shows and len(self._kept(length)) == 1

    def admit(self, entries: Tensor, landing: Landing, changes: Changes) -> None:
        """Put what `row` gave of another ring into the row where they land."""
        n = min(len(entries), self.capacity)
        new = entries[len(entries) - n :].movedim(0, self.axis - 1)
        if self.store.plain is None:
            self.put(new[None], landing.step(n))
            return
        held, done = self.store.plain[landing.row], 0
        for run in Step(0, landing.length).runs(landing.length - n, n, self.capacity):
            size = run.stop - run.start
            changes.copy(held.narrow(self.axis - 1, run.start, size), new.narrow(self.axis - 1, done, size))
            done += size

    def buffers(self) -> list[Tensor]:
        return self.store.buffers()

    # ---- inside

    def _kept(self, length: int) -> list[slice]:
        """The slots of what a row of this length has for its next step."""
        n = length if self.spec.window is None else min(length, self.spec.window)
        return Step(0, length).runs(length - n, n, self.capacity)

    def _put_runs(self, new: Tensor, step: Step, first: int) -> None:
        done, n = 0, new.shape[self.axis]
        for at in step.runs(first, n, self.capacity):
            size = at.stop - at.start
            self.store.write(at, new if size == n else new.narrow(self.axis, done, size))
            done += size

    def _last(self, n: int, new: Tensor) -> Tensor:
        more = new.shape[self.axis] - n
        return new.narrow(self.axis, more, n) if more else new

    def _nothing(self, n: int, like: Tensor) -> Tensor:
        return like.new_zeros(*like.shape[: self.axis], n, *like.shape[self.axis + 1 :])

    def _spread(self, at_slot: Tensor, like: Tensor) -> Tensor:
        """(n,) or (R, n) to the rank of `like`, time at the axis."""
        after = [1] * (like.dim() - self.axis - 1)
        if at_slot.dim() == 1:
            return at_slot.view(-1, *after)
        return at_slot.view(len(at_slot), *[1] * (self.axis - 1), -1, *after)
