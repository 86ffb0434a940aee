"""The one clock: how many tokens each row has taken in, and how far it may go back.

B rows, T new tokens. The device's lengths are the truth; the host keeps a copy for as long as it saw every step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from statecache.errors import CapacityError, RaggedError, RollbackError, StateCacheError
from statecache.replay import Replay
from statecache.ring import Room, Step
from statecache.storage.dense import keep_rows, revive, zeros


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be read back and no number may be baked in."""
    if torch.compiler.is_compiling():
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Clock:
    """Lengths of B rows. `limit`: the longest a row can get, or None."""

    def __init__(self, room: Room, limit: int | None) -> None:
        def longs(*shape: int) -> Tensor:
            return zeros(*shape, dtype=torch.long, device=room.device, static=self.static)

        self.static = room.capacity is not None
        self.rows, self.limit, self.slack = room.rows, limit, room.slack
        self.length = longs(room.rows)
        self.floor = longs(room.rows)  # the shortest length that a rollback can come back to
        self.kept = longs(room.rows, room.slack)  # in slot (n - 1) % slack: n, if leased states were copied at length n
        self.columns = longs()  # fed to every row, pads included: what transformers calls the length
        self.overflow = zeros(dtype=torch.bool, device=room.device, static=self.static)
        self.host = [0] * room.rows
        self.floors = [0] * room.rows  # the host's copy of `floor`
        self.width = 0  # the host's copy of `columns`
        self.ragged = False  # whether rows differ; a bool of its own, since compiled code is guarded by what it reads
        self.overflowed = False
        self.captured = False  # once part of a CUDA graph, replays go unseen: always ask the device
        self.told: list[int] | None = None  # the count of the open pass, as the host was told it
        self._seen = self._version
        self._after: list[int] | None = None  # the host's lengths once the open step is closed
        self._bases: list[int] | None = None  # the host's floors once the logs are folded for it

    def __getstate__(self) -> dict[str, object]:
        self.sync()
        return self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        for name in ("length", "floor", "kept", "columns", "overflow"):
            setattr(self, name, revive(getattr(self, name), self.static))
        self._seen = self._version

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has taken in: (B,) long, live."""
        return self.length if self.rows == len(self.length) else self.length[: self.rows]

    @property
    def _version(self) -> int:
        """What differs once the device's clock was moved."""
        return self.length._version + self.floor._version

    def drop(self) -> None:
        """Forget a pass that was given up."""
        self._after = None

    def keep_from_here(self) -> None:
        """Rows cannot go back before where they stand."""
        self.sync()
        self.floor.copy_(self.length)
        self._read()

    def catch_up(self) -> list[int]:
        """The lengths on the host. Waits for the device if compiled or replayed steps moved it meanwhile."""
        if not torch.compiler.is_compiling() and (self.captured or self._seen != self._version):
            self._read()
        return self.host

    def sync(self) -> list[int]:
        """As `catch_up`. Raises CapacityError if one of those steps ran past the capacity."""
        host = self.catch_up()
        if self.overflowed:
            raise CapacityError(
                f"a compiled step took a row past capacity={self.limit}; its tokens were dropped and the recurrent "
                "states are ahead of the others: reset() or restore() a mark, and give a larger capacity="
            )
        return host

    def uniform(self) -> int:
        """The length of every row, on the host. Raises RaggedError where rows differ."""
        host = self.sync()
        if self.ragged:
            raise RaggedError(
                f"rows hold {host} tokens; an unmodified model counts one number of columns for the whole batch: "
                "roll back every row by the same number"
            )
        return host[0]

    # ---- a step

    def open(self, tokens: int, count: Tensor | None = None) -> Step:
        """Begin a pass of T `tokens`, of which row b takes in the first `count[b]`.

        Raises CapacityError before anything is written where a row would become longer than the limit.
        """
        if self.static and (torch.compiler.is_compiling() or capturing(self.length)):
            if not torch.compiler.is_compiling():
                self.captured = True
            self._after = None
            if self.ragged and count is None:
                count = torch.full_like(self.lengths, tokens)
            return Step(tokens, self.lengths[:1].clone() if count is None else self.lengths.clone(), count)
        host = self.sync()
        taken = self.told or ([tokens] * len(host) if count is None else count.tolist())
        for row, (length, n) in enumerate(zip(host, taken, strict=True)):
            if self.limit is not None and length + n > self.limit:
                raise CapacityError(
                    f"row {row} holds {length} tokens and the step brings {n} more; the cache was made with "
                    f"capacity={self.limit}: give a larger capacity=, or leave it out for a cache that grows"
                )
        self._after = [length + n for length, n in zip(host, taken, strict=True)]
        if count is None and not self.ragged:
            return Step(tokens, host[0], end=host[0] + tokens)
        taking = torch.full_like(self.lengths, tokens) if count is None else count
        return Step(tokens, self.lengths.clone(), taking, end=max(self._after))

    def taking(self) -> list[int]:
        """Tokens that each row takes in in the open pass, as far as the host knows."""
        return [] if self._after is None else [a - b for a, b in zip(self._after, self.host, strict=True)]

    def replay(self, step: Step, lasting: bool = False) -> Replay:
        """How the open step meets the logs, which keep the last `slack` inputs of each row.

        `lasting`: what stands is kept for good, so that the states are folded up to it.
        """
        tokens, slack = step.tokens, self.slack
        if self._after is None:  # the host does not know
            assert isinstance(step.start, Tensor)
            floor = self.floor[: self.rows].clone()
            if lasting:
                self._bases = None
                return Replay(floor, step.start - floor, slack, 0, None)
            room = step.start + (tokens if step.count is None else step.count) - slack
            lag = max(slack - tokens, 0) if step.count is None else slack
            fold = torch.maximum(floor, torch.minimum(room, step.start)) - floor
            at = None if tokens <= slack else torch.maximum(floor, room) - step.start + lag
            return Replay(floor, fold, min(tokens, slack), lag, at)
        spans = list(zip(self.floors, self.host, self._after, strict=True))
        bases = [length if lasting else max(floor, min(after - slack, length)) for floor, length, after in spans]
        self._bases = bases
        folds = [base - floor for base, floor in zip(bases, self.floors, strict=True)]
        lag = max(length - base for length, base in zip(self.host, bases, strict=True))
        ends = [max(floor, after - slack) for floor, _, after in spans]
        moves = not lasting and any(end > base for end, base in zip(ends, bases, strict=True))
        if isinstance(step.start, int) and len(set(self.floors)) == 1:
            return Replay(self.floors[0], folds[0], folds[0], lag, ends[0] - self.host[0] + lag if moves else None)
        device = self.length.device
        fold = self.lengths - self.floor[: self.rows] if lasting else torch.tensor(folds, device=device)
        takes = [end - length + lag for end, length in zip(ends, self.host, strict=True)]
        at = torch.tensor(takes, device=device) if moves else None
        return Replay(self.floor[: self.rows].clone(), fold, max(folds), lag, at)

    def folded(self, replay: Replay) -> None:
        """The logged states stand where `replay` folds them to."""
        floor = self.floor[: self.rows]
        if isinstance(replay.base, int):
            floor.fill_(replay.base)
        else:
            floor.copy_(replay.base.expand_as(floor))
        if self._after is not None and self._bases is not None:
            self.floors, self._seen = self._bases, self._version

    def accept(self, step: Step, accepted: list[int]) -> None:
        """End a pass of which each row keeps its first `accepted` tokens."""
        count = torch.tensor(accepted, device=self.length.device)
        start = self.lengths.clone()
        self._after = [length + n for length, n in zip(self.host, accepted, strict=True)]
        self.close(replace(step, start=start, count=count), columns=max(accepted))

    def close(self, step: Step, columns: int | None = None) -> None:
        """End the pass: its tokens are now part of the rows. `columns`: that it fed, if not all T."""
        length = self.lengths
        columns = step.tokens if columns is None else columns
        self.columns.add_(columns)
        if isinstance(step.start, int):
            start: int | Tensor = step.start
            length.add_(step.tokens)
        else:
            end = step.start + (step.tokens if step.count is None else step.count)
            if self.limit is not None:
                self.overflow.logical_or_((end > self.limit).any())
                end = end.clamp(max=self.limit)
            length.copy_(end.expand_as(length))
            start = step.start[:, None]
        if self.slack and step.tokens:
            floor, kept = self.floor[: self.rows], self.kept[: self.rows]
            back = 0 if step.lasting else self.slack
            floor.copy_(torch.maximum(floor, length - back))
            # copies beyond this start were made in a course of events that a rollback took back
            here = (torch.arange(1, self.slack + 1, device=kept.device) - start) % self.slack == 0
            if step.count is not None:
                here &= step.count[:, None] > 0
            kept.copy_(torch.where(here, start, torch.where(kept > start, 0, kept)))
        if self._after is not None:
            floors = self.floors
            if self.slack and step.tokens:
                back = 0 if step.lasting else self.slack
                floors = [max(low, end - back) for low, end in zip(floors, self._after, strict=True)]
            self._know(self._after, floors, self.width + columns)
            self._after = None

    # ---- between steps

    def refuse(self, forget: list[int], leased: bool) -> StateCacheError | None:
        """Why rows cannot forget this many tokens each, or None. Waits for the device."""
        host, floor, kept = self.sync(), self.floors, self.kept.tolist()
        for row, (length, n) in enumerate(zip(host, forget, strict=True)):
            target = length - n
            if n < 0 or target < 0:
                return RollbackError(f"row {row} holds {length} tokens and cannot forget {n}")
            least = floor[row] if self.slack else length
            if n and target < least:
                return RollbackError(
                    f"row {row} holds {length} tokens and can go back to {least}, not to {target}: the cache was "
                    f"made with slack={self.slack}; give slack= the most tokens to forget"
                )
            if n and leased and target and target not in kept[row]:
                copies = sorted(k for k in kept[row] if least <= k < length)
                return RollbackError(
                    f"row {row} cannot go back to {target} tokens: a recurrent state is copied at the start of each "
                    f"step, and {target} was inside a chunk; copies stand at {copies}: feed one token at a time, or "
                    "forget the whole chunk"
                )
        return None

    def rollback(self, forget: Tensor) -> None:
        """Subtract (B,) tokens, as `refuse` allowed."""
        self.lengths.sub_(forget)
        self.columns.sub_(forget.min())
        self._read()

    def reset(self) -> None:
        """Every row is empty, and all rows are in use again."""
        self.rows = len(self.length)
        self.length.zero_()
        self.floor.zero_()
        self.kept.zero_()
        self.columns.zero_()
        self.overflow.zero_()
        self._read()

    def empty(self, rows: list[int]) -> None:
        """These rows hold nothing."""
        for held in (self.length, self.floor, self.kept):
            held[rows] = 0
        self._read()

    def take(self, rows: Tensor) -> None:
        """Keep these rows (n,), in this order."""
        for name in ("length", "floor", "kept"):
            setattr(self, name, keep_rows(getattr(self, name), rows, self.static))
        self.rows = len(rows)
        self._read()

    def snapshot(self) -> tuple[Tensor, ...]:
        rows = slice(0, self.rows)
        return self.length[rows].clone(), self.floor[rows].clone(), self.kept[rows].clone(), self.columns.clone()

    def load(self, copied: tuple[Tensor, ...]) -> None:
        for data, copy in zip((self.length, self.floor, self.kept), copied[:3], strict=True):
            data[: self.rows].copy_(copy)
        self.columns.copy_(copied[3])
        self.overflow.zero_()
        self._read()

    def buffers(self) -> list[Tensor]:
        return [self.length, self.floor, self.kept, self.columns, self.overflow]

    def _read(self) -> None:
        self._know(self.lengths.tolist(), self.floor[: self.rows].tolist(), int(self.columns.item()))
        self.overflowed = bool(self.overflow.item())
        self._after = None  # of a pass that was given up

    def _know(self, lengths: list[int], floors: list[int], width: int) -> None:
        self.host, self.floors, self.width = lengths, floors, width
        if not torch.compiler.is_compiling():
            self._seen = self._version
        ragged = lengths.count(lengths[0]) != len(lengths)
        if ragged != self.ragged:
            self.ragged = ragged
