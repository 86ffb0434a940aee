"""Kimi Delta Attention, of kimi_linear, bailing_hybrid and glm5_next.

B rows, T new tokens, E the model's width, H heads of size D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from statecache.models.mixers.base import Operator, Recurrent
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import gated_delta


class KDA(Recurrent):
    """The gated delta rule with a decay for each channel, which a submodule of the model's own computes.

    `gate`: the submodules that give the gate of the output, one after the other.
    """

    operator = Operator(gated_delta, taken=("k", "v", "g", "beta"), query="q")

    def __init__(self, module: nn.Module, unmodified: Any, *, gate: tuple[str, ...] = ("g_a_proj", "g_b_proj")) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.gate = gate
        self.silu = m.activation in ("silu", "swish")
        heads = (m.num_heads, m.head_dim)
        self.inputs, self.gates, self.query = (heads, heads), (heads, (m.num_heads,)), heads

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        qkv = torch.cat([m.q_proj(hidden_states), m.k_proj(hidden_states), m.v_proj(hidden_states)], -1)
        g, beta = m.forget_gate(hidden_states), m.b_proj(hidden_states).sigmoid()
        y = self.advance((qkv, g, beta), states).to(hidden_states.dtype)
        gate = hidden_states
        for name in self.gate:
            gate = getattr(m, name)(gate)
        return m.o_proj(m.o_norm(y, gate.view(y.shape)).flatten(2))  # type: ignore[no-any-return]

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: q, k and v as one (B, T, 3 H D), g (B, T, H, D), beta (B, T, H).

        The output is (B, T, H, D).
        """
        if self.kernel is not None and (y := self.by_kernel(projected, states)) is not None:
            return torch.unflatten(y, -1, self.query)
        m: Any = self.module
        qkv, g, beta = projected
        qkv = states.convolve(qkv, m.conv1d.weight.squeeze(1), m.conv1d.bias, self.silu)
        qkv = qkv if self.silu else ACT2FN[m.activation](qkv)
        q, k, v = torch.unflatten(qkv, -1, (3, *self.query)).unbind(2)
        return states.recur(self, (k, v, g, beta), q)
