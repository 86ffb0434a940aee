"""The attention of inkling, biased by how far a query stands behind a key, which differs from row to row.

B rows, T new tokens, S keys, E the model's width, H heads of size D, R distances that have a bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from statecache.models.attention import ARGUMENT, AttentionPass
from statecache.models.interface import NAMES
from statecache.models.mixers.base import Mixer
from statecache.models.names import given_cache


class RelativeDistance(Mixer):
    """Attention that is told the distances: its own forward, told those of the pass."""

    convolutions = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, each row's distances being its own."""
        pass_: AttentionPass | None = kwargs.get(ARGUMENT)
        if pass_ is not None:
            m: Any = self.module
            hidden_states: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            kwargs["relative_distance"] = pass_.distance(m.config.keys, hidden_states.device)
        return self.unmodified(*args, **kwargs)


class RelativeAttention(Mixer):
    """Attention that finds out the distances by itself, and how far its queries grow with their positions."""

    convolutions = ("rel_logits_proj",)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend from hidden_states (B, T, E): the output (B, T, E), and the weights in forms that make them."""
        pass_: AttentionPass | None = kwargs.get(ARGUMENT)
        if pass_ is None:
            return self.unmodified(hidden_states, *args, **kwargs)
        with self._inside():
            return self._attend(hidden_states, pass_, *args, **kwargs)

    def _attend(self, x: Tensor, pass_: AttentionPass, attention_mask: Any = None, **kwargs: Any) -> Any:
        m: Any = self.module
        cache = given_cache(kwargs)
        options = {name: value for name, value in kwargs.items() if name not in (*NAMES, "conv_mask")}
        q = m.q_norm(torch.unflatten(m.q_proj(x), -1, (m.num_heads, m.head_dim))).transpose(1, 2)  # (B, H, T, D)
        k, v = m.k_sconv(m.k_proj(x), cache=cache), m.v_sconv(m.v_proj(x), cache=cache)
        k, v = (torch.unflatten(each, -1, (-1, m.head_dim)) for each in (k, v))
        k, v = cache.update(m.k_norm(k).transpose(1, 2), v.transpose(1, 2), m.layer_idx)

        distance = pass_.distance(m.config.keys, x.device)
        profiles = (torch.unflatten(m.r_proj(x), -1, (m.num_heads, -1)) @ m.rel_logits_proj.proj).transpose(1, 2)
        reach = m.rel_logits_proj.rel_extent
        bias = profiles.gather(-1, distance.clamp(0, reach - 1).expand(*profiles.shape[:2], -1, -1))  # (B, H, T, S)
        bias = bias.masked_fill((distance < 0) | (distance >= reach), 0)
        floor = m.config.log_scaling_n_floor
        if floor is not None and not m.is_sliding:
            position = pass_.step.places(x.device)[:, None, :, None]  # (B or 1, 1, T, 1)
            growth = 1 + m.config.log_scaling_alpha * torch.log(((position + 1).float() / floor).clamp(min=1))
            q, bias = ((each.float() * growth).to(each.dtype) for each in (q, bias))

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(m.config._attn_implementation, m.config.eager)
        dropout = m.attention_dropout if m.training else 0.0
        options |= {"dropout": dropout, "scaling": m.scaling, "sliding_window": m.sliding_window, "position_bias": bias}
        y, weights = attend(m, q, k, v, attention_mask, **options)
        return m.o_proj(y.flatten(2)), weights
