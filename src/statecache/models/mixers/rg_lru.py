"""The recurrent block of recurrent_gemma, whose RG-LRU keeps its state in the cache instead of on the module.

B rows, T new tokens, E the model's width, W channels, H heads of P of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache.models.mixers.base import Derived, Operator, Recurrent, awake
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import rg_lru

SHARPNESS = 8.0  # of the decay: c in Griffin, a number in transformers' code, too


class RGLRU(Recurrent):
    """A convolution and an RG-LRU between two projections; its layer expects the output and the weights, none here.

    At position 0 the recurrence begins anew, also inside a row, where positions that came with the tokens say so.
    """

    operator = Operator(rg_lru, taken=("x", "g"), query="c")
    convolutions = ("conv_1d",)
    asks = ("position_ids",)

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        width = (int(module.lru_width),)  # type: ignore[arg-type]
        self.inputs, self.gates, self.query = (width,), (width,), width
        self.rate = Derived("recurrent_param", _rate)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless, *asked: Tensor) -> tuple[Tensor, None]:
        m: Any = self.module
        (positions,) = asked
        first = (positions == 0).expand(hidden_states.shape[:2])
        c = m.act_fn(m.linear_y(hidden_states))
        y = self.advance((m.linear_x(hidden_states), c, first), states)
        return m.linear_out(y.to(hidden_states.dtype)), None

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: x and c (B, T, W), and where the recurrence begins (B, T) bool."""
        m: Any = self.module
        x, c, first = projected
        x = states.convolve(x, m.conv_1d.weight.squeeze(1), m.conv_1d.bias, False)
        unit = m.rg_lru
        with awake(unit):
            takes = _by_head(x, unit.input_gate_weight, unit.input_gate_bias)
            forgets = _by_head(x, unit.recurrent_gate_weight, unit.recurrent_gate_bias)
            rate = self.rate(unit, anew=x.shape[1] > 1)
        g = (forgets.to(rate.dtype).sigmoid() * rate).masked_fill(first.unsqueeze(-1), rg_lru.FORGETS)
        return states.recur(self, (x * takes.sigmoid(), g), c)


def _by_head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A projection (B, T, W) of x (B, T, W), each head by itself: weight (H, P, P), bias (H, P)."""
    heads = torch.unflatten(x, -1, bias.shape).flatten(0, 1).transpose(0, 1)  # (H, B T, P)
    return torch.baddbmm(bias.unsqueeze(1), heads, weight).transpose(0, 1).reshape(x.shape)


def _rate(recurrent_param: Tensor) -> Tensor:
    """The logarithm of the decay at an open gate, in float32 at least."""
    return -SHARPNESS * F.softplus(recurrent_param.to(torch.promote_types(recurrent_param.dtype, torch.float32)))
