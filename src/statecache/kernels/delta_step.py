"""A token of the gated delta rule, or the few of a round, in one launch: convolution, activation, gates, norms, rule.

The decay is a head's, which the launch computes, or that of each channel of a key, as it is given.

Reads and writes the rings of the convolution and the states in place. With a log the states stay as they are, and what
they would consume is written down, for `delta_fold`. Rows that take nothing in cost no memory traffic.

B rows, N tokens of each, J key heads of size K, H value heads of size V, C = 2 J K + H V channels, S slots of the ring,
T taps, L slots of a log, M tokens at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.convolve import at_once, convolve, known, softplus
from statecache.kernels.early import early, launch, wait
from statecache.kernels.rehearsal import Kernel


@Kernel
@triton.jit
def _step(
    new,
    b,
    a,
    weight,
    bias,
    A_log,
    dt_bias,
    ring,
    state,
    inputs,
    gates,
    start,
    count,
    y,
    new_stride,
    b_stride,
    a_stride,
    start_stride,
    strength,
    scale,
    N: tl.constexpr,
    M: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    WIDE: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    if EARLY:
        launch()
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    key = head // (H // J)
    channels: tl.constexpr = 2 * J * K + H * V
    decaying: tl.constexpr = H * K if WIDE else H  # decays of a token, behind which its strengths are kept
    k_at, v_at = tl.arange(0, BK), part * BV + tl.arange(0, BV)
    whole, some = k_at < K, v_at < V
    out = y + (row * N * H + head) * V + v_at
    taken = tl.full([], N, tl.int64)
    if COUNTED:
        taken = tl.load(count + row)
        if taken == 0:
            if EARLY:
                wait()
            for t in tl.static_range(N):
                tl.store(out + t * (H * V), tl.zeros([BV], tl.float32).to(y.dtype.element_ty), mask=some)
            return
    at = tl.load(start + row * start_stride)
    ring += row * channels * S
    new += row * N * new_stride
    a += row * N * a_stride + (head * K if WIDE else head)
    b += row * N * b_stride + head
    cell = state + ((row * H + head) * K + k_at[:, None]) * V + v_at[None, :]
    inside = whole[:, None] & some[None, :]
    held = tl.load(cell, mask=inside, other=0.0).to(tl.float32)
    if not WIDE:
        rate, late = tl.exp(tl.load(A_log + head).to(tl.float32)), tl.load(dt_bias + head).to(tl.float32)
    cq = key * K + k_at
    ck, cv = cq + J * K, 2 * J * K + head * V + v_at
    by_q = known(ring, weight, bias, cq, whole, at, T, S, BIAS)
    by_k = known(ring, weight, bias, ck, whole, at, T, S, BIAS)
    by_v = known(ring, weight, bias, cv, some, at, T, S, BIAS)
    if EARLY:
        wait()
    shared = (head % (H // J) == 0) & (part == 0)  # what the heads of a key have in common is written once
    for first in range(0, N, M):
        q, q_in = convolve(new, new_stride, by_q, cq, whole, first, N, M, T, BIAS, SILU)
        k, k_in = convolve(new, new_stride, by_k, ck, whole, first, N, M, T, BIAS, SILU)
        v, v_in = convolve(new, new_stride, by_v, cv, some, first, N, M, T, BIAS, SILU)
        decays, strengths = (), ()
        for m in tl.static_range(M):
            t = first + m
            gate = tl.load(b + t * b_stride).to(tl.float32)
            if WIDE:
                decays += (tl.load(a + t * a_stride + k_at, mask=whole, other=0.0).to(tl.float32),)
                strengths += (gate,)
            else:
                decays += (-rate * softplus(tl.load(a + t * a_stride).to(tl.float32) + late),)
                strengths += (strength / (1.0 + tl.exp(-gate)),)
        for m in tl.static_range(M):
            t = first + m
            # the slots that are written are none of the T - 1 that other programs still read, as S >= T - 1 + N
            slot, real = (at + t) % S, some & (tl.broadcast_to(taken, some.shape) > t)
            tl.store(ring + cv * S + slot, v_in[m].to(ring.dtype.element_ty), mask=real)
            if shared & (taken > t):
                tl.store(ring + cq * S + slot, q_in[m].to(ring.dtype.element_ty), mask=whole)
                tl.store(ring + ck * S + slot, k_in[m].to(ring.dtype.element_ty), mask=whole)
            if L:
                entry = row * L + (at + t) % L
                kept = inputs + entry * (J * K + H * V)
                tl.store(kept + cv - J * K, v[m].to(inputs.dtype.element_ty), mask=real)
                if (part == 0) & (taken > t):
                    by = gates + entry * (decaying + H)
                    if WIDE:
                        tl.store(by + head * K + k_at, decays[m].to(gates.dtype.element_ty), mask=whole)
                    else:
                        tl.store(by + head, decays[m].to(gates.dtype.element_ty))
                    tl.store(by + decaying + head, strengths[m].to(gates.dtype.element_ty))
                if shared & (taken > t):
                    tl.store(kept + cq, k[m].to(inputs.dtype.element_ty), mask=whole)
            query, at_key = tl.where(whole, q[m], 0.0), tl.where(whole, k[m], 0.0)
            query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6) * scale
            at_key *= tl.rsqrt(tl.sum(at_key * at_key, 0) + 1e-6)
            held *= tl.exp(decays[m])[:, None] if WIDE else tl.exp(decays[m])
            written = strengths[m] * (v[m] - tl.sum(held * at_key[:, None], 0))
            held += at_key[:, None] * written[None, :]
            tl.store(out + t * (H * V), tl.sum(held * query[:, None], 0).to(y.dtype.element_ty), mask=some)
    if not L:
        tl.store(cell, held.to(state.dtype.element_ty), mask=inside)


def step(
    new: Tensor,
    b: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    ring: Tensor,
    state: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    key_heads: int,
    silu: bool = True,
    doubled: bool = False,
    log: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Take in N tokens of each row, `ring` (B, C, S) and `state` (B, H, K, V) in place; outputs (B N, H V), as `new`.

    new: q, k and v as one (B N, C), b and a (B N, H), all with any stride between tokens; weight (C, T), bias (C,),
    A_log and dt_bias (H,). start: (B,) or (1,), where rows stand; count: (B,), 0..N, None for all: beyond it outputs
    are junk, and nothing is written. S must be at least T - 1 + N. log: inputs, k and v (B, L, J K + H V), and gates,
    decays and strengths (B, L, 2 H): these are written in place of the state; without it N is 1.

    Without A_log and dt_bias a (B N, H K) are the logarithms of decays for each channel of a key, b strengths, and so
    many are in the log: (B, L, H K + H).
    """
    wide = A_log is None or dt_bias is None
    rows, H, K, V = state.shape
    channels, slots = ring.shape[1:]
    taps, tokens = weight.shape[-1], len(new) // rows
    inputs, gates = (state, state) if log is None else log
    assert a.shape[1] == (H * K if wide else H) and b.shape[1] == H
    assert slots >= taps - 1 + tokens and weight.is_contiguous() and ring.is_contiguous() and state.is_contiguous()
    assert new.stride(-1) == b.stride(-1) == a.stride(-1) == 1 and channels == 2 * key_heads * K + H * V
    if log is None:
        assert tokens == 1
    else:
        assert inputs.is_contiguous() and gates.is_contiguous() and inputs.shape[1] == gates.shape[1] >= tokens
    y = torch.empty(len(new), H * V, dtype=new.dtype, device=new.device)
    few = rows < 8 or log is not None
    block = min(triton.next_power_of_2(V), 32 if few else 64)
    _step[(rows, H, triton.cdiv(V, block))](
        new,
        b,
        a,
        weight,
        new if bias is None else bias,
        a if wide else A_log,
        a if wide else dt_bias,
        ring,
        state,
        inputs,
        gates,
        start,
        start if count is None else count,
        y,
        new.stride(0),
        b.stride(0),
        a.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        2.0 if doubled else 1.0,
        K**-0.5,
        N=tokens,
        M=at_once(tokens),
        J=key_heads,
        K=K,
        H=H,
        V=V,
        T=taps,
        S=slots,
        L=0 if log is None else inputs.shape[1],
        WIDE=wide,
        BIAS=bias is not None,
        SILU=silu,
        COUNTED=count is not None,
        BK=triton.next_power_of_2(K),
        BV=block,
        num_warps=2,
        **early(new.device),
    )
    return y
