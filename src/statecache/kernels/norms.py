"""RMS norms, with a gate before or after, one program a row and group; and the units of what feeds forward.

B rows, E channels, in groups of M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import silu
from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _norm(
    x,
    gate,
    weight,
    out,
    x_stride,
    gate_stride,
    eps,
    offset,
    E: tl.constexpr,
    M: tl.constexpr,
    SHARED: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.arange(0, BM)
    there, e = m < M, group * M + m
    if EARLY:
        launch()
    scale = tl.load(weight + (m if SHARED else e), mask=there, other=0.0).to(tl.float32) + offset
    if EARLY:
        wait()
    seen = tl.load(x + row * x_stride + e, mask=there, other=0.0).to(tl.float32)
    if BEFORE or AFTER:
        by = silu(tl.load(gate + row * gate_stride + e, mask=there, other=0.0).to(tl.float32))
        if BEFORE:
            seen *= by
    seen *= tl.rsqrt(tl.sum(seen * seen, 0) / M + eps) * scale
    if AFTER:
        seen *= by
    tl.store(out + row * E + e, seen.to(out.dtype.element_ty), mask=there)


def norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    offset: float = 0.0,
    group: int | None = None,
    gate: Tensor | None = None,
    gate_first: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The RMS norm of x (B, E) by weight + offset, over groups of `group` channels, None for all: (B, E) in `dtype`.

    weight: (E,), or (M,) the same for every group. gate (B, E): silu of it multiplies x before the norm, or what comes
    after it. `dtype`: that of x, if not given. Rows of x and gate may have any stride.
    """
    rows, width = x.shape
    size = width if group is None else group
    out = torch.empty(rows, width, dtype=dtype or x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    _norm[(rows, width // size)](
        x,
        x if gate is None else gate,
        weight,
        out,
        x.stride(0),
        0 if gate is None else gate.stride(0),
        eps,
        offset,
        E=width,
        M=size,
        SHARED=len(weight) == size,
        BEFORE=gate is not None and gate_first,
        AFTER=gate is not None and not gate_first,
        BM=block,
        num_warps=4 if block <= 2048 else 8,
        **early(x.device),
    )
    return out


@triton.jit
def unit_of(
    x,
    gate,
    out,
    row,
    place,
    x_stride,
    gate_stride,
    E: tl.constexpr,
    GATED: tl.constexpr,
    OPENED: tl.constexpr,
    BE: tl.constexpr,
):
    """Write the outputs from `place` BE on of a row of a unit, see `unit` and `squared`."""
    e = place * BE + tl.arange(0, BE)
    there = e < E
    y = tl.load(x + row * x_stride + e, mask=there, other=0.0).to(tl.float32)
    if GATED:
        y = silu(y) * tl.load(x + row * x_stride + E + e, mask=there, other=0.0).to(tl.float32)
    else:
        y = tl.maximum(y, 0.0)
        y *= y
    if OPENED:
        y /= 1.0 + tl.exp(-tl.load(gate + row * gate_stride).to(tl.float32))
    tl.store(out + row * E + e, y.to(out.dtype.element_ty), mask=there)


@Kernel
@triton.jit
def _unit(x, out, x_stride, E: tl.constexpr, GATED: tl.constexpr, EARLY: tl.constexpr, BE: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        launch()
        wait()
    unit_of(x, x, out, row, place, x_stride, 0, E, GATED, False, BE)


def unit(x: Tensor) -> Tensor:
    """A gated unit of x (B, 2 E), whose rows may have any stride: silu(x[:, :E]) x[:, E:], (B, E)."""
    return _units(x, x.shape[1] // 2, gated=True)


def squared(x: Tensor) -> Tensor:
    """The squares of what is positive of x (B, E), whose rows may have any stride, and zero for the rest."""
    return _units(x, x.shape[1], gated=False)


def _units(x: Tensor, width: int, gated: bool) -> Tensor:
    out = torch.empty(len(x), width, dtype=x.dtype, device=x.device)
    grid = len(x), triton.cdiv(width, 512)
    _unit[grid](x, out, x.stride(0), E=width, GATED=gated, BE=512, num_warps=4, **early(x.device))
    return out
