"""How a recurrence rolls back: not by copies of its state, but by a log of what it consumed, and replay.

A row's state stands after its last token, and every pass goes on from there. Behind it stands a second one, the *base*,
and between the two the log has what the recurrence consumed of each token: two rings of one and a half times the slack.
To roll back is to run from the base over what is left of the log. The base moves only when the log is full, and then by
half the slack at once, so that a step mostly pays for going back by no more than writing down what it consumes.

A speculative round runs from the state and leaves it where it is; what is accepted is taken in from the log.

B rows, R of them in a step, T new tokens, W the width of a flat entry, *D a recurrence's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from statecache.lease import Lease
from statecache.ring import Ring
from statecache.step import Shift, Step

FEW = 8  # tokens that are quicker stepped over one by one than as a chunk

Parts = tuple[Tensor, ...]
# accepts a round's tokens, see `Log.accept`, in all of these
Together = Callable[["Sequence[tuple[Recurrence, Log]]", Step, int, Tensor | None], None]


class Recurrence(Protocol):
    """What steps a state. It takes in tokens by parts, inputs and then gates; where all gates are 0 there is no token.

    `inputs` and `gates`: the shapes of the parts of one token; `query`: that of what it asks of the state.
    """

    inputs: tuple[tuple[int, ...], ...]
    gates: tuple[tuple[int, ...], ...]
    query: tuple[int, ...]

    def chunk(
        self, taken: Parts, query: Tensor, state: Tensor | None, count: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The outputs (B, T, ...), the state after `count` (B,) tokens, and the states (B, n, *D) after `at` (B, n)."""
        ...

    def step(self, taken: Parts, query: Tensor, state: Tensor) -> Tensor:
        """The output (B, ...) of one token, parts (B, *shape), taken into `state` (B, *D) in place."""
        ...

    def fold(self, taken: Parts, state: Tensor, count: Tensor | None) -> None:
        """Take tokens (B, n, *shape), of each row the first `count` (B,), into `state` (B, *D) in place."""
        ...


@runtime_checkable
class Gathering(Protocol):
    """A recurrence that may take a round's tokens into the states of several layers at once."""

    def together(self, log: Log) -> Together | None:
        """What does it, the same for all that go together; None where this state goes by itself."""
        ...


class Operators(dict[str, Recurrence]):
    """What steps each logged state, by the state's name."""


def make_room(
    step: Step, starts: Sequence[int], taken: Sequence[int], known: Sequence[int], bases: Tensor, slack: int, log: int
) -> tuple[Shift, list[int]] | None:
    """How bases move so that logs of `log` entries have room for the step; and where they stand then. None: they have.

    starts, taken, known: where each of the step's rows stands, what it takes in, and where its base stands; `bases` is
    the last of these on the device, (R,).
    """
    if all(start + n - base <= log for start, n, base in zip(starts, taken, known, strict=True)):
        return None
    then = [max(base, start + n - slack) for start, n, base in zip(starts, taken, known, strict=True)]
    inside = any(base > start for base, start in zip(then, starts, strict=True))
    if isinstance(step.start, int) and known.count(known[0]) == len(known):
        first, base = known[0], then[0]
        move = (
            Shift(first, 0, None, base - step.start, base) if inside else Shift(first, base - first, None, None, base)
        )
        return move, then
    over = [base - first for first, base, start in zip(known, then, starts, strict=True) if base <= start]
    return _shift(step, bases, slack, max(over, default=0), inside), then


def make_room_unseen(step: Step, bases: Tensor, slack: int, log: int) -> Shift:
    """The same where only the device knows the numbers: a pass moves the bases (R,) as little as it can."""
    inside = step.tokens > log
    return _shift(step, bases, slack if inside else log, min(step.tokens, log), inside)


def _shift(step: Step, bases: Tensor, back: int, most: int, inside: bool) -> Shift:
    """Bases that are to stand `back` tokens before the step's end."""
    end = step.start + (step.tokens if step.count is None else step.count)
    then = torch.maximum(bases, torch.as_tensor(end - back, device=bases.device))
    if not inside:
        return Shift(bases, most, then - bases, None, then)
    start = torch.as_tensor(step.start, device=bases.device)
    return Shift(
        bases, most, torch.where(then > start, 0, then - bases), torch.where(then > start, then - start, -1), then
    )


