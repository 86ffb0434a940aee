"""What the arguments of a module's call say of its cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache

from statecache.errors import StepError
from statecache.models.cache import StateCache
from statecache.models.interface import NAMES
from statecache.models.prepared import STATELESS, LayerState, Stateless


def layer_states(layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerState | Stateless | None:
    """What the cache that was handed to this layer's module holds for it; None for a cache of another class.

    A layer that runs several times in a pass says which of the cache's layers is this time's. Raises StepError for
    packed sequences.
    """
    cache = None
    for given in (*map(kwargs.get, NAMES), *args):  # a call less than `given_cache`, for every layer and token
        if isinstance(given, Cache):
            cache = given
            break
    if cache is not None and not isinstance(cache, StateCache):
        return None
    for packed in ("seq_idx", "cu_seq_lens_q"):
        if kwargs.get(packed) is not None:
            raise StepError(f"layer {layer}: prepared models take no packed sequences ({packed}=)")
    return STATELESS if cache is None else cache.writer.layers[layer + kwargs.get("cache_offset", 0)]
