"""What attention layers of a prepared model are told: nothing where causality alone will do, else one mask a window.

B rows, T new tokens, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statecache.errors import RaggedError
from statecache.mask import additive, visible
from statecache.models.cache import StateCache
from statecache.models.table import KINDS
from statecache.step import Step, offset

NAMES = ("full_attention", "sliding_attention", "linear_attention", "conv")  # what families ask of a dict of masks


def check_form(config: Any, cache: StateCache, width: int, ragged: bool) -> None:
    """Whether the attention can be told what rows see, before anything is changed."""
    form, clock = config._attn_implementation, cache.states.clock
    ragged = ragged or (clock is not None and clock.known.ragged)
    plain = cache.capacity is None and not ragged and ("flash" in form or width == 1)
    if form not in ("sdpa", "eager") and not plain and any(s.name == "key" for _, s in cache.spec.states()):
        raise RaggedError(
            f'rows of different lengths, padding and a fixed capacity need masks, and attn_implementation="{form}" '
            'takes none of them: load the model with attn_implementation="sdpa"'
        )


def masks(
    config: Any, dtype: Any, cache: StateCache, step: Step, device: torch.device
) -> Tensor | dict[str, Tensor | None] | None:
    """The masks of a pass, by the names under which layers ask for them."""
    form = config._attn_implementation
    windows = {s.kind: s.window for layer in cache.spec.layers for s in layer.states if s.name == "key"}
    made = {kind: mask(form, dtype, cache, step, device, window) for kind, window in windows.items()}
    if len(made) == 1 and not any(KINDS[layer.kind].mixer for layer in cache.spec.layers):
        return next(iter(made.values()))  # not every model of attention alone takes a dict
    sliding = made.get("sliding")
    return dict(zip(NAMES, (made.get("attention", sliding), sliding, None, None), strict=True))


def mask(
    form: str, dtype: torch.dtype, cache: StateCache, step: Step, device: torch.device, window: int | None
) -> Tensor | None:
    """The mask of layers that see `window` tokens, (B or 1, 1, T, S), over the keys that `Ring.extend` returns."""
    width, start = step.tokens, step.start
    growing = cache.capacity is None
    if isinstance(start, int) and growing:
        # the keys end with the last token: SDPA needs no mask if there is one query, or nothing before the queries
        short = width == 1 or (form == "sdpa" and start == 0 and (window is None or width <= window))
        if short or "flash" in form:
            return None
    step = step.on(device)
    starts = torch.tensor([start], device=device) if isinstance(start, int) else step.start
    assert isinstance(starts, Tensor)
    query = starts[:, None] + torch.arange(width, device=device)
    spec = next(s for layer in cache.spec.layers for s in layer.states if s.name == "key" and s.window == window)
    if window is None or spec.holds_all(cache.capacity, cache.slack):
        held = step.end if growing else cache.capacity
        key = torch.arange(held or 0, device=device)[None]
    elif isinstance(start, int) and growing:
        past = min(start, window - 1)
        key = (starts - past)[:, None] + torch.arange(past + width, device=device)
    else:
        key = offset(starts, window)[:, None] + torch.arange(window - 1 + width, device=device)
    seen = visible(query, key, window, None if step.count is None else step.takes())
    return seen if form == "sdpa" else additive(seen, dtype)
