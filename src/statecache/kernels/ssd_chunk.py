"""Many tokens of Mamba-2's recurrence in a few launches: see `statecache.ops.ssd`.

The first computes the products of C and B within each chunk, once for all heads of a group. The last carries the state
through the chunks, a program for some channels of a head. Where that leaves a device idle, the sequence is cut into
runs of chunks: between the two launches, what each run adds is computed, and then the state before each.

Rows, T new tokens, H heads of size P, G groups, N state size, M chunks of Q tokens; `marks` of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.rehearsal import Kernel
from statecache.kernels.tokens import along, block, cut, dense, gates, limit, padded, product, room, width

CHANGING = ("T", "first", "chunks", "each", "runs")  # from one prompt to the next


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _within(
    B,
    C,
    scores,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    T,
    first,
    G: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BN: tl.constexpr,
):
    chunk, row, group = tl.program_id(1), (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    here, at = tl.arange(0, Q), tl.arange(0, BN)
    token = (first + chunk) * Q + here
    inside = (token < T)[:, None] & (at < N)[None, :]
    b = tl.load(B + row * B_row + token[:, None] * B_token + group * B_group + at[None, :], mask=inside, other=0.0)
    c = tl.load(C + row * C_row + token[:, None] * C_token + group * C_group + at[None, :], mask=inside, other=0.0)
    out = ((row * G + group) * tl.num_programs(1) + chunk) * (Q * Q) + here[:, None] * Q + here[None, :]
    tl.store(scores + out, tl.dot(c, tl.trans(b), input_precision="tf32x3"))


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _through(
    x,
    dt,
    A,
    B,
    C,
    state,
    count,
    marks,
    scores,
    y,
    after,
    kept,
    sums,
    decays,
    x_row,
    x_token,
    x_head,
    dt_row,
    dt_token,
    B_row,
    B_token,
    B_group,
    C_row,
    C_token,
    C_group,
    T,
    first,
    chunks,
    each,
    H: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    MARKS: tl.constexpr,
    READS: tl.constexpr,
    BEGUN: tl.constexpr,
    COUNTED: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    run, runs = tl.program_id(2), tl.num_programs(2)
    group = head // (H // G)
    here, p, n = tl.arange(0, Q), tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    cell = p[:, None] * N + n[None, :]
    some = (p < P)[:, None] & (n < N)[None, :]
    last_chunk = tl.cdiv(T, Q) - 1
    end = limit(count, row, T, COUNTED)
    lane = row * H + head
    held = tl.zeros([BP, BN], tl.float32)
    if READS:
        if run > 0:
            held = tl.load(sums + (lane * (runs - 1) + run - 1) * (P * N) + cell, mask=some, other=0.0)
        elif BEGUN:
            held = tl.load(state + lane * (P * N) + cell, mask=some, other=0.0).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    x += row * x_row + head * x_head
    B += row * B_row + group * B_group
    C += row * C_row + group * C_group
    y += row * T * (H * P) + head * P
    square = (row * G + group) * chunks * (Q * Q) + here[:, None] * Q + here[None, :]
    own = here[:, None] >= here[None, :]
    passed = tl.zeros([1], tl.float64)
    for chunk in range(run * each, tl.minimum((run + 1) * each, chunks)):
        token = (first + chunk) * Q + here
        there = token < T
        inside = there[:, None] & (n < N)[None, :]
        b = tl.load(B + token[:, None] * B_token + n[None, :], mask=inside, other=0.0)
        read = there[:, None] & (p < P)[None, :]
        new = tl.load(x + token[:, None] * x_token + p[None, :], mask=read, other=0.0).to(tl.float32)
        step = gates(dt + row * dt_row + head, token, dt_token, end)
        new *= step[:, None]
        log = (step * rate).to(tl.float64)
        total, whole = tl.cumsum(log, 0), tl.sum(log, 0)
        if READS:
            c = tl.load(C + token[:, None] * C_token + n[None, :], mask=inside, other=0.0)
            between = (total[:, None] - total[None, :]).to(tl.float32)
            decay = tl.exp(tl.where(own, between, -float("inf")))
            seen = product(c, tl.trans(held)) * tl.exp(total.to(tl.float32))[:, None]
            score = tl.load(scores + square + chunk * (Q * Q)) * decay
            seen += tl.dot(score, new, input_precision="tf32x3")
            tl.store(y + token[:, None] * (H * P) + p[None, :], seen, mask=read)
            for mark in tl.static_range(MARKS):
                place = tl.load(marks + row * MARKS + mark)
                if tl.minimum(place // Q, last_chunk) == first + chunk:
                    upto = token < place
                    part = tl.sum(tl.where(upto, log, 0.0), 0)
                    until = tl.exp(tl.where(upto, (part - total).to(tl.float32), -float("inf")))
                    then = product(tl.trans(new * until[:, None]), b)
                    then += held * tl.exp(part.to(tl.float32))
                    tl.store(kept + ((row * MARKS + mark) * H + head) * (P * N) + cell, then, mask=some)
        until = tl.exp((whole - total).to(tl.float32))
        held *= tl.exp(whole.to(tl.float32))
        held += product(tl.trans(new * until[:, None]), b)
        passed += whole
    if READS:
        if run == runs - 1:
            tl.store(after + lane * (P * N) + cell, held, mask=some)
    else:
        tl.store(sums + (lane * runs + run) * (P * N) + cell, held, mask=some)
        if tl.program_id(1) == 0:
            tl.store(decays + lane * runs + run + tl.arange(0, 1), tl.exp(passed.to(tl.float32)))


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _join(state, sums, decays, runs, SIZE: tl.constexpr, BEGUN: tl.constexpr, BLOCK: tl.constexpr):
    """The states after each run of chunks, in place of what each adds."""
    lane, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < SIZE
    held = tl.zeros([BLOCK], tl.float32)
    if BEGUN:
        held = tl.load(state + lane * SIZE + at, mask=there, other=0.0).to(tl.float32)
    for run in range(runs):
        cell = sums + (lane * runs + run) * SIZE + at
        held = held * tl.load(decays + lane * runs + run) + tl.load(cell, mask=there, other=0.0)
        tl.store(cell, held, mask=there)


def chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
    *,
    part: int | None = None,
    runs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens, as `statecache.ops.ssd.chunk`: all in float32, whatever the inputs.

    `part`: channels of a head that a program takes; `runs`: parts of the sequence that are taken at once.
    """
    rows, tokens, heads, P = x.shape
    G, N = B.shape[2:]
    x, dt, A, B, C = (along(part) for part in (x, dt, A, B, C))
    state, count, at = dense(state, count, at)
    marks = 0 if at is None else at.shape[1]
    Q, BN = block(tokens, x.device, N), padded(N)
    total, lanes = triton.cdiv(tokens, Q), rows * heads
    band = min(total, room(rows * G * Q * Q))
    part = part or (min(64, padded(P)) if total >= 16 else width(P, lanes, 64))
    parts = triton.cdiv(P, part)

    def made(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    scores, y, after = made(rows * G * band * Q * Q), made(rows, tokens, heads, P), made(rows, heads, P, N)
    kept = None if at is None else made(rows, marks, heads, P, N)
    among = (*B.stride()[:3], *C.stride()[:3])
    sizes = {"H": heads, "P": P, "G": G, "N": N, "Q": Q, "BP": part, "BN": BN, "COUNTED": count is not None}
    for first in range(0, total, band):
        chunks = min(band, total - first)
        each = triton.cdiv(chunks, runs or cut(chunks, lanes * parts))
        later = triton.cdiv(chunks, each) - 1  # runs that do not begin with the state
        sums, decays = made(later * lanes * P * N), made(later * lanes)
        begun = y if state is None else state
        given = (
            *(x, dt, A, B, C, begun, y if count is None else count, y if at is None else at),
            *(scores, y, after, y if kept is None else kept, sums, decays),
            *(*x.stride()[:3], *dt.stride()[:2], *among, tokens, first, chunks, each),
        )
        kind: dict[str, Any] = {**sizes, "num_warps": 4, "num_stages": 1}
        with torch.cuda.device_of(x):
            _within[(rows * G, chunks)](B, C, scores, *among, tokens, first, G=G, N=N, Q=Q, BN=BN, num_warps=4)
            if later:
                _through[(lanes, parts, later)](*given, READS=False, BEGUN=False, MARKS=0, **kind)
                cells = (lanes, triton.cdiv(P * N, 1024))
                _join[cells](begun, sums, decays, later, SIZE=P * N, BEGUN=state is not None, BLOCK=1024)
            _through[(lanes, parts, later + 1)](*given, READS=True, BEGUN=state is not None, MARKS=marks, **kind)
        state = after
    return y, after, kept
