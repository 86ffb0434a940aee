"""The lightning attention of minimax.

B rows, T new tokens, H heads of size D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache.models.mixers.base import Derived, Operator, Recurrent
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import lightning


class Lightning(Recurrent):
    """Lightning attention; its layer expects the output and the weights, of which there are none."""

    operator = Operator(lightning, taken=("k", "v", "alive"), query="q", constant="slope", kernel="lightning_chunk")
    convolutions = ()

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        heads = (m.num_attention_heads, m.head_dim)
        self.inputs, self.gates, self.query = (heads, heads), ((1,),), heads
        self.constant = Derived("slope_rate", torch.flatten)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> tuple[Tensor, None]:
        m: Any = self.module
        y = self.advance((m.act_fn(m.qkv_proj(hidden_states)),), states).to(hidden_states.dtype)
        return m.out_proj(F.sigmoid(m.output_gate(hidden_states)) * m.norm(y)), None

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: q, k and v of each head in turn (B, T, 3 H D)."""
        (qkv,) = projected
        heads, size = self.inputs[0]
        q, k, v = torch.unflatten(qkv, -1, (heads, 3, size)).unbind(-2)
        alive = qkv.new_ones(*qkv.shape[:2], 1, dtype=torch.promote_types(qkv.dtype, torch.float32))
        return states.recur(self, (k, v, alive), q).flatten(2)
