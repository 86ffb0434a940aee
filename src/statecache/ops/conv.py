"""Causal depthwise convolution over time: y_t = bias + sum_w weight_w x_(t-W+1+w), silu after it if asked.

The short convolution before a Mamba scan (Gu & Dao 2023, arXiv:2312.00752) and before the delta rule.
Its state is its last W-1 inputs, (B, C, W-1), time last; before the first token they are zeros.

Letters: B rows, T new tokens, C channels, W width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "window": "bitwise", "chunk": "reassociated"}


@chunks.uncast
def chunk(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool) -> Tensor:
    """Convolve T tokens: x (B, T, C), weight (C, W), bias (C), past (B, C, W-1) or None for zeros; (B, T, C)."""
    if not x.shape[1]:
        return x.clone()
    if past is None:
        past = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    wide = torch.cat([past.mT.to(x.dtype), x], 1)  # (B, W-1+T, C)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():
        # fuses to one kernel: 2 to 4 times faster than a convolution call, whose layout the compiler changes
        y = sum((wide[:, w : w + x.shape[1]] * weight[:, w] for w in range(weight.shape[1])), x.new_zeros(()))
        y = y if bias is None else y + bias
    else:
        # An image of height 1, its channels last in memory: on a processor 25 times faster than conv1d (T = 512,
        # C = 2048), which wants time last; W products and sums win at T = 2 alone, and in bfloat16 they round W times.
        y = F.conv2d(wide.mT.unsqueeze(2), weight[:, None, None], bias, groups=x.shape[2]).squeeze(2).mT
    return F.silu(y) if silu else y


def step(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Convolve one token: x (B, 1, C), past (B, C, W-1) of its dtype; y (B, 1, C), and past with x (B, W, C)."""
    # time before channels: a sum over four neighbours is several times slower on a processor
    wide = torch.cat([past.mT, x], 1)
    y = (wide * weight.mT.to(x.dtype)).sum(1, keepdim=True, dtype=x.dtype)  # said: else autocast on CUDA widens it
    if bias is not None:
        y = y + bias.to(x.dtype)
    return F.silu(y) if silu else y, wide


def window(x: Tensor, past: Tensor | None, width: int, count: Tensor | None = None) -> Tensor:
    """The last W-1 inputs, (B, C, W-1), after the first `count` (B,) of x (B, T, C), None for all; W is `width`."""
    rows, tokens, channels = x.shape
    before = width - 1
    if past is None:
        past = x.new_zeros(rows, channels, before)
    if count is None:
        if tokens >= before:
            return x[:, tokens - before :].transpose(1, 2).to(past.dtype).contiguous()
        return torch.cat([past[..., tokens:], x.transpose(1, 2).to(past.dtype)], -1)
    if not tokens:
        return past.clone()
    place = count[:, None] + torch.arange(before, device=x.device) - before  # (B, W-1), negative in the past
    new = x[torch.arange(rows, device=x.device)[:, None], place.clamp(min=0)].transpose(1, 2)
    old = past.gather(2, (place + before).clamp(max=max(before - 1, 0))[:, None].expand(-1, channels, -1))
    return torch.where((place < 0)[:, None], old, new.to(past.dtype))
