"""What transformers calls a cache: `cache` from 5.24 on, `past_key_values` before, `cache_params` in three models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any

from transformers import Cache
from transformers.masking_utils import create_causal_mask

from statecache.errors import ConfigError
from statecache.models.interface import NAMES


def cache_name(function: Any) -> str:
    """The name under which a forward, or something else that is called, takes its cache.

    Raises ConfigError where it takes none.
    """
    taken = inspect.signature(function).parameters
    for name in NAMES:
        if name in taken:
            return name
    raise ConfigError(
        f"{getattr(function, '__qualname__', function)} takes no cache under any of the names {', '.join(NAMES)}: "
        "this is no model that generates with one, or of a transformers newer than statecache knows"
    )


FUNCTIONS_TAKE = cache_name(create_causal_mask)  # what transformers calls it wherever models do not differ


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, under whatever name; None if there is none."""
    for name in NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return None


def rename(kwargs: MutableMapping[str, Any], name: str) -> str:
    """Have the cache among the arguments of a call, in place, under `name` alone; the name under which it came.

    That of `generate_batch` is no `Cache`, and finds its way to the attention as it came.
    """
    found = [(other, kwargs.pop(other)) for other in NAMES if isinstance(kwargs.get(other, 0), Cache | None)]
    given = [cache for _, cache in found if cache is not None]
    if any(cache is not given[0] for cache in given):
        raise ConfigError(f"two caches came, as {' and '.join(other for other, _ in found)}: give one, as {name}=")
    if found:
        kwargs[name] = given[0] if given else None
    return found[0][0] if found else name
