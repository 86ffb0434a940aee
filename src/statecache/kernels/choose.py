"""The likeliest tokens, and which drafted ones they keep: two launches after a model's head.

B rows, K drafted tokens, T = 1 + K positions, V tokens of the model, S parts of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.early import early, wait
from statecache.kernels.rehearsal import Kernel

PROGRAMS = 256
BLOCK = 1024  # logits that a program looks at together


@Kernel
@triton.jit
def _likeliest(logits, keys, V, stride, PARTS: tl.constexpr, BV: tl.constexpr):
    place, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full([BV], -(1 << 63), tl.int64)
    for first in range(part * BV, V, PARTS * BV):
        v = first + tl.arange(0, BV)
        x = tl.load(logits + place * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
        word = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # one zero
        rank = tl.where(x != x, 0x7FFFFFFF, word ^ ((word >> 31) & 0x7FFFFFFF))  # as torch has it, NaN is above all
        key = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - v)  # of equals the first
        best = tl.maximum(best, tl.where(v < V, key, -(1 << 63)))
    tl.store(keys + place * PARTS + part, tl.max(best, 0))


@Kernel
@triton.jit
def _settle(
    keys,
    last,
    writes,
    drafts,
    counts,
    kept,
    taken,
    ends,
    E,
    K: tl.constexpr,
    SURE: tl.constexpr,
    ENDS: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    if EARLY:
        wait()
    row = tl.program_id(0).to(tl.int64)
    t, part = tl.arange(0, BT), tl.arange(0, PARTS)
    place = row * (K + 1) + t
    found = tl.load(keys + place[:, None] * PARTS + part[None, :], mask=(t <= K)[:, None], other=0)
    likeliest = 0x7FFFFFFF - (tl.max(found, 1) & 0xFFFFFFFF)
    write = tl.load(writes + row)
    n = 0
    if K:
        n = tl.load(counts + row).to(tl.int32)
        drafted = tl.load(drafts + row * K + t, mask=t < K, other=-1)
        if not SURE:
            n = tl.min(tl.where((t < n) & (drafted == likeliest), BT, t), 0)
        after = tl.sum(tl.where(t == n, likeliest, 0), 0)
        if ENDS:
            e = tl.arange(0, BE)
            end = tl.load(ends + row * E + e, mask=e < E, other=-1)
            ending = tl.max((drafted[:, None] == end[None, :]).to(tl.int32), 1) != 0
            first = tl.min(tl.where((t < n) & ending, t, BT), 0)
            if first < n:
                n = first
                after = tl.sum(tl.where(t == first, drafted, 0), 0)
        tl.store(kept + row, write * n)
        tl.store(taken + row, write * (1 + n))
    else:
        after = tl.max(likeliest, 0)
    if write > 0:
        tl.store(last + row, after)


def likeliest(logits: Tensor) -> Tensor:
    """Of logits (B, T, V) the likeliest token of each part of them: (B, T, S) long, in an order of their own.

    Of equals the first is taken, and NaN before any number, as `argmax` does.
    """
    rows, tokens, V = logits.shape
    flat = logits.reshape(rows * tokens, V)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    parts = triton.next_power_of_2(min(triton.cdiv(V, BLOCK), max(1, PROGRAMS // len(flat))))
    keys = torch.empty(rows, tokens, parts, dtype=torch.long, device=logits.device)
    with torch.cuda.device_of(logits):
        _likeliest[(len(flat), parts)](flat, keys, V, flat.stride(0), PARTS=parts, BV=BLOCK, num_warps=4)
    return keys


def choose(keys: Tensor, last: Tensor, writes: Tensor) -> None:
    """Put the likeliest of `keys` (B, 1, S) in place of `last` (B, 1), in rows that write: (B,) long, 1 or 0."""
    _launch(keys, last, writes, None, None)


def settle(
    keys: Tensor, last: Tensor, writes: Tensor, drafts: Tensor, counts: Tensor, kept: Tensor, ends: Tensor | None
) -> Tensor:
    """Keep of the `drafts` (B, K), `counts` (B,) of them, the first that are the likeliest in their places.

    keys: (B, 1 + K, S), after the `last` tokens (B, 1) and each draft. What follows is put in place of `last`. None is
    kept from a row's first end token on, ends (B, E), filled up with -1, and that follows. ends None: all are known to
    be right. writes: (B,), 1, or 0 where a row keeps nothing and stays. Gives how many tokens a row takes in, (B,).
    All are long, without gaps.
    """
    taken = torch.empty_like(counts)
    _launch(keys, last, writes, (drafts, counts, kept, taken), ends)
    return taken


def _launch(
    keys: Tensor, last: Tensor, writes: Tensor, drafted: tuple[Tensor, ...] | None, ends: Tensor | None
) -> None:
    rows, tokens, parts = keys.shape
    E = 0 if ends is None else ends.shape[1]
    with torch.cuda.device_of(keys):
        _settle[(rows,)](
            keys,
            last,
            writes,
            *(drafted or [keys] * 4),
            ends if E else keys,
            E,
            K=tokens - 1,
            SURE=ends is None,
            ENDS=E > 0,
            PARTS=parts,
            BT=triton.next_power_of_2(tokens),
            BE=triton.next_power_of_2(max(E, 1)),
            num_warps=4,
            **early(keys.device),
        )
