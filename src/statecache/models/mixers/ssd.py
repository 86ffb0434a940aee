"""Mamba-2.

B rows, T new tokens, H heads of size P, W = H P, G groups, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache.models.mixers.base import Derived, Operator, Recurrent, decay
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import ssd


class SSD(Recurrent):
    """Mamba-2. The time step is clamped in every form, where the model has limits.

    `scaled`: projections pass multipliers; `normed`: the attribute that says whether the output has a norm, "" for yes.
    """

    operator = Operator(ssd, taken=("x", "B", "dt"), query="C", constant="A", kernel="ssd_chunk", folding="ssd_fold")
    folded = ("A_log",)

    def __init__(self, module: nn.Module, unmodified: Any, *, scaled: bool = False, normed: str = "") -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.scaled, self.silu = scaled, m.activation in ("silu", "swish")
        self.normed = bool(getattr(m, normed)) if normed else True
        self.low, self.high = m.time_step_limit
        self.limited = self.low > 0 or self.high < float("inf")
        width, shared = m.intermediate_size, m.n_groups * m.ssm_state_size
        self.projected = (width, width + 2 * shared, m.num_heads)  # z; x, B and C; dt
        self.convolved = (width, shared, shared)
        self.inputs = ((m.num_heads, width // m.num_heads), (m.n_groups, m.ssm_state_size))
        self.gates, self.query = ((m.num_heads,),), self.inputs[1]
        self.constant, self.sizes = Derived("A_log", decay), (("groups", m.n_groups),)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        if self.scaled:
            projected = m.in_proj(hidden_states * m.ssm_in_multiplier) * m.mup_vector
        else:
            projected = m.in_proj(hidden_states)
        z, xBC, dt = projected.split_with_sizes(self.projected, -1)
        y = self.advance((xBC, dt), states).to(hidden_states.dtype)
        y = m.norm(y, z) if self.normed else y * F.silu(z)
        return m.out_proj(y.to(hidden_states.dtype))  # type: ignore[no-any-return]

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: x, B and C as one (B, T, W + 2 G N), dt (B, T, H) before its bias."""
        if self.kernel is not None and (y := self.by_kernel(projected, states)) is not None:
            return y
        m: Any = self.module
        xBC, dt = projected
        xBC = states.convolve(xBC, m.conv1d.weight.squeeze(1), m.conv1d.bias, self.silu)
        xBC = xBC if self.silu else m.act(xBC)
        x, B, C = xBC.split_with_sizes(self.convolved, -1)
        by_head, by_group = self.inputs
        x = torch.unflatten(x, -1, by_head)
        precise = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(precise) + m.dt_bias.to(precise))
        if self.limited:
            dt = dt.clamp(self.low, self.high)
        y = states.recur(self, (x, torch.unflatten(B, -1, by_group), dt), torch.unflatten(C, -1, by_group))
        return torch.addcmul(y, x.to(y.dtype), m.D.to(y.dtype)[:, None]).flatten(2)
