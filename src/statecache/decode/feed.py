"""One forward pass of a prepared model over tokens of ragged rows.

B rows, T new tokens, V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def feed(model: Any, cache: Any, tokens: Sequence[list[int]] | Tensor) -> Tensor:
    """Take in tokens, each row its own number of them, or (B, T); the logits (B, V) after each row's last."""
    device = next(model.parameters()).device
    if isinstance(tokens, Tensor):
        ids, mask = tokens.to(device), None
    else:
        width = max(len(row) for row in tokens)
        # on the left, so that the last column has every row's last token, and no other logits need be made
        ids = torch.tensor([[0] * (width - len(row)) + row for row in tokens], device=device)
        mask = left_padding([len(row) for row in tokens], width, device)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    logits: Tensor = model(ids, past_key_values=cache, attention_mask=mask, use_cache=True, **last).logits
    return logits[:, -1]


def left_padding(counts: Sequence[int], width: int, device: torch.device) -> Tensor | None:
    """A mask (B, T) of rows whose last `counts` of T = `width` columns are tokens; None where all are."""
    if min(counts) == width:
        return None
    return (torch.arange(width, 0, -1, device=device) <= torch.tensor(counts, device=device)[:, None]).long()
