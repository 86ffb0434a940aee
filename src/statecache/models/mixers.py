"""The mixers of prepared models: what a layer does between its projections, on the operators of `ops`.

A mixer holds the module that it stands in for, and uses its weights, norms and projections as they are, called as
modules, so that hooks, quantised layers and sharded weights keep working.

B rows, T new tokens, E the model's width, W the width of a flat entry. Time is axis 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from statecache.errors import StepError
from statecache.models.cache import StateCache
from statecache.models.prepared import STATELESS
from statecache.ops import gated_delta, lightning, selective_scan, ssd


class Memory:
    """Throw-away bridge."""

    def __init__(self, state):
        self.state = state

    def convolve(self, *a):
        return self.state.convolve(*a)

    def recur(self, r, inputs, gates, query):
        r.flat.inputs, r.flat.gates, r.flat.query = ((inputs.shape[-1],),), ((gates.shape[-1],),), (query.shape[-1],)
        return self.state.recur(r.flat, (inputs, gates), query)


class Flat:
    def __init__(self, m):
        self.m = m

    def chunk(self, taken, query, state, count=None, at=None):
        return self.m.chunk(*taken, query, state, count, at)

    def step(self, taken, query, state):
        return self.m.step(*taken, query, state)

    def fold(self, taken, state, count):
        self.m.fold_log(*taken, state, count)


class Mixer:
    """Stands in for `module.forward`. `unmodified` is what it replaced, for caches of another kind."""

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        self.module, self.unmodified = module, unmodified
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.flat = Flat(self)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix hidden_states (B, T, E) along time."""
        given = (kwargs.get("past_key_values"), kwargs.get("cache_params"), *args)
        cache = next((value for value in given if isinstance(value, Cache)), None)
        if cache is not None and not isinstance(cache, StateCache):
            return self.unmodified(hidden_states, *args, **kwargs)
        for packed in ("seq_idx", "cu_seq_lens_q"):
            if kwargs.get(packed) is not None:
                raise StepError(f"layer {self.layer}: prepared models take no packed sequences ({packed}=)")
        return self.mix(hidden_states, Memory(STATELESS if cache is None else cache.writer.layer(self.layer)))

    def mix(self, hidden_states: Tensor, memory: Memory) -> Any:
        raise NotImplementedError

    def fold_log(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        """Step the recurrence over entries of its log, outside of a forward. See `statecache.replay.Fold`."""
        hook = _wake(self.module)
        with torch.no_grad():
            self.fold(inputs, gates, state, count)
        _sleep(self.module, hook)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        raise NotImplementedError


def convolve(module: Any, x: Tensor, memory: Memory) -> Tensor:
    """The module's short convolution and its activation over x (B, T, C)."""
    silu = module.activation in ("silu", "swish")
    y = _convolve(module.conv1d, x, memory, silu)
    return y if silu else module.act(y)


def _convolve(module: Any, x: Tensor, memory: Memory, silu: bool) -> Tensor:
    hook = _wake(module)
    y = memory.convolve(x, module.weight.squeeze(1), module.bias, silu)
    _sleep(module, hook)
    return y


def _wake(module: nn.Module) -> Any:
    """Bring an offloaded module's weights, which accelerate does only where the module itself is called."""
    hook = vars(module).get("_hf_hook")  # where there is none, getattr costs as much as an operation
    if hook is not None:
        hook.pre_forward(module)
    return hook


def _sleep(module: nn.Module, hook: Any) -> None:
    if hook is not None:
        hook.post_forward(module, ())


def decay(module: Any) -> Tensor:
    """A < 0, in float32 at least."""
    return -torch.exp(module.A_log.to(_precise(module.A_log.dtype)))


# parts of an entry are taken with split_with_sizes: what `split` adds to it in Python is four times its own time


def heads(x: Tensor, n: int) -> Tensor:
    """X (..., W) by heads: (..., H, W/H)."""
    return torch.unflatten(x, -1, (n, -1))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- Mamba-1


class Scan(Mixer):
    """Mamba-1, with one group of channels or, as in zamba, with heads of their own projections."""

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.groups: int = getattr(m, "n_mamba_heads", 1)
        self.width: int = m.intermediate_size
        self.size: int = m.ssm_state_size
        self.normed = hasattr(m, "dt_layernorm")  # jamba

    def mix(self, hidden_states: Tensor, memory: Memory) -> Tensor:
        m: Any = self.module
        projected = m.in_proj(hidden_states)
        if self.groups > 1:
            x, z = torch.unflatten(projected, -1, (-1, 2)).unbind(-1)
        else:
            x, z = projected.chunk(2, -1)
        x = convolve(m, x, memory)
        dt, B, C = self._parameters(x)
        y = memory.recur(self, torch.cat([x, B], -1), dt, C)
        y = torch.addcmul(y, x.to(y.dtype), m.D.to(y.dtype).flatten()) * F.silu(z.to(y.dtype))
        return m.out_proj(y.to(hidden_states.dtype))  # type: ignore[no-any-return]

    def _parameters(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Dt (B, T, W), B and C (B, T, G N) of the scan of x (B, T, W)."""
        m: Any = self.module
        precise = _precise(x.dtype)
        split = (m.time_step_rank, self.size, self.size)
        if self.groups > 1:
            by_head = heads(x, self.groups).transpose(1, 2)  # (B, H, T, P)
            dt, B, C = (by_head @ m.x_proj_weight.mT).split_with_sizes(split, -1)
            dt = (dt @ m.dt_proj_weight.mT).to(precise) + m.dt_proj_bias.to(precise)[:, None]
            dt, B, C = (part.transpose(1, 2).flatten(2) for part in (dt, B, C))
            return F.softplus(dt), B, C
        dt, B, C = m.x_proj(x).split_with_sizes(split, -1)
        if self.normed:
            dt, B, C = m.dt_layernorm(dt), m.b_layernorm(B), m.c_layernorm(C)
        plain = type(m.dt_proj) is nn.Linear and "_hf_hook" not in vars(m.dt_proj)
        if plain and m.dt_proj.bias is not None:  # its bias in full precision
            dt = F.linear(dt, m.dt_proj.weight).to(precise) + m.dt_proj.bias.to(precise)
        else:
            dt = m.dt_proj(dt).to(precise)
        return F.softplus(dt), B, C

    def _consumed(self, inputs: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B = inputs.split_with_sizes((self.width, self.groups * self.size), -1)
        return heads(x, self.groups), heads(gates, self.groups), heads(B, self.groups)

    def _A(self) -> Tensor:
        A = decay(self.module)
        return A if self.groups > 1 else A[None]

    def chunk(
        self,
        inputs: Tensor,
        gates: Tensor,
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, dt, B = self._consumed(inputs, gates)
        state = None if state is None else self._state(state)
        y, state, states = selective_scan.chunk(x, dt, self._A(), B, heads(query, self.groups), state, count, at)
        if self.groups == 1:
            state, states = state[:, 0], None if states is None else states[:, :, 0]
        return y.flatten(2), state, states

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Tensor:
        x, dt, B = self._consumed(inputs, gates)
        return selective_scan.step(x, dt, self._A(), B, heads(query, self.groups), self._state(state)).flatten(1)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        x, dt, B = self._consumed(inputs, gates)
        selective_scan.fold(x, dt, B, self._A(), self._state(state), count)

    def _state(self, state: Tensor) -> Tensor:
        return state if self.groups > 1 else state[:, None]


# ---- Mamba-2


class SSD(Mixer):
    """Mamba-2. The time step is clamped in every form, where the model has limits."""

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.heads: int = m.num_heads
        self.groups: int = m.n_groups
        self.width: int = m.intermediate_size
        self.states: int = m.n_groups * m.ssm_state_size
        self.scaled = hasattr(m, "ssm_in_multiplier")  # falcon_h1
        self.normed: bool = getattr(m, "mamba_rms_norm", True)

    def mix(self, hidden_states: Tensor, memory: Memory) -> Tensor:
        m: Any = self.module
        dtype = hidden_states.dtype
        if self.scaled:
            projected = m.in_proj(hidden_states * m.ssm_in_multiplier) * m.mup_vector
        else:
            projected = m.in_proj(hidden_states)
        z, xBC, dt = projected.split_with_sizes((self.width, self.width + 2 * self.states, self.heads), -1)
        xBC = convolve(m, xBC, memory)
        low, high = m.time_step_limit
        precise = _precise(dtype)
        dt = F.softplus(dt.to(precise) + m.dt_bias.to(precise))
        if low > 0 or high < float("inf"):
            dt = dt.clamp(low, high)
        taken = self.width + self.states
        y = memory.recur(self, xBC[..., :taken], dt, xBC[..., taken:])
        x = heads(xBC[..., : self.width], self.heads)
        y = torch.addcmul(y, x.to(y.dtype), m.D.to(y.dtype)[:, None]).flatten(2).to(dtype)
        y = m.norm(y, z) if self.normed else y * F.silu(z)
        return m.out_proj(y.to(dtype))  # type: ignore[no-any-return]

    def _consumed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, B = inputs.split_with_sizes((self.width, self.states), -1)
        return heads(x, self.heads), heads(B, self.groups)

    def chunk(
        self,
        inputs: Tensor,
        gates: Tensor,
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, B = self._consumed(inputs)
        return ssd.chunk(x, gates, decay(self.module), B, heads(query, self.groups), state, count, at)

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Tensor:
        x, B = self._consumed(inputs)
        return ssd.step(x, gates, decay(self.module), B, heads(query, self.groups), state)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        x, B = self._consumed(inputs)
        ssd.fold(x, gates, B, decay(self.module), state, count)


# ---- gated delta nets


class Delta(Mixer):
    """The gated delta rule of qwen3_next, qwen3_5 and olmo_hybrid, which differ in their projections."""

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.key_heads: int = m.num_k_heads
        self.heads: int = m.num_v_heads
        self.keys: int = m.key_dim
        self.values: int = m.value_dim
        self.strength = 2.0 if getattr(m, "allow_neg_eigval", False) else 1.0  # olmo_hybrid

    def mix(self, hidden_states: Tensor, memory: Memory) -> Tensor:
        m: Any = self.module
        qkv, z, b, a = self._project(hidden_states)
        qkv = convolve(m, qkv, memory)
        precise = _precise(a.dtype)
        g = F.softplus(a.to(precise) + m.dt_bias) * decay(m)
        beta = b.sigmoid()
        if self.strength != 1.0:
            beta = beta * self.strength
        y = memory.recur(self, qkv[..., self.keys :], torch.cat([g, beta.to(g.dtype)], -1), qkv[..., : self.keys])
        y, z = y.to(hidden_states.dtype), z.reshape(-1, m.head_v_dim)
        y = self._norm(y.reshape(-1, m.head_v_dim), z).view(*hidden_states.shape[:2], -1)
        return self._out(y)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m: Any = self.module
        return m.in_proj_qkv(x), m.in_proj_z(x), m.in_proj_b(x), m.in_proj_a(x)

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        return self.module.norm(y, z)  # type: ignore[operator, no-any-return]

    def _out(self, y: Tensor) -> Tensor:
        return self.module.out_proj(y)  # type: ignore[operator, no-any-return]

    def _consumed(self, inputs: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, v = inputs.split_with_sizes((self.keys, self.values), -1)
        g, beta = gates.chunk(2, -1)
        return heads(k, self.key_heads), heads(v, self.heads), g, beta

    def chunk(
        self,
        inputs: Tensor,
        gates: Tensor,
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return gated_delta.chunk(heads(query, self.key_heads), *self._consumed(inputs, gates), state, count, at)

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Tensor:
        return gated_delta.step(heads(query, self.key_heads), *self._consumed(inputs, gates), state)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        gated_delta.fold(*self._consumed(inputs, gates), state, count)


class Qwen3NextDelta(Delta):
    """Projections that interleave heads."""

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m: Any = self.module
        q, k, v, z, b, a = m.fix_query_key_value_ordering(m.in_proj_qkvz(x), m.in_proj_ba(x))
        return torch.cat([part.flatten(2) for part in (q, k, v)], -1), z, b, a


class OlmoDelta(Delta):
    """A projection for each part."""

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        m: Any = self.module
        return torch.cat([m.q_proj(x), m.k_proj(x), m.v_proj(x)], -1), m.g_proj(x), m.b_proj(x), m.a_proj(x)

    def _norm(self, y: Tensor, z: Tensor) -> Tensor:
        return self.module.o_norm(y, z)  # type: ignore[operator, no-any-return]

    def _out(self, y: Tensor) -> Tensor:
        return self.module.o_proj(y)  # type: ignore[operator, no-any-return]


# ---- short convolutions, lightning attention


class ShortConv(Mixer):
    """The gated short convolution of lfm2."""

    def mix(self, hidden_states: Tensor, memory: Memory) -> Tensor:
        m: Any = self.module
        B, C, x = m.in_proj(hidden_states).chunk(3, -1)
        return m.out_proj(C * _convolve(m.conv, B * x, memory, silu=False))  # type: ignore[no-any-return]


class Lightning(Mixer):
    """The lightning attention of minimax; its layer expects the output and the weights, of which there are none."""

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        super().__init__(module, unmodified)
        m: Any = module
        self.heads: int = m.num_attention_heads

    def mix(self, hidden_states: Tensor, memory: Memory) -> tuple[Tensor, None]:
        m: Any = self.module
        qkv = torch.unflatten(m.act_fn(m.qkv_proj(hidden_states)), -1, (self.heads, 3, -1))
        q, kv = qkv[..., 0, :].flatten(2), qkv[..., 1:, :].transpose(2, 3).flatten(2)
        alive = torch.ones_like(q[..., :1], dtype=_precise(q.dtype))
        y = memory.recur(self, kv, alive, q).flatten(2).to(hidden_states.dtype)
        y = F.sigmoid(m.output_gate(hidden_states)) * m.norm(y)
        return m.out_proj(y), None

    def _slope(self) -> Tensor:
        return self.module.slope_rate.flatten()  # type: ignore[operator]

    def _consumed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        k, v = inputs.chunk(2, -1)
        return heads(k, self.heads), heads(v, self.heads)

    def chunk(
        self,
        inputs: Tensor,
        gates: Tensor,
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v = self._consumed(inputs)
        return lightning.chunk(heads(query, self.heads), k, v, gates, self._slope(), state, count, at)

    def step(self, inputs: Tensor, gates: Tensor, query: Tensor, state: Tensor) -> Tensor:
        k, v = self._consumed(inputs)
        return lightning.step(heads(query, self.heads), k, v, gates, self._slope(), state)

    def fold(self, inputs: Tensor, gates: Tensor, state: Tensor, count: Tensor | None) -> None:
        k, v = self._consumed(inputs)
        lightning.fold(k, v, gates, self._slope(), state, count)


MIXERS: dict[str, type[Mixer]] = {
    "MambaMixer": Scan,
    "FalconMambaMixer": Scan,
    "JambaMambaMixer": Scan,
    "ZambaMambaMixer": Scan,
    "Mamba2Mixer": SSD,
    "BambaMixer": SSD,
    "FalconH1Mixer": SSD,
    "GraniteMoeHybridMambaLayer": SSD,
    "NemotronHMamba2Mixer": SSD,
    "Zamba2MambaMixer": SSD,
    "Qwen3NextGatedDeltaNet": Qwen3NextDelta,
    "Qwen3_5GatedDeltaNet": Delta,
    "Qwen3_5MoeGatedDeltaNet": Delta,
    "OlmoHybridGatedDeltaNet": OlmoDelta,
    "Lfm2ShortConv": ShortConv,
    "Lfm2MoeShortConv": ShortConv,
    "MiniMaxLightningAttention": Lightning,
}
