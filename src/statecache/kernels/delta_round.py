"""A round of the gated delta rule: few tokens of each row run ahead of the state, and later what is kept goes into it.

`ahead` leaves the state as it is, and writes down what it would consume: the inputs of the convolution in its ring, and
those of the recurrence in the log. `fold` takes tokens from the logs of many layers into their states, in one launch.
Rows that take nothing in cost no memory traffic.

B rows, R of them in a round, N tokens, J key heads of size K, H value heads of size V, C = 2 J K + H V channels, S
slots of the ring, T taps, L slots of a log.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import convolve, silu, softplus
from statecache.kernels.early import early, launch, wait
from statecache.kernels.pointers import Table


@triton.jit
def _ahead(
    new,
    b,
    a,
    weight,
    bias,
    A_log,
    dt_bias,
    ring,
    state,
    inputs,
    gates,
    start,
    count,
    y,
    new_stride,
    b_stride,
    a_stride,
    start_stride,
    strength,
    scale,
    N: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    if EARLY:
        launch()
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    key = head // (H // J)
    channels: tl.constexpr = 2 * J * K + H * V
    k_at, v_at = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    whole, some = k_at < K, v_at < V
    out = y + (row * N * H + head) * V + v_at
    taken = tl.full([], N, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(N):
                tl.store(out + t * (H * V), tl.zeros([BV], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * N * new_stride
    a += row * N * a_stride
    b += row * N * b_stride
    cell = state + ((row * H + head) * K + k_at[:, None]) * V + v_at[None, :]
    held = tl.load(cell, mask=whole[:, None] & some[None, :], other=0.0).to(tl.float32)
    if EARLY:
        wait()
    cq = key * K + k_at
    ck, cv = cq + J * K, 2 * J * K + head * V + v_at
    shared = (head % (H // J) == 0) & (part == 0)  # what the heads of a key have in common is written once
    rate, late = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(dt_bias + head).to(tl.float32)
    for t in tl.static_range(N):
        q, q_in = convolve(new, new_stride, ring, weight, bias, cq, whole, at, t, T, S, BIAS)
        k, k_in = convolve(new, new_stride, ring, weight, bias, ck, whole, at, t, T, S, BIAS)
        v, v_in = convolve(new, new_stride, ring, weight, bias, cv, some, at, t, T, S, BIAS)
        if SILU:
            q, k, v = silu(q), silu(k), silu(v)
        gate = -rate * softplus(tl.load(a + t * a_stride + head).to(tl.float32) + late)
        beta = strength / (1.0 + tl.exp(-tl.load(b + t * b_stride + head).to(tl.float32)))
        # the slots that are written are none of the T - 1 that other programs still read, as S >= T - 1 + N
        slot, entry = (at + t) % S, row * L + (at + t) % L
        kept, real = inputs + entry * (J * K + H * V), some & (tl.broadcast_to(taken, some.shape) > t)
        tl.store(ring + cv * S + slot, v_in.to(ring.dtype.element_ty), mask=real)
        tl.store(kept + cv - J * K, v.to(inputs.dtype.element_ty), mask=real)
        if (part == 0) & (taken > t):
            tl.store(gates + entry * 2 * H + head, gate.to(gates.dtype.element_ty))
            tl.store(gates + entry * 2 * H + H + head, beta.to(gates.dtype.element_ty))
        if shared & (taken > t):
            tl.store(ring + cq * S + slot, q_in.to(ring.dtype.element_ty), mask=whole)
            tl.store(ring + ck * S + slot, k_in.to(ring.dtype.element_ty), mask=whole)
            tl.store(kept + cq, k.to(inputs.dtype.element_ty), mask=whole)
        q, k = tl.where(whole, q, 0.0), tl.where(whole, k, 0.0)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        held *= tl.exp(gate)
        written = beta * (v - tl.sum(held * k[:, None], 0))
        held += k[:, None] * written[None, :]
        tl.store(out + t * (H * V), tl.sum(held * q[:, None], 0).to(y.dtype.element_ty), mask=some)


def ahead(
    new: Tensor,
    b: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    ring: Tensor,
    state: Tensor,
    inputs: Tensor,
    gates: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    key_heads: int,
    silu: bool = True,
    doubled: bool = False,
    block: int = 32,
) -> Tensor:
    """Run over N tokens of each row from `state` (B, H, K, V) on, which stays; outputs (B N, H V).

    new: q, k and v as one (B N, C), b and a (B N, H), all with any stride between tokens; weight (C, T), bias (C,),
    A_log and dt_bias (H,). start: (B,) or (1,), where rows stand; count: (B,), 0..N, None for all: beyond it outputs
    are junk, and nothing is written. ring: (B, C, S), S at least T - 1 + N. The log: inputs, k and v (B, L, J K + H V),
    and gates, decays and strengths (B, L, 2 H). `block`: channels of a head's values that a program takes.
    """
    rows, H, K, V = state.shape
    channels, slots = ring.shape[1:]
    taps, tokens = weight.shape[-1], len(new) // rows
    assert slots >= taps - 1 + tokens and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == b.stride(-1) == a.stride(-1) == 1 and channels == 2 * key_heads * K + H * V
    assert inputs.is_contiguous() and gates.is_contiguous() and inputs.shape[1] == gates.shape[1] >= tokens
    y = torch.empty(len(new), H * V, dtype=new.dtype, device=new.device)
    block = min(triton.next_power_of_2(V), block)
    _ahead[(rows, H, triton.cdiv(V, block))](
        new,
        b,
        a,
        weight,
        new if bias is None else bias,
        A_log,
        dt_bias,
        ring,
        state,
        inputs,
        gates,
        start,
        start if count is None else count,
        y,
        new.stride(0),
        b.stride(0),
        a.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        2.0 if doubled else 1.0,
        K**-0.5,
        N=tokens,
        J=key_heads,
        K=K,
        H=H,
        V=V,
        T=taps,
        S=slots,
        L=inputs.shape[1],
        BIAS=bias is not None,
        SILU=silu,
        COUNTED=count is not None,
        BK=triton.next_power_of_2(K),
        BV=block,
        num_warps=2,
        **early(new.device),
    )
    return y


@triton.jit
def _fold(
    layers,
    like_state,
    like_inputs,
    rows,
    start,
    count,
    most,
    start_stride,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    SOME: tl.constexpr,
    COUNTED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    r, head, at_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts: tl.constexpr = (V + BV - 1) // BV
    layers += at_layer // parts * 3
    taken = most
    if COUNTED:
        taken = tl.minimum(tl.load(count + r), most)
    if taken == 0:
        return
    row = r.to(tl.int64)
    if SOME:
        row = tl.load(rows + r)
    at = tl.load(start + r * start_stride)
    state = tl.load(layers).to(tl.pointer_type(like_state.dtype.element_ty))
    inputs = tl.load(layers + 1).to(tl.pointer_type(like_inputs.dtype.element_ty))
    gates = tl.load(layers + 2).to(tl.pointer_type(tl.float32))
    k_at, v_at = tl.arange(0, BK), at_layer % parts * BV + tl.arange(0, BV)
    whole, some = k_at < K, v_at < V
    cell = state + ((row * H + head) * K + k_at[:, None]) * V + v_at[None, :]
    inside = whole[:, None] & some[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    for t in range(taken):
        entry = row * L + (at + t) % L
        kept = inputs + entry * (J * K + H * V)
        gate, beta = tl.load(gates + entry * 2 * H + head), tl.load(gates + entry * 2 * H + H + head)
        k = tl.load(kept + head // (H // J) * K + k_at, mask=whole, other=0.0).to(tl.float32)
        v = tl.load(kept + J * K + head * V + v_at, mask=some, other=0.0).to(tl.float32)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        held *= tl.exp(gate)
        written = beta * (v - tl.sum(held * k[:, None], 0))
        held += k[:, None] * written[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def fold(
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    start: Tensor,
    count: Tensor | None,
    most: int,
    rows: Tensor | None = None,
    *,
    key_heads: int,
    table: Table | None = None,
) -> None:
    """Step each layer's state (B, H, K, V) in place over its log's entries from `start` on, `most` or `count` of them.

    Of each layer inputs, k and v (B, L, J K + H V), and gates, decays and strengths (B, L, 2 H) float32. start: (R,) or
    (1,); count: (R,) long; rows: (R,) long, None for all. All layers are of one shape and one dtype each.
    `table`: of their addresses, for who captures the launch to keep.
    """
    B, H, K, V = states[0].shape
    R = B if rows is None else len(rows)
    block = min(triton.next_power_of_2(V), 32)
    with torch.cuda.device_of(states[0]):
        _fold[(R, H, len(states) * triton.cdiv(V, block))](
            (table or Table()).of(list(zip(states, inputs, gates, strict=True))),
            states[0],
            inputs[0],
            start if rows is None else rows,
            start,
            start if count is None else count,
            most,
            1 if len(start) == R and R > 1 else 0,
            J=key_heads,
            K=K,
            H=H,
            V=V,
            L=inputs[0].shape[1],
            SOME=rows is not None,
            COUNTED=count is not None,
            BK=triton.next_power_of_2(K),
            BV=block,
            num_warps=2,
        )
