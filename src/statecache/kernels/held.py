"""A linear layer for 2 to 8 rows, its weights multiplied where they arrive, in registers. See `kernels.linear`.

Each program has asked for much of its weights before the kernel in front of it ends, as those of one row do; what goes
through shared memory, as a tensor core's operands else, can only be asked for then.

E inputs; W warps of a program, each of which has M times 16 outputs, and every W-th 32 of the inputs.
"""

import triton
import triton.language as tl

from statecache.kernels.early import launch, wait
from statecache.kernels.mma import load16, load16_once, mma, numbers, packed
from statecache.kernels.rehearsal import Kernel
from statecache.kernels.weights import whose

ROWS = 8  # which a product of a warp has


@Kernel
@triton.jit
def multiply(
    x,
    norm,
    parts,
    weight,
    weight1,
    weight2,
    weight3,
    residual,
    out,
    behind,
    weighted,
    sums,
    rows,
    size,
    size1,
    size2,
    size3,
    x_stride,
    residual_stride,
    eps,
    offset,
    scale,
    behind_offset,
    E: tl.constexpr,
    UNIT: tl.constexpr,
    NORMED: tl.constexpr,
    ADDS: tl.constexpr,
    HANDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    AHEAD: tl.constexpr,
):
    if EARLY:
        launch()
    width = size + size1 + size2 + size3  # of all outputs of a row
    BO: tl.constexpr = 16 if UNIT else 16 * M
    tile, out, weight, size = whose(
        tl.program_id(0), out, weight, weight1, weight2, weight3, size, size1, size2, size3, WEIGHTS, BO
    )
    dtype: tl.constexpr = weight.dtype.element_ty
    thread = tl.arange(0, 32 * W)
    g, column = thread % 32 // 4, thread // 32 * 32 + thread % 4 * 8
    places, words = (), ()
    for m in tl.static_range(M):
        for half in tl.static_range(2):
            o = tile * BO + (0 if UNIT else 16 * m) + 8 * half + g
            at = tl.minimum(o, size - 1).to(tl.int64) * E + column
            if UNIT and m == 1:
                places += (weight1 + at,)
            else:
                places += (weight + at,)
    for c in tl.static_range(AHEAD):
        for place in tl.static_range(2 * M):
            words += load16_once(places[place] + c * 32 * W)
    eight, four, scales = tl.arange(0, 8), tl.arange(0, 4), ()
    if HANDS:
        for half in tl.static_range(2 * M):
            o = tile * BO + 8 * half + eight
            scales += (tl.load(behind + o, mask=o < size, other=0.0).to(tl.float32) + behind_offset,)
    if EARLY:
        wait()
    if PARTS:  # what the sums wait for is asked for before them
        part = tl.arange(0, BS)
        there = (eight < rows)[:, None] & (part < PARTS)[None, :]
        before = tl.load(parts + eight[:, None] * PARTS + part[None, :], mask=there, other=0.0)
    added = ()
    if ADDS:
        for m in tl.static_range(M):
            for k in tl.static_range(4):
                o, b = tile * BO + 16 * m + 8 * (k // 2) + eight, 2 * four + k % 2
                both = (o < size)[:, None] & (b < rows)[None, :]
                added += (tl.load(residual + b[None, :] * residual_stride + o[:, None], mask=both, other=0.0),)
    x += tl.minimum(g, rows - 1) * x_stride + column
    norm += column
    totals, squares = (), tl.zeros([32 * W], tl.float32)
    for _ in tl.static_range(8 * M):
        totals += (tl.zeros([32 * W], tl.float32),)
    for c in tl.static_range(E // (32 * W)):
        if c + AHEAD < E // (32 * W):
            for place in tl.static_range(2 * M):
                words += load16_once(places[place] + (c + AHEAD) * 32 * W)
        if NORMED or x.dtype.element_ty != dtype:
            row, seen = numbers(x + c * 32 * W), ()
            if NORMED:
                unscaled, by, row = row, numbers(norm + c * 32 * W), ()
                for k in tl.static_range(8):
                    squares += unscaled[k] * unscaled[k]
                    row += (unscaled[k] * (by[k] + offset),)
            for k in tl.static_range(4):
                seen += (packed(row[2 * k], row[2 * k + 1], dtype),)
        else:
            seen = load16(x + c * 32 * W)
        were, totals = totals, ()
        for k in tl.static_range(2):  # sums of their own, since each waits for the one before
            for m in tl.static_range(M):
                totals += mma(
                    words[8 * (c * M + m) + 2 * k],
                    words[8 * (c * M + m) + 2 * k + 4],
                    words[8 * (c * M + m) + 2 * k + 1],
                    words[8 * (c * M + m) + 2 * k + 5],
                    seen[2 * k],
                    seen[2 * k + 1],
                    were[4 * (k * M + m)],
                    were[4 * (k * M + m) + 1],
                    were[4 * (k * M + m) + 2],
                    were[4 * (k * M + m) + 3],
                    dtype,
                )
    factor = tl.full([8], scale, tl.float32)
    if PARTS:
        factor *= tl.rsqrt(tl.sum(before, 1) / E + eps)
    if NORMED:
        total = tl.sum(tl.sum(tl.reshape(squares, [W, 8, 4]), 0), 1)
        factor *= tl.rsqrt(total / E + eps)
    factors = tl.split(tl.reshape(factor, [4, 2]))
    squared = (tl.zeros([4], tl.float32), tl.zeros([4], tl.float32))  # of even rows, and of odd ones
    for m in tl.static_range(1 if UNIT else M):
        ys = _sums(totals, 4 * m, M, W)
        if UNIT:
            through = _sums(totals, 4, M, W)
        for k in tl.static_range(4):
            o, b = tile * BO + 16 * m + 8 * (k // 2) + eight, 2 * four + k % 2
            both = (o < size)[:, None] & (b < rows)[None, :]
            y = ys[k] * factors[k % 2][None, :]
            if UNIT:
                y *= through[k] * factors[k % 2][None, :] / (1.0 + tl.exp(-y))
            if ADDS:
                y += added[4 * m + k].to(tl.float32)
            spot, y = b[None, :] * width + o[:, None], y.to(out.dtype.element_ty)
            tl.store(out + spot, y, mask=both)
            if HANDS:
                y = y.to(tl.float32)
                to = (y * scales[2 * m + k // 2][:, None]).to(weighted.dtype.element_ty)
                tl.store(weighted + spot, to, mask=both)
                here = tl.sum(tl.where(both, y * y, 0.0), 0)
                squared = (squared[1], squared[0] + here)  # rows take turns
    if HANDS:
        for odd in tl.static_range(2):
            row = 2 * four + odd
            tl.store(sums + row * tl.num_programs(0) + tile, squared[odd], mask=row < rows)


@triton.jit
def _sums(totals, at: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """The sums over warps of what their threads have in both of their totals: four (8, 4), by g and t."""
    both = ()
    for k in tl.static_range(4):
        both += (tl.reshape(totals[at + k] + totals[4 * M + at + k], [W, 8, 4]),)
    return tl.reduce((both[0], both[1], both[2], both[3]), 0, _add)  # type: ignore[misc]


@triton.jit
def _add(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3
