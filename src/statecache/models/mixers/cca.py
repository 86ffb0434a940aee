"""Compressed convolutional attention, of zaya: what comes before its attention.

B rows, T new tokens, E the model's width, G heads of keys and values, R of queries for each of them, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from statecache.models.mixers.base import Operator, Recurrent
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import delay


class CCA(Recurrent):
    """Queries and keys pass two convolutions; half of the values are those of the token before."""

    operator = Operator(delay, taken=("x", "alive"))
    convolutions = ("conv_qk_depthwise", "conv_qk_grouped")

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.by_query = (m.num_key_value_heads, m.num_key_value_groups, m.head_dim)
        self.split = (m.num_attention_heads, m.num_key_value_heads)
        self.inputs, self.gates, self.query = ((m.num_key_value_heads * m.head_dim // 2,),), ((1,),), (0,)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, G R, D), keys and values (B, T, G, D)."""
        m: Any = self.module
        q, k, late = m.q_proj(hidden_states), m.k_proj(hidden_states), m.v_proj_delayed(hidden_states)
        # late at a row's first token, where that is not zero: what comes of zeros
        none = (m.v_proj_delayed(torch.zeros_like(hidden_states[:1, :1])),) if m.config.attention_bias else ()
        mixed = self.advance((torch.cat([q, k], -1), late, *none), states)
        qk, late = mixed.split_with_sizes((q.shape[-1] + k.shape[-1], late.shape[-1]), -1)
        by_query, by_key = torch.unflatten(qk, -1, (-1, m.head_dim)).split_with_sizes(self.split, 2)
        beside = (torch.unflatten(q, -1, self.by_query) + torch.unflatten(k, -1, (-1, 1, m.head_dim))) * 0.5
        values = torch.cat([m.v_proj_current(hidden_states), late], -1)
        return by_query + beside.flatten(2, 3), by_key + beside.mean(3), torch.unflatten(values, -1, (-1, m.head_dim))

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: q and k as one (B, T, (G R + G) D), the late half of v (B, T, G D / 2).

        And what that half is at a row's first token, (1, 1, G D / 2), where it is not zero. The output is both as one.
        """
        m: Any = self.module
        qk, late, *none = projected
        first, second = m.conv_qk_depthwise, m.conv_qk_grouped
        qk = states.convolve(qk, first.weight.squeeze(1), first.bias, False, heads=(second.weight, second.bias))
        alive = late.new_ones(*late.shape[:2], 1, dtype=torch.promote_types(late.dtype, torch.float32))
        late = states.recur(self, (late, alive), late[..., :0]).to(late.dtype)
        for first_late in none:
            late = torch.where((states.places(late) == 0).unsqueeze(-1), first_late, late)
        return torch.cat([qk, late], -1)
