"""What a mixer of a prepared model sees of the cache: its convolution's inputs, its recurrent state, their log.

B rows, T new tokens, C channels, K width of a convolution. Time is axis 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statecache.errors import StepError
from statecache.models.cache import StateCache
from statecache.models.checks import cut
from statecache.ops import conv
from statecache.replay import Recurrence, run
from statecache.ring import Ring, Step


class Memory:
    """The states of one layer in the pass that is open; without a cache there are none."""

    def __init__(self, cache: StateCache | None, layer: int) -> None:
        self.cache, self.layer = cache, layer
        if cache is not None and cache._step is None:
            raise StepError(
                f"layer {layer} was called by itself, and a prepared model opens its cache at the whole decoder: "
                "call the model"
            )

    @property
    def step(self) -> Step:
        assert self.cache is not None and self.cache._step is not None
        return self.cache._step

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """Convolve x (B, T, C) causally with weight (C, K) behind the inputs before it, and keep it: (B, T, C)."""
        if self.cache is None:
            return conv.chunk(x, weight, bias, None, silu)
        step, width = self.step, weight.shape[-1]
        state = self.cache.conv_lease(self.layer, x)
        past = state.past(width - 1, step) if isinstance(state, Ring) else state.entry
        if x.shape[1] == 1:
            y, wide = conv.step(x, weight, bias, past, silu)
        else:
            y, wide = conv.chunk(x, weight, bias, past, silu), None
        if isinstance(state, Ring):
            state.put(x.mT, step)
        elif wide is None or step.count is not None:
            state.put(conv.window(x.detach(), past, width, step.count))
        else:
            state.put(wide[:, 1:].mT)
        return cut(y, x)

    def recur(self, recurrence: Recurrence, inputs: Tensor, gates: Tensor, query: Tensor) -> Tensor:
        """Run the recurrence over T tokens from the state before them, and keep the state after: (B, T, *)."""
        if self.cache is None:
            return recurrence.chunk(inputs, gates, query, None)[0]
        cache, step = self.cache, self.step
        state, log = cache.recurrence(self.layer, inputs), None
        if step.replay is not None:
            log = cache.log(self.layer, "inputs", inputs), cache.log(self.layer, "gates", gates)
        cache._writes()
        with torch.no_grad():
            y = run(recurrence, inputs, gates, query, state, log, step)
        return cut(y, inputs)
