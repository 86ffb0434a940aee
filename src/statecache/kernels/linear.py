"""A linear layer for few rows, with what stands before and after it: norm; gated unit, scale and residual.

Every weight is read once, whatever the number of rows. The sum of squares of an RMS norm is taken in the same loop as
the product, which it scales at the end, so that a norm costs no pass of its own. Or the product in front took it, which
hands on its sum ready for that: see `added`.

B rows, E inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels import held
from statecache.kernels.cards import DTYPES, able, shared
from statecache.kernels.early import early, fetch, launch, light, wait
from statecache.kernels.rehearsal import Kernel
from statecache.kernels.weights import whose

FEW_ROWS = 16  # for which a norm is worth computing in every program
MOST_ROWS = 64
OWN = 1 << 13  # bytes that a program shares beside what it loads
SQUARES = 64  # parts of sums of squares that a thread has registers for during its products


@dataclass(frozen=True)
class Tile:
    """Outputs and inputs of a program's tile, its warps, and how many of its loads are under way at once.

    For several rows, on Hopper: it asks for the weights of so many inputs before the kernel in front ends (`ahead`), or
    lets the next begin when all of its own are there (`late`), which then asks when the memory has less to do.
    """

    outputs: int
    inputs: int
    warps: int
    stages: int = 3
    ahead: int = 0
    late: bool = False


@dataclass(frozen=True)
class Held:
    """Of a program that holds its weights in registers its warps, how many times 16 outputs each has, or 16 of both
    weights of a gated unit, and how many times 32 inputs it asks for before it begins.
    """

    warps: int
    outputs: int
    ahead: int

    def takes(self, x: Tensor, weights: Sequence[Tensor], norm: Tensor | None) -> bool:
        """Whether such programs can read these."""
        given = [x, *weights] if norm is None else [x, *weights, norm]
        dtype, inputs = weights[0].dtype, weights[0].shape[1]
        if dtype not in (torch.bfloat16, torch.float16) or any(t.dtype not in DTYPES for t in given):
            return False
        return able(x.device) and inputs % (32 * self.warps) == 0 and all(map(_whole, given))


# by rows, up to so many, and outputs, up to so many: benchmarks/tune_linear.py, on an H100
TILES: dict[int, tuple[tuple[int, Tile | Held], ...]] = {
    1: ((3072, Tile(4, 2048, 4)), (1 << 62, Tile(4, 1024, 4))),
    held.ROWS: ((3072, Held(8, 1, 16)), (6144, Held(4, 2, 8)), (1 << 62, Held(4, 1, 4))),
    16: (
        (3072, Tile(16, 512, 2, 5, ahead=1024)),
        (4096, Tile(32, 256, 4, 4, late=True)),
        (6144, Tile(32, 128, 2, 5, late=True)),
        (1 << 62, Tile(64, 128, 2, 4, late=True)),
    ),
    32: (
        (3072, Tile(16, 512, 2, 5, ahead=1024)),
        (4096, Tile(16, 256, 2, 4, late=True)),
        (6144, Tile(32, 128, 2, 5, late=True)),
        (1 << 62, Tile(64, 128, 2, 4, late=True)),
    ),
    64: ((3072, Tile(16, 256, 4, 4)), (4096, Tile(32, 128, 4, 4)), (1 << 62, Tile(64, 128, 4))),
}


@Kernel
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
    BB: tl.constexpr,
    BO: tl.constexpr,
    BE: tl.constexpr,
    AHEAD: tl.constexpr,
    LATE: tl.constexpr,
    SOON: tl.constexpr,
):
    if EARLY and not LATE:
        launch()
    width = size + size1 + size2 + size3  # of all outputs of a row
    place, out, weight, size = whose(
        tl.program_id(0), out, weight, weight1, weight2, weight3, size, size1, size2, size3, WEIGHTS, BO
    )
    o = place * BO + tl.arange(0, BO)
    real = o < size
    if BB == 1:
        tl.static_assert(not HANDS)
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
        if HANDS:
            by_behind = tl.load(behind + o, mask=real, other=0.0).to(tl.float32) + behind_offset
        if EARLY:
            if AHEAD:
                first_of = tl.minimum(o, size - 1).to(tl.int64) * E
                fetch(weight + first_of, AHEAD * weight.dtype.element_ty.primitive_bitwidth // 8)
                if UNIT:
                    fetch(weight1 + first_of, AHEAD * weight.dtype.element_ty.primitive_bitwidth // 8)
            wait()
        spot, wanted = b[:, None] * width + o[None, :], used[:, None] & real[None, :]
        if ADDS:  # what the sums wait for in the end is asked for before them
            added = tl.load(residual + b[:, None] * residual_stride + o[None, :], mask=wanted, other=0.0)
        part = tl.arange(0, BS)
        listed = used[:, None] & (part < PARTS)[None, :]
        if PARTS and SOON:
            summed = tl.load(parts + b[:, None] * PARTS + part[None, :], mask=listed, other=0.0)
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
        if EARLY and LATE:
            launch()
        if PARTS:
            if not SOON:
                summed = tl.load(parts + b[:, None] * PARTS + part[None, :], mask=listed, other=0.0)
            squares = tl.sum(summed, 1)
        if NORMED or PARTS:
            total *= tl.rsqrt(squares / E + eps)[:, None]
            through *= tl.rsqrt(squares / E + eps)[:, None]
        total *= scale
        through *= scale
        if UNIT:
            total *= through / (1.0 + tl.exp(-total))
        if ADDS:
            total += added.to(tl.float32)
        y = total.to(out.dtype.element_ty)
        tl.store(out + spot, y, mask=wanted)
        if HANDS:
            y = y.to(tl.float32)
            tl.store(weighted + spot, (y * by_behind[None, :]).to(weighted.dtype.element_ty), mask=wanted)
            squares = tl.sum(tl.where(wanted, y * y, 0.0), 1)
            tl.store(sums + b * tl.num_programs(0) + place, squares, mask=used)


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
    tile: Tile | Held | None = None,
) -> Tensor:
    """Multiply x (B, E) by `weight` (O, E), for at most 64 rows: (B, O), in `dtype`, that of `weight` if not given.

    Several weights, up to four, of one dtype, share the launch: their outputs lie side by side, without `residual`.

    norm (E,): the RMS norm of x takes its place, by norm + offset. squares (B, n) float32: x has been multiplied by the
    weight of its norm, and these are the squares of what it was before, summed up in n parts of each row. unit: two
    weights (O, E) are those of a gated unit, and give silu(x @ first) (x @ second) (B, O). The product times `scale` is
    added to `residual` (B, O). Rows of x and residual may have any stride.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    around = norm, eps, offset, squares, unit, residual, scale
    return _multiply(x, weights, *around, dtype or weights[0].dtype, tile, None, 0.0)[0]


