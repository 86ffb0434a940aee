"""What is kept of a round of the gated delta rule goes into the states: tokens from many layers' logs, in one launch.

B rows, R of them in a round, J key heads of size K, H value heads of size V, L slots of a log.
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
    rows,
    start,
    count,
    most,
    start_stride,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    SOME: tl.constexpr,
    COUNTED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    r, head, at_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts: tl.constexpr = (V + BV - 1) // BV
    layers += at_layer // parts * 3
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
    k_at, v_at = tl.arange(0, BK), at_layer % parts * BV + tl.arange(0, BV)
    whole, some = k_at < K, v_at < V
    cell = state + ((row * H + head) * K + k_at[:, None]) * V + v_at[None, :]
    inside = whole[:, None] & some[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    for t in range(taken):
        entry = row * L + (at + t) % L
        kept = inputs + entry * (J * K + H * V)
        gate, beta = tl.load(gates + entry * 2 * H + head), tl.load(gates + entry * 2 * H + H + head)
        k = tl.load(kept + head // (H // J) * K + k_at, mask=whole, other=0.0).to(tl.float32)
        v = tl.load(kept + J * K + head * V + v_at, mask=some, other=0.0).to(tl.float32)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        held *= tl.exp(gate)
        written = beta * (v - tl.sum(held * k[:, None], 0))
        held += k[:, None] * written[None, :]
    tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def fold(
    states: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gates: Sequence[Tensor],
    start: Tensor,
    count: Tensor | None,
    most: int,
    rows: Tensor | None = None,
    *,
    key_heads: int,
    table: Table | None = None,
) -> None:
    """Step each layer's state (B, H, K, V) in place over its log's entries from `start` on, `most` or `count` of them.

    Of each layer inputs, k and v (B, L, J K + H V), and gates, decays and strengths (B, L, 2 H) float32. start: (R,) or
    (1,); count: (R,) long; rows: (R,) long, None for all. All layers are of one shape and one dtype each.
    `table`: of their addresses, for who captures the launch to keep.
    """
    B, H, K, V = states[0].shape
    R = B if rows is None else len(rows)
    block = min(triton.next_power_of_2(V), 32)
    with torch.cuda.device_of(states[0]):
        _fold[(R, H, len(states) * triton.cdiv(V, block))](
            (table or Table()).of(list(zip(states, inputs, gates, strict=True))),
            states[0],
            inputs[0],
            start if rows is None else rows,
            start,
            start if count is None else count,
            most,
            1 if len(start) == R and R > 1 else 0,
            J=key_heads,
            K=K,
            H=H,
            V=V,
            L=inputs[0].shape[1],
            SOME=rows is not None,
            COUNTED=count is not None,
            BK=triton.next_power_of_2(K),
            BV=block,
            num_warps=2,
        )
