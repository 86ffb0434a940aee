"""Attention of a prepared model: one function in transformers' `AttentionInterface`, which attends in the cache's pass.

An attention module looks up the function that its configuration names. Those of a prepared model are given a
configuration of their own for that, which names `attend`, and is the model's in all else.

B rows, T new tokens, S keys, H heads, G of them with keys and values of their own, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from statecache.errors import ConfigError, StepError, UnknownLayerError
from statecache.models.masks import mask, untold
from statecache.models.table import model_spec
from statecache.spec import StateSpec
from statecache.states import States
from statecache.step import Step

NAME = "statecache"  # of `attend`, among the attn_implementations
ARGUMENT = "statecache_pass"  # under which models hand an `AttentionPass` on to it

Attention = tuple[Tensor, Tensor | None]  # (B, T, H, D); the weights (B, H, T, S), in forms that make them


class AttentionPass:
    """The pass that is open, as attention needs it: the step, and the masks made for it so far."""

    def __init__(self, states: States, step: Step) -> None:
        self.states, self.step = states, step
        self._masks: dict[Any, Tensor | None] = {}

    def mask(self, form: str, keys: StateSpec, query: Tensor) -> Tensor | None:
        """What `form` is to be told of layers with these keys; made once for each window on each device. See `mask`."""
        key = form, keys.window, query.device, query.dtype
        if key not in self._masks:
            self._masks[key] = mask(form, query.dtype, query.device, keys, self.states, self.step)
        return self._masks[key]


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
            f'attn_implementation="{NAME}" is what statecache.prepare(model) gives attention layers: load the model '
            'with attn_implementation="sdpa", and prepare it'
        )
    own = config.own
    if statecache_pass is not None:
        attention_mask = statecache_pass.mask(own._attn_implementation, config.keys, query)
    elif untold(attention_mask):
        raise StepError(
            f"a {type(module).__name__} did not get the pass of its cache: {ARGUMENT}= must go with the other "
            "arguments from the decoder to its attention"
        )
    dense = ALL_ATTENTION_FUNCTIONS.get_interface(own._attn_implementation, config.eager)
    out: Attention = dense(Unprepared(module, own), query, key, value, attention_mask, **options)
    return out


AttentionInterface.register(NAME, attend)


class Attending:
    """A configuration that names `attend`, and is `own` in all else, now and after changes.

    keys: the state that holds the keys of the module that it is for. eager: what attends there in plain PyTorch.
    """

    _attn_implementation = NAME

    def __init__(self, own: Any, keys: StateSpec, eager: Callable[..., Attention]) -> None:
        vars(self).update(own=own, keys=keys, eager=eager)

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


def attention(decoder: nn.Module) -> list[tuple[nn.Module, Attending]]:
    """The attention modules of a decoder, and the configuration that each is to have while it is prepared.

    Layers that share a module share its window. Raises UnknownLayerError for a layer whose attention is fixed.
    """
    layers: Any = decoder.layers
    found: dict[nn.Module, Attending] = {}
    for spec, layer in zip(model_spec(decoder.config).layers, layers, strict=True):
        keys = next((state for state in spec.states if state.name == "key"), None)
        if keys is None:
            continue
        asking = {module: _eager(module) for module in layer.modules()}
        here = {module: eager for module, eager in asking.items() if eager is not None}
        if not here:
            raise UnknownLayerError(
                f'layer {spec.index} ("{spec.kind}") is a {type(layer).__name__} in which nothing asks transformers\' '
                "AttentionInterface how to attend, so that it cannot be told what rows see; the model was left as it is"
            )
        for module, eager in here.items():
            found.setdefault(module, Attending(module.config, keys, eager))
    return list(found.items())


def _eager(module: nn.Module) -> Callable[..., Attention] | None:
    """The plain function of the file of an attention module; None of a module that does not ask the interface."""
    for cls in type(module).__mro__:
        forward = inspect.unwrap(vars(cls).get("forward", nn.Module.forward))
        if isinstance(forward, FunctionType) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names:
            eager: Callable[..., Attention] = forward.__globals__["eager_attention_forward"]
            return eager
    return None