def added(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    behind: Tensor,
    *,
    offset: float = 0.0,
    squares: Tensor | None = None,
    eps: float = 0.0,
    scale: float = 1.0,
    tile: Tile | Held | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The product of `linear` added to `residual`, in its dtype; and what a norm behind, by behind + offset, needs.

    That is the sums times behind (O,) + offset, in the dtype of `weight` (B, O), and their squares as `squares` (B, n).
    For two rows or more: a norm costs nothing in the product of one.
    """
    assert len(x) > 1
    around = None, eps, 0.0, squares, False, residual, scale
    return _multiply(x, (weight,), *around, residual.dtype, tile, behind, offset)


def _multiply(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    eps: float,
    offset: float,
    squares: Tensor | None,
    unit: bool,
    residual: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    tile: Tile | Held | None,
    behind: Tensor | None,
    behind_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs, outputs = len(x), weights[0].shape[1], [len(each) for each in weights]
    assert rows <= MOST_ROWS and x.shape[1] == inputs and x.stride(1) == 1
    assert len(weights) == 1 or (len(weights) <= 4 and residual is None)
    assert squares is None or (norm is None and len(squares) == rows and squares.is_contiguous())
    assert not unit or (len(weights) == 2 and outputs[0] == outputs[1])
    assert all(w.is_contiguous() and w.shape[1] == inputs and w.dtype == weights[0].dtype for w in weights)
    outputs = outputs[:1] if unit else outputs
    out = torch.empty(rows, sum(outputs), dtype=dtype, device=x.device)
    if tile is None:
        tile = _tile(rows, sum(outputs))
        if isinstance(tile, Held) and not tile.takes(x, weights, norm):
            tile = _tile(held.ROWS + 1, sum(outputs))
    width = tile.outputs if isinstance(tile, Tile) else 16 if unit else 16 * tile.outputs
    programs = sum(triton.cdiv(n, width) for n in outputs)
    weighted, sums = out, out
    if behind is not None:
        weighted = torch.empty_like(out, dtype=weights[0].dtype)
        sums = torch.empty(rows, programs, dtype=torch.float32, device=x.device)
    parts = 0 if squares is None else squares.shape[1]
    more = [*weights, *[weights[0]] * (4 - len(weights))]
    sizes = [*outputs, *[0] * (4 - len(outputs))]
    given = (
        x,
        x if norm is None else norm,
        x if squares is None else squares,
        *more,
        x if residual is None else residual,
        out,
        x if behind is None else behind,
        weighted,
        sums,
        rows,
        *sizes,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        scale,
        behind_offset,
    )
    form = {
        "E": inputs,
        "UNIT": unit,
        "NORMED": norm is not None,
        "ADDS": residual is not None,
        "HANDS": behind is not None,
        "WEIGHTS": len(outputs),
        "PARTS": parts,
        "BS": triton.next_power_of_2(max(parts, 1)),
        "num_warps": tile.warps,
        **early(x.device),
    }
    if isinstance(tile, Held):
        assert rows <= held.ROWS and tile.takes(x, weights, norm)
        ahead = min(tile.ahead, inputs // (32 * tile.warps))
        light(held.multiply[(programs,)](*given, W=tile.warps, M=2 if unit else tile.outputs, AHEAD=ahead, **form))
        return out, weighted, sums
    padded = 1 if rows == 1 else max(16, triton.next_power_of_2(rows))
    width = min(tile.inputs, triton.next_power_of_2(inputs))
    if rows > 1:
        each = tile.outputs * (2 if unit else 1) * weights[0].element_size() + padded * x.element_size()
        while (tile.stages - 1) * width * each > shared(x.device) - OWN:  # as of float32, or on smaller cards
            width //= 2
    _linear[(programs,)](
        *given,
        BB=padded,
        BO=tile.outputs,
        BE=width,
        num_stages=tile.stages,
        AHEAD=min(tile.ahead, inputs) if all(map(_whole, weights)) else 0,
        LATE=tile.late,
        SOON=padded * triton.next_power_of_2(max(parts, 1)) <= SQUARES * 32 * tile.warps,
        **form,
    )
    return out, weighted, sums


def _tile(rows: int, outputs: int) -> Tile | Held:
    few = next(n for n in TILES if rows <= n)
    return next(each for most, each in TILES[few] if outputs <= most)


def _whole(x: Tensor) -> bool:
    """Whether all rows, or the vector, begin where 16 bytes do."""
    return x.data_ptr() % 16 == 0 and (x.dim() == 1 or x.stride(0) * x.element_size() % 16 == 0)
