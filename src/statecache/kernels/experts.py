"""Experts of few tokens: one launch chooses them, and two read each token's own where they lie.

Programs that read the same part of several experts follow one another, so that tokens which share an expert find it in
the second cache. For many tokens of few experts the library's grouped products read less.

T tokens, K experts of each out of N, E channels, D inside an expert.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import silu
from statecache.kernels.early import early, launch, wait
from statecache.kernels.norms import unit_of
from statecache.kernels.rehearsal import Kernel

CELLS = 2048  # of a program's tile
INPUTS = 1024  # of a tile, at most
PART = 256  # of what is inside the shared unit, for a program
TOKENS = 2  # of an expert, on average, up to which it is worth reading it for each


@Kernel
@triton.jit
def _route(
    logits,
    bias,
    index,
    share,
    shared,
    gate,
    inside,
    stride,
    shared_stride,
    gate_stride,
    scale,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMED: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    OPENED: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        launch()
        wait()
    if part > 0:
        unit_of(shared, gate, inside, token, part - 1, shared_stride, gate_stride, D, GATED, OPENED, BD)
    else:
        n, place = tl.arange(0, BN), tl.arange(0, BK)
        real = n < N
        seen = tl.load(logits + token * stride + n, mask=real, other=-float("inf")).to(tl.float32)
        if SOFTMAX:
            score = tl.exp(seen - tl.max(seen, 0))
            score /= tl.sum(score, 0)
        else:
            score = 1.0 / (1.0 + tl.exp(-seen))
        by = score
        if BIASED:
            by += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)
        by = tl.where(real & (by == by), by, -float("inf"))  # no number, as in rows at rest, is no place
        chosen = tl.zeros([BK], tl.int64)
        shares = tl.zeros([BK], tl.float32)
        for k in range(K):
            best = tl.argmax(by, 0)
            mine = tl.sum(tl.where(n == best, score, 0.0), 0)
            chosen = tl.where(place == k, best, chosen)
            shares = tl.where(place == k, mine, shares)
            by = tl.where(n == best, -float("inf"), by)
        if NORMED:
            shares /= tl.sum(shares, 0) + eps
        tl.store(index + token * K + place, chosen, mask=place < K)
        tl.store(share + token * K + place, shares * scale, mask=place < K)


@dataclass(frozen=True)
class Shared:
    """A unit that every token goes through: (T, 2 D) of a gated one, else (T, D); a gate (T, 1) may multiply it.

    Rows may have any stride.
    """

    x: Tensor
    gated: bool
    gate: Tensor | None = None


def route(
    logits: Tensor,
    chosen: int,
    *,
    softmax: bool,
    normed: bool,
    eps: float = 0.0,
    scale: float = 1.0,
    bias: Tensor | None = None,
    shared: Shared | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of each token, best first, and their shares: both (T, chosen), int64 and float32.

    logits (T, N), whose rows may have any stride: scores are their softmax over the experts, or their logistic
    function. bias (N,) is added to scores where experts are compared alone. normed: shares are divided by `eps` and
    their sum. They are multiplied by `scale`. Of equal scores the first expert's is the best. The third is what is
    inside the unit of `shared` (T, D), by the logistic function of its gate; none has a D of 0.
    """
    tokens, count = logits.shape
    assert logits.stride(1) == 1 and chosen <= count and (bias is None or bias.is_contiguous())
    index = torch.empty(tokens, chosen, dtype=torch.int64, device=logits.device)
    share = torch.empty(tokens, chosen, dtype=torch.float32, device=logits.device)
    x, gate = (logits, None) if shared is None else (shared.x, shared.gate)
    size = 0 if shared is None else x.shape[1] // (1 + shared.gated)
    inside = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    _route[(tokens, 1 + triton.cdiv(size, PART))](
        logits,
        logits if bias is None else bias,
        index,
        share,
        x,
        x if gate is None else gate,
        inside,
        logits.stride(0),
        x.stride(0),
        0 if gate is None else gate.stride(0),
        scale,
        eps,
        N=count,
        K=chosen,
        D=size,
        SOFTMAX=softmax,
        NORMED=normed,
        BIASED=bias is not None,
        GATED=shared is not None and shared.gated,
        OPENED=gate is not None,
        BN=triton.next_power_of_2(count),
        BK=triton.next_power_of_2(chosen),
        BD=PART,
        num_warps=1 if count <= 256 else 4,
        **early(logits.device),
    )
    return index, share, inside


