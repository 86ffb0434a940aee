"""Causal depthwise convolution over time: y_t = bias + sum_w weight_w x_(t-W+1+w), silu after it if asked.

The short convolution before a Mamba scan (Gu & Dao 2023, arXiv:2312.00752) and before the delta rule.
Its state is its last W-1 inputs, (B, C, W-1), time last; before the first token they are zeros.

`heads`: the weight (C, P, V) and bias (C) of a second convolution that follows, over the P channels of each head, as in
compressed convolutional attention (Figliolia et al., arXiv:2510.04476). One state serves both: the last W+V-2 inputs of
the first, whose outputs before the first token are its bias.

Letters: B rows, T new tokens, C channels, W width, H heads of P channels, V width of the second convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "window": "bitwise", "chunk": "reassociated"}

FEW = 8  # tokens that a product by head takes up quicker than a convolution, on a processor
FEW_ROWS = 8  # that an exported step convolves one by one

Heads = tuple[Tensor, Tensor | None]


def span(weight: Tensor, heads: Heads | None = None) -> int:
    """How many inputs an output depends on: W, or W+V-1."""
    return weight.shape[-1] if heads is None else weight.shape[-1] + heads[0].shape[2] - 1


@chunks.uncast
def chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool, heads: Heads | None = None
) -> Tensor:
    """Convolve T tokens: x (B, T, C), weight (C, W), bias (C), past (B, C, W-1) or None for zeros; (B, T, C).

    Each token may have weights of its own: (B, T, C, W).
    """
    if not x.shape[1]:
        return x.clone()
    if past is None:
        past = x.new_zeros(x.shape[0], x.shape[2], span(weight, heads) - 1)
    wide = torch.cat([past.mT.to(x.dtype), x], 1)  # (B, W-1+T, C)
    tokens = wide.shape[1] - weight.shape[-1] + 1
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.dim() > 2 or torch.compiler.is_compiling():
        # fuses to one kernel: 2 to 4 times faster than a convolution call, whose layout the compiler changes
        y = sum((wide[:, w : w + tokens] * weight[..., w] for w in range(weight.shape[-1])), x.new_zeros(()))
        y = y if bias is None else y + bias
    else:
        # An image of height 1, its channels last in memory: on a processor 25 times faster than conv1d (T = 512,
        # C = 2048), which wants time last; W products and sums win at T = 2 alone, and in bfloat16 they round W times.
        y = F.conv2d(wide.mT.unsqueeze(2), weight[:, None, None], bias, groups=x.shape[2]).squeeze(2).mT
    if heads is not None:
        y = _by_head(y, *heads)
    return F.silu(y) if silu else y


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, silu: bool, heads: Heads | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve one token: x (B, 1, C), past (B, C, W-1) of its dtype; y (B, 1, C), and past with x (B, W, C).

    The weight is (C, W), or (B, 1, C, W).
    """
    # time before channels: a sum over four neighbours is several times slower on a processor
    wide = torch.cat([past.mT, x], 1)
    weight = weight.squeeze(1) if weight.dim() > 2 else weight
    if heads is None and torch.compiler.is_exporting():  # each read where it lies: outputs wait for no copy
        taps = weight.to(x.dtype).unbind(-1)
        if weight.dim() == 2 and 1 < len(x) <= FEW_ROWS:  # of all at once the compiler makes a tile for one thread
            y = torch.cat([_sum(past[row : row + 1], x[row : row + 1], taps) for row in range(len(x))])
        else:
            y = _sum(past, x, taps)
    elif heads is None:
        y = (wide * weight.mT.to(x.dtype)).sum(1, keepdim=True, dtype=x.dtype)  # said: else autocast on CUDA widens it
    else:
        y = (wide.unfold(1, weight.shape[-1], 1) * weight.to(x.dtype)).sum(-1, dtype=x.dtype)  # (B, V, C)
    if bias is not None:
        y = y + bias.to(x.dtype)
    if heads is not None:
        y = _by_head(y, *heads)
    return F.silu(y) if silu else y, wide


def _sum(past: Tensor, x: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """Products with taps, each (C,) or (B, C), summed up: x (B, 1, C), past (B, C, W-1); (B, 1, C)."""
    y: Tensor = sum((past[..., w] * tap for w, tap in enumerate(taps[:-1])), x[:, 0] * taps[-1])
    return y.unsqueeze(1)


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


@chunks.uncast
def _by_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The second convolution: x (B, V-1+T, C), weight (C, P, V), bias (C); (B, T, C)."""
    channels, size, taps = weight.shape
    weight, bias = weight.to(x.dtype), x.new_zeros(channels) if bias is None else bias.to(x.dtype)
    heads, tokens = channels // size, x.shape[1] - taps + 1
    if tokens > FEW and not torch.compiler.is_compiling():
        return F.conv2d(x.mT.unsqueeze(2), weight.unsqueeze(2), bias, groups=heads).squeeze(2).mT
    seen = torch.unflatten(x, -1, (heads, size)).unfold(1, taps, 1)  # (B, T, H, P, V)
    seen = seen.permute(2, 0, 1, 3, 4).reshape(heads, len(x) * tokens, size * taps)
    y = torch.baddbmm(bias.view(heads, 1, size), seen, weight.reshape(heads, size, size * taps).mT)
    return y.view(heads, len(x), tokens, size).permute(1, 2, 0, 3).flatten(2)
