"""Where a row's tokens stand among the columns that were fed, pads included: transformers' outputs count by these.

B rows, H heads, T new tokens, S keys, W columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statecache.clock import Known
from statecache.models.masks import places
from statecache.spec import StateSpec
from statecache.states import States
from statecache.step import Step


class Columns:
    """The columns of one pass. known: what the host knew before it. mask (B, T or more): which columns are tokens.

    Of columns before the pass that the mask does not show, a row's tokens stand in the last.
    """

    def __init__(self, states: States, step: Step, known: Known, mask: Tensor | None) -> None:
        self.states, self.step, self.held = states, step, known.width
        self.start = torch.tensor(known.lengths)[:, None]
        self.new = self.past = None
        if mask is not None:
            past, new = mask[:, : -step.tokens], mask[:, -step.tokens :]
            self.new = _order(new)
            if past.shape[1] == self.held and (past != 0).sum(1).tolist() == known.lengths:
                self.past = _order(past)

    def spread(self, weights: Tensor, keys: StateSpec) -> Tensor:
        """Attention weights (B, H, T, S), by position, as (B, H, T, W): zero where a column holds no token of the row.

        W is as in transformers: of layers with these `keys`, in a growing cache, the columns that a window reaches. A
        token that it holds from before them is left out.
        """
        states, step, device = self.states, self.step, weights.device
        at = places(device, keys, states, step).expand(len(weights), -1)
        start = self.start.to(device)
        new = (at - start).clamp(0, step.tokens - 1)
        column = self.held + (new if self.new is None else self.new.to(device).gather(1, new))
        before = at + self.held - start
        if self.past is not None and self.held:
            before = self.past.to(device).gather(1, at.clamp(max=self.held - 1))
        column = torch.where(at < start, before, column)
        first, width, window = 0, weights.shape[-1], keys.window
        if window is not None and not keys.holds_all(states.capacity, states.slack):
            first = max(self.held - window + 1, 0)
        if states.capacity is None:
            width = self.held + step.tokens - first
        column = column - first
        kept = (column >= 0) & (column < width)
        shape = (*weights.shape[:-1], width)
        index = column.clamp(0, width - 1)[:, None, None].expand_as(weights)
        return weights.new_zeros(shape).scatter_add_(-1, index, weights * kept[:, None, None])


def _order(real: Tensor) -> Tensor:
    """The columns (B, n) of tokens, in their order, and then those of pads."""
    return torch.argsort(real == 0, dim=1, stable=True)
