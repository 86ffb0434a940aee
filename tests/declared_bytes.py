"""What a fixed cache of dense stores takes, by arithmetic on its specification: the oracle of what is allocated."""

from __future__ import annotations

import math

import torch

from statecache.spec import KINDS, ModelSpec, Sizes, as_dtype


def declared_bytes(
    spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype | str = torch.float32, slack: int = 0
) -> Sizes:
    """Bytes that a cache of these rows and this capacity allocates, by kind of state."""
    sizes, dtype = dict.fromkeys(KINDS, 0), as_dtype(dtype)
    for _, state in spec.states():
        assert state.shape is not None
        slots = capacity if state.window is None else min(state.window + slack, capacity)
        if state.kind == "log":  # half the slack more than that: it is read when it is full
            slots = min(slack + (slack + 1) // 2, capacity)
        if state.leased:  # and a copy for each token of the slack; a logged one stands where its log begins, too
            slots = 1 + (1 if state.logged else slack)
        sizes[state.kind] += rows * slots * math.prod(state.shape) * state.dtype_for(dtype).itemsize
    # of each row four numbers, one more for each copy that a leased state may have; a flag
    return Sizes({**sizes, "clock": 8 * rows * (4 + slack) + 1})
