"""The gated short convolution of lfm2 and lfm3, which has no recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from statecache.models.mixers.base import Mixer
from statecache.models.prepared import LayerState, Stateless


class ShortConv(Mixer):
    """A convolution between two gates."""

    convolutions = ("conv",)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        return m.out_proj(self.advance(m.in_proj(hidden_states), states))  # type: ignore[no-any-return]

    def advance(self, projected: Tensor, states: LayerState | Stateless) -> Tensor:
        """Take in T tokens: from both gates and what is convolved, as one (B, T, 3 E), to (B, T, E)."""
        if self.kernel is not None and (y := self.by_kernel((projected,), states)) is not None:
            return y
        conv: Any = self.module.conv
        B, C, x = projected.chunk(3, -1)
        return C * states.convolve(B * x, conv.weight.squeeze(1), conv.bias, False)
