"""Attention of a prepared model: one function in transformers' `AttentionInterface`, which attends in the cache's pass.

An attention module looks up the function that its configuration names. Those of a prepared model are given a
configuration of their own for that, which names `attend`, and is the model's in all else.

B rows, T new tokens, S keys, H heads, G of them with keys and values of their own, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from statecache.clock import Known
from statecache.errors import ConfigError, StepError, UnknownLayerError
from statecache.mask import additive
from statecache.models.code import asked, forwards, hands_on
from statecache.models.columns import Columns
from statecache.models.decoder import layers_of
from statecache.models.masks import mask, places, untold
from statecache.models.table import KINDS, LOOPS, Kind, model_spec
from statecache.spec import StateSpec
from statecache.states import States
from statecache.step import Step

FORM = "statecache"  # of `attend`, among the attn_implementations
ARGUMENT = "statecache_pass"  # under which models hand an `AttentionPass` on to it

Attention = tuple[Tensor, Tensor | None]  # (B, T, H, D); the weights (B, H, T, S), in forms that make them


class AttentionPass:
    """The pass that is open, as attention needs it: the step, and the masks and distances made for it so far.

    known: what the host knew before it; None where that may not be baked in. given: its mask (B, T or more).
    """

    def __init__(self, states: States, step: Step, known: Known | None, given: Tensor | None) -> None:
        self.states, self.step = states, step
        self.known, self.given = known, given
        self._columns: Columns | None = None
        self._masks: dict[Any, Tensor | None] = {}
        self._distances: dict[Any, Tensor] = {}

    def mask(self, form: str, keys: StateSpec, chunked: bool, query: Tensor) -> Tensor | None:
        """What `form` is to be told of layers with these keys; made once for each window on each device. See `mask`."""
        key = form, keys.window, chunked, query.device, query.dtype
        if key not in self._masks:
            self._masks[key] = mask(form, query.dtype, query.device, keys, chunked, self.states, self.step)
        return self._masks[key]

    def spread(self, weights: Tensor, keys: StateSpec) -> Tensor:
        """Attention weights by column, where columns are not positions: see `Columns.spread`."""
        known, step = self.known, self.step
        if known is None or step.rows is not None:
            return weights
        if step.count is None and all(length == known.width for length in known.lengths):
            return weights
        if self._columns is None:
            self._columns = Columns(self.states, step, known, self.given)
        return self._columns.spread(weights, keys)

    def distance(self, keys: StateSpec, device: torch.device) -> Tensor:
        """How far each token stands behind each of these keys: (B or 1, 1, T, S), below zero for those after it."""
        key = keys.window, device
        if key not in self._distances:
            queries = self.step.places(device).unsqueeze(-1)
            self._distances[key] = (queries - places(device, keys, self.states, self.step).unsqueeze(1)).unsqueeze(1)
        return self._distances[key]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    statecache_pass: AttentionPass | None = None,
    **options: Any,
) -> Attention:
    """Attend with query (B, H, T, D) to key and value (B, G, S, D), as `StateCache.update` gave them back.

    Within a pass of a cache with a mask made here; without one as the unprepared model does, with the mask that came.
    Raises StepError where a model did not hand the pass on, ConfigError for a model that asks for it unprepared.
    """
    config: Any = module.config
    if not isinstance(config, Attending):
        raise ConfigError(
            f'attn_implementation="{FORM}" is what statecache.prepare(model) gives attention layers: load the model '
            'with attn_implementation="sdpa", and prepare it'
        )
    own = config.own
    if config.kind.indexed:
        # the model has made a mask of what its index chose, and may have known no form that takes it
        if own._attn_implementation == "sdpa" and attention_mask is not None and attention_mask.dtype != torch.bool:
            attention_mask = attention_mask == 0
        elif own._attn_implementation == "eager" and attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
    elif statecache_pass is not None:
        attention_mask = statecache_pass.mask(own._attn_implementation, config.keys, config.kind.chunked, query)
    elif untold(attention_mask):
        raise StepError(
            f"a {type(module).__name__} did not get the pass of its cache: {ARGUMENT}= must go with the other "
            "arguments from the decoder to its attention"
        )
    dense = ALL_ATTENTION_FUNCTIONS.get_interface(own._attn_implementation, config.eager)
    within = statecache_pass is not None
    if within and own._attn_implementation == "sdpa" and _shares(query, key, attention_mask, options):
        return _packed(dense, module, own, query, key, value, attention_mask, **options), None
    out, weights = dense(Unprepared(module, own), query, key, value, attention_mask, **options)
    if weights is not None and statecache_pass is not None:
        weights = statecache_pass.spread(weights, config.keys)
    return out, weights


AttentionInterface.register(FORM, attend)


def _shares(query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether heads of one new token share keys, and see the same ones."""
    alike = mask is None or mask.shape[1] == 1
    return query.shape[2] == 1 < query.shape[1] // key.shape[1] and alike and options.get("position_bias") is None


