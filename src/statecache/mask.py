"""From positions to what a token may attend to.

B rows (1 where all are alike), T new tokens, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    query: Tensor, key: Tensor, window: int | None = None, real: Tensor | None = None, chunked: bool = False
) -> Tensor:
    """Which keys each token attends to, (B, 1, T, S) bool: those not after it, and of them the `window` newest.

    query (B, T) and key (B, S) are positions. `real` (B, T): the others are no tokens; they see everything, since a
    row of nothing but False is NaN after a softmax. `chunked`: of the tokens from a multiple of `window` on.
    """
    key, query = key[:, None], query[..., None]
    seen = key <= query
    if window is not None:
        seen = seen & (key >= query - query % window if chunked else key > query - window)
    if real is not None:
        seen = seen | ~real[..., None]
    return seen[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as a summand of attention scores: 0 where seen, else the least number of `dtype`."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
