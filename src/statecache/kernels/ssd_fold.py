"""What is kept of a round of Mamba-2 goes into the states: tokens from the logs of many layers, in one launch.

B rows, R of them in a round, H heads of size P, W = H P, G groups, N state size, L slots of a log.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.pointers import Table
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _fold(
    layers,
    like_state,
    like_inputs,
    like_A,
    rows,
    start,
    count,
    most,
    start_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    L: tl.constexpr,
    SOME: tl.constexpr,
    COUNTED: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    r, head, at_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts: tl.constexpr = (P + BP - 1) // BP
    layers += at_layer // parts * 4
    taken = most
    if COUNTED:
        taken = tl.minimum(tl.load(count + r), most)
    if taken == 0:
        return
    row = r.to(tl.int64)
    if SOME:
        row = tl.load(rows + r)
    at = tl.load(start + r * start_stride)
    state = tl.load(layers).to(tl.pointer_type(like_state.dtype.element_ty))
    inputs = tl.load(layers + 1).to(tl.pointer_type(like_inputs.dtype.element_ty))
    gates = tl.load(layers + 2).to(tl.pointer_type(tl.float32))
    A = tl.load(tl.load(layers + 3).to(tl.pointer_type(like_A.dtype.element_ty)) + head).to(tl.float32)
    p, n = at_layer % parts * BP + tl.arange(0, BP), tl.arange(0, BN)
    some, whole = p < P, n < N
    cell = state + ((row * H + head) * P + p[:, None]) * N + n[None, :]
    inside = some[:, None] & whole[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(A)
    for t in range(taken):
        entry = row * L + (at + t) % L
        kept = inputs + entry * (H * P + G * N)
        step = tl.load(gates + entry * H + head)
        x = tl.load(kept + head * P + p, mask=some, other=0.0).to(tl.float32)
        B = tl.load(kept + H * P + head // (H // G) * N + n, mask=whole, other=0.0).to(tl.float32)
        held = held * tl.exp(-step * rate) + (x * step)[:, None] * B[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def fold(
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    A_log: Sequence[Tensor],
    start: Tensor,
    count: Tensor | None,
    most: int,
    rows: Tensor | None = None,
    *,
    groups: int,
    table: Table | None = None,
) -> None:
    """Step each layer's state (B, H, P, N) in place over its log's entries from `start` on, `most` or `count` of them.

    Of each layer inputs, x and B (B, L, W + G N), gates, the time steps (B, L, H) float32, and A_log (H,). start: (R,)
    or (1,); count: (R,) long; rows: (R,) long, None for all. All layers are of one shape and one dtype each.
    `table`: of their addresses, for who captures the launch to keep.
    """
    B, H, P, N = states[0].shape
    R = B if rows is None else len(rows)
    block = min(triton.next_power_of_2(P), 16)
    with torch.cuda.device_of(states[0]):
        _fold[(R, H, len(states) * triton.cdiv(P, block))](
            (table or Table()).of(list(zip(states, inputs, gates, A_log, strict=True))),
            states[0],
            inputs[0],
            A_log[0],
            start if rows is None else rows,
            start,
            start if count is None else count,
            most,
            1 if len(start) == R and R > 1 else 0,
            H=H,
            P=P,
            G=groups,
            N=N,
            L=inputs[0].shape[1],
            SOME=rows is not None,
            COUNTED=count is not None,
            BP=block,
            BN=triton.next_power_of_2(N),
            num_warps=4,
        )
