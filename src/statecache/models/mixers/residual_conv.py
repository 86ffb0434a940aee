"""The short convolutions of inkling, added to what they take in: four in each layer, each with a state of its own.

B rows, T new tokens, C channels, H heads that share them, K width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from statecache.models.given import layer_states
from statecache.models.mixers.base import Mixer
from statecache.models.prepared import LayerState, Stateless


class ResidualConv(Mixer):
    """A convolution and its input, in float32 at least. `scaled`: by the K + 1 numbers that are summed."""

    def __init__(self, module: nn.Module, unmodified: Any, *, scaled: bool = False) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.number = int(m.conv_idx)
        self.scale = (m.conv_kernel_size + 1) ** -0.5 if scaled else 1.0

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        x, weight = hidden_states.float(), m.conv1d.weight.squeeze(1)
        wide = x.to(torch.promote_types(x.dtype, weight.dtype))
        y = states.convolve(wide, weight, m.conv1d.bias, False, self.number).to(x.dtype)
        return ((y + x) * self.scale).to(hidden_states.dtype)


class DynamicConv(Mixer):
    """The same, its weights being fixed ones and, for all channels of a head, some that each token brings."""

    convolutions = ()

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.number = int(m.conv_idx)
        self.scale = (2 * m.conv_kernel_size + 1) ** -0.5

    def forward(self, hidden_states: Tensor, dynamic_input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Convolve hidden_states (B, T, C) with weights that `dynamic_input` (B, T, E) brings. See `Mixer.forward`."""
        states = layer_states(self.layer, args, kwargs)
        if states is None:
            return self.unmodified(hidden_states, dynamic_input, *args, **kwargs)
        m: Any = self.module
        x = hidden_states.float()
        with self._inside():
            brought = torch.unflatten(m.weight_proj(dynamic_input).float(), -1, (m.num_heads, 1, -1))  # (B, T, H, 1, K)
            fixed = torch.unflatten(m.static_weight.float().mT, 0, (m.num_heads, -1))  # (H, C / H, K), newest first
        weight = (fixed + brought).flatten(2, 3).flip(-1)  # (B, T, C, K)
        y = states.convolve(x, weight, None, False, self.number)
        return ((y + x) * self.scale).to(hidden_states.dtype)
