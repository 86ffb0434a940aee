"""Lightning attention, a linear attention of fixed decay (Qin et al., arXiv:2401.04658; MiniMax-01, arXiv:2501.08313).

    S_t = exp(-slope) S_(t-1) + v_t outer k_t        y_t = S_t q_t

It is `ssd` of x = v, dt = alive, A = -slope, B = k, C = q, a group per head. alive, 1 or 0, is the gate.

Letters: B rows, T new tokens, H heads, D head size, n marks of a row.
"""

import torch
from torch import Tensor

from statecache.ops import chunks, ssd

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}


@chunks.uncast
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alive: Tensor,
    slope: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens: q, k, v (B, T, H, D), alive (B, T) or (B, T, 1), slope (H,) > 0, state (B, H, D, D) or None.

    Returns the outputs (B, T, H, D), the state after the first `count` (B,) tokens of each row, None for all, and
    the states after `at` (B, n) tokens, each 0..T, (B, n, H, D, D), or None.
    """
    return ssd.chunk(v, _gate(alive, v.shape[:-1], chunks.working(v, state)), -slope, k, q, state, count, at)


@chunks.forward_only
def step(q: Tensor, k: Tensor, v: Tensor, alive: Tensor, slope: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, H, D, D) in place: q, k, v (B, H, D), alive (B,) or (B, 1), slope (H,).

    Returns (B, H, D).
    """
    return ssd.step(v, _gate(alive, v.shape[:-1], state.dtype), -slope, k, q, state)


@chunks.forward_only
def fold(k: Tensor, v: Tensor, alive: Tensor, slope: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, H, D, D) in place over the first `count` (B,) tokens of a record, None for all.

    The record: k, v (B, T, H, D), alive (B, T) or (B, T, 1).
    """
    ssd.fold(v, _gate(alive, v.shape[:-1], state.dtype), k, -slope, state, count)


def _gate(alive: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return alive.reshape(*shape[:-1], 1).to(dtype).expand(shape)
