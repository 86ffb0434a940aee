"""Many tokens of the gated delta rule in three launches, where a head has one decay: see `statecache.ops.gated_delta`.

What the tokens of a chunk write, d (Q, V), solves (I + A) d = beta (v - exp(G) k S), with the state S before the chunk.
So d = U - W S: the first launch computes of every chunk by itself U, W and the scores of q. The second carries S
through the chunks, a program for some channels of a head, and keeps it and d of each. The third reads all chunks' S and
d at once.

B rows, T new tokens, J key heads of size K, H value heads of size V, M chunks of Q tokens, N marks of a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.rehearsal import Kernel
from statecache.kernels.tokens import along, block, dense, gates, limit, padded, product, room, width

CHANGING = ("T", "first", "chunks")  # from one prompt to the next


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _within(
    q,
    k,
    v,
    g,
    beta,
    count,
    scores,
    W,
    U,
    reads,
    writes,
    decays,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    g_row,
    g_token,
    beta_row,
    beta_token,
    T,
    first,
    scale,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    COUNTED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    chunk, row, head = tl.program_id(1), (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    key = head // (H // J)
    here, k_at, v_at = tl.arange(0, Q), tl.arange(0, BK), tl.arange(0, BV)
    token = (first + chunk) * Q + here
    there, end = token < T, limit(count, row, T, COUNTED)
    inside = there[:, None] & (k_at < K)[None, :]
    q_raw = tl.load(q + row * q_row + token[:, None] * q_token + key * q_head + k_at[None, :], mask=inside, other=0.0)
    k_raw = tl.load(k + row * k_row + token[:, None] * k_token + key * k_head + k_at[None, :], mask=inside, other=0.0)
    q_unit, k_unit = _unit(q_raw) * scale, _unit(k_raw)
    strength = gates(beta + row * beta_row + head, token, beta_token, end)
    log = gates(g + row * g_row + head, token, g_token, end).to(tl.float64)
    total, whole = tl.cumsum(log, 0), tl.sum(log, 0)
    since = tl.exp(total.to(tl.float32))
    place = (row * H + head) * tl.num_programs(1) + chunk
    tl.store(reads + place * Q + here, since * q_unit)
    tl.store(writes + place * Q + here, tl.exp((whole - total).to(tl.float32)) * k_unit)
    tl.store(decays + place, tl.exp(whole.to(tl.float32)))
    between = (total[:, None] - total[None, :]).to(tl.float32)
    own = here[:, None] >= here[None, :]
    products = tl.dot(q_raw, tl.trans(k_raw), input_precision="tf32x3") * q_unit[:, None] * k_unit[None, :]
    square = place * (Q * Q) + here[:, None] * Q + here[None, :]
    tl.store(scores + square, products * tl.exp(tl.where(own, between, -float("inf"))))
    # A by columns: what token i, along axis 1, reads of the tokens j before it
    products = tl.dot(k_raw, tl.trans(k_raw), input_precision="tf32x3") * k_unit[:, None] * k_unit[None, :]
    before = here[:, None] < here[None, :]
    system = products * tl.exp(tl.where(before, -between, -float("inf"))) * strength[None, :]
    solved = tl.where(here[:, None] == here[None, :], 1.0, 0.0)
    for i in range(1, Q):
        of = tl.sum(tl.where(here[None, :] == i, system, 0.0), 1)
        solved -= tl.where(here[:, None] == i, tl.sum(of[:, None] * solved, 0)[None, :], 0.0)
    erased = k_raw.to(tl.float32) * (strength * since * k_unit)[:, None]
    erased = tl.dot(solved, erased, input_precision="tf32x3")
    tl.store(W + place * (Q * BK) + here[:, None] * BK + k_at[None, :], erased)
    written = there[:, None] & (v_at < V)[None, :]
    value = tl.load(v + row * v_row + token[:, None] * v_token + head * v_head + v_at[None, :], mask=written, other=0.0)
    value = tl.dot(solved, value.to(tl.float32) * strength[:, None], input_precision="tf32x3")
    tl.store(U + place * (Q * BV) + here[:, None] * BV + v_at[None, :], value)


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _through(
    k,
    g,
    state,
    count,
    marks,
    W,
    U,
    writes,
    decays,
    states,
    after,
    kept,
    k_row,
    k_token,
    k_head,
    g_row,
    g_token,
    T,
    first,
    chunks,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    N: tl.constexpr,
    BEGUN: tl.constexpr,
    COUNTED: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,
):
    row, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    here, k_at, v_at = tl.arange(0, Q), tl.arange(0, BK), tl.program_id(1) * PART + tl.arange(0, PART)
    cell = k_at[:, None] * V + v_at[None, :]
    some = (k_at < K)[:, None] & (v_at < V)[None, :]
    last_chunk = tl.cdiv(T, Q) - 1
    if BEGUN:
        held = tl.load(state + (row * H + head) * (K * V) + cell, mask=some, other=0.0).to(tl.float32)
    else:
        held = tl.zeros([BK, PART], tl.float32)
    k += row * k_row + (head // (H // J)) * k_head
    for chunk in range(chunks):
        token = (first + chunk) * Q + here
        place = (row * H + head) * chunks + chunk
        inside = (token < T)[:, None] & (k_at < K)[None, :]
        k_raw = tl.load(k + token[:, None] * k_token + k_at[None, :], mask=inside, other=0.0).to(tl.float32)
        erases = tl.load(W + place * (Q * BK) + here[:, None] * BK + k_at[None, :])
        at = U + place * (Q * BV) + here[:, None] * BV + v_at[None, :]
        new = tl.load(at) - tl.dot(erases, held, input_precision="tf32x3")
        tl.store(at, new)
        tl.store(states + place * (BK * BV) + k_at[:, None] * BV + v_at[None, :], held)
        for n in tl.static_range(N):
            mark = tl.load(marks + row * N + n)
            if tl.minimum(mark // Q, last_chunk) == first + chunk:
                log = gates(g + row * g_row + head, token, g_token, limit(count, row, T, COUNTED)).to(tl.float64)
                upto = token < mark
                whole = tl.sum(tl.where(upto, log, 0.0), 0)
                until = (whole - tl.cumsum(log, 0)).to(tl.float32)
                until = tl.exp(tl.where(upto, until, -float("inf"))) * _unit(k_raw)
                then = tl.dot(tl.trans(k_raw), new * until[:, None], input_precision="tf32x3")
                then += held * tl.exp(whole.to(tl.float32))
                tl.store(kept + ((row * N + n) * H + head) * (K * V) + cell, then, mask=some)
        new *= tl.load(writes + place * Q + here)[:, None]
        held = held * tl.load(decays + place) + tl.dot(tl.trans(k_raw), new, input_precision="tf32x3")
    tl.store(after + (row * H + head) * (K * V) + cell, held, mask=some)


@Kernel
@triton.jit(do_not_specialize=CHANGING)
def _read(
    q,
    scores,
    U,
    reads,
    states,
    y,
    q_row,
    q_token,
    q_head,
    T,
    first,
    J: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    Q: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,
):
    chunk, row, head = tl.program_id(1), (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    here, k_at, v_at = tl.arange(0, Q), tl.arange(0, BK), tl.program_id(2) * PART + tl.arange(0, PART)
    token = (first + chunk) * Q + here
    place = (row * H + head) * tl.num_programs(1) + chunk
    inside = (token < T)[:, None] & (k_at < K)[None, :]
    q += row * q_row + (head // (H // J)) * q_head
    q_raw = tl.load(q + token[:, None] * q_token + k_at[None, :], mask=inside, other=0.0)
    there = (v_at < V)[None, :]
    held = tl.load(states + place * (BK * BV) + k_at[:, None] * BV + v_at[None, :], mask=there, other=0.0)
    seen = product(q_raw, held) * tl.load(reads + place * Q + here)[:, None]
    new = tl.load(U + place * (Q * BV) + here[:, None] * BV + v_at[None, :], mask=there, other=0.0)
    score = tl.load(scores + place * (Q * Q) + here[:, None] * Q + here[None, :])
    seen += tl.dot(score, new, input_precision="tf32x3")
    written = (token < T)[:, None] & there
    tl.store(y + ((row * T + token[:, None]) * H + head) * V + v_at[None, :], seen, mask=written)


@triton.jit
def _unit(x):
    """What each of these keys (Q, K) is to be multiplied with, to have the length 1."""
    full = x.to(tl.float32)
    return tl.rsqrt(tl.sum(full * full, 1) + 1e-6)


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
    *,
    part: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens, as `statecache.ops.gated_delta.chunk` with g (B, T, H): all in float32, whatever the inputs.

    `part`: channels of a head's values that a program of the second launch takes.
    """
    rows, tokens, heads, V = v.shape
    J, K = q.shape[2:]
    q, k, v, g, beta = (along(x) for x in (q, k, v, g, beta))
    state, count, at = dense(state, count, at)
    marks = 0 if at is None else at.shape[1]
    Q, BK, BV = block(tokens, v.device, K), padded(K), padded(V)
    total, lanes = triton.cdiv(tokens, Q), rows * heads
    band = min(total, room(lanes * max(BK * BV, Q * (Q + BK + BV))))

    def made(*shape: int) -> Tensor:
        return v.new_empty(shape, dtype=torch.float32)

    scores, W, U, states = (made(lanes * band * size) for size in (Q * Q, Q * BK, Q * BV, BK * BV))
    reads, writes, decays = made(lanes * band * Q), made(lanes * band * Q), made(lanes * band)
    y, after = made(rows, tokens, heads, V), made(rows, heads, K, V)
    kept = None if at is None else made(rows, marks, heads, K, V)
    counted, begun, marked = (y if x is None else x for x in (count, state, at))
    by_query, by_key, by_value = q.stride()[:3], k.stride()[:3], v.stride()[:3]
    part, read = part or width(V, lanes, 32), min(BV, 64)
    sizes: dict[str, Any] = {"J": J, "K": K, "H": heads, "V": V, "Q": Q, "BK": BK, "BV": BV, "num_warps": 4}
    for first in range(0, total, band):
        chunks = min(band, total - first)
        with torch.cuda.device_of(v):
            _within[(lanes, chunks)](
                *(q, k, v, g, beta, counted, scores, W, U, reads, writes, decays),
                *(*by_query, *by_key, *by_value, *g.stride()[:2], *beta.stride()[:2], tokens, first, K**-0.5),
                COUNTED=count is not None,
                **sizes,
            )
            _through[(lanes, triton.cdiv(V, part))](
                *(k, g, begun, counted, marked, W, U, writes, decays, states, after, y if kept is None else kept),
                *(*by_key, *g.stride()[:2], tokens, first, chunks),
                N=marks,
                BEGUN=first > 0 or state is not None,
                COUNTED=count is not None,
                PART=part,
                num_stages=1,
                **sizes,
            )
            _read[(lanes, chunks, triton.cdiv(V, read))](
                *(q, scores, U, reads, states, y, *by_query, tokens, first),
                PART=read,
                **sizes,
            )
        begun = after
    return y, after, kept
