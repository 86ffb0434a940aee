"""One token of Mamba-2 in one launch: convolution, activation, time step, recurrence and skip.

Reads and writes the rings of the convolution and the states in place. Rows that take nothing in cost no memory traffic.

B rows, H heads of size P, W = H P, G groups, N state size, C = W + 2 G N channels, S slots of the ring, K width.
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
    dt,
    weight,
    bias,
    A_log,
    dt_bias,
    D,
    ring,
    state,
    start,
    count,
    y,
    new_stride,
    dt_stride,
    start_stride,
    low,
    high,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
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
    out = y + row * (H * P) + head * P + p
    if COUNTED:
        if tl.load(count + row) == 0:
            if EARLY:
                wait()
            tl.store(out, tl.zeros([BP], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * new_stride
    cell = state + ((row * H + head) * P + p[:, None]) * N + n[None, :]
    inside = some[:, None] & whole[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        wait()
    cx, cB = head * P + p, H * P + group * N + n
    cC = cB + G * N
    x, x_in = convolve(new, 0, ring, weight, bias, cx, some, at, 0, K, S, BIAS)
    B, B_in = convolve(new, 0, ring, weight, bias, cB, whole, at, 0, K, S, BIAS)
    C, C_in = convolve(new, 0, ring, weight, bias, cC, whole, at, 0, K, S, BIAS)
    if SILU:
        x, B, C = silu(x), silu(B), silu(C)
    step = softplus(tl.load(dt + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32))
    if LIMITED:
        step = tl.minimum(tl.maximum(step, low), high)
    decay = tl.exp(-step * tl.exp(tl.load(A_log + head).to(tl.float32)))
    held = held * decay + (x * step)[:, None] * tl.where(whole, B, 0.0)[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)
    seen = tl.sum(held * tl.where(whole, C, 0.0)[None, :], 1) + x * tl.load(D + head).to(tl.float32)
    tl.store(out, seen.to(y.dtype.element_ty), mask=some)
    # the slot that is written is none of the K - 1 that other programs still read, as S >= K
    slot = at % S
    tl.store(ring + cx * S + slot, x_in.to(ring.dtype.element_ty), mask=some)
    if (head % (H // G) == 0) & (part == 0):
        tl.store(ring + cB * S + slot, B_in.to(ring.dtype.element_ty), mask=whole)
        tl.store(ring + cC * S + slot, C_in.to(ring.dtype.element_ty), mask=whole)


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
    block: int | None = None,
) -> Tensor:
    """Take in one token of each row, `ring` (B, C, S) and `state` (B, H, P, N) in place; the outputs (B, W), as `new`.

    new: x, B and C as one (B, C), dt (B, H) before its bias, both with any stride between rows; weight (C, K), bias
    (C,), A_log, dt_bias and D (H,). start: (B,) or (1,), where rows stand; count: (B,), 0 or 1, None for all.
    S must be at least K. `block`: channels of a head that a program takes.
    """
    rows, H, P, N = state.shape
    channels, slots = ring.shape[1:]
    K = weight.shape[-1]
    assert slots >= K and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == 1 and dt.stride(-1) == 1 and channels == H * P + 2 * groups * N
    y = torch.empty(rows, H * P, dtype=new.dtype, device=new.device)
    few = rows < 8  # programs must be many, else each loads more at once
    block = min(triton.next_power_of_2(P), block or (16 if few else 64))
    low, high = limits
    _step[(rows, H, triton.cdiv(P, block))](
        new,
        dt,
        weight,
        new if bias is None else bias,
        A_log,
        dt_bias,
        D,
        ring,
        state,
        start,
        start if count is None else count,
        y,
        new.stride(0),
        dt.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        low,
        min(high, 3e38),
        H=H,
        P=P,
        G=groups,
        N=N,
        K=K,
        S=slots,
        BIAS=bias is not None,
        SILU=silu,
        LIMITED=low > 0 or high < float("inf"),
        COUNTED=count is not None,
        BP=block,
        BN=triton.next_power_of_2(N),
        num_warps=4 if few else 2,
        **early(new.device),
    )
    return y