@dataclass(frozen=True, eq=False)
class Log:
    """One recurrence's state, and what it consumed since its base."""

    state: Lease
    inputs: Ring
    gates: Ring

    def put(self, taken: Parts, step: Step, gates: int) -> None:
        """Write down the parts (R, T, *shape) that a step takes in, the last `gates` of them gates."""
        n = min(step.tokens, self.inputs.capacity)
        if n < step.tokens and step.count is None:  # a prompt's last tokens alone are logged: the others are not moved
            taken = tuple(part[:, -n:] for part in taken)
        parts = (taken[: len(taken) - gates], taken[len(taken) - gates :])
        for ring, each in zip((self.inputs, self.gates), parts, strict=True):
            flat = [part.flatten(2) for part in each]
            new = flat[0] if len(flat) == 1 else torch.cat(flat, -1)
            ring.put(new.to(ring.dtype), step)

    def read(self, recurrence: Recurrence, first: int | Tensor, n: int, rows: Tensor | None = None) -> Parts:
        """The parts (R, n, *shape) of the tokens from position `first` on, an int or (R,)."""
        after = Step(0, first + n, rows=rows, end=0)
        return (
            *_parts(self.inputs.past(n, after), recurrence.inputs),
            *_parts(self.gates.past(n, after), recurrence.gates),
        )

    def fold(self, recurrence: Recurrence, step: Step) -> None:
        """Move the base as the step's shift says, over what is in the log."""
        base, shift = self.state.base, step.on(self.state.device).shift
        if base is not None and shift is not None and shift.most:
            taken = self.read(recurrence, shift.first, shift.most, step.on(self.state.device).rows)
            base.write(_advance(recurrence, taken, base.read(step), shift.count), step)

    def stand(self, states: Tensor | None, step: Step) -> None:
        """Have the base stand inside the step's pass, where its shift says so; `states` (R, 1, *D) are those there."""
        base, shift = self.state.base, step.on(self.state.device).shift
        if base is None or states is None or shift is None:
            return
        new = states[:, 0]
        if isinstance(shift.at, Tensor):
            moves = (shift.at >= 0).view(-1, *[1] * (new.dim() - 1))
            new = torch.where(moves, new, base.read(step))
        base.write(new, step)

    def accept(self, recurrence: Recurrence, step: Step, most: int, count: Tensor | None) -> None:
        """Take in the first `count` (R,) of a round's tokens, at most `most`; None: all of these."""
        if most:
            here = step.on(self.state.device)
            taken = self.read(recurrence, here.start, most, here.rows)
            count = None if count is None else count.to(self.state.device)
            self.state.write(_advance(recurrence, taken, self.state.read(step), count), step)

    def replay(
        self, recurrence: Recurrence, bases: Sequence[int], lengths: Sequence[int], moved: Sequence[bool]
    ) -> None:
        """Have the state stand at these lengths again, in the rows that moved: from the base over the log."""
        base = self.state.base
        assert base is not None
        behind = [length - first for first, length in zip(bases, lengths, strict=True)]
        alike = len(set(bases)) == 1 and len(set(behind)) == 1
        device = self.state.device
        first: int | Tensor = bases[0]
        count: Tensor | None = None
        if not alike:
            first, count = torch.tensor(bases, device=device), torch.tensor(behind, device=device)
        after = base.entry.clone()
        if max(behind):
            after = _advance(recurrence, self.read(recurrence, first, max(behind)), after, count)
        if not all(moved):
            rows = torch.tensor(moved, device=device).view(-1, *[1] * (after.dim() - 1))
            after = torch.where(rows, after, self.state.entry)
        self.state.put(after)


def run(
    recurrence: Recurrence, taken: Parts, query: Tensor, state: Lease, step: Step, log: Log | None = None
) -> Tensor:
    """Take in the parts (R, T, *shape) of a step's tokens; the outputs (R, T, ...). The state is then after them.

    In a speculative round it stays, and the log alone has them.
    """
    step.write()
    here = step.on(state.device)
    held = state.read(here)
    if step.tokens == 1:
        one = tuple(part[:, 0] for part in taken)
        if here.count is not None:
            one = _idle(recurrence, one, here)
        held = held.clone() if step.tentative else held
        y = recurrence.step(one, query[:, 0], held)[:, None]
    else:
        at = None if here.shift is None or log is None else here.shift.at
        marks = None if at is None else torch.as_tensor(at, device=held.device).clamp(min=0).view(-1, 1)
        marks = None if marks is None else marks.expand(len(held), 1)
        y, held, states = recurrence.chunk(taken, query, held, here.count, marks)
        if log is not None:
            log.stand(states, here)
    if not step.tentative:
        state.write(held, here)
    if log is not None:
        log.put(taken, here, len(recurrence.gates))
    return y


def _idle(recurrence: Recurrence, one: Parts, step: Step) -> Parts:
    """The parts (R, *shape) of one token, which is none in rows that take nothing in."""
    n = len(recurrence.inputs)
    alive = step.takes()
    assert alive is not None
    gates = (torch.where(alive.view(-1, *[1] * (gate.dim() - 1)), gate, 0) for gate in one[n:])
    return (*one[:n], *gates)


def _parts(flat: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Parts:
    """Flat entries (R, n, W) as parts (R, n, *shape)."""
    widths = [math.prod(shape) for shape in shapes]
    pieces = (flat,) if len(widths) == 1 else flat.split_with_sizes(widths, -1)
    return tuple(torch.unflatten(piece, -1, shape) for piece, shape in zip(pieces, shapes, strict=True))


def _advance(recurrence: Recurrence, taken: Parts, state: Tensor, count: Tensor | None) -> Tensor:
    """The state (R, *D) after the first `count` (R,) of these tokens (R, n, *shape); `state` may be overwritten."""
    n = taken[0].shape[1]
    if n <= FEW:
        recurrence.fold(taken, state, count)
        return state
    query = taken[0].new_zeros(len(state), n, *recurrence.query)
    return recurrence.chunk(taken, query, state, count)[1]
