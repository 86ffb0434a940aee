"""What kernels share: a causal convolution over a ring, for one token of one row.

C channels, S slots of the ring, K width of the convolution. The entry of position p lies in slot p % S.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(new, ring, weight, bias, channel, there, at, K: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr):
    """Convolve the token at position `at` in these channels: the outputs and the inputs, float32.

    new: its inputs (C,); ring: (C, S) of the row; weight: (C, K); bias: (C,). `there`: which channels exist.
    """
    x = tl.load(new + channel, mask=there, other=0.0).to(tl.float32)
    y = x * tl.load(weight + channel * K + K - 1, mask=there, other=0.0).to(tl.float32)
    for tap in tl.static_range(K - 1):
        position = at - (K - 1) + tap
        held = tl.broadcast_to(position, channel.shape) >= 0  # before the first token are zeros
        past = tl.load(ring + channel * S + (position + S) % S, mask=there & held, other=0.0).to(tl.float32)
        y += past * tl.load(weight + channel * K + tap, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    return y, x


@triton.jit
def silu(x):
    """X times its logistic function."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as torch computes it: x itself above 20."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
