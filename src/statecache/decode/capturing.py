"""Which texts `generate` writes with a decoder of its own accord: where that saves more time than it costs."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from statecache import kernels
from statecache.decode.compiled import compiles
from statecache.decode.feed import input_device
from statecache.errors import ConfigError, OptionError
from statecache.models.cache import StateCache
from statecache.models.plan import plan
from statecache.models.ready import promised

WORTH = 32  # new tokens: 16 are enough once Triton's kernels were compiled, see benchmarks/RESULTS.md
ROOM = 0.5  # of the device's free memory that a fixed cache may take, since it is allocated whole
SIDE_BY_SIDE = 8  # rows on a CPU, where one that has ended takes as much time as the others, until all have
SHORTEST = 512  # capacity on a CPU


def worth_capturing(model: Any, new: int, drafts: int = 0) -> bool:
    """Whether a decoder pays where so many new tokens are to come, with all of the model on one device."""
    device = input_device(model)
    if device.type == "cpu":
        return new >= WORTH and not drafts and compiles(model)  # no round is compiled
    if new < WORTH or device.type != "cuda" or not kernels.available(device):
        return False
    whole = all(tensor.device == device for tensor in chain(model.parameters(), model.buffers()))
    return whole and not torch.is_autocast_enabled(device.type)


def takes(cache: StateCache) -> bool:
    """Whether a decoder takes this cache: one that never moves, of rotary factors that stay."""
    return cache.capacity is not None and cache.rows is not None and cache.spec.rotary is None


def fixed_cache(model: Any, rows: int, longest: int, new: int, drafts: int = 0) -> StateCache | None:
    """A cache for prompts of at most `longest` tokens, `new` ones and a round's `drafts`, that a decoder takes.

    None where that does not pay, takes too much memory, or cannot be. On a CPU capacities are few, since code is good
    for one.
    """
    if not worth_capturing(model, new, drafts):
        return None
    device, dtype = input_device(model), model.get_input_embeddings().weight.dtype
    host = device.type == "cpu"
    if host and rows > SIDE_BY_SIDE:
        return None
    capacity = _among_few(longest + new) if host else longest + new + drafts
    options: dict[str, Any] = {"rows": rows, "capacity": capacity, "slack": 1 + drafts, "back": False, "dtype": dtype}
    try:
        with promised():
            if (
                not host
                and plan(model.config, prepared=True, **options).total > ROOM * torch.cuda.mem_get_info(device)[0]
            ):
                return None
            cache = StateCache(model.config, device=device, **options)
    except (ConfigError, OptionError):  # of shapes that show with the first pass, or of loops that share their keys
        return None
    return cache if takes(cache) else None


def _among_few(tokens: int) -> int:
    """The capacity for so many: of four between a power of two and the next."""
    step = max(1 << max(tokens.bit_length() - 3, 0), SHORTEST)
    return -(-tokens // step) * step
