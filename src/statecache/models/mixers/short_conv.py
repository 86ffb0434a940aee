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
        B, C, x = m.in_proj(hidden_states).chunk(3, -1)
        y = states.convolve(B * x, m.conv.weight.squeeze(1), m.conv.bias, False)
        return m.out_proj(C * y)  # type: ignore[no-any-return]
