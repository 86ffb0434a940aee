"""The one clock: how many tokens each row has taken in, and how far it may go back.

Of a row's positions

    [0, reach - slack)       are gone: rings have written over them
    [reach - slack, length)  can be taken back
    [base, length)           are in the logs; the states that these go on from stand at `base`
    [length, reach)          were written and taken back, or not accepted

B rows, R of them in a step, T new tokens. The device's numbers are the truth; the host keeps a copy for as long as it
saw every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from statecache.errors import CapacityError, RaggedError, RollbackError, RowsError, StateCacheError, StepError
from statecache.rotary import Rotary
from statecache.step import Allocation, Standing, Step
from statecache.storage.store import revive, zeros

LENGTH, COLUMNS, REACH, BASE, COPIED = range(5)  # rows of the clock's tensor; from COPIED on there are `slack` of them


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may be read back and no number may be baked in."""
    if torch.compiler.is_compiling():
        return False
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class Known:
    """What the host knows of the clock, by row. `rotated`: the shortest row whose keys are rotated as its own are."""

    lengths: list[int]
    reach: list[int]
    base: list[int]
    rotated: list[int]
    width: int = 0  # columns fed, pads included: what transformers calls the length
    ragged: bool = False  # whether rows differ; a bool of its own, since compiled code is guarded by what it reads
    overflowed: bool = False

    def over(self, rows: Sequence[int] | None, ends: list[int], columns: int) -> Known:
        """The same after a step over these rows, None for all, which then hold `ends` tokens."""
        lengths = ends
        if rows is not None:
            lengths = list(self.lengths)
            for row, end in zip(rows, ends, strict=True):
                lengths[row] = end
        reach = list(map(max, self.reach, lengths))
        return replace(self, lengths=lengths, reach=reach, width=self.width + columns, ragged=differ(lengths))


def nothing(rows: int) -> Known:
    """What is known of empty rows."""
    return Known([0] * rows, [0] * rows, [0] * rows, [0] * rows)


def differ(lengths: list[int]) -> bool:
    return lengths.count(lengths[0]) != len(lengths)


