"""A round of Mamba-2: the few tokens of each row run ahead of the state, and later what is kept of them goes into it.

`ahead` leaves the state as it is, and writes down what it would consume: the inputs of the convolution in its ring, and
those of the recurrence in the log. `fold` takes tokens from the logs of many layers into their states, in one launch.
Rows that take nothing in cost no memory traffic.

B rows, R of them in a round, T tokens, H heads of size P, W = H P, G groups, N state size, C = W + 2 G N channels, S
slots of the ring, K width, L slots of a log.
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
    start,
    count,
    y,
    new_stride,
    dt_stride,
    start_stride,
    low,
    high,
    T: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
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
    out = y + row * T * (H * P) + head * P + p
    taken = tl.full([], T, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(T):
                tl.store(out + t * (H * P), tl.zeros([BP], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * T * new_stride
    dt += row * T * dt_stride
    cell = state + ((row * H + head) * P + p[:, None]) * N + n[None, :]
    held = tl.load(cell, mask=some[:, None] & whole[None, :], other=0.0).to(tl.float32)
    if EARLY:
        wait()
    cx, cB = head * P + p, H * P + group * N + n
    cC = cB + G * N
    shared = (head % (H // G) == 0) & (part == 0)  # what the heads of a group have in common is written once
    rate, skip = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(D + head).to(tl.float32)
    late = tl.load(dt_bias + head).to(tl.float32)
    for t in tl.static_range(T):
        x, x_in = convolve(new, new_stride, ring, weight, bias, cx, some, at, t, K, S, BIAS)
        B, B_in = convolve(new, new_stride, ring, weight, bias, cB, whole, at, t, K, S, BIAS)
        C, C_in = convolve(new, new_stride, ring, weight, bias, cC, whole, at, t, K, S, BIAS)
        if SILU:
            x, B, C = silu(x), silu(B), silu(C)
        step = softplus(tl.load(dt + t * dt_stride + head).to(tl.float32) + late)
        if LIMITED:
            step = tl.minimum(tl.maximum(step, low), high)
        held = held * tl.exp(-step * rate) + (x * step)[:, None] * tl.where(whole, B, 0.0)[None, :]
        seen = tl.sum(held * tl.where(whole, C, 0.0)[None, :], 1) + x * skip
        tl.store(out + t * (H * P), seen.to(y.dtype.element_ty), mask=some)
        # the slots that are written are none of the K - 1 that other programs still read, as S >= K - 1 + T
        slot, entry = (at + t) % S, row * L + (at + t) % L
        kept = inputs + entry * (H * P + G * N)
        real = some & (tl.broadcast_to(taken, some.shape) > t)
        tl.store(ring + cx * S + slot, x_in.to(ring.dtype.element_ty), mask=real)
        tl.store(kept + cx, x.to(inputs.dtype.element_ty), mask=real)
        if (part == 0) & (taken > t):
            tl.store(gates + entry * H + head, step.to(gates.dtype.element_ty))
        if shared & (taken > t):
            tl.store(ring + cB * S + slot, B_in.to(ring.dtype.element_ty), mask=whole)
            tl.store(ring + cC * S + slot, C_in.to(ring.dtype.element_ty), mask=whole)
            tl.store(kept + cB, B.to(inputs.dtype.element_ty), mask=whole)


def ahead(
    new: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    D: Tensor,
    ring: Tensor,
    state: Tensor,
    inputs: Tensor,
    gates: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    groups: int,
    silu: bool = True,
    limits: tuple[float, float] = (0.0, float("inf")),
    block: int = 16,
) -> Tensor:
    """Run over T tokens of each row from `state` (B, H, P, N) on, which stays; the outputs (B T, W), as `new`.

    new: x, B and C as one (B T, C), dt (B T, H) before its bias, both with any stride between tokens; weight (C, K),
    bias (C,), A_log, dt_bias and D (H,). start: (B,) or (1,), where rows stand; count: (B,), 0..T, None for all: beyond
    it outputs are junk, and nothing is written. ring: (B, C, S), S at least K - 1 + T. The log: inputs, x and B
    (B, L, W + G N), and gates, the time steps (B, L, H). `block`: channels of a head that a program takes.
    """
    rows, H, P, N = state.shape
    channels, slots = ring.shape[1:]
    K, tokens = weight.shape[-1], len(new) // rows
    assert slots >= K - 1 + tokens and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == 1 and dt.stride(-1) == 1 and channels == H * P + 2 * groups * N
    assert inputs.is_contiguous() and gates.is_contiguous() and inputs.shape[1] == gates.shape[1] >= tokens
    y = torch.empty(len(new), H * P, dtype=new.dtype, device=new.device)
    block = min(triton.next_power_of_2(P), block)
    low, high = limits
    _ahead[(rows, H, triton.cdiv(P, block))](
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
        start,
        start if count is None else count,
        y,
        new.stride(0),
        dt.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        low,
        min(high, 3e38),
        T=tokens,
        H=H,
        P=P,
        G=groups,
        N=N,
        K=K,
        S=slots,
        L=inputs.shape[1],
        BIAS=bias is not None,
        SILU=silu,
        LIMITED=low > 0 or high < float("inf"),
        COUNTED=count is not None,
        BP=block,
        BN=triton.next_power_of_2(N),
        num_warps=4,
        **early(new.device),
    )
    return y


@triton.jit
def _fold(
    layers,
    like_state,
    like_inputs,
    like_A,
    rows,
    start,
    count,
    most,
    start_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    SOME: tl.constexpr,
    COUNTED: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    r, head, at_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts: tl.constexpr = (P + BP - 1) // BP
    layers += at_layer // parts * 4
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
    A = tl.load(tl.load(layers + 3).to(tl.pointer_type(like_A.dtype.element_ty)) + head).to(tl.float32)
    p, n = at_layer % parts * BP + tl.arange(0, BP), tl.arange(0, BN)
    some, whole = p < P, n < N
    cell = state + ((row * H + head) * P + p[:, None]) * N + n[None, :]
    inside = some[:, None] & whole[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(A)
    for t in range(taken):
        entry = row * L + (at + t) % L
        kept = inputs + entry * (H * P + G * N)
        step = tl.load(gates + entry * H + head)
        x = tl.load(kept + head * P + p, mask=some, other=0.0).to(tl.float32)
        B = tl.load(kept + H * P + head // (H // G) * N + n, mask=whole, other=0.0).to(tl.float32)
        held = held * tl.exp(-step * rate) + (x * step)[:, None] * B[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def fold(
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    A_log: Sequence[Tensor],
    start: Tensor,
    count: Tensor | None,
    most: int,
    rows: Tensor | None = None,
    *,
    groups: int,
    table: Table | None = None,
) -> None:
    """Step each layer's state (B, H, P, N) in place over its log's entries from `start` on, `most` or `count` of them.

    Of each layer inputs, x and B (B, L, W + G N), gates, the time steps (B, L, H) float32, and A_log (H,). start: (R,)
    or (1,); count: (R,) long; rows: (R,) long, None for all. All layers are of one shape and one dtype each.
    `table`: of their addresses, for who captures the launch to keep.
    """
    B, H, P, N = states[0].shape
    R = B if rows is None else len(rows)
    block = min(triton.next_power_of_2(P), 16)
    with torch.cuda.device_of(states[0]):
        _fold[(R, H, len(states) * triton.cdiv(P, block))](
            (table or Table()).of(list(zip(states, inputs, gates, A_log, strict=True))),
            states[0],
            inputs[0],
            A_log[0],
            start if rows is None else rows,
            start,
            start if count is None else count,
            most,
            1 if len(start) == R and R > 1 else 0,
            H=H,
            P=P,
            G=groups,
            N=N,
            L=inputs[0].shape[1],
            SOME=rows is not None,
            COUNTED=count is not None,
            BP=block,
            BN=triton.next_power_of_2(N),
            num_warps=4,
        )
