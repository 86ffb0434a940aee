"""One forward pass of a prepared model, over all rows of its cache or some, each with tokens of its own number.

B rows, T new tokens, V tokens of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from statecache import kernels
from statecache.models.fused import norms_by_kernels
from statecache.models.names import cache_name

MANY = 128  # tokens of a prompt for which it pays to go through a model's norms


def feed(model: Any, cache: Any, tokens: Sequence[list[int]] | Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Take in tokens, each row its own number of them, or (B, T); the logits (B, V) after each row's last.

    `rows`: of the cache, and all of one length; None for all rows, of any lengths.
    """
    device = input_device(model)
    if isinstance(tokens, Tensor):
        ids, widths = tokens.to(device), [tokens.shape[1]] * len(tokens)
    else:
        widths = [len(row) for row in tokens]
        # on the left, so that the last column has every row's last token, and no other logits need be made
        ids = torch.tensor([[0] * (max(widths) - len(row)) + row for row in tokens], device=device)
    options: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(model.__class__) else {}
    if min(widths) < ids.shape[1]:
        assert rows is None
        options["attention_mask"] = left_padding(widths, ids.shape[1], device)
    many = ids.shape[1] >= MANY and kernels.available(device) and not torch.is_grad_enabled()
    with norms_by_kernels(model) if many else nullcontext():
        return advance(model, cache, ids, None, rows, **options)[:, -1]


def advance(
    model: Any,
    cache: Any,
    ids: Tensor,
    counts: list[int] | None,
    rows: Sequence[int] | None = None,
    counted: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Take in the first `counts[b]` of ids (B, T) in each row, or all; the logits (B, T, V), junk beyond the counts.

    `rows`: of the cache, B of them; None for all. `counted`: the counts (B,) long on the model's device, if they are
    there already.
    """
    if rows is not None or (counts is not None and min(counts) < ids.shape[1]):
        cache.expect(counts or [ids.shape[1]] * len(ids), rows, counted=counted)
    logits: Tensor = model(ids, **{_cache_name(model.__class__): cache}, use_cache=True, **options).logits
    return logits


def step(model: Any, cache: Any, ids: Tensor, count: Tensor) -> Tensor:
    """Take in ids (B, 1) in the rows whose `count` (B,), on the cache's device, is 1; the logits (B, V) after them."""
    cache.expect(count)
    return advance(model, cache, ids, None)[:, -1]


def input_device(model: Any) -> torch.device:
    """Where a model takes its ids: where its embedding is, or where accelerate brings it from elsewhere."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        if getattr(each, "execution_device", None) is not None:
            return torch.device(each.execution_device)
    device: torch.device = embedding.weight.device
    return device


def left_padding(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """A mask (B, T) of rows whose last `counts` of T = `width` columns are tokens."""
    return (torch.arange(width, 0, -1, device=device) <= torch.tensor(counts, device=device)[:, None]).long()


@lru_cache
def _cache_name(kind: Any) -> str:
    """The name under which a model of this class takes its cache."""
    return cache_name(kind.forward)


@lru_cache
def _keeps_logits(kind: Hashable) -> bool:
    """Whether a model of this class makes the logits of the last tokens alone if it is asked to."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
