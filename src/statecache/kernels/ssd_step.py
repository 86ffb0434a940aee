"""A token of Mamba-2, or the few of a round, in one launch: convolution, time step, recurrence, skip, and gated norm.

Reads and writes the rings of the convolution and the states in place. With a log the states stay as they are, and what
they would consume is written down, for `ssd_fold`. Rows that take nothing in cost no memory traffic.

B rows, T tokens of each, H heads of size P, W = H P, G groups, N state size, C = W + 2 G N channels, S slots of the
ring, K width, L slots of a log, M tokens at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import at_once, convolve, known, silu, softplus
from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _step(
    new,
    dt,
    weight,
    bias,
    A_log,
    dt_bias,
    D,
    ring,
    state,
    inputs,
    gates,
    gate,
    norm,
    start,
    count,
    y,
    squares,
    new_stride,
    dt_stride,
    gate_stride,
    start_stride,
    low,
    high,
    T: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    LIMITED: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    if EARLY:
        launch()
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group = head // (H // G)
    channels: tl.constexpr = H * P + 2 * G * N
    p, n = part * BP + tl.arange(0, BP), tl.arange(0, BN)
    some, whole = p < P, n < N
    out = y + row * T * (H * P) + head * P + p
    parts = H * tl.num_programs(2)
    sums = squares + row * T * parts + head * tl.num_programs(2) + part
    taken = tl.full([], T, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(T):
                tl.store(out + t * (H * P), tl.zeros([BP], tl.float32).to(y.dtype.element_ty), mask=some)
                if NORMED:
                    tl.store(sums + t * parts, 0.0)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * T * new_stride
    dt += row * T * dt_stride + head
    gate += row * T * gate_stride
    cell = state + ((row * H + head) * P + p[:, None]) * N + n[None, :]
    inside = some[:, None] & whole[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    rate, skip = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(D + head).to(tl.float32)
    late = tl.load(dt_bias + head).to(tl.float32)
    if NORMED:
        by = tl.load(norm + head * P + p, mask=some, other=0.0).to(tl.float32)
    cx, cB = head * P + p, H * P + group * N + n
    cC = cB + G * N
    by_x = known(ring, weight, bias, cx, some, at, K, S, BIAS)
    by_B = known(ring, weight, bias, cB, whole, at, K, S, BIAS)
    by_C = known(ring, weight, bias, cC, whole, at, K, S, BIAS)
    if EARLY:
        wait()
    shared = (head % (H // G) == 0) & (part == 0)  # what the heads of a group have in common is written once
    for first in range(0, T, M):
        x, x_in = convolve(new, new_stride, by_x, cx, some, first, T, M, K, BIAS, SILU)
        B, B_in = convolve(new, new_stride, by_B, cB, whole, first, T, M, K, BIAS, SILU)
        C, C_in = convolve(new, new_stride, by_C, cC, whole, first, T, M, K, BIAS, SILU)
        steps, through = (), ()
        for m in tl.static_range(M):
            t = first + m
            step = softplus(tl.load(dt + t * dt_stride).to(tl.float32) + late)
            if LIMITED:
                step = tl.minimum(tl.maximum(step, low), high)
            steps += (step,)
            if GATED:
                z = tl.load(gate + t * gate_stride + cx, mask=some, other=0.0).to(tl.float32)
                through += (silu(z),)
        for m in tl.static_range(M):
            t = first + m
            held = held * tl.exp(-steps[m] * rate) + (x[m] * steps[m])[:, None] * tl.where(whole, B[m], 0.0)[None, :]
            seen = tl.sum(held * tl.where(whole, C[m], 0.0)[None, :], 1) + x[m] * skip
            if GATED:
                seen *= through[m]
            if NORMED:
                tl.store(sums + t * parts, tl.sum(tl.where(some, seen * seen, 0.0), 0))
                seen *= by
            tl.store(out + t * (H * P), seen.to(y.dtype.element_ty), mask=some)
            # the slots that are written are none of the K - 1 that other programs still read, as S >= K - 1 + T
            slot, real = (at + t) % S, some & (tl.broadcast_to(taken, some.shape) > t)
            tl.store(ring + cx * S + slot, x_in[m].to(ring.dtype.element_ty), mask=real)
            if shared & (taken > t):
                tl.store(ring + cB * S + slot, B_in[m].to(ring.dtype.element_ty), mask=whole)
                tl.store(ring + cC * S + slot, C_in[m].to(ring.dtype.element_ty), mask=whole)
            if L:
                entry = row * L + (at + t) % L
                kept = inputs + entry * (H * P + G * N)
                tl.store(kept + cx, x[m].to(inputs.dtype.element_ty), mask=real)
                if (part == 0) & (taken > t):
                    tl.store(gates + entry * H + head, steps[m].to(gates.dtype.element_ty))
                if shared & (taken > t):
                    tl.store(kept + cB, B[m].to(inputs.dtype.element_ty), mask=whole)
    if not L:
        tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def step(
    new: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    ring: Tensor,
    state: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    groups: int,
    silu: bool = True,
    limits: tuple[float, float] = (0.0, float("inf")),
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    log: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Take in T tokens of each row, `ring` (B, C, S) and `state` (B, H, P, N) in place; the outputs (B T, W), as `new`.

    new: x, B and C as one (B T, C), dt (B T, H) before its bias, both with any stride between tokens; weight (C, K),
    bias (C,), A_log, dt_bias and D (H,). start: (B,) or (1,), where rows stand; count: (B,), 0..T, None for all: beyond
    it outputs are junk, and nothing is written. S must be at least K - 1 + T. gate (B T, W), of any stride between
    tokens: silu of it multiplies the outputs. norm (W,): the weight of an RMS norm over each token's outputs, which
    multiplies them; the squares of what they were before come beside them, summed up in n parts of each token (B T, n)
    float32, as `kernels.linear` takes them. log: inputs, x and B (B, L, W + G N), and gates, the time steps (B, L, H):
    these are written in place of the state; without it T is 1.
    """
    rows, H, P, N = state.shape
    channels, slots = ring.shape[1:]
    K, tokens = weight.shape[-1], len(new) // rows
    inputs, gates = (state, state) if log is None else log
    assert slots >= K - 1 + tokens and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == 1 and dt.stride(-1) == 1 and channels == H * P + 2 * groups * N
    assert gate is None or gate.stride(-1) == 1
    if log is None:
        assert tokens == 1
    else:
        assert inputs.is_contiguous() and gates.is_contiguous() and inputs.shape[1] == gates.shape[1] >= tokens
    y = torch.empty(len(new), H * P, dtype=new.dtype, device=new.device)
    few = rows < 8 or log is not None  # programs must be many, else each loads more at once
    block = 16 if few else 64
    if log is not None and rows > 1:  # each convolves B and C of its group, for all tokens of a round
        block = 32
    block = min(triton.next_power_of_2(P), block)
    parts = triton.cdiv(P, block)
    squares = None if norm is None else torch.empty(len(new), H * parts, dtype=torch.float32, device=new.device)
    low, high = limits
    _step[(rows, H, parts)](
        new,
        dt,
        weight,
        new if bias is None else bias,
        A_log,
        dt_bias,
        D,
        ring,
        state,
        inputs,
        gates,
        new if gate is None else gate,
        new if norm is None else norm,
        start,
        start if count is None else count,
        y,
        y if squares is None else squares,
        new.stride(0),
        dt.stride(0),
        0 if gate is None else gate.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        low,
        min(high, 3e38),
        T=tokens,
        M=at_once(tokens),
        H=H,
        P=P,
        G=groups,
        N=N,
        K=K,
        S=slots,
        L=0 if log is None else inputs.shape[1],
        BIAS=bias is not None,
        SILU=silu,
        GATED=gate is not None,
        NORMED=norm is not None,
        LIMITED=low > 0 or high < float("inf"),
        COUNTED=count is not None,
        BP=block,
        BN=triton.next_power_of_2(N),
        num_warps=4 if few else 2,
        **early(new.device),
    )
    return y, squares