def _packed(dense: Any, module: nn.Module, own: Any, query: Tensor, *rest: Any, **options: Any) -> Tensor:
    """What `dense` makes of one new token, its heads in place of as many tokens: keys are not repeated for them."""
    rows, heads, _, size = query.shape
    groups = rest[0].shape[1]
    query = query.reshape(rows, groups, heads // groups, size)
    out: Tensor = dense(Packed(module, own), query, *rest, **{**options, "is_causal": False})[0]
    return out.transpose(1, 2).reshape(rows, 1, heads, -1)


class Attending:
    """A configuration that names `attend`, and is `own` in all else, now and after changes.

    keys: the state that holds the keys of the module that it is for. kind: of its layer. eager: what attends there in
    plain PyTorch.
    """

    _attn_implementation = FORM

    def __init__(self, own: Any, keys: StateSpec, kind: Kind, eager: Callable[..., Attention]) -> None:
        vars(self).update(own=own, keys=keys, kind=kind, eager=eager)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copy and pickle, before `own` is there
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)


class Unprepared:
    """An attention module with its own configuration, for functions that read there which of them was asked for."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Packed(Unprepared):
    """The same as one whose heads share no keys."""

    num_key_value_groups = 1


def attention(decoder: nn.Module) -> list[tuple[nn.Module, Attending]]:
    """The attention modules of a decoder, and the configuration that each is to have while it is prepared.

    Layers that share a module share its window. Raises UnknownLayerError for a layer whose attention is fixed.
    """
    found: dict[nn.Module, Attending] = {}
    layers = layers_of(decoder)
    for spec, layer in zip(model_spec(decoder.config).layers[: len(layers)], layers, strict=True):
        keys = next((state for state in spec.states if state.name == "key"), None)
        if keys is None:
            continue
        here = _attending(layer)
        why = _fixed(decoder, layer, list(here), KINDS[spec.kind])
        if why is not None:
            raise UnknownLayerError(
                f'layer {spec.index} ("{spec.kind}") is a {type(layer).__name__} {why}, so that it cannot be told what '
                "rows see: use the model as it is, with a StateCache or without; it was left so"
            )
        for module, eager in here.items():
            found.setdefault(module, Attending(module.config, keys, KINDS[spec.kind], eager))
    return list(found.items())


def counts_columns(decoder: nn.Module) -> bool:
    """Whether layers ask the cache how long it is, and so take all rows to be as long."""
    asking = [module for layer in layers_of(decoder) for module in (layer, *_attending(layer))]
    return any("get_seq_length" in asked(forward.__code__) for module in asking for forward in forwards(module))


def _fixed(decoder: nn.Module, layer: nn.Module, attending: list[nn.Module], kind: Kind) -> str | None:
    """Why a layer's attention cannot be told what rows see; None where it can."""
    config: Any = decoder.config
    if not attending:
        return "in which nothing asks transformers' AttentionInterface how to attend to what a cache holds"
    if len(attending) > 1:
        return f"that attends {len(attending)} times"
    if getattr(attending[0], "is_causal", True) is False:
        return "that attends to what comes after, too"
    masking = sorted(name for name in asked(next(forwards(attending[0])).__code__) if name.endswith("_mask"))
    if masking and not kind.indexed:
        return f"whose attention makes masks of its own ({masking[0]})"
    if "keys" in asked(next(forwards(decoder)).__code__) and config.model_type not in LOOPS:
        return "of a decoder that reads the keys of its cache by itself"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "of a decoder that takes no position_ids"
    for module in (decoder, layer, *attending):
        if not hands_on(next(forwards(module))):
            return f"in which {type(module).__name__}.forward does not hand further arguments on (**kwargs)"
    return None


def _attending(layer: nn.Module) -> dict[nn.Module, Callable[..., Attention]]:
    """The modules of a layer that ask the interface how to attend to what a cache holds; the plain function of each."""
    found: dict[nn.Module, Callable[..., Attention]] = {}
    for module in layer.modules():
        for forward in forwards(module):
            plain = forward.__globals__.get("eager_attention_forward")
            if {"ALL_ATTENTION_FUNCTIONS", "update"} <= asked(
                forward.__code__
            ) and plain is not None:  # `update` of a cache
                found.setdefault(module, plain)
    return found
