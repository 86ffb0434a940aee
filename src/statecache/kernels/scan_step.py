"""A token of Mamba-1's selective scan, or the few of a round, in one launch: time step, recurrence, skip and gate.

Reads and writes states in place. With a log the states stay as they are, and what they would consume is written down.
Rows that take nothing in cost no memory traffic.

B rows, T tokens of each, W channels, R rank of the time step, N state size, L slots of a log, M tokens at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import at_once, silu, softplus
from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@dataclass(frozen=True)
class Norms:
    """RMS norms of the time step's low rank, of B and of C; their weights (R,), (N,) and (N,), or None for none."""

    eps: float
    weights: tuple[Tensor, Tensor, Tensor] | None = None


@triton.jit
def _part(low, at, there, weight, size, eps, NORMED: tl.constexpr, WEIGHTED: tl.constexpr):
    """A part of what a token's projection gives, through its norm."""
    part = tl.load(low + at, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        part *= tl.rsqrt(tl.sum(part * part, 0) / size + eps)
    if WEIGHTED:
        part *= tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    return part


@Kernel
@triton.jit
def _step(
    x,
    low,
    gate,
    weight,
    bias,
    of_dt,
    of_B,
    of_C,
    A_log,
    D,
    state,
    inputs,
    gates,
    start,
    count,
    y,
    x_stride,
    low_stride,
    gate_stride,
    start_stride,
    eps,
    T: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BW: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    if EARLY:
        launch()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w, r, n = part * BW + tl.arange(0, BW), tl.arange(0, BR), tl.arange(0, BN)
    some, ranks, whole = w < W, r < R, n < N
    out = y + row * T * W + w
    taken = tl.full([], T, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(T):
                tl.store(out + t * W, tl.zeros([BW], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    cell = state + (row * W + w[:, None]) * N + n[None, :]
    inside = some[:, None] & whole[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(A_log + w[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32))
    lift = tl.load(weight + w[:, None] * R + r[None, :], mask=some[:, None] & ranks[None, :], other=0.0).to(tl.float32)
    skip = tl.load(D + w, mask=some, other=0.0).to(tl.float32)
    late = tl.zeros([BW], tl.float32)
    if BIAS:
        late = tl.load(bias + w, mask=some, other=0.0).to(tl.float32)
    if EARLY:
        wait()
    for first in range(0, T, M):
        for m in tl.static_range(M):
            t = first + m
            token = row * T + t
            given = low + token * low_stride
            rank = _part(given, r, ranks, of_dt, R, eps, NORMED, WEIGHTED)
            B = _part(given + R, n, whole, of_B, N, eps, NORMED, WEIGHTED)
            C = _part(given + R + N, n, whole, of_C, N, eps, NORMED, WEIGHTED)
            seen = tl.load(x + token * x_stride + w, mask=some, other=0.0).to(tl.float32)
            dt = softplus(tl.sum(lift * rank[None, :], 1) + late)
            if L:
                entry = row * L + (at + t) % L
                kept, real = inputs + entry * (W + N), some & (tl.broadcast_to(taken, some.shape) > t)
                tl.store(kept + w, seen.to(inputs.dtype.element_ty), mask=real)
                tl.store(gates + entry * W + w, dt.to(gates.dtype.element_ty), mask=real)
                if (part == 0) & (taken > t):
                    tl.store(kept + W + n, B.to(inputs.dtype.element_ty), mask=whole)
            held = held * tl.exp(-dt[:, None] * rate) + (dt * seen)[:, None] * B[None, :]
            value = tl.sum(held * C[None, :], 1) + seen * skip
            if GATED:
                value *= silu(tl.load(gate + token * gate_stride + w, mask=some, other=0.0).to(tl.float32))
            tl.store(out + t * W, value.to(y.dtype.element_ty), mask=some)
    if not L:
        tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def step(
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    D: Tensor,
    state: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    gate: Tensor | None = None,
    norms: Norms | None = None,
    log: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Take in T tokens of each row, `state` (B, W, N) in place; outputs (B T, W), as `x`.

    x: after its convolution (B T, W); low: what x is projected to, the time step's rank, B and C as one (B T, R + 2 N);
    gate (B T, W), whose silu multiplies the outputs: all with any stride between tokens. weight (W, R) and bias (W,)
    make the time step; A_log (W, N), D (W,). start: (B,) or (1,), where rows stand; count: (B,), 0..T, None for all:
    beyond it outputs are junk, and nothing is written. log: inputs, x and B (B, L, W + N), and gates, the time steps
    (B, L, W): these are written in place of the state; without it T is 1.
    """
    rows, W, N = state.shape
    tokens, R = len(x) // rows, weight.shape[1]
    inputs, gates = (state, state) if log is None else log
    assert weight.is_contiguous() and A_log.is_contiguous() and state.is_contiguous() and low.shape[1] == R + 2 * N
    assert all(each is None or each.stride(-1) == 1 for each in (x, low, gate))
    if log is None:
        assert tokens == 1
    else:
        assert inputs.is_contiguous() and gates.is_contiguous() and inputs.shape[1] == gates.shape[1] >= tokens
    y = torch.empty(len(x), W, dtype=x.dtype, device=x.device)
    weights = None if norms is None else norms.weights
    of_dt, of_B, of_C = (low, low, low) if weights is None else weights
    _step[(rows, triton.cdiv(W, 16))](
        x,
        low,
        x if gate is None else gate,
        weight,
        x if bias is None else bias,
        of_dt,
        of_B,
        of_C,
        A_log,
        D,
        state,
        inputs,
        gates,
        start,
        start if count is None else count,
        y,
        x.stride(0),
        low.stride(0),
        0 if gate is None else gate.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        0.0 if norms is None else norms.eps,
        T=tokens,
        M=at_once(tokens),
        W=W,
        R=R,
        N=N,
        L=0 if log is None else inputs.shape[1],
        BIAS=bias is not None,
        GATED=gate is not None,
        NORMED=norms is not None,
        WEIGHTED=weights is not None,
        COUNTED=count is not None,
        BW=16,
        BR=triton.next_power_of_2(R),
        BN=triton.next_power_of_2(N),
        num_warps=4 if R > 64 else 2,
        **early(x.device),
    )
    return y
