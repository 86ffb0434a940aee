"""Mamba-1, with one group of channels or, as in zamba, with heads of their own projections.

B rows, T new tokens, W channels, G groups of P channels, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache.models.mixers.base import Derived, Operator, Recurrent, decay
from statecache.models.prepared import LayerState, Stateless
from statecache.ops import selective_scan


class Scan(Recurrent):
    """Mamba-1. `groups`: the module's attribute with their number, "" for one; `normed`: dt, B and C pass norms."""

    operator = Operator(selective_scan, taken=("x", "B", "dt"), query="C", constant="A")

    def __init__(self, module: nn.Module, unmodified: Any, *, groups: str = "", normed: bool = False) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.norms = ("dt_layernorm", "b_layernorm", "c_layernorm") if normed else ()
        self.silu = m.activation in ("silu", "swish")
        self.grouped = bool(groups) and getattr(m, groups) > 1
        self.groups: int = getattr(m, groups) if self.grouped else 1
        self.split = (int(m.time_step_rank), m.ssm_state_size, m.ssm_state_size)
        channels = (self.groups, m.intermediate_size // self.groups)
        self.inputs, self.gates = (channels, (self.groups, m.ssm_state_size)), (channels,)
        self.query = self.inputs[1]
        self.constant = Derived("A_log", decay if self.grouped else _decay)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless) -> Tensor:
        m: Any = self.module
        projected = m.in_proj(hidden_states)
        if self.grouped:
            x, z = torch.unflatten(projected, -1, (-1, 2)).unbind(-1)
        else:
            x, z = projected.chunk(2, -1)
        y = self.advance((x,), states)
        return m.out_proj((y * F.silu(z.to(y.dtype))).to(hidden_states.dtype))  # type: ignore[no-any-return]

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """See `Recurrent.advance`. Projected: x (B, T, W)."""
        if self.kernel is not None and (y := self.by_kernel(projected, states)) is not None:
            return y
        m: Any = self.module
        (x,) = projected
        x = states.convolve(x, m.conv1d.weight.squeeze(1), m.conv1d.bias, self.silu)
        x = x if self.silu else m.act(x)
        dt, B, C = self._by_head(x) if self.grouped else self._alone(x)
        y = states.recur(self, (torch.unflatten(x, -1, self.inputs[0]), B, F.softplus(dt)), C).flatten(2)
        return torch.addcmul(y, x.to(y.dtype), m.D.to(y.dtype).flatten())

    def _alone(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dt (B, T, 1, W) before its softplus, B and C (B, T, 1, N), of x (B, T, W)."""
        m: Any = self.module
        dt, B, C = m.x_proj(x).split_with_sizes(self.split, -1)
        if self.norms:
            dt, B, C = (getattr(m, name)(part) for name, part in zip(self.norms, (dt, B, C), strict=True))
        precise = torch.promote_types(x.dtype, torch.float32)
        plain = type(m.dt_proj) is nn.Linear and "_hf_hook" not in vars(m.dt_proj)
        if plain and m.dt_proj.bias is not None:  # its bias in full precision
            dt = F.linear(dt, m.dt_proj.weight).to(precise) + m.dt_proj.bias.to(precise)
        else:
            dt = m.dt_proj(dt).to(precise)
        return dt.unsqueeze(2), B.unsqueeze(2), C.unsqueeze(2)

    def _by_head(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dt (B, T, G, P) before its softplus, B and C (B, T, G, N), of x (B, T, W)."""
        m: Any = self.module
        x = torch.unflatten(x, -1, self.inputs[0]).transpose(1, 2)  # (B, G, T, P)
        dt, B, C = (x @ m.x_proj_weight.mT).split_with_sizes(self.split, -1)
        precise = torch.promote_types(x.dtype, torch.float32)
        dt = (dt @ m.dt_proj_weight.mT).to(precise) + m.dt_proj_bias.to(precise)[:, None]
        return dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)

    # ---- of one group the cache holds (B, W, N), and the operator wants (B, 1, W, N)

    def chunk(
        self,
        taken: tuple[Tensor, ...],
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.grouped:
            return super().chunk(taken, query, state, count, at)
        y, after, states = super().chunk(taken, query, None if state is None else state.unsqueeze(1), count, at)
        return y, after.squeeze(1), None if states is None else states.squeeze(2)

    def step(self, taken: tuple[Tensor, ...], query: Tensor, state: Tensor) -> Tensor:
        return super().step(taken, query, state if self.grouped else state.unsqueeze(1))

    def fold(self, taken: tuple[Tensor, ...], state: Tensor, count: Tensor | None) -> None:
        super().fold(taken, state if self.grouped else state.unsqueeze(1), count)


def _decay(A_log: Tensor) -> Tensor:
    return decay(A_log)[None]
