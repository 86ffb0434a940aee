"""What kernels share: a causal convolution over a ring, for the few tokens of a row.

C channels, T tokens, S slots of the ring, K width of the convolution. The entry of position p lies in slot p % S.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
    new,
    stride,
    ring,
    weight,
    bias,
    channel,
    there,
    at,
    T: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BY: tl.constexpr = 0,
):
    """Convolve the T new tokens of a row that stands at `at` in these channels: T outputs and T inputs, float32.

    new: the tokens' inputs (T, C), `stride` apart; ring: (C, S) of the row, which has those before `at`; weight:
    (C, K); bias: (C,). `there`: which channels exist. BY: how far behind an input lies what multiplies it; 0: nothing
    does. All is read before anything is computed.
    """
    seen, taps = (), ()
    for n in tl.static_range(K - 1):
        position = at - (K - 1) + n
        held = tl.broadcast_to(position, channel.shape) >= 0  # before the first token are zeros
        x = tl.load(ring + channel * S + (position + S) % S, mask=there & held, other=0.0)
        seen += (x.to(tl.float32),)
    for t in tl.static_range(T):
        x = tl.load(new + t * stride + channel, mask=there, other=0.0).to(tl.float32)
        if BY:
            x *= tl.load(new + t * stride + BY + channel, mask=there, other=0.0).to(tl.float32)
            x = x.to(new.dtype.element_ty).to(tl.float32)  # as the ring has it, so that a round is its steps
        seen += (x,)
    for tap in tl.static_range(K):
        taps += (tl.load(weight + channel * K + tap, mask=there, other=0.0).to(tl.float32),)
    if BIAS:
        late = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    outs, ins = (), ()
    for t in tl.static_range(T):
        y = seen[t + K - 1] * taps[K - 1]
        for tap in tl.static_range(K - 1):
            y += seen[t + tap] * taps[tap]
        if BIAS:
            y += late
        if SILU:
            y = silu(y)
        outs += (y,)
        ins += (seen[t + K - 1],)
    return outs, ins


@triton.jit
def silu(x):
    """X times its logistic function."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to the last places, however small: x itself above 20, as torch has it."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e  # rounded; the logarithm is of that, and e / (u - 1) makes up for it
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)
