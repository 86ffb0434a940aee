"""A linear layer for few rows, with what stands before and after it: norm; gated unit, scale and residual.

Every weight is read once, whatever the number of rows. The sum of squares of an RMS norm is taken in the same loop as
the product, which it scales at the end, so that a norm costs no pass of its own.

B rows, E inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.early import early, launch, wait

FEW_ROWS = 16  # for which a norm is worth computing in every program
MOST_ROWS = 64


@dataclass(frozen=True)
class Tile:
    """Outputs and inputs of a program's tile, its warps, and how many of its loads are under way at once."""

    outputs: int
    inputs: int
    warps: int
    stages: int = 3


# by rows, up to so many, and outputs, up to so many: benchmarks/tune_linear.py, on an H100
TILES = {
    1: ((3072, Tile(4, 2048, 4)), (1 << 62, Tile(4, 1024, 4))),
    16: (
        (3072, Tile(16, 512, 2, 5)),
        (4096, Tile(32, 256, 4, 4)),
        (6144, Tile(32, 128, 2, 5)),
        (1 << 62, Tile(64, 128, 2, 4)),
    ),
    64: ((3072, Tile(16, 256, 4, 4)), (4096, Tile(32, 128, 4, 4)), (1 << 62, Tile(64, 128, 4))),
}


