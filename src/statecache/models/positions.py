"""Where the tokens of a prepared model stand: at their number, or off it by what pictures have moved their row.

A picture's tokens get three coordinates each, and the text behind it goes on from the largest of them. How far a row's
next token then stands from its length is a state of the cache, an entry a token as all are, so that it goes where the
row goes. There is none before the first picture, unless addresses must never move.

B rows, R of them in a pass, T new tokens, A coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statecache.models.cache import StateCache
from statecache.models.table import POSITION
from statecache.ring import Ring
from statecache.states import States
from statecache.step import Step


class Places:
    """Where the tokens of one pass stand. `positions`: (R or 1, T), or as the caller `given` gave them.

    Positions (A, R, T) say where a row goes on from; those without coordinates leave that as it is.
    """

    def __init__(self, states: States, step: Step, given: Tensor | None, device: torch.device) -> None:
        self.step, self.entries = step, None
        places = step.places(device)
        self.positions = places if given is None else given
        moved = given is not None and given.dim() == 3
        self.ring = _ring(states, device, step.tokens, moved)
        if self.ring is None:
            return
        off = self.ring.past(1, step)[..., 0].clone().to(device)  # (R, 1); the past may be a view of what is written
        if given is None:
            self.positions = places + off
        if moved:
            assert given is not None
            last = given[-3:].amax(0).to(device).expand(len(off), -1)  # (R, T)
            before = places[:, :1] + off - 1
            self.entries = torch.maximum(last, before).cummax(1).values - places
        else:
            self.entries = off.expand(-1, step.tokens)

    def keep(self) -> None:
        """Write down where the rows go on from."""
        if self.ring is not None and self.entries is not None:
            self.ring.put(self.entries[..., None].to(self.ring.device), self.step)


def _ring(states: States, device: torch.device, tokens: int, moved: bool) -> Ring | None:
    if POSITION.name not in states.declared:
        return None
    held = states.held.get(POSITION.name)
    if held is None and (moved or states.capacity is not None):
        held = states.allocate(POSITION.name, torch.long, states.device or device, tokens)
    assert held is None or isinstance(held, Ring)
    return held


def upcoming(cache: StateCache, rows: Sequence[int] | None, batch: int, device: torch.device) -> Tensor:
    """The position of the next token of these rows, None for all: (batch,) long; zeros where the cache has others."""
    cache.writer.finish()
    clock, ring = cache.states.clock, cache.states.held.get(POSITION.name)
    if clock is None or (rows is None and clock.rows != batch):
        return torch.zeros(batch, dtype=torch.long, device=device)
    start, chosen = clock.lengths, None
    if rows is not None:
        chosen = torch.tensor(list(rows), device=start.device)
        start = start[chosen]
    if ring is None:
        return start.to(device)
    assert isinstance(ring, Ring)
    return start.to(device) + ring.past(1, Step(0, start, rows=chosen)).flatten().to(device)
