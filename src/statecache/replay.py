"""How a recurrence rolls back: not by copies of its state, but by a log of what it consumed, and replay.

The state stands at the `floor` of its row, the farthest that a rollback may go; the log, two rings of `slack` entries,
has what came after it. A pass first folds the state forward, just so far that the log has room for the new tokens, then
runs from there over what is left of the log and its own tokens, and logs these. So a pass of up to `slack` tokens
changes nothing that is before the end of its row: whatever it brought can be taken back.

To read the log again for every single token would double the time of decoding. So a growing cache keeps beside each
state its tip, the state after the row's last token: a pass of one token steps that. A rollback leaves the tips behind,
and the next pass makes them anew.

B rows, T new tokens, W the width of a flat entry, *D a recurrence's state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.ring import Lease, Ring, Step

# Steps a recurrence over n entries of its log: inputs and gates (B, n, W) as they were logged, the state (B, *D) in
# place, and how many of the entries each row takes in, (B,), or None for all.
Fold = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], None]


@dataclass(frozen=True, eq=False)
class Replay:
    """How one pass meets the logs, the same for all layers."""

    floor: int | Tensor  # where the states stand: (B,) where rows may differ
    fold: int | Tensor  # entries that each is to be folded over before the pass
    most: int  # of them, at most
    lag: int  # entries that the pass reads again in front of its own tokens, as far as they are not folded yet
    at: int | Tensor | None  # of the lag + T tokens, how many the state takes in for good; None: it stays

    @property
    def base(self) -> int | Tensor:
        """Where the states stand once they are folded."""
        return self.floor + self.fold


class Recurrence(Protocol):
    """A recurrence over flat entries: inputs, gates and queries (B, T, W). Where all gates are 0 there is no token."""

    def chunk(
        self,
        inputs: Tensor,
        gates: Tensor,
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The outputs (B, T, ...), the state after `count` (B,) tokens, and the states (B, n, *D) after `at` (B, n)."""
        ...

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Tensor:
        """The output of one token (B, W), taken into `state` (B, *D) in place."""
        ...


def fold(step: Fold, state: Lease, log: tuple[Ring, Ring], replay: Replay) -> None:
    """Move the state forward over the oldest entries of its log."""
    if replay.most:
        entries = Step(0, replay.floor + replay.most)
        inputs, gates = (ring.past(replay.most, entries) for ring in log)
        step(inputs, gates, state.entry, replay.fold if isinstance(replay.fold, Tensor) else None)


def run(
    recurrence: Recurrence,
    inputs: Tensor,
    gates: Tensor,
    query: Tensor,
    state: Lease,
    log: tuple[Ring, Ring] | None,
    step: Step,
) -> Tensor:
    """Run a recurrence over the T tokens of a step, and keep what the next step needs; the outputs (B, T, ...)."""
    replay, count = step.replay, step.count
    if replay is None or log is None:
        if step.tokens == 1:
            return _one(recurrence, inputs, gates, query, state.entry, count)
        y, after, _ = recurrence.chunk(inputs, gates, query, state.entry, count)
        state.put(after)
        return y
    if step.tip and state.tip is not None and step.tokens == 1:
        y = _one(recurrence, inputs, gates, query, state.tip, count)
    else:
        y = _again(recurrence, inputs, gates, query, state, log, step, replay)
    for ring, new in zip(log, (inputs, gates), strict=True):
        ring.put(new, step)
    return y


def _one(
    recurrence: Recurrence, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor, count: Tensor | None
) -> Tensor:
    """Step over one token, `state` (B, *D) in place."""
    if count is not None:
        gates = gates * (count > 0).to(gates.dtype)[:, None, None]
    return recurrence.step(inputs[:, 0], gates[:, 0], query[:, 0], state)[:, None]


def _again(
    recurrence: Recurrence,
    inputs: Tensor,
    gates: Tensor,
    query: Tensor,
    state: Lease,
    log: tuple[Ring, Ring],
    step: Step,
    replay: Replay,
) -> Tensor:
    """Run from where the state stands over what is left of the log, then over the tokens of the step."""
    count = step.count
    lag, seen = replay.lag, (inputs, gates, query)
    if lag:
        old, old_gates = (ring.past(lag, step) for ring in log)
        if isinstance(replay.base, Tensor):  # rows whose state stands further have less to read again
            start = torch.as_tensor(step.start, device=gates.device).view(-1, 1)
            ahead = start + torch.arange(-lag, 0, device=gates.device) >= replay.base[:, None]
            old_gates = old_gates * ahead[..., None].to(gates.dtype)
        seen = torch.cat([old, inputs], 1), torch.cat([old_gates, gates], 1), F.pad(query, (0, 0, lag, 0))
        count = None if count is None else count + lag
    at = replay.at
    marks = None if at is None else torch.as_tensor(at, device=gates.device).view(-1, 1).expand(len(inputs), 1)
    y, after, states = recurrence.chunk(*seen, state.entry, count, marks)
    if states is not None:
        state.put(states[:, 0])
    if step.tip is not None:
        state.put_tip(after)
    return y[:, lag:]