@Kernel
@triton.jit
def _inside(
    x,
    norm,
    weight,
    index,
    out,
    x_stride,
    eps,
    offset,
    NORMED: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
):
    pair, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BO + tl.arange(0, BO)
    if EARLY:
        launch()
        wait()
    weight += tl.load(index + pair).to(tl.int64) * (2 * D * E if GATED else D * E)
    x += pair // K * x_stride
    real = o < D
    total = tl.zeros([BO, BE], tl.float32)
    through = tl.zeros([BO, BE], tl.float32)
    squares = tl.zeros([BE], tl.float32)
    for first in tl.static_range(0, E, BE):
        e = first + tl.arange(0, BE)
        there = e < E
        cell, both = o[:, None] * E + e[None, :], real[:, None] & there[None, :]
        seen = tl.load(x + e, mask=there, other=0.0).to(tl.float32)
        if NORMED:
            squares += seen * seen
            seen *= tl.load(norm + e, mask=there, other=0.0).to(tl.float32) + offset
        total += tl.load(weight + cell, mask=both, other=0.0).to(tl.float32) * seen[None, :]
        if GATED:
            through += tl.load(weight + D * E + cell, mask=both, other=0.0).to(tl.float32) * seen[None, :]
    y, z = tl.sum(total, 1), tl.sum(through, 1)
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / E + eps)
        y, z = y * scale, z * scale
    if GATED:
        y = silu(y) * z
    else:
        y = tl.maximum(y, 0.0)
        y *= y
    tl.store(out + pair * D + o, y.to(out.dtype.element_ty), mask=real)


@Kernel
@triton.jit
def _outside(
    inside,
    weight,
    index,
    share,
    residual,
    out,
    residual_stride,
    scale,
    ADDS: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    EARLY: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
):
    token, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BO + tl.arange(0, BO)
    if EARLY:
        launch()
        wait()
    real = o < E
    total = tl.zeros([BO, BI], tl.float32)
    for k in range(token * K, token * K + K):
        expert, by = weight + tl.load(index + k).to(tl.int64) * (E * D), tl.load(share + k).to(tl.float32)
        for first in tl.static_range(0, D, BI):
            i = first + tl.arange(0, BI)
            there = i < D
            cell, both = o[:, None] * D + i[None, :], real[:, None] & there[None, :]
            seen = by * tl.load(inside + k * D + i, mask=there, other=0.0).to(tl.float32)
            total += tl.load(expert + cell, mask=both, other=0.0).to(tl.float32) * seen[None, :]
    y = tl.sum(total, 1) * scale
    if ADDS:
        y += tl.load(residual + token * residual_stride + o, mask=real, other=0.0).to(tl.float32)
    tl.store(out + token * E + o, y.to(out.dtype.element_ty), mask=real)


def crowded(index: Tensor, up: Tensor) -> bool:
    """Whether tokens choose so many experts (T, K) of these that a product by groups, reading each once, is faster."""
    return index.numel() > TOKENS * len(up)


def experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    index: Tensor,
    share: Tensor,
    *,
    gated: bool,
    norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """What a token's experts give, each by its share, summed up: x (T, E) to (T, E), in the dtype of `residual` or x.

    index, share (T, K): the experts of each token, 0..N-1, and what their outputs are multiplied by. up: (N, 2 D, E),
    of gated units, whose inside is silu(x @ first half) (x @ second half); else (N, D, E), and it is the square of what
    is positive. down (N, E, D). norm (E,): the RMS norm of x takes its place, by norm + offset. The sum times `scale`
    is added to `residual` (T, E). Rows of x and residual may have any stride.
    """
    tokens, width = x.shape
    chosen, size = index.shape[1], down.shape[2]
    assert index.shape == share.shape == (tokens, chosen) and down.shape[:2] == (len(up), width)
    assert up.shape[1:] == ((2 if gated else 1) * size, width) and x.stride(1) == 1
    assert up.is_contiguous() and down.is_contiguous()
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    index, share = index.contiguous(), share.contiguous()
    inside = torch.empty(tokens * chosen, size, dtype=up.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=(x if residual is None else residual).dtype, device=x.device)
    inputs, through = (min(INPUTS, triton.next_power_of_2(n)) for n in (width, size))
    given = {"K": chosen, "E": width, "D": size, "num_warps": 4, **early(x.device)}
    some = CELLS // inputs
    _inside[(tokens * chosen, triton.cdiv(size, some))](
        x,
        x if norm is None else norm,
        up,
        index,
        inside,
        x.stride(0),
        eps,
        offset,
        NORMED=norm is not None,
        GATED=gated,
        BO=some,
        BE=inputs,
        **given,
    )
    some = CELLS // through
    _outside[(tokens, triton.cdiv(width, some))](
        inside,
        down,
        index,
        share,
        x if residual is None else residual,
        out,
        0 if residual is None else residual.stride(0),
        scale,
        ADDS=residual is not None,
        BO=some,
        BI=through,
        **given,
    )
    return out
