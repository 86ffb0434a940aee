"""The logged states of a container: what steps them, how their logs make room, how they come to their rows' ends."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from statecache.clock import Clock
from statecache.errors import StepError
from statecache.lease import Lease
from statecache.replay import Gathering, Log, Operators, Recurrence, Together, make_room, make_room_unseen
from statecache.ring import Ring
from statecache.step import Step


class Logs:
    """The logs among the states that a container has `held` so far.

    `apart`: they are on the device one layer at a time. `behind`: whether a state has yet to be brought to its row's
    end, for want of its operator.
    """

    def __init__(self, held: dict[str, Ring | Lease], apart: bool) -> None:
        self._held, self._apart = held, apart
        self._operators: weakref.ref[Operators] | None = None
        self.behind = False
        self._gathered: dict[Together, Together] = {}  # kept, since captured launches read what these hold

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": None, "_gathered": {}}

    def __getitem__(self, name: str) -> Log | None:
        """A logged state with what it consumed; None before it was first written."""
        layer = name.partition(".")[0]
        parts = (self._held.get(name), self._held.get(f"{layer}.inputs"), self._held.get(f"{layer}.gates"))
        if any(part is None for part in parts):
            return None
        return Log(*parts)  # type: ignore[arg-type]

    @property
    def operators(self) -> Operators | None:
        """What steps the states, by name, for as long as somebody else keeps it alive."""
        return None if self._operators is None else self._operators()

    def bind(self, operators: Operators) -> None:
        """Know what steps the states. Does not keep it alive."""
        self._operators = weakref.ref(operators)

    def room(
        self, step: Step, clock: Clock, rows: Sequence[int] | None, taken: Sequence[int] | None, slack: int, size: int
    ) -> list[int] | None:
        """Say in `step.shift` how bases move, so that logs of `size` have room for it; and where all rows' stand then.

        rows: those of the step, None for all. taken: the tokens of each; None, and None back: only the device knows.
        """
        bases = clock.bases if step.rows is None else clock.bases.index_select(0, step.rows)
        if taken is None:
            step.shift = make_room_unseen(step, bases, slack, size)
            return None
        known, chosen = clock.known, range(clock.rows) if rows is None else rows
        lengths, held = ([numbers[row] for row in chosen] for numbers in (known.lengths, known.base))
        made = make_room(step, lengths, taken, held, bases, slack, size)
        if made is None:
            return None
        step.shift, then = made[0], list(known.base)
        for row, base in zip(chosen, made[1], strict=True):
            then[row] = base
        return then

    def fold(self, step: Step) -> None:
        """Move the bases as the step's shift says."""
        for recurrence, log in self._each():
            log.fold(recurrence, step)

    def accept(self, step: Step, most: int, count: Tensor | None) -> None:
        """Take in what a round keeps of its pass: the first `count` (R,) tokens, at most `most`; None: all of these."""
        together: dict[Together, list[tuple[Recurrence, Log]]] = {}
        for recurrence, log in self._each():
            run = recurrence.together(log) if isinstance(recurrence, Gathering) and not self._apart else None
            if run is None:
                log.accept(recurrence, step, most, count)
            else:
                together.setdefault(self._gathered.setdefault(run, run), []).append((recurrence, log))
        for run, some in together.items():
            run(some, step, most, count)

    def replay(self, clock: Clock, moved: Sequence[bool] | None = None) -> None:
        """Bring states to the ends of the rows that moved, None: all; later, where nobody knows what steps them."""
        self.behind = self.operators is None and any(state.spec.logged for state in dict.values(self._held))
        if not self.behind:
            moved = [True] * clock.rows if moved is None else moved
            for recurrence, log in self._each():
                log.replay(recurrence, clock.known.base, clock.known.lengths, moved)

    def catch_up(self, clock: Clock | None) -> None:
        """Bring states to the ends of their rows, where that was put off."""
        if self.behind and clock is not None:
            self.replay(clock)

    def _each(self) -> Iterator[tuple[Recurrence, Log]]:
        """What steps each state that was written, and its log."""
        operators = self.operators
        for name, state in self._held.items():
            log = self[name] if state.spec.logged else None
            if log is None:
                continue
            if operators is None or name not in operators:
                raise StepError(
                    f'state "{name}" rolls back by a log of what it consumed, and its model is not known: bind()'
                )
            yield operators[name], log
