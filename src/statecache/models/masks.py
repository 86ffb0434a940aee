"""What attention layers of a prepared model are told: nothing where causality alone will do, else one mask a window.

B rows, T new tokens, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statecache.clock import capturing
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
# Of layers whose index chooses among what this lets them see.
UNCHOSEN = torch.ones((), dtype=torch.bool, device="cpu")


class Given(dict[str, Any]):
    """A caller's `mask` as a dict, the form in which wrappers that make masks hand on what is made already."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self.mask = mask


def check_form(config: Any, cache: StateCache, width: int, ragged: bool, counts: bool) -> None:
    """Whether the attention can be told what rows see, before anything is changed. `counts`: see `counts_columns`."""
    form, clock = config._attn_implementation, cache.states.clock
    ragged = ragged or (clock is not None and clock.known.ragged)
    if ragged and counts:
        raise RaggedError(
            f"attention of {config.model_type} models goes by one length for all rows: give it rows of one length, "
            "without padding, or one row at a time"
        )
    if form in ("sdpa", "eager") or not any(s.name == "key" for _, s in cache.spec.states()):
        return
    chunked = any(KINDS[layer.kind].chunked for layer in cache.spec.layers)
    if ragged or chunked or cache.capacity is not None or not ("flash" in form or width == 1):
        raise RaggedError(
            "rows of different lengths, padding, a fixed capacity and attention by chunks need masks, and "
            f'attn_implementation="{form}" takes none of them: load the model with attn_implementation="sdpa"'
        )


def by_row(mask: Tensor, rows: int, width: int, spec: ModelSpec, cache: StateCache | None) -> Tensor | str:
    """Which of T new columns are tokens, (B, T) bool, where a mask (B or 1, 1 or H, T, S) shows each all up to itself.

    Why no such mask says the same, where it shows anything else. Waits for the device.
    """
    if torch.compiler.is_compiling() or capturing(mask):
        return "what one of four axes shows cannot be looked at in a compiled or captured step"
    if any(state.name == "key" and state.window is not None for _, state in spec.states()):
        return "one of four axes says nothing of layers with a window"
    clock = None if cache is None else cache.states.clock
    lengths = [0] * rows if clock is None else clock.sync().lengths
    columns = 0 if clock is None else clock.known.width
    shape = tuple(mask.shape)
    if shape[0] not in (1, rows) or shape[2:] != (width, columns + width) or len(lengths) != rows:
        return f"one of four axes is to be ({rows} or 1, heads or 1, {width}, {columns + width}), for the columns held"
    least = torch.finfo(mask.dtype).min if mask.is_floating_point() else None
    seen = mask if least is None else mask == 0
    if seen.dtype != torch.bool or (least is not None and not bool((seen | (mask <= least / 2)).all())):
        return "one of four axes is of bool, or zero where tokens are seen and as low as can be elsewhere"
    if not bool((seen == seen[:, :1]).all()):
        return "this shows other tokens to other heads"
    seen = seen[:, 0].expand(rows, -1, -1)
    place = torch.arange(width, device=mask.device) + columns
    everything = seen.all(-1) & (place < columns + width - 1)  # pads may be let see all, in place of nothing
    order = torch.arange(width, device=mask.device)
    new = seen[:, order, place] & ~everything
    last = torch.where(new, order, 0).amax(1)
    past = seen[torch.arange(rows, device=mask.device), last, :columns]
    causal = torch.arange(columns + width, device=mask.device) <= place[:, None]
    right = (seen == (causal & torch.cat([past, new], 1)[:, None])).all(-1) | (~new & (everything | ~seen.any(-1)))
    if not bool(right.all()):
        row, token = (~right).nonzero()[0].tolist()
        return f"this shows token {token} of row {row} something else than all real ones up to itself"
    for row, (shown, held) in enumerate(zip(past.sum(1).tolist(), lengths, strict=True)):
        if shown != held and bool(new[row].any()):
            return f"this shows row {row} {shown} of the tokens before, and the cache holds {held} of it"
    return new


def unmasked(spec: ModelSpec) -> Tensor | dict[str, Tensor | None]:
    """What a decoder is handed in place of masks, so that it makes none: by kind of layer, where it has mixers too."""
    kinds = {state.kind for layer in spec.layers for state in layer.states if state.name == "key"}
    if len(kinds) == 1 and not any(KINDS[layer.kind].mixer for layer in spec.layers):
        return UNTOLD  # not every model of attention alone takes a dict
    attending = {name: kind for name, kind in KINDS.items() if kind.attention and not kind.mixer}
    return dict.fromkeys(KINDS) | {name: UNCHOSEN if kind.indexed else UNTOLD for name, kind in attending.items()}


def untold(given: Any) -> bool:
    """Whether what an attention layer was given is what stands in place of a mask."""
    return isinstance(given, Tensor) and given.shape == UNTOLD.shape


def mask(
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    keys: StateSpec,
    chunked: bool,
    states: States,
    step: Step,
) -> Tensor | None:
    """The mask of layers that keep these `keys`, (B or 1, 1, T, S), over those that `Ring.extend` returns.

    None where `form` needs none. `chunked`: whether what is seen begins anew after every window.
    """
    width, start, window = step.tokens, step.start, keys.window
    growing = states.capacity is None
    if isinstance(start, int) and growing:
        # the keys end with the last token: SDPA needs no mask if there is one query, or nothing before the queries
        short = (width == 1 and not chunked) or (form == "sdpa" and start == 0 and (window is None or width <= window))
        if short or "flash" in form:
            return None
    step = step.on(device)
    real = None if step.count is None else step.takes()
    key = places(device, keys, states, step)
    seen = visible(step.places(device), key, window, None if real is None else real.to(device), chunked)
    return seen if form == "sdpa" else additive(seen, dtype)


def places(device: torch.device, keys: StateSpec, states: States, step: Step) -> Tensor:
    """The positions (B or 1, S) of the `keys` that `Ring.extend` returns in this step."""
    start, window, growing = step.start, keys.window, states.capacity is None
    starts = torch.full((1,), start, device=device) if isinstance(start, int) else step.on(device).start
    assert isinstance(starts, Tensor)
    if window is None or keys.holds_all(states.capacity, states.slack):
        held = step.end if growing else states.capacity
        return torch.arange(max(1, held or 0), device=device)[None]
    if isinstance(start, int) and growing:
        past = min(start, window - 1)
        return (starts - past)[:, None] + torch.arange(past + step.tokens, device=device)
    return offset(starts, window)[:, None] + torch.arange(window - 1 + step.tokens, device=device)
