"""What kernels share: a causal convolution over a ring, for one token of one row or the few of a round.

C channels, T tokens, S slots of the ring, K width of the convolution. The entry of position p lies in slot p % S.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
    new, stride, ring, weight, bias, channel, there, at, t, K: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr
):
    """Convolve the t-th new token of a row that stands at `at` in these channels: outputs and inputs, float32.

    new: the tokens' inputs (T, C), `stride` apart; ring: (C, S) of the row, which has those before `at`; weight:
    (C, K); bias: (C,). `there`: which channels exist.
    """
    x = tl.load(new + t * stride + channel, mask=there, other=0.0).to(tl.float32)
    y = x * tl.load(weight + channel * K + K - 1, mask=there, other=0.0).to(tl.float32)
    for tap in tl.static_range(K - 1):
        back = t - (K - 1) + tap  # of the new tokens; before them below 0
        position = at + back
        held = tl.broadcast_to(position, channel.shape) >= 0  # before the first token are zeros
        if back < 0:
            past = tl.load(ring + channel * S + (position + S) % S, mask=there & held, other=0.0).to(tl.float32)
        else:
            past = tl.load(new + back * stride + channel, mask=there, other=0.0).to(tl.float32)
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