class Clock:
    """Numbers of B rows. `limit`: the longest a row can get, or None. `back`: whether rows go back but for rounds.

    `rotary`: how keys depend on the length of their row, if they do.
    """

    def __init__(self, room: Allocation, limit: int | None, back: bool = True, rotary: Rotary | None = None) -> None:
        self.rotary = rotary
        self.static = room.capacity is not None
        self.rows, self.limit, self.slack, self.back = room.rows, limit, room.slack, back
        self.copying = False  # whether any state is copied at the starts of steps
        self.data = zeros(COPIED + room.slack, room.rows, dtype=torch.long, device=room.device, static=self.static)
        self.overflow = zeros(dtype=torch.bool, device=room.device, static=self.static)
        self.known = nothing(room.rows)
        self.unseen: list[int] | None = (
            None  # the lengths before steps that the host has not seen, for marks to look at
        )
        self.captured = False  # once part of a CUDA graph, replays go unseen: always ask the device
        self._look()

    def __getstate__(self) -> dict[str, object]:
        self.sync()
        return {name: value for name, value in self.__dict__.items() if name != "_used"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.data, self.overflow = revive(self.data, self.static), revive(self.overflow, self.static)
        self._look()

    def _look(self) -> None:
        """Look at the rows in use, and note which version of them the host knows."""
        self._used = self.data if self.rows == self.data.shape[1] else self.data[:, : self.rows]
        self._seen = self.data._version

    def use(self, rows: int) -> None:
        """Have the first `rows` in use, whatever the others hold. Waits for the device."""
        self.rows = rows
        self._look()
        self.read()
        self.unseen = None

    @property
    def allocated(self) -> int:
        """Rows that there is room for."""
        return self.data.shape[1]

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has taken in: (B,) long, live."""
        return self._used[LENGTH]

    @property
    def columns(self) -> Tensor:
        """Columns fed to the batch: a 0-d long, live."""
        return self._used[COLUMNS, 0]

    @property
    def bases(self) -> Tensor:
        """Where the states stand that logs go on from: (B,) long, live."""
        return self._used[BASE]

    @property
    def floors(self) -> list[int]:
        """The shortest length that each row can come back to, as far as the host knows."""
        known = self.known
        return [max(n - self.slack, 0) for n in known.reach] if self.back and self.slack else list(known.lengths)

    # ---- what the host knows

    def catch_up(self) -> Known:
        """Know the device's numbers. Waits for it, if compiled or replayed steps moved them meanwhile."""
        if not torch.compiler.is_compiling() and (self.captured or self._seen != self.data._version):
            self.read()
        return self.known

    def sync(self) -> Known:
        """As `catch_up`. Raises CapacityError if one of those steps ran past the capacity."""
        known = self.catch_up()
        if known.overflowed:
            raise CapacityError(
                f"a compiled step took a row past capacity={self.limit}; its tokens were dropped and the recurrent "
                "states are ahead of the others: reset() or restore() a mark, and give a larger capacity="
            )
        return known

    def uniform(self) -> int:
        """The length of every row, on the host. Raises RaggedError where rows differ."""
        known = self.sync()
        if known.ragged:
            raise RaggedError(
                f"rows hold {known.lengths} tokens; an unmodified model counts one number of columns for the whole "
                "batch: roll back every row by the same number"
            )
        return known.lengths[0]

    def read(self) -> None:
        """Ask the device."""
        self.unseen = self.known.lengths if self.unseen is None else self.unseen
        numbers = self._used[:COPIED].tolist()
        lengths = numbers[LENGTH]
        overflowed, width = bool(self.overflow.item()), numbers[COLUMNS][0]
        rotated = self.known.rotated  # no step that the host does not see changes it
        self.know(Known(lengths, numbers[REACH], numbers[BASE], rotated, width, differ(lengths), overflowed))

    def moved(self) -> None:
        """Say that a step that went unseen has moved the device's numbers."""
        self._seen = -1  # of no tensor the version

    def know(self, known: Known) -> None:
        """Take these numbers for those of the device, which has just been given them."""
        self.known = known
        if not torch.compiler.is_compiling():
            self._seen = self.data._version

    # ---- a step

    def open(
        self,
        tokens: int,
        count: Tensor | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        counted: Tensor | None = None,
        tentative: bool = False,
        unseen: bool = False,
    ) -> tuple[Step, Known | None]:
        """Begin a pass of T `tokens` over some `rows`, the b-th of which takes in its first `count[b]`.

        `counted`: the count on the device, where it is there already. Returns the step, and what the host knows once
        it is closed; None in compiled or captured code, or an `unseen` step, where it knows nothing.
        Raises CapacityError where a row would become longer than the limit, RotaryError where keys would not be
        rotated alike, RowsError, StepError for other numbers.
        """
        captured = capturing(self.data)
        if captured and not self.static:
            raise StepError(
                "a growing cache cannot be part of a CUDA graph, which would write one slot for ever: make it with "
                "capacity="
            )
        if self.static and (captured or unseen or torch.compiler.is_compiling()):
            if self.rotary is not None:
                self.rotary.check_unseen(self.limit)
            if captured:
                self.captured = True
            elif unseen:
                self.sync()
            return self._open_unseen(tokens, count, rows, captured or unseen, tentative), None
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise StepError(f"a pass of {tokens!r} tokens: give how many it brings, as an integer from 0 on")
        known = self.sync()
        chosen = None if rows is None else self._chosen(rows)
        n = self.rows if chosen is None else len(chosen)
        taken = None if count is None else self._counts(count, tokens, n)
        whole = taken is None or min(taken) == tokens
        lengths = known.lengths if chosen is None else [known.lengths[row] for row in chosen]
        if taken is None or whole:
            ends = [length + tokens for length in lengths]
        else:
            ends = list(map(operator.add, lengths, taken))
        end = max(ends)
        if self.limit is not None and end > self.limit:
            b = next(b for b, end in enumerate(ends) if end > self.limit)
            raise CapacityError(
                f"row {b if chosen is None else chosen[b]} holds {lengths[b]} tokens and the step brings "
                f"{ends[b] - lengths[b]} more; the cache was made with capacity={self.limit}: give a larger capacity=, "
                "or leave it out for a cache that grows"
            )
        after = known.over(chosen, ends, tokens)
        if self.rotary is not None:
            after = replace(after, rotated=self.rotary.rotate(known.rotated, chosen, lengths, ends))
        if chosen is None and whole and not known.ragged:
            return Step(tokens, lengths[0], end=end, tentative=tentative), after
        on_device = None
        if not whole:
            given = count if counted is None else counted
            on_device = torch.as_tensor(given, dtype=torch.long, device=self.data.device).contiguous()  # for kernels
        index = None if chosen is None else torch.tensor(chosen, device=self.data.device)
        start = self.lengths.clone() if index is None else self.lengths.index_select(0, index)
        here = Standing(range(n) if chosen is None else chosen, lengths, [tokens] * n if taken is None else taken)
        return Step(tokens, start, on_device, end, index, tentative, standing=here), after

    def _open_unseen(
        self,
        tokens: int,
        count: Tensor | Sequence[int] | None,
        rows: Sequence[int] | None,
        captured: bool,
        tentative: bool,
    ) -> Step:
        """A step whose numbers only the device knows."""
        index = None if rows is None else torch.as_tensor(rows, device=self.data.device)
        if count is not None:
            count = torch.as_tensor(count, device=self.data.device).contiguous()
        elif captured and index is None:  # a graph is replayed when rows differ, too
            count = torch.full_like(self.lengths, tokens)
        if index is not None:
            start = self.lengths.index_select(0, index)
        elif count is None and not self.known.ragged:
            start = self.lengths[:1].clone()
        else:
            start = self.lengths.clone()
        return Step(tokens, start, count, None, index, tentative)

    def _chosen(self, rows: Sequence[int]) -> list[int]:
        chosen = [int(row) for row in rows]
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= row < self.rows for row in chosen):
            raise RowsError(f"a pass over rows {chosen} of {self.rows}: give each once, in 0..{self.rows - 1}")
        return chosen

    def _counts(self, count: Tensor | Sequence[int], tokens: int, rows: int) -> list[int]:
        """How many tokens each row takes in, if that can be."""
        numbers = whole_numbers(count, rows, "tokens to take in")
        for b, n in enumerate(numbers):
            if not 0 <= n <= tokens:
                raise StepError(f"row {b} cannot take in {n} tokens: the pass brings {tokens}, so give 0..{tokens}")
        return numbers

    def close(self, step: Step, after: Known | None) -> None:
        """End the pass: its tokens are now part of the rows."""
        if self.copying and step.tokens:
            self._note_copies(step)
        self._take_in(step, step.count, step.tokens)
        if after is not None:
            self.know(after)

    def _take_in(self, step: Step, count: Tensor | None, columns: int | Tensor) -> None:
        used = self._used
        if step.end is None and self.limit is not None and step.tokens:  # nobody has checked
            self._clamp(step, count)
            used[COLUMNS].add_(columns)
        elif count is None and step.rows is None:
            used[: COLUMNS + 1].add_(columns)
        else:
            used[COLUMNS].add_(columns)
            if step.rows is None:
                used[LENGTH].add_(step.tokens if count is None else count)
            else:
                more = torch.full_like(step.rows, step.tokens) if count is None else count
                used[LENGTH].index_add_(0, step.rows, more)
        used[REACH].clamp_(min=used[LENGTH])

    def _clamp(self, step: Step, count: Tensor | None) -> None:
        assert isinstance(step.start, Tensor) and self.limit is not None
        end = step.start + (step.tokens if count is None else count)
        self.overflow.logical_or_((end > self.limit).any())
        end = end.clamp(max=self.limit)
        length = self._used[LENGTH]
        if step.rows is None:
            length.copy_(end.expand_as(length))
        else:
            length.index_copy_(0, step.rows, end)

    def _note_copies(self, step: Step) -> None:
        """Copies of leased states now stand at the start of the step, in the rows that took anything in."""
        copied = self._used[COPIED:]  # in slot (n - 1) % slack: n, where a copy was made at length n
        if isinstance(step.start, int):
            copied[(step.start - 1) % self.slack].fill_(step.start)
            return
        start = step.start.expand(self.rows) if step.rows is None else step.start
        took = None if step.count is None else step.count > 0
        slot = ((start - 1) % self.slack)[None]
        if step.rows is None:
            new = start if took is None else torch.where(took, start, copied.gather(0, slot)[0])
            copied.scatter_(0, slot, new[None])
        else:
            new = start if took is None else torch.where(took, start, copied[slot[0], step.rows])
            copied[slot[0], step.rows] = new

    def wrote_ahead(self, step: Step, after: Known | None) -> None:
        """A round's pass has written past the ends of its rows, and they stay where they are."""
        end = step.start + (step.tokens if step.count is None else step.count)
        reach = self._used[REACH]
        if step.rows is None:
            reach.clamp_(min=end)
        else:
            reach.index_copy_(0, step.rows, torch.maximum(reach.index_select(0, step.rows), torch.as_tensor(end)))
        if after is not None:
            self.know(replace(self.known, reach=after.reach))

    def accept(self, step: Step, now: Known | None, rows: Sequence[int] | None, accepted: list[int]) -> Tensor | None:
        """End a round: of its pass each row keeps its first `accepted` tokens. They on the device; None if all do.

        `now`: what was to be known after that pass.
        """
        known = self.sync()
        held = known.lengths if rows is None else [known.lengths[row] for row in rows]
        after = known.over(rows, list(map(operator.add, held, accepted)), max(accepted))
        if now is not None:
            after = replace(after, rotated=now.rotated)
        count = None
        if step.rows is not None or any(n != accepted[0] for n in accepted):
            count = torch.tensor(accepted, device=self.data.device)
        self._take_in(Step(max(accepted), step.start, count, 0, step.rows), count, max(accepted))
        self.know(after)
        return count

    def accept_unseen(self, step: Step, accepted: Tensor) -> Tensor:
        """The same where only the device knows the numbers (R,); as many of them as the pass brought."""
        most = step.tokens if step.count is None else step.count
        accepted = torch.minimum(accepted.clamp(min=0), torch.as_tensor(most, device=accepted.device))
        end = None if self.limit is not None else 0
        self._take_in(Step(step.tokens, step.start, accepted, end, step.rows), accepted, accepted.amax())
        return accepted

    def stand(self, base: Tensor | int, rows: Tensor | None, bases: list[int] | None) -> None:
        """The states that logs go on from stand at `base`: an int, or (R,) of some rows. `bases`: as the host knows."""
        held = self._used[BASE]
        if isinstance(base, int):
            held.fill_(base)
        elif rows is None:
            held.copy_(base)
        else:
            held.index_copy_(0, rows, base)
        if bases is not None:
            self.know(replace(self.known, base=bases))

    # ---- between steps

    def refuse(self, forget: list[int], leased: bool) -> StateCacheError | None:
        """Why rows cannot forget this many tokens each, or None. Waits for the device."""
        known, floors = self.sync(), self.floors
        copied = self._used[COPIED:].T.tolist() if leased and any(forget) else None
        for row, (length, n) in enumerate(zip(known.lengths, forget, strict=True)):
            target = length - n
            if n < 0 or target < 0:
                return RollbackError(f"row {row} holds {length} tokens and cannot forget {n}")
            least = floors[row]
            if n and not self.back:
                return RollbackError(
                    f"row {row} cannot forget {n} tokens: the cache was made with back=False, so that rows go back "
                    "only by dropping a speculative round"
                )
            if n and target < least:
                return RollbackError(
                    f"row {row} holds {length} tokens and can go back to {least}, not to {target}: the cache was "
                    f"made with slack={self.slack}; give slack= the most tokens to forget"
                )
            if n and copied is not None and target and target not in copied[row]:
                copies = sorted(k for k in copied[row] if least <= k < length)
                ways = f"it can go back to {', '.join(map(str, copies))}: " if copies else ""
                return RollbackError(
                    f"row {row} cannot go back to {target} tokens: a recurrent state is copied at the start of each "
                    f"step, and {target} was inside a chunk; {ways}feed what may be forgotten one token at a time, or "
                    "statecache.prepare(model)"
                )
        return None

    def rollback(self, forget: list[int]) -> None:
        """Subtract the tokens that each row forgets, as `refuse` allowed."""
        n = torch.tensor(forget, device=self.data.device)
        used = self._used
        used[LENGTH].sub_(n)
        used[COLUMNS].sub_(min(forget))
        if self.copying:  # copies beyond the new ends are of a course of events that is taken back
            copied = used[COPIED:]
            copied.masked_fill_(copied > used[LENGTH], 0)
        lengths = [length - n for length, n in zip(self.known.lengths, forget, strict=True)]
        width = self.known.width - min(forget)
        self.know(replace(self.known, lengths=lengths, width=width, ragged=differ(lengths)))

    def stay(self) -> None:
        """Rows cannot go back before where they stand, and logs begin here."""
        lengths, used = list(self.sync().lengths), self._used
        used[REACH].copy_(used[LENGTH]).add_(self.slack)
        used[BASE].copy_(used[LENGTH])
        self.know(replace(self.known, reach=[n + self.slack for n in lengths], base=lengths))

    def empty(self) -> None:
        """The rows in use are empty."""
        self._used.zero_()
        self.overflow.zero_()
        self.know(nothing(self.rows))

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Rows are empty; without a choice of them all are, and all that were allocated are in use again."""
        if rows is None:
            self.rows = self.allocated
            self._look()
            self.data.zero_()
            self.overflow.zero_()
            self.know(nothing(self.rows))
        else:
            index = torch.tensor(rows, device=self.data.device)
            for numbers in (self.data[LENGTH], self.data[REACH:]):  # all but the columns
                numbers.index_fill_(-1, index, 0)
            self._set(rows, 0, 0, self.known.width)

    def admit(self, row: int, length: int, rotated: int) -> None:
        """A row has been filled with what another one held, and cannot go back before that."""
        reach, columns = length + self.slack, max(self.sync().width, length)
        self.data[:, row].zero_()
        for number, value in ((LENGTH, length), (BASE, length), (REACH, reach)):
            self.data[number, row].fill_(value)
        self.data[COLUMNS].fill_(columns)
        self._set([row], length, reach, columns, rotated)

    def _set(self, rows: Sequence[int], length: int, reach: int, width: int, rotated: int = 0) -> None:
        """Know that these rows hold `length` tokens each, which cannot be taken back."""
        known = self.known
        lengths, reaches, bases, rotations = map(list, (known.lengths, known.reach, known.base, known.rotated))
        for row in rows:
            lengths[row], reaches[row], bases[row], rotations[row] = length, reach, length, rotated
        self.know(Known(lengths, reaches, bases, rotations, width, differ(lengths), known.overflowed))

    def taken(self, rows: Sequence[int]) -> Callable[[], None]:
        """Prepare to keep these rows, in this order."""
        index = torch.tensor(rows, device=self.data.device)
        data, known = revive(self.data.index_select(1, index), static=False), self.known
        held = known.lengths, known.reach, known.base, known.rotated
        lengths, reach, base, rotated = ([numbers[row] for row in rows] for numbers in held)

        def move() -> None:
            if self.static:
                self.data[:, : len(rows)] = data
            else:
                self.data = data
            self.rows = len(rows)
            self._look()
            self.know(Known(lengths, reach, base, rotated, known.width, differ(lengths)))

        return move

    def snapshot(self) -> tuple[Tensor, Known]:
        """The numbers, on the device and as the host knows them."""
        return self._used.clone(), self.known

    def load(self, copied: tuple[Tensor, Known]) -> None:
        """Put a snapshot back."""
        self._used.copy_(copied[0])
        self.overflow.zero_()
        self.know(copied[1])

    def buffers(self) -> list[Tensor]:
        return [self.data, self.overflow]


def whole_numbers(given: Tensor | Sequence[int] | int, rows: int, what: str) -> list[int]:
    """One integer for each of B rows, from one for all, a list, or a long tensor (B,). Raises RowsError."""
    if isinstance(given, int) and not isinstance(given, bool):
        return [given] * rows
    if isinstance(given, Tensor):
        kind, shape = str(given.dtype), tuple(given.shape)
        if not given.is_floating_point() and given.dtype != torch.bool and shape == (rows,):
            return [int(n) for n in given.tolist()]
    else:
        numbers = list(given) if isinstance(given, Sequence) else [given]
        kind, shape = type(given).__name__, (len(numbers),)
        if len(numbers) == rows and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            return [int(n) for n in numbers]
    raise RowsError(f"{what} are one int, or a long tensor ({rows},), one number a row, not {kind} {shape}")
