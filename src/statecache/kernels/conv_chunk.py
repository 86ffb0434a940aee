"""A causal depthwise convolution of many tokens in one launch: see `statecache.ops.conv`.

B rows, T new tokens, C channels, W width. Sums are in float32 and rounded once, after the activation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import silu as activated
from statecache.kernels.rehearsal import Kernel
from statecache.kernels.tokens import along

TOKENS, CHANNELS = 16, 128  # of a program


@Kernel
@triton.jit(do_not_specialize=("T",))
def _chunk(
    x,
    weight,
    bias,
    past,
    y,
    x_row,
    x_token,
    weight_channel,
    past_row,
    past_channel,
    past_token,
    T,
    C,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    BEGUN: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    there = channel < C
    inside = (token < T)[:, None] & there[None, :]
    x += row * x_row + channel[None, :]
    past += row * past_row + channel[None, :] * past_channel
    total = tl.zeros([BT, BC], tl.float32)
    for tap in tl.static_range(W):
        place = token - (W - 1) + tap
        new = tl.load(x + place[:, None] * x_token, mask=inside & (place >= 0)[:, None], other=0.0).to(tl.float32)
        if BEGUN:
            old = inside & (place < 0)[:, None]
            new += tl.load(past + (place + W - 1)[:, None] * past_token, mask=old, other=0.0).to(tl.float32)
        total += new * tl.load(weight + channel * weight_channel + tap, mask=there, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = activated(total)
    out = y + (row * T + token[:, None]) * C + channel[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=inside)


def chunk(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """Convolve T tokens, as `statecache.ops.conv.chunk` with weights (C, W): (B, T, C)."""
    x, weight = along(x), along(weight)
    rows, tokens, channels = x.shape
    y = x.new_empty((rows, tokens, channels))
    with torch.cuda.device_of(x):
        _chunk[(triton.cdiv(tokens, TOKENS), triton.cdiv(channels, CHANNELS), rows)](
            x,
            weight,
            x if bias is None else bias,
            x if past is None else past,
            y,
            x.stride(0),
            x.stride(1),
            weight.stride(0),
            *((0, 0, 0) if past is None else past.stride()),
            tokens,
            channels,
            W=weight.shape[-1],
            BIAS=bias is not None,
            BEGUN=past is not None,
            SILU=silu,
            BT=TOKENS,
            BC=CHANNELS,
            num_warps=4,
        )
    return y
