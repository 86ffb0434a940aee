"""Stands in for the decoder's `forward` of a prepared model: where a pass begins and ends, and padding is dealt with.

Behind it each row's new tokens stand on the left, counted, with positions of their own; nothing downstream sees a pad.
It stands in front of the decoder, so that a pass is opened and closed whoever calls.

B rows, T new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from statecache.clock import capturing
from statecache.errors import ConfigError, RaggedError, ShapeError, StepError
from statecache.models.attention import ARGUMENT, AttentionPass
from statecache.models.cache import Expected, StateCache
from statecache.models.masks import check_form, unmasked
from statecache.models.table import model_spec
from statecache.replay import Operators
from statecache.step import Step

CACHES = ("past_key_values", "cache_params")


class Forward:
    """Stands in for the decoder's `forward`. `operators`: what steps its recurrent states."""

    def __init__(self, decoder: nn.Module, unmodified: Any, operators: Operators) -> None:
        self.decoder, self.unmodified, self.operators = decoder, unmodified, operators
        config: Any = decoder.config
        self.config = config
        self.names = [name for name in inspect.signature(unmodified).parameters if name != "kwargs"]
        self.cache_name = next(name for name in CACHES if name in self.names)
        self.positioned = "position_ids" in self.names
        spec = model_spec(config)
        self.made_for, self.unmasked = spec.digest(), unmasked(spec)
        self.owns_cache = config.model_type == "minimax"  # refuses others, where it is told to use a cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own forward, for any padding, rows of any lengths, and caches under either name."""
        kwargs.update(zip(self.names, args, strict=False))
        given = [kwargs.pop(name) for name in CACHES if kwargs.get(name) is not None]
        cache = given[0] if given else None
        checkpointed = self._checkpoints()
        if cache is None and self._uses_cache(kwargs) and not checkpointed:
            cache = StateCache(self.config)
        kwargs[self.cache_name] = cache
        if isinstance(cache, Cache) and not isinstance(cache, StateCache):
            return self.unmodified(**kwargs)
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return self.unmodified(**kwargs)  # which says what is missing
        rows, width = tokens.shape[:2]
        if not width:
            raise ShapeError(f"no token came, in {tuple(tokens.shape)}: a forward pass takes at least one")
        mask = kwargs.get("attention_mask")
        expected = cache.take_expected(rows, mask) if isinstance(cache, StateCache) else None
        real, count = _real(mask, rows, width)
        if isinstance(cache, StateCache):
            self._check_cache(cache, mask, width, checkpointed)
        kwargs["attention_mask"] = None
        if cache is None and real is None:
            return self.unmodified(**kwargs)
        place = None
        if real is not None:
            place = torch.argsort(~real, dim=1, stable=True)  # real tokens first, in their order
            _move(kwargs, place, rows, width)
        if cache is None:
            out = self.unmodified(**kwargs)
        else:
            if real is not None:
                expected = Expected(count if isinstance(count, list) else real.sum(1), None, real.sum(1))
            out = self._through(cache, kwargs, tokens, expected)
        return out if place is None else _back(out, place, keys=cache is None)

    def _uses_cache(self, kwargs: Mapping[str, Any]) -> bool:
        use = kwargs.get("use_cache")
        return bool(self.config.use_cache and not self.decoder.training if use is None else use)

    def _through(self, cache: StateCache, kwargs: dict[str, Any], tokens: Tensor, expected: Expected | None) -> Any:
        width = tokens.shape[1]
        count, rows, counted = (
            (None, None, None) if expected is None else (expected.count, expected.rows, expected.counted)
        )
        if self.positioned:
            check_form(self.config, cache, width, ragged=expected is not None)
        writer = cache.begin(tokens, width, count, rows, counted=counted, operators=self.operators)
        step = writer.step
        assert step is not None
        if self.positioned:
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = _positions(step, tokens)
            kwargs["attention_mask"] = self.unmasked
            kwargs[ARGUMENT] = AttentionPass(cache.states, step)
        if self.owns_cache:
            kwargs["use_cache"] = False
        try:
            out = self.unmodified(**kwargs)
        except BaseException:
            writer.give_up()
            raise
        writer.end()
        return out

    def _checkpoints(self) -> bool:
        """Whether layers are to run again in a backward pass, for which transformers hides the cache from them."""
        layers: Any = self.decoder.layers
        return self.decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in layers)

    def _check_cache(self, cache: StateCache, mask: Tensor | None, width: int, checkpointed: bool) -> None:
        """Whether this model can go on with the cache."""
        if checkpointed:
            raise StepError("gradient checkpointing hides the cache from the layers: train with use_cache=False")
        if cache.made_for != self.made_for:
            alike = cache.spec.model == self.config.model_type and len(cache) == self.config.num_hidden_layers
            raise ConfigError(
                f"the cache was made for {len(cache)} layers of {cache.spec.model}, and this {self.config.model_type} "
                f"model has {self.config.num_hidden_layers}{', of other sizes or windows' * alike}: make it from "
                "model.config"
            )
        if mask is not None and cache.holds_pads(mask[:, :-width]):
            raise RaggedError(
                "the mask shows pads among the tokens that an unprepared model fed to this cache, as tokens: begin "
                "with a new cache, or prepare the model before the first turn"
            )


