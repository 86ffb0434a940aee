"""Passes of `States.one_pass` beside lists of what rows were given: what each state shows, of the rows in use."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROWS, WINDOW, TAPS = 3, 4, 2
CAPACITIES = None, 24, 6  # in the last a ring with a window holds all, where it has slack


def run(core: SimpleNamespace, seed: int) -> None:
    """A schedule of passes, some over some rows, some of a cache of fewer rows, and rollbacks."""
    Passes(core, random.Random(seed)).run()


class Passes:
    """States of all forms, and the number that stood for each token of each row."""

    def __init__(self, core: SimpleNamespace, draw: random.Random) -> None:
        self.core, self.draw = core, draw
        self.slack, self.capacity = draw.choice((0, 3)), draw.choice(CAPACITIES)
        state, layer = core.spec.StateSpec, core.spec.LayerSpec
        # of one number an entry, first along their first axis and along the second
        entries = (
            state("conv", "conv", (1,), TAPS),
            state("wide", "conv", (1,), TAPS, axis=1),
            state("memory", "recurrent", (2,), 1, leased=True),
            state("key", "attention", (1, 1)),
            state("near", "sliding", (1, 1), WINDOW, axis=1),
        )
        spec = core.spec.ModelSpec((layer(0, "mine", entries),))
        given: dict[str, Any] = {"rows": ROWS, "dtype": torch.float64, "device": "cpu"}
        self.states = core.states.States(spec, capacity=self.capacity, slack=self.slack, **given)
        self.held: list[list[float]] = [[] for _ in range(ROWS)]
        self.used, self.number = ROWS, 0.0

    def run(self) -> None:
        for _ in range(14):
            what = self.draw.choice(("pass", "pass", "pass", "step", "left", "fewer"))
            if what == "left" and self.room(1, range(ROWS)):
                self.leave_out()
            elif what in ("pass", "step"):
                self.feed(1 if what == "step" else self.draw.randint(1, 6), choose=what == "pass")
            elif what == "fewer" and self.capacity is not None and any(self.held):
                with self.fewer(self.draw.randint(1, ROWS)):
                    self.feed(self.draw.randint(1, 6), choose=True)
                    self.feed(1, choose=False)
            assert self.states.lengths.tolist() == [len(held) for held in self.held]

    @contextmanager
    def fewer(self, rows: int) -> Iterator[None]:
        """Have the first rows alone in use, and the others stay as they are. Marks from before are stale then."""
        mark = self.states.checkpoint()
        with self.states.narrowed(rows):
            self.used = rows
            assert self.states.rows == rows and self.states.lengths.tolist() == list(map(len, self.held[:rows]))
            yield
        self.used = ROWS
        if rows < ROWS:
            self.refused("StaleMarkError", lambda: self.states.restore(mark))

    def feed(self, tokens: int, *, choose: bool) -> None:
        """A pass, and a rollback of a step that all rows took in."""
        rows = list(range(self.used))
        chosen = (
            self.draw.sample(rows, self.draw.randint(1, self.used)) if choose and self.draw.random() < 0.4 else None
        )
        over = rows if chosen is None else chosen
        count = [self.draw.randint(0, tokens) for _ in over] if choose and self.draw.random() < 0.5 else None
        taken = count or [tokens] * len(over)
        if not self.room(tokens, over):
            return
        new = torch.arange(len(over) * tokens, dtype=torch.float64).view(len(over), tokens) + self.number + 1
        self.number = float(new.max())
        with self.states.one_pass(tokens, count=count, rows=chosen) as now:
            self.refusals(now, new)
            self.shown(now, new, over, taken)
        self.refused("StepError", lambda: now.visible("0.key"))
        for now_in, n, numbers in zip(over, taken, new.tolist(), strict=True):
            self.held[now_in] += numbers[:n]
        if not choose and self.slack and self.draw.random() < 0.5:
            self.states.rollback(1)
            for row in rows:
                self.held[row].pop()

    def room(self, tokens: int, rows: Iterable[int]) -> bool:
        return self.capacity is None or max(len(self.held[row]) for row in rows) + tokens <= self.capacity

    def leave_out(self) -> None:
        """A pass that writes one state alone, which a mark comes back from."""
        mark = self.states.checkpoint()
        self.refused("StepError", self.write_one)
        self.states.restore(mark)

    def write_one(self) -> None:
        with self.states.one_pass(1) as now:
            now.write("0.memory", torch.ones(ROWS, 2, dtype=torch.float64))

    def shown(self, now: Any, new: Tensor, over: list[int], taken: list[int]) -> None:
        """Put the numbers (R, T) into every state, and look at what each shows of the rows `over`."""
        tokens, before = new.shape[1], [self.held[row] for row in over]
        places = now.positions.expand(len(over), -1).tolist()
        assert places == [[len(held) + t for t in range(tokens)] for held in before]
        assert now.real.tolist() == [[t < n for t in range(tokens)] for n in taken]
        memory = now.read("0.memory")
        assert memory.tolist() == [[sum(held), len(held)] for held in before]
        memory.add_(torch.stack([(new * now.real).sum(1), now.real.sum(1)], 1))  # a copy, one's own
        now.write("0.memory", memory)
        key, near = now.attend("0.key", new[..., None, None]), now.attend("0.near", new[:, None, :, None])
        seen = now.window("0.conv", new[..., None])[..., 0], now.window("0.wide", new[:, None])[:, 0]
        assert key.shape[1] == max(1, *(len(held) + n for held, n in zip(before, taken, strict=True)))
        for again in (lambda: now.read("0.memory"), lambda: now.attend("0.key", new[..., None, None])):
            self.refused("StepError", again)
        masks = {None: now.visible("0.key"), WINDOW: now.visible("0.near")}
        for b, (held, n) in enumerate(zip(before, taken, strict=True)):
            whole = held + new[b].tolist()
            for x in seen:
                assert x[b].tolist() == ([0.0] * TAPS + whole)[-TAPS - tokens :]
            for (window, mask), entries in zip(masks.items(), (key[b, :, 0, 0], near[b, 0, :, 0]), strict=True):
                for t in range(n):
                    may = mask[b if len(mask) > 1 else 0, 0, t]
                    text = whole[: len(held) + t + 1]
                    assert entries[may].tolist() == (text if window is None else text[-window:])

    def refusals(self, now: Any, new: Tensor) -> None:
        """What is wrong is refused, and changes nothing."""
        entries = new[..., None, None]
        for error, wrong in (
            ("LayerError", lambda: now.window("0.key", entries)),
            ("LayerError", lambda: now.window("conv", entries[..., 0])),
            ("LayerError", lambda: now.read("0.conv")),
            ("LayerError", lambda: now.attend("0.memory", entries)),
            ("StepError", lambda: now.visible("0.key")),
            ("ShapeError", lambda: now.attend("0.key", entries[:, :, 0])),
            ("ShapeError", lambda: now.attend("0.near", new.repeat(1, 2)[:, None, :, None])),
            ("RowsError", lambda: now.attend("0.key", entries.repeat(2, 1, 1, 1))),
            ("DtypeError", lambda: now.attend("0.key", entries.float())),
            ("DeviceError", lambda: now.attend("0.key", entries.to("meta"))),
        ):
            self.refused(error, wrong)
        with torch.enable_grad():
            self.refused("StateCacheError", lambda: now.attend("0.key", entries.clone().requires_grad_()))
        assert now.left() == [f"0.{name}" for name in ("conv", "wide", "memory", "key", "near")]

    def refused(self, error: str, wrong: Callable[[], object]) -> None:
        with pytest.raises(getattr(self.core.errors, error)):
            wrong()
