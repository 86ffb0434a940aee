"""One token of the gated delta rule in one launch: convolution, activation, gates, norms of q and k, and the rule.

Reads and writes the rings of the convolution and the states in place. Rows that take nothing in cost no memory traffic.

B rows, J key heads of size K, H value heads of size V, C = 2 J K + H V channels, S slots of the ring, T taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import convolve, silu, softplus
from statecache.kernels.early import early, launch, wait


@triton.jit
def _step(
    new,
    b,
    a,
    weight,
    bias,
    A_log,
    dt_bias,
    ring,
    state,
    start,
    count,
    y,
    new_stride,
    b_stride,
    a_stride,
    start_stride,
    strength,
    scale,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
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
    out = y + (row * H + head) * V + v_at
    if COUNTED:
        if tl.load(count + row) == 0:
            if EARLY:
                wait()
            tl.store(out, tl.zeros([BV], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * new_stride
    cell = state + ((row * H + head) * K + k_at[:, None]) * V + v_at[None, :]
    inside = whole[:, None] & some[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        wait()
    cq = key * K + k_at
    ck, cv = cq + J * K, 2 * J * K + head * V + v_at
    q, q_in = convolve(new, 0, ring, weight, bias, cq, whole, at, 0, T, S, BIAS)
    k, k_in = convolve(new, 0, ring, weight, bias, ck, whole, at, 0, T, S, BIAS)
    v, v_in = convolve(new, 0, ring, weight, bias, cv, some, at, 0, T, S, BIAS)
    if SILU:
        q, k, v = silu(q), silu(k), silu(v)
    q, k = tl.where(whole, q, 0.0), tl.where(whole, k, 0.0)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    gate = softplus(tl.load(a + row * a_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    decay = tl.exp(-gate * tl.exp(tl.load(A_log + head).to(tl.float32)))
    beta = strength / (1.0 + tl.exp(-tl.load(b + row * b_stride + head).to(tl.float32)))
    held *= decay
    written = beta * (v - tl.sum(held * k[:, None], 0))
    held += k[:, None] * written[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)
    tl.store(out, tl.sum(held * q[:, None], 0).to(y.dtype.element_ty), mask=some)
    # the slot that is written is none of the T - 1 that other programs still read, as S >= T
    slot = at % S
    tl.store(ring + cv * S + slot, v_in.to(ring.dtype.element_ty), mask=some)
    if (head % (H // J) == 0) & (part == 0):
        tl.store(ring + cq * S + slot, q_in.to(ring.dtype.element_ty), mask=whole)
        tl.store(ring + ck * S + slot, k_in.to(ring.dtype.element_ty), mask=whole)


def step(
    new: Tensor,
    b: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    ring: Tensor,
    state: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    key_heads: int,
    silu: bool = True,
    doubled: bool = False,
    block: int | None = None,
) -> Tensor:
    """Take in one token of each row, `ring` (B, C, S) and `state` (B, H, K, V) in place; outputs (B, H V), as `new`.

    new: q, k and v as one (B, C), b and a (B, H), all with any stride between rows; weight (C, T), bias (C,), A_log and
    dt_bias (H,). start: (B,) or (1,), where rows stand; count: (B,), 0 or 1, None for all. S must be at least T.
    `block`: channels of a head's values that a program takes.
    """
    rows, H, K, V = state.shape
    channels, slots = ring.shape[1:]
    taps = weight.shape[-1]
    assert slots >= taps and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == b.stride(-1) == a.stride(-1) == 1 and channels == 2 * key_heads * K + H * V
    y = torch.empty(rows, H * V, dtype=new.dtype, device=new.device)
    block = min(triton.next_power_of_2(V), block or (32 if rows < 8 else 64))
    _step[(rows, H, triton.cdiv(V, block))](
        new,
        b,
        a,
        weight,
        new if bias is None else bias,
        A_log,
        dt_bias,
        ring,
        state,
        start,
        start if count is None else count,
        y,
        new.stride(0),
        b.stride(0),
        a.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        2.0 if doubled else 1.0,
        K**-0.5,
        J=key_heads,
        K=K,
        H=H,
        V=V,
        T=taps,
        S=slots,
        BIAS=bias is not None,
        SILU=silu,
        COUNTED=count is not None,
        BK=triton.next_power_of_2(K),
        BV=block,
        num_warps=2,
        **early(new.device),
    )
    return y
