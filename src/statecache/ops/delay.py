"""A delay by one token: y_t = x_(t-1), and the state is the x of the last token.

Half of the values of compressed convolutional attention (Figliolia et al., arXiv:2510.04476) come so. Where alive, the
gate, is 0 there is no token. Nothing is computed: every form gives the same bits.

Letters: B rows, T new tokens, *D the shape of x, n marks of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "bitwise"}


@chunks.uncast
def chunk(
    x: Tensor, alive: Tensor, state: Tensor | None = None, count: Tensor | None = None, at: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens: x (B, T, *D), alive (B, T) or (B, T, 1), state (B, *D) or None.

    Returns the outputs (B, T, *D), the state after the first `count` (B,) tokens of each row, None for all, and the
    states after `at` (B, n) tokens, each 0..T, (B, n, *D), or None.
    """
    x = x.to(chunks.working(x, state))
    state = x.new_zeros(len(x), *x.shape[2:]) if state is None else state
    states, last = torch.cat([state.unsqueeze(1), x], 1), _last(alive, x, count)
    rows = torch.arange(len(x), device=x.device)
    marked = None if at is None else states[rows[:, None], last.gather(1, at)]
    return states[rows[:, None], last[:, :-1]], states[rows, last[:, -1]], marked


@chunks.forward_only
def step(x: Tensor, alive: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, *D) in place: x (B, *D), alive (B,) or (B, 1). Returns (B, *D)."""
    y = state.clone()
    state.copy_(torch.where(alive.reshape(-1, *[1] * (x.dim() - 1)) != 0, x.to(state.dtype), state))
    return y


@chunks.forward_only
def fold(x: Tensor, alive: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, *D) in place over the first `count` (B,) tokens of a record, None for all.

    The record: x (B, T, *D), alive (B, T) or (B, T, 1).
    """
    states = torch.cat([state.unsqueeze(1), x.to(state.dtype)], 1)
    state.copy_(states[torch.arange(len(x), device=x.device), _last(alive, x, count)[:, -1]])


def _last(alive: Tensor, x: Tensor, count: Tensor | None) -> Tensor:
    """Which token is the last after 0..T of them, from 1 on, 0 for none: (B, T + 1)."""
    there = chunks.gated(alive.reshape(x.shape[:2]), count, x.dtype) != 0
    number = torch.arange(1, x.shape[1] + 1, device=x.device)
    return F.pad((number * there).cummax(1).values, (1, 0))
