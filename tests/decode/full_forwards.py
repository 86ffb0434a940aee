"""What a model writes by itself: the argmax, by a full forward of the unprepared model for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def argmax_loop(model: Any, ids: Tensor, n: int, ends: tuple[int, ...] = (), pad: int = 0) -> Tensor:
    """Go on with ids (B, T) for n tokens, or until each row has had one of `ends`: (B, T + new)."""
    over = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(n):
        token = model(ids, use_cache=False).logits[:, -1].argmax(-1).masked_fill(over, pad)
        ids = torch.cat([ids, token[:, None]], 1)
        over |= torch.isin(token, torch.tensor(ends, dtype=torch.long))
        if over.all():
            break
    return ids
