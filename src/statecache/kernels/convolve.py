"""What kernels share: a causal convolution over a ring, for the few tokens of a row.

C channels, T tokens, S slots of the ring, K width of the convolution. The entry of position p lies in slot p % S.
"""

import triton
import triton.language as tl

AT_ONCE = 5


def at_once(tokens: int) -> int:
    """How many tokens of a round a kernel takes at once: more take long to compile, since each is written out."""
    return next(n for n in range(AT_ONCE, 0, -1) if tokens % n == 0)


@triton.jit
def known(ring, weight, bias, channel, there, at, K: tl.constexpr, S: tl.constexpr, BIAS: tl.constexpr):
    """What a convolution needs that no kernel in front has written: K - 1 inputs before `at`, K taps, and the bias.

    ring: (C, S) of a row that stands at `at`; weight: (C, K); bias: (C,). `there`: which channels exist. All float32.
    """
    found = ()
    for n in tl.static_range(K - 1):
        position = at - (K - 1) + n
        held = tl.broadcast_to(position, channel.shape) >= 0  # before the first token are zeros
        x = tl.load(ring + channel * S + (position + S) % S, mask=there & held, other=0.0)
        found += (x.to(tl.float32),)
    for tap in tl.static_range(K):
        found += (tl.load(weight + channel * K + tap, mask=there, other=0.0).to(tl.float32),)
    if BIAS:
        found += (tl.load(bias + channel, mask=there, other=0.0).to(tl.float32),)
    return found


@triton.jit
def convolve(
    new,
    stride,
    held,
    channel,
    there,
    first,
    T: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BY: tl.constexpr = 0,
):
    """Convolve M of a row's T new tokens, from the `first` on, in these channels: M outputs and M inputs, float32.

    new: the tokens' inputs (T, C), `stride` apart; held: what `known` gives. `there`: which channels exist. BY: how
    far behind an input lies what multiplies it; 0: nothing does. All is read before anything is computed.
    """
    seen = ()
    for n in tl.static_range(K - 1):
        x = held[n]
        if M < T:
            before = tl.zeros(channel.shape, tl.int32) + (first - (K - 1) + n)
            for later in tl.static_range(n + 1, K - 1):
                x = tl.where(before == later - (K - 1), held[later], x)
            x = tl.where(before < 0, x, _input(new + before * stride + channel, there & (before >= 0), BY))
        seen += (x,)
    for m in tl.static_range(M):
        seen += (_input(new + (first + m) * stride + channel, there, BY),)
    outs, ins = (), ()
    for m in tl.static_range(M):
        y = seen[m + K - 1] * held[2 * K - 2]
        for tap in tl.static_range(K - 1):
            y += seen[m + tap] * held[K - 1 + tap]
        if BIAS:
            y += held[2 * K - 1]
        if SILU:
            y = silu(y)
        outs += (y,)
        ins += (seen[m + K - 1],)
    return outs, ins


@triton.jit
def _input(place, there, BY: tl.constexpr):
    x = tl.load(place, mask=there, other=0.0).to(tl.float32)
    if BY:
        x *= tl.load(place + BY, mask=there, other=0.0).to(tl.float32)
        x = x.to(place.dtype.element_ty).to(tl.float32)  # as the ring has it, so that a round is its steps
    return x


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
