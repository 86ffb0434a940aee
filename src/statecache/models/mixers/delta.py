"""Gated delta nets, which differ in their projections alone.

B rows, T new tokens, E the model's width, J key heads of size K, H value heads of size V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from statecache.models.mixers.base import Derived, Operator, Recurrent, decay
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import gated_delta

# from the module and its input (B, T, E) to q, k and v as one (B, T, 2 J K + H V), z (.., H V), b and a (B, T, H)
Projections = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def joined(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One projection for q, k and v."""
    return m.in_proj_qkv(x), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)


def interleaved(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two projections, which interleave heads."""
    return ordered(m, m.in_proj_qkvz(x), m.in_proj_ba(x))


def ordered(m: Any, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What two projections (B, T, ...) that interleave heads gave, as `Projections` do."""
    q, k, v, z, b, a = m.fix_query_key_value_ordering(qkvz, ba)
    return torch.cat([part.flatten(2) for part in (q, k, v)], -1), z, b.contiguous(), a.contiguous()


def separate(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A projection for each part."""
    return torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1), m.g_proj(x), m.b_proj(x), m.a_proj(x)


class Delta(Recurrent):
    """The gated delta rule.

    `projections`: one of the three above; `norm` and `out`: submodules of the output; `doubled`: the attribute that
    says whether tokens are written at twice the strength, "" for no.
    """

    operator = Operator(
        gated_delta, taken=("k", "v", "g", "beta"), query="q", kernel="delta_chunk", folding="delta_fold"
    )

    def __init__(
        self,
        module: nn.Module,
        unmodified: Any,
        *,
        projections: Projections = joined,
        norm: str = "norm",
        out: str = "out_proj",
        doubled: str = "",
    ) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.projections, self.norm, self.out = projections, norm, out
        self.doubled = bool(doubled) and bool(getattr(m, doubled))
        self.silu = m.activation in ("silu", "swish")
        self.convolved = (m.key_dim, m.key_dim, m.value_dim)
        self.inputs = ((m.num_k_heads, m.head_k_dim), (m.num_v_heads, m.head_v_dim))
        self.gates, self.query = ((m.num_v_heads,), (m.num_v_heads,)), self.inputs[0]
        self.decay, self.sizes = Derived("A_log", decay), (("key_heads", m.num_k_heads),)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        qkv, z, b, a = self.projections(m, hidden_states)
        y = self.advance((qkv, b, a), states).to(hidden_states.dtype)
        size = self.inputs[1][1]
        y = getattr(m, self.norm)(y.reshape(-1, size), z.reshape(-1, size))
        return getattr(m, self.out)(y.view(*hidden_states.shape[:2], -1))  # type: ignore[no-any-return]

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: q, k and v as one (B, T, 2 J K + H V), b and a (B, T, H)."""
        if self.kernel is not None and (y := self.by_kernel(projected, states)) is not None:
            return y
        m: Any = self.module
        qkv, b, a = projected
        A = self.decay(m, anew=a.shape[1] > 1)
        g = F.softplus(a.to(A.dtype) + m.dt_bias) * A
        beta = b.sigmoid()
        beta = beta * 2 if self.doubled else beta
        qkv = states.convolve(qkv, m.conv1d.weight.squeeze(1), m.conv1d.bias, self.silu)
        qkv = qkv if self.silu else ACT2FN[m.activation](qkv)
        q, k, v = qkv.split_with_sizes(self.convolved, -1)
        by_key, by_value = self.inputs
        q, k, v = torch.unflatten(q, -1, by_key), torch.unflatten(k, -1, by_key), torch.unflatten(v, -1, by_value)
        return states.recur(self, (k, v, g, beta), q)
