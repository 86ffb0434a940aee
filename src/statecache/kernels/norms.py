"""RMS norms, with a gate before or after, one program a row and group; and the units of what feeds forward.

B rows, E channels, in groups of M.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.early import early, launch, wait


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
    if EARLY:
        launch()
        wait()
    there, e = m < M, group * M + m
    seen = tl.load(x + row * x_stride + e, mask=there, other=0.0).to(tl.float32)
    if BEFORE or AFTER:
        by = tl.load(gate + row * gate_stride + e, mask=there, other=0.0).to(tl.float32)
        by = by / (1.0 + tl.exp(-by))
        if BEFORE:
            seen *= by
    seen *= tl.rsqrt(tl.sum(seen * seen, 0) / M + eps)
    seen *= tl.load(weight + (m if SHARED else e), mask=there, other=0.0).to(tl.float32) + offset
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
def _unit(x, out, x_stride, E: tl.constexpr, EARLY: tl.constexpr, BE: tl.constexpr):
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BE + tl.arange(0, BE)
    if EARLY:
        launch()
        wait()
    there = e < E
    through = tl.load(x + row * x_stride + e, mask=there, other=0.0).to(tl.float32)
    seen = tl.load(x + row * x_stride + E + e, mask=there, other=0.0).to(tl.float32)
    through = through / (1.0 + tl.exp(-through)) * seen
    tl.store(out + row * E + e, through.to(out.dtype.element_ty), mask=there)


def unit(x: Tensor) -> Tensor:
    """A gated unit of x (B, 2 E), whose rows may have any stride: silu(x[:, :E]) x[:, E:], (B, E)."""
    rows, width = len(x), x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    _unit[(rows, triton.cdiv(width, 512))](x, out, x.stride(0), E=width, BE=512, num_warps=4, **early(x.device))
    return out


@triton.jit
def _squared(x, out, x_stride, E: tl.constexpr, EARLY: tl.constexpr, BE: tl.constexpr):
    row, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BE + tl.arange(0, BE)
    if EARLY:
        launch()
        wait()
    there = e < E
    positive = tl.maximum(tl.load(x + row * x_stride + e, mask=there, other=0.0).to(tl.float32), 0.0)
    tl.store(out + row * E + e, (positive * positive).to(out.dtype.element_ty), mask=there)


def squared(x: Tensor) -> Tensor:
    """The squares of what is positive of x (B, E), whose rows may have any stride, and zero for the rest."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    _squared[(rows, triton.cdiv(width, 512))](x, out, x.stride(0), E=width, BE=512, num_warps=4, **early(x.device))
    return out
