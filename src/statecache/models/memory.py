"""What a mixer of a prepared model sees of the cache: its convolution's inputs, its recurrent state, their log.

B rows, T new tokens, C channels, K width of a convolution. Time is axis 1.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from statecache.errors import StepError
from statecache.models.cache import StateCache
from statecache.models.checks import cut
from statecache.ops import conv
from statecache.replay import run
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

    def recur(self, recurrence: Any, taken: tuple[Tensor, ...], query: Tensor) -> Tensor:
        """Run the recurrence over T tokens from the state before them, and keep the state after: (B, T, ...)."""
        if self.cache is None:
            return recurrence.chunk(taken, query, None)[0]  # type: ignore[no-any-return]
        cache, step = self.cache, self.step
        state, n = cache.recurrence(self.layer, taken[0]), len(recurrence.inputs)
        with torch.no_grad():
            if step.replay is not None:
                flat = Flat(recurrence, query.shape[2:])
                inputs, gates = flat.flatten(taken)
                log = cache.log(self.layer, "inputs", inputs), cache.log(self.layer, "gates", gates)
                cache._writes()
                return cut(run(flat, inputs, gates, query.flatten(2), state, log, step), taken[0])
            cache._writes()
            if step.tokens == 1:
                if step.count is not None:
                    live = step.count > 0
                    taken = (*taken[:n], *(g * live.view(-1, *[1] * (g.dim() - 1)) for g in taken[n:]))
                y = recurrence.step(tuple([part[:, 0] for part in taken]), query[:, 0], state.entry)[:, None]
            else:
                y, after, _ = recurrence.chunk(taken, query, state.entry, step.count)
                state.put(after)
        return cut(y, taken[0])


class Flat:
    """A recurrence over flat entries, as today's replay calls it."""

    def __init__(self, recurrence: Any, query: tuple[int, ...] = ()) -> None:
        self.recurrence, self.query = recurrence, query
        self.shapes = recurrence.inputs, recurrence.gates

    def flatten(self, taken: tuple[Tensor, ...]) -> list[Tensor]:
        n = len(self.recurrence.inputs)
        return [torch.cat([part.flatten(2) for part in parts], -1) for parts in (taken[:n], taken[n:])]

    def parts(self, inputs: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for flat, shapes in zip((inputs, gates), self.shapes, strict=True):
            pieces = flat.split_with_sizes([prod(shape) for shape in shapes], -1)
            found += [torch.unflatten(piece, -1, shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return tuple(found)

    def chunk(self, inputs: Tensor, gates: Tensor, query: Tensor, *rest: Any) -> Any:
        return self.recurrence.chunk(self.parts(inputs, gates), torch.unflatten(query, -1, self.query), *rest)

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Any:
        return self.recurrence.step(self.parts(inputs, gates), torch.unflatten(query, -1, self.query), state)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        self.recurrence.fold(self.parts(inputs, gates), state, count)
