"""A token of a convolution, or the few of a round, in one launch: with what activates it, or between two gates.

Reads and writes the ring in place. Rows that take nothing in cost no memory traffic.

B rows, N tokens of each, C channels, S slots of the ring, T taps, M tokens at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import at_once, convolve, known
from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _step(
    new,
    weight,
    bias,
    ring,
    start,
    count,
    y,
    new_stride,
    start_stride,
    N: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    GATED: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BC: tl.constexpr,
):
    if EARLY:
        launch()
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BC + tl.arange(0, BC)
    there, out = channel < C, y + row * N * C + channel
    taken = tl.full([], N, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(N):
                tl.store(out + t * C, tl.zeros([BC], tl.float32).to(y.dtype.element_ty), mask=there)
            return
    at = tl.load(start + row * start_stride)
    ring += row * C * S
    new += row * N * new_stride
    held = known(ring, weight, bias, channel, there, at, T, S, BIAS)
    if EARLY:
        wait()
    by: tl.constexpr = 2 * C if GATED else 0
    for first in range(0, N, M):
        x, x_in = convolve(new, new_stride, held, channel, there, first, N, M, T, BIAS, SILU, by)
        for m in tl.static_range(M):
            t, value = first + m, x[m]
            if GATED:
                value *= tl.load(new + t * new_stride + C + channel, mask=there, other=0.0).to(tl.float32)
            tl.store(out + t * C, value.to(y.dtype.element_ty), mask=there)
            real = there & (tl.broadcast_to(taken, there.shape) > t)
            tl.store(ring + channel * S + (at + t) % S, x_in[m].to(ring.dtype.element_ty), mask=real)


def step(
    new: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ring: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    silu: bool = False,
    gated: bool = False,
) -> Tensor:
    """Take in N tokens of each row, `ring` (B, C, S) in place; outputs (B N, C), as `new`.

    new: (B N, C), with any stride between tokens; `gated`: a gate, the gate of the outputs and what is convolved, as
    one (B N, 3 C). weight (C, T), bias (C,). start: (B,) or (1,), where rows stand; count: (B,), 0..N, None for all:
    beyond it outputs are junk, and nothing is written. S must be at least T - 1 + N.
    """
    rows, channels, slots = ring.shape
    taps, tokens = weight.shape[-1], len(new) // rows
    assert slots >= taps - 1 + tokens and weight.is_contiguous() and ring.is_contiguous()
    assert new.stride(-1) == 1 and new.shape[1] == channels * (3 if gated else 1)
    y = torch.empty(len(new), channels, dtype=new.dtype, device=new.device)
    _step[(rows, triton.cdiv(channels, 128))](
        new,
        weight,
        new if bias is None else bias,
        ring,
        start,
        start if count is None else count,
        y,
        new.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        N=tokens,
        M=at_once(tokens),
        C=channels,
        T=taps,
        S=slots,
        BIAS=bias is not None,
        SILU=silu,
        GATED=gated,
        COUNTED=count is not None,
        BC=128,
        num_warps=2,
        **early(new.device),
    )
    return y
