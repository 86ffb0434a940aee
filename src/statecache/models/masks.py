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
from statecache.spec import ModelSpec, StateSpec
from statecache.states import States
from statecache.step import Step, offset

# What models hand on where a mask would be. Of one with four axes transformers makes no other, and without entries
# nothing can be attended with it: were it not replaced, that would be an error, not a wrong answer.
UNTOLD = torch.empty((0, 0, 0, 0), device="cpu")


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


def unmasked(spec: ModelSpec) -> Tensor | dict[str, Tensor | None]:
    """What a decoder is handed in place of masks, so that it makes none: by kind of layer, where it has mixers too."""
    kinds = {state.kind for layer in spec.layers for state in layer.states if state.name == "key"}
    if len(kinds) == 1 and not any(KINDS[layer.kind].mixer for layer in spec.layers):
        return UNTOLD  # not every model of attention alone takes a dict
    return {name: UNTOLD if kind.attention and not kind.mixer else None for name, kind in KINDS.items()}


def untold(given: Any) -> bool:
    """Whether what an attention layer was given is what stands in place of a mask."""
    return isinstance(given, Tensor) and given.shape == UNTOLD.shape


def mask(
    form: str, dtype: torch.dtype, device: torch.device, keys: StateSpec, states: States, step: Step
) -> Tensor | None:
    """The mask of layers that keep these `keys`, (B or 1, 1, T, S), over those that `Ring.extend` returns.

    None where `form` needs none.
    """
    width, start, window = step.tokens, step.start, keys.window
    growing = states.capacity is None
    if isinstance(start, int) and growing:
        # the keys end with the last token: SDPA needs no mask if there is one query, or nothing before the queries
        short = width == 1 or (form == "sdpa" and start == 0 and (window is None or width <= window))
        if short or "flash" in form:
            return None
    step = step.on(device)
    starts = torch.full((1,), start, device=device) if isinstance(start, int) else step.start
    assert isinstance(starts, Tensor)
    query = starts[:, None] + torch.arange(width, device=device)
    if window is None or keys.holds_all(states.capacity, states.slack):
        held = step.end if growing else states.capacity
        key = torch.arange(held or 0, device=device)[None]
    elif isinstance(start, int) and growing:
        past = min(start, window - 1)
        key = (starts - past)[:, None] + torch.arange(past + width, device=device)
    else:
        key = offset(starts, window)[:, None] + torch.arange(window - 1 + width, device=device)
    real = None if step.count is None else step.takes()
    seen = visible(query, key, window, None if real is None else real.to(device))
    return seen if form == "sdpa" else additive(seen, dtype)