def stands_in(decoder: nn.Module) -> bool:
    """Whether something stands in for the forward of this decoder."""
    return any(isinstance(getattr(value, "__self__", None), Forward) for value in vars(decoder).values())


def _real(mask: Any, rows: int, width: int) -> tuple[Tensor | None, list[int] | None]:
    """Which of the T new tokens are tokens, (B, T) bool, from the last T columns of a mask; None where all are.

    And how many each row has, which waits for the device, unless it is compiled or captured.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < width:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"attention_mask: came {came}, expected ({rows}, {width} or more): a prepared model reads which of its "
            f"{width} new tokens are real off the last columns, and knows the rest itself"
        )
    real = mask[:, -width:] != 0
    if torch.compiler.is_compiling() or capturing(real):
        return real, None
    count = real.sum(1).tolist()
    return (None, None) if min(count) == width else (real, count)


def _positions(step: Step, tokens: Tensor) -> Tensor:
    """The position of each new token: (B, T), or (1, T) where all rows stand alike."""
    offsets = torch.arange(step.tokens, device=tokens.device)
    if isinstance(step.start, int):
        return (offsets + step.start)[None]
    return step.start.to(tokens.device)[:, None] + offsets


def _move(kwargs: dict[str, Any], place: Tensor, rows: int, width: int) -> None:
    """Put what comes one a token in the order of `place` (B, T)."""
    if kwargs.get("input_ids") is not None:
        kwargs["input_ids"] = kwargs["input_ids"].gather(1, place)
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = _gather(kwargs["inputs_embeds"], place)
    if kwargs.get("position_ids") is not None:
        given = kwargs["position_ids"]
        given = given.expand(*given.shape[:-2], rows, width)
        kwargs["position_ids"] = given.gather(-1, place.expand_as(given))


def _back(out: Any, place: Tensor, keys: bool) -> Any:
    """Put what comes one a token back into the columns it came from. `keys`: those of attention weights as well.

    Hidden states are (B, T, E), attention weights (B, H, T, S), a router's logits (B T, E). Keys of a cache are in
    order of position, whatever the columns.
    """
    home = torch.argsort(place, dim=1)
    rows, width = home.shape

    def back(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(back(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        there = home.to(value.device)  # layers may lie on several devices
        if value.dim() == 3 and value.shape[:2] == (rows, width):
            return _gather(value, there)
        if value.dim() == 2 and len(value) == rows * width:
            return _gather(value.view(rows, width, -1), there).flatten(0, 1)
        if value.dim() == 4 and (len(value), value.shape[2]) == (rows, width):
            value = value.gather(2, there[:, None, :, None].expand_as(value))
            return value.gather(3, there[:, None, None].expand_as(value)) if keys else value
        return value

    if isinstance(out, tuple):
        return back(out)
    for name in ("last_hidden_state", "hidden_states", "attentions", "router_logits"):
        if out.get(name) is not None:
            out[name] = back(out[name])
    return out


def _gather(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(1, place[..., None].expand(*place.shape, x.shape[-1]))
