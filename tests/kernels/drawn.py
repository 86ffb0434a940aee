"""What the tests of kernels draw, and how far a kernel may be off."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers in products
NAN = float("nan")
# how far what is rounded to bfloat16 once may be off: to the nearest, and in the interpreter towards zero
ROUNDED = 2.0 ** (-8 if DEVICE == "cuda" else -7) * (1 + 1e-3)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def strided(x: Tensor, more: int = 3) -> Tensor:
    """The same rows as a part of wider ones, whose other columns are poisoned."""
    wide = torch.full((len(x), x.shape[1] + more), NAN, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def narrowed(x: Tensor) -> Tensor:
    """What a kernel keeps of float32 in bfloat16: the nearest number, and in the interpreter the next towards zero."""
    return x.bfloat16() if x.is_cuda else (x.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()


def normed(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + offset)


def error(got: Tensor, want: Tensor) -> float:
    assert not got.isnan().any(), "an element was not written, or poison was read"
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-9)).item()
