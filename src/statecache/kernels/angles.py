"""The angles by which queries and keys are rotated: cosines and sines of positions, in one launch.

T tokens, F frequencies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _angles(positions, frequencies, cos, sin, scale, F: tl.constexpr, EARLY: tl.constexpr, BF: tl.constexpr):
    token, f = tl.program_id(0).to(tl.int64), tl.arange(0, BF)
    if EARLY:
        launch()
    real = f < F
    by = tl.load(frequencies + f, mask=real, other=0.0).to(tl.float32)
    if EARLY:
        wait()
    angle = tl.load(positions + token).to(tl.float32) * by
    c, s = tl.cos(angle) * scale, tl.sin(angle) * scale
    first = token * 2 * F + f
    for half in tl.static_range(2):
        tl.store(cos + first + half * F, c.to(cos.dtype.element_ty), mask=real)
        tl.store(sin + first + half * F, s.to(sin.dtype.element_ty), mask=real)


def angles(positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (..., T) times frequencies (F,), times `scale`: (..., T, 2 F), in `dtype`.

    The first F channels turn with the last F, so that both have the same.
    """
    assert frequencies.is_contiguous()  # which is read before what is in front is over
    size, positions = len(frequencies), positions.contiguous()
    cos, sin = torch.empty(2, *positions.shape, 2 * size, dtype=dtype, device=positions.device)
    _angles[(positions.numel(),)](
        positions,
        frequencies,
        cos,
        sin,
        scale,
        F=size,
        BF=triton.next_power_of_2(size),
        num_warps=1,
        **early(positions.device),
    )
    return cos, sin
