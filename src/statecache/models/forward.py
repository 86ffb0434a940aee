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

from statecache.clock import capturing
from statecache.errors import ConfigError, ShapeError, StepError
from statecache.models.attention import ARGUMENT, AttentionPass, counts_columns
from statecache.models.cache import Expected, StateCache
from statecache.models.checks import no_token
from statecache.models.decoder import layers_of
from statecache.models.factors import check_places, dynamic, restart
from statecache.models.masks import Given, by_row, check_form, unmasked
from statecache.models.names import cache_name, rename
from statecache.models.positions import Places
from statecache.models.ready import announce
from statecache.models.table import KINDS, model_spec
from statecache.replay import Operators
from statecache.step import Step


class StandIn:
    """What is called in place of a module's own method, `unmodified`, and shows that method's parameters."""

    def __init__(self, unmodified: Any) -> None:
        self.unmodified = unmodified

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.unmodified)


class Forward(StandIn):
    """Stands in for the decoder's `forward`. `operators`: what steps its recurrent states.

    whole: the configuration of the model around it, from which it makes a cache where none is given.
    """

    def __init__(self, decoder: nn.Module, unmodified: Any, operators: Operators) -> None:
        super().__init__(unmodified)
        self.decoder, self.operators = decoder, operators
        config: Any = decoder.config
        self.config = self.whole = config
        self.names = [name for name in inspect.signature(unmodified).parameters if name != "kwargs"]
        self.cache_name = cache_name(unmodified)
        self.positioned, self.counts = "position_ids" in self.names, counts_columns(decoder)
        self.spec = spec = model_spec(config)
        self.mixes = any(KINDS[layer.kind].mixer for layer in spec.layers)
        self.by_row = any(state.name == "position" for _, state in spec.states())  # where tokens stand is kept
        self.made_for, self.unmasked = spec.digest(), unmasked(spec)
        self.rotary, self.dynamic = spec.rotary, list(dynamic(decoder))
        self.owns_cache = config.model_type == "minimax"  # refuses others, where it is told to use a cache
        announce(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy of the model
        vars(self).update(state)
        announce(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the decoder's own forward, for any padding, rows of any lengths, and a cache under any name."""
        kwargs.update(zip(self.names, args, strict=False))
        rename(kwargs, self.cache_name)
        cache = kwargs.get(self.cache_name)
        checkpointed = self._checkpoints()
        own = cache is None and self.makes_cache(kwargs)
        if own:
            cache = StateCache(self.whole)
        kwargs[self.cache_name] = cache
        if cache is not None and not isinstance(cache, StateCache):  # one of transformers, or of its generate_batch
            return self.unmodified(**kwargs)
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return self.unmodified(**kwargs)  # which says what is missing
        rows, width = tokens.shape[:2]
        if not width:
            raise no_token(cache.lengths.tolist() if isinstance(cache, StateCache) else [])
        restart(self.dynamic)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Given):
            mask = mask.mask
        elif isinstance(mask, dict) and cache is None:
            return self.unmodified(**kwargs)  # with the masks that a model around it has made
        expected = cache.take_expected(rows, mask) if isinstance(cache, StateCache) else None
        why = ""
        if isinstance(mask, Tensor) and mask.dim() == 4:
            found = by_row(mask, rows, width, self.spec, cache)
            if isinstance(found, Tensor):
                mask = found
            elif cache is None and not self.mixes:
                return self.unmodified(**kwargs)
            else:
                why = found
        real, count = _real(mask, rows, width, why)
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
            if count is not None:
                self._place_alone(kwargs, count, tokens)
            out = self.unmodified(**kwargs)
        else:
            if real is not None:
                expected = Expected(count if isinstance(count, list) else real.sum(1), None, real.sum(1))
            out = self._through(cache, kwargs, tokens, expected, mask, whole=own and torch.is_grad_enabled())
        return out if real is None else _back(out, real, keys=cache is None)

    def makes_cache(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether it makes a cache where none came."""
        use = kwargs.get("use_cache")
        use = self.config.use_cache and not self.decoder.training if use is None else use
        return bool(use and not self._checkpoints())

    def _through(
        self,
        cache: StateCache,
        kwargs: dict[str, Any],
        tokens: Tensor,
        expected: Expected | None,
        mask: Tensor | None,
        whole: bool,
    ) -> Any:
        width = tokens.shape[1]
        count, rows, counted = (
            (None, None, None) if expected is None else (expected.count, expected.rows, expected.counted)
        )
        if self.positioned:
            check_form(self.config, cache, width, expected is not None, self.counts)
        if not torch.compiler.is_compiling():
            cache.filled_by(self.decoder)
        writer = cache.begin(tokens, width, count, rows, counted=counted, operators=self.operators)
        step, writer.whole = writer.step, whole
        assert step is not None
        places = None
        if self.owns_cache:
            kwargs["use_cache"] = False
        try:
            if self.positioned:
                places = self._place(cache, kwargs, step, tokens)
                kwargs["attention_mask"] = self.unmasked
                clock, baked = cache.states.clock, torch.compiler.is_compiling() or capturing(tokens)
                known = None if clock is None or baked else clock.known
                kwargs[ARGUMENT] = AttentionPass(cache.states, step, known, mask)
            out = self.unmodified(**kwargs)
            if places is not None:
                places.keep()
        except BaseException:
            writer.give_up()
            raise
        writer.end()
        return out

    def _place(self, cache: StateCache, kwargs: dict[str, Any], step: Step, tokens: Tensor) -> Places:
        """Say where the pass's tokens stand, or check what is said where rotary factors depend on it."""
        given, rotary = kwargs.get("position_ids"), self.rotary
        if given is not None and rotary is not None:
            check_places(rotary, given, step.end)
        places = Places(cache.states, step, given, tokens.device)
        kwargs["position_ids"] = places.positions
        if given is None and rotary is not None:
            # the model takes its longest row for as long as the largest position says, of junk too
            kwargs["position_ids"] = places.positions.clamp(max=(step.end or cache.get_max_length()) - 1)
        if self.by_row:
            last = kwargs["position_ids"]
            kwargs["position_ids"] = last.expand(*last.shape[:-2], *tokens.shape[:2])
        return places

    def _place_alone(self, kwargs: dict[str, Any], count: list[int], tokens: Tensor) -> None:
        """The same without a cache, for rows of `count` tokens. Training takes batches as transformers does."""
        if self.rotary is None or self.decoder.training or kwargs.get("position_ids") is not None:
            return
        rows = len(count)
        self.rotary.rotate([0] * rows, None, [0] * rows, count)
        kwargs["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device)[None].clamp(max=max(count) - 1)

    def _checkpoints(self) -> bool:
        """Whether layers are to run again in a backward pass, for which transformers hides the cache from them."""
        if not self.decoder.training:
            return False
        return any(getattr(layer, "gradient_checkpointing", False) for layer in layers_of(self.decoder))

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
        if mask is not None:
            cache.check_mask(mask[:, :-width])


def stands_in(decoder: nn.Module) -> bool:
    """Whether something stands in for the forward of this decoder."""
    return any(isinstance(value, Forward) for value in vars(decoder).values())


def door(decoder: nn.Module) -> Forward:
    """What stands in for it."""
    return next(value for value in vars(decoder).values() if isinstance(value, Forward))


def _real(mask: Any, rows: int, width: int, why: str) -> tuple[Tensor | None, list[int] | None]:
    """Which of the T new tokens are tokens, (B, T) bool, from the last T columns of a mask; None where all are.

    And how many each row has, which waits for the device, unless it is compiled or captured. `why`: one of four axes
    says nothing of the kind.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < width:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"attention_mask: came {came}, expected ({rows}, {width} or more): a prepared model reads which of its "
            f"{width} new tokens are real off the last columns, and knows the rest itself{why and '; ' + why}"
        )
    real = mask[:, -width:] != 0
    if torch.compiler.is_compiling() or capturing(real):
        return real, None
    count = real.sum(1).tolist()
    return (None, None) if min(count) == width else (real, count)


def _move(kwargs: dict[str, Any], place: Tensor, rows: int, width: int) -> None:
    """Put what comes one a token in the order of `place` (B, T)."""
    for ids in ("input_ids", "ple_input_ids"):
        if kwargs.get(ids) is not None:
            kwargs[ids] = kwargs[ids].gather(1, place)
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = _gather(kwargs["inputs_embeds"], place)
    if kwargs.get("position_ids") is not None:
        given = kwargs["position_ids"]
        given = given.expand(*given.shape[:-2], rows, width)
        kwargs["position_ids"] = given.gather(-1, place.expand_as(given))


def _back(out: Any, real: Tensor, keys: bool) -> Any:
    """Put what comes one a token back into the columns it came from. `keys`: those of attention weights as well.

    A padded column gets what the last token before it has, so that the last column ends every row; zeros where there
    is none. Hidden states are (B, T, E), attention weights (B, H, T, S), a router's logits (B T, E). Keys of a cache
    are in order of position, whatever the columns.
    """
    home = real.cumsum(1) - 1
    some = home >= 0
    home = home.clamp(min=0)
    rows, width = home.shape

    def back(value: Any) -> Any:
        if type(value) is tuple:
            return tuple(back(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        there, seen = home.to(value.device), some.to(value.device)  # layers may lie on several devices
        if value.dim() == 3 and value.shape[:2] == (rows, width):
            return _gather(value, there).masked_fill(~seen[..., None], 0)
        if value.dim() == 2 and len(value) == rows * width:
            value = _gather(value.view(rows, width, -1), there).masked_fill(~seen[..., None], 0)
            return value.flatten(0, 1)
        if value.dim() == 4 and (len(value), value.shape[2]) == (rows, width):
            value = value.gather(2, there[:, None, :, None].expand_as(value)).masked_fill(~seen[:, None, :, None], 0)
            if keys:
                value = value.gather(3, there[:, None, None].expand_as(value))
                value = value.masked_fill(~real.to(value.device)[:, None, None], 0)
        return value

    if isinstance(out, tuple):
        return back(out)
    for name in ("last_hidden_state", "hidden_states", "attentions", "router_logits"):
        if out.get(name) is not None:
            out[name] = back(out[name])
    return out


def _gather(x: Tensor, place: Tensor) -> Tensor:
    return x.gather(1, place[..., None].expand(*place.shape, x.shape[-1]))