@triton.jit
def _linear(
    x,
    norm,
    parts,
    weight,
    weight1,
    weight2,
    weight3,
    residual,
    out,
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
    E: tl.constexpr,
    UNIT: tl.constexpr,
    NORMED: tl.constexpr,
    ADDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
):
    if EARLY:
        launch()
    tile_of = tl.program_id(0)
    width = size + size1 + size2 + size3  # of all outputs of a row
    if WEIGHTS > 1:  # the tiles of one weight after those of another; outputs side by side
        tiles = tl.cdiv(size, BO)
        if tile_of >= tiles:
            tile_of -= tiles
            out += size
            weight = weight1
            size = size1
            if WEIGHTS > 2:
                tiles = tl.cdiv(size1, BO)
                if tile_of >= tiles:
                    tile_of -= tiles
                    out += size1
                    weight = weight2
                    size = size2
                    if WEIGHTS > 3:
                        tiles = tl.cdiv(size2, BO)
                        if tile_of >= tiles:
                            tile_of -= tiles
                            out += size2
                            weight = weight3
                            size = size3
    o = tile_of * BO + tl.arange(0, BO)
    real = o < size
    if BB == 1:
        total = tl.zeros([BO, BE], tl.float32)
        through = tl.zeros([BO, BE], tl.float32)
        squares = tl.zeros([BE], tl.float32)
        for first in tl.static_range(0, E, BE):
            e = first + tl.arange(0, BE)
            there = e < E
            cell, both = o[:, None].to(tl.int64) * E + e[None, :], real[:, None] & there[None, :]
            tile = tl.load(weight + cell, mask=both, other=0.0)
            if UNIT:
                other = tl.load(weight1 + cell, mask=both, other=0.0)
            if EARLY and first == 0:
                wait()
            seen = tl.load(x + e, mask=there, other=0.0).to(tl.float32)
            if NORMED:
                squares += seen * seen
                seen *= tl.load(norm + e, mask=there, other=0.0).to(tl.float32) + offset
            total += tile.to(tl.float32) * seen[None, :]
            if UNIT:
                through += other.to(tl.float32) * seen[None, :]
        y = tl.sum(total, 1)
        if PARTS:
            part = tl.arange(0, BS)
            squares = tl.load(parts + part, mask=part < PARTS, other=0.0)
        if NORMED or PARTS:
            scale *= tl.rsqrt(tl.sum(squares, 0) / E + eps)
        y *= scale
        if UNIT:
            y *= tl.sum(through, 1) * scale / (1.0 + tl.exp(-y))
        if ADDS:
            y += tl.load(residual + o, mask=real, other=0.0).to(tl.float32)
        tl.store(out + o, y.to(out.dtype.element_ty), mask=real)
    else:
        b = tl.arange(0, BB)
        used = b < rows
        if EARLY:
            wait()
        total = tl.zeros([BB, BO], tl.float32)
        through = tl.zeros([BB, BO], tl.float32)
        squares = tl.zeros([BB], tl.float32)
        for first in range(0, E, BE):
            e = first + tl.arange(0, BE)
            there = e < E
            cell, both = o[:, None].to(tl.int64) * E + e[None, :], real[:, None] & there[None, :]
            tile = tl.load(weight + cell, mask=both, other=0.0)
            if UNIT:
                other = tl.load(weight1 + cell, mask=both, other=0.0)
            seen = tl.load(x + b[:, None] * x_stride + e[None, :], mask=used[:, None] & there[None, :], other=0.0)
            if NORMED:
                seen = seen.to(tl.float32)
                squares += tl.sum(seen * seen, 1)
                seen *= (tl.load(norm + e, mask=there, other=0.0).to(tl.float32) + offset)[None, :]
            seen = seen.to(tile.dtype)
            total = tl.dot(seen, tl.trans(tile), total, input_precision="ieee")
            if UNIT:
                through = tl.dot(seen, tl.trans(other), through, input_precision="ieee")
        if PARTS:
            part = tl.arange(0, BS)
            there = used[:, None] & (part < PARTS)[None, :]
            squares = tl.sum(tl.load(parts + b[:, None] * PARTS + part[None, :], mask=there, other=0.0), 1)
        if NORMED or PARTS:
            total *= tl.rsqrt(squares / E + eps)[:, None]
            through *= tl.rsqrt(squares / E + eps)[:, None]
        total *= scale
        through *= scale
        both = used[:, None] & real[None, :]
        if UNIT:
            total *= through / (1.0 + tl.exp(-total))
        if ADDS:
            total += tl.load(residual + b[:, None] * residual_stride + o[None, :], mask=both, other=0.0).to(tl.float32)
        tl.store(out + b[:, None] * width + o[None, :], total.to(out.dtype.element_ty), mask=both)


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    squares: Tensor | None = None,
    unit: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply x (B, E) by `weight` (O, E), for at most 64 rows: (B, O), in `dtype`, that of `weight` if not given.

    Several weights, up to four, of one dtype, share the launch: their outputs lie side by side, without `residual`.

    norm (E,): the RMS norm of x takes its place, by norm + offset. squares (B, n) float32: x has been multiplied by the
    weight of its norm, and these are the squares of what it was before, summed up in n parts of each row. unit: two
    weights (O, E) are those of a gated unit, and give silu(x @ first) (x @ second) (B, O). The product times `scale` is
    added to `residual` (B, O). Rows of x and residual may have any stride.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    rows, inputs, outputs = len(x), weights[0].shape[1], [len(each) for each in weights]
    assert rows <= MOST_ROWS and x.shape[1] == inputs and x.stride(1) == 1
    assert len(weights) == 1 or (len(weights) <= 4 and residual is None)
    assert squares is None or (norm is None and len(squares) == rows and squares.is_contiguous())
    assert not unit or (len(weights) == 2 and outputs[0] == outputs[1])
    assert all(w.is_contiguous() and w.shape[1] == inputs and w.dtype == weights[0].dtype for w in weights)
    outputs = outputs[:1] if unit else outputs
    out = torch.empty(rows, sum(outputs), dtype=dtype or weights[0].dtype, device=x.device)
    if tile is None:
        few = next(n for n in TILES if rows <= n)
        tile = next(each for most, each in TILES[few] if sum(outputs) <= most)
    parts = 0 if squares is None else squares.shape[1]
    width = min(tile.inputs, triton.next_power_of_2(inputs))
    more = [*weights, *[weights[0]] * (4 - len(weights))]
    sizes = [*outputs, *[0] * (4 - len(outputs))]
    _linear[(sum(triton.cdiv(n, tile.outputs) for n in outputs),)](
        x,
        x if norm is None else norm,
        x if squares is None else squares,
        *more,
        x if residual is None else residual,
        out,
        rows,
        *sizes,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        scale,
        E=inputs,
        UNIT=unit,
        NORMED=norm is not None,
        ADDS=residual is not None,
        WEIGHTS=len(outputs),
        PARTS=parts,
        BS=triton.next_power_of_2(max(parts, 1)),
        BB=1 if rows == 1 else max(16, triton.next_power_of_2(rows)),
        BO=tile.outputs,
        BE=width,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **early(x.device),
    )
    return out
