"""Attention over a cache's keys for one token of each row, or the few of a round: norms, rotation, entries, attention.

It reads keys up to each row's length, not to the capacity, split over programs so that one long row fills the device;
a second launch joins the splits and applies the output's gate.

B rows, T tokens, H heads of size D, G of them on each of J keys' heads, C slots of a row, N splits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.early import early, fetch, launch, wait
from statecache.kernels.rehearsal import Kernel

MOST_SPLITS = 64


@dataclass(frozen=True)
class Tile:
    """Keys of a program's tile, its warps, and how many programs fill a device: two for each processor, or four."""

    keys: int
    warps: int
    programs: int


@triton.jit
def _turned(x, by, cos, sin, head, turn, d, there, eps, offset, D, R: tl.constexpr, NORMED: tl.constexpr):
    """Heads (BG, BD) of a query or key at x + head + d: their RMS norm, rotated in the first R channels; float32.

    turn: where the angles of each lie.
    """
    seen = tl.load(x + head[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(seen * seen, 1) / D + eps)[:, None]
        weight = (tl.load(by + d, mask=d < D, other=0.0).to(tl.float32) + offset)[None, :]
        seen = seen * scale * weight
    if R > 0:
        inside = d < R
        other = tl.where(d < R // 2, d + R // 2, d - R // 2)
        beside = tl.load(x + head[:, None] + other[None, :], mask=there & inside[None, :], other=0.0).to(tl.float32)
        if NORMED:
            beside = beside * scale
            beside *= (tl.load(by + other, mask=inside, other=0.0).to(tl.float32) + offset)[None, :]
        beside = tl.where((d < R // 2)[None, :], -beside, beside)
        angle, turns = turn[:, None] + d[None, :], there & inside[None, :]
        c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
        seen = seen * c + beside * s
    return seen


@Kernel
@triton.jit
def _attend(
    query,
    key,
    value,
    q_by,
    k_by,
    cos,
    sin,
    keys,
    values,
    start,
    count,
    sums,
    tops,
    weights,
    q_stride,
    k_stride,
    v_stride,
    start_stride,
    angle_stride,
    C,
    eps,
    offset,
    scale,
    T: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    APART: tl.constexpr,
    N: tl.constexpr,
    NORMED: tl.constexpr,
    COUNTED: tl.constexpr,
    FETCHED: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
):
    row, j, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    g, d, s = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BS)  # of g the heads of a token, then those of the next
    if EARLY:
        launch()
    at = tl.load(start + row * start_stride)
    taken = T
    if COUNTED:
        taken = tl.load(count + row)
    keys += (row * J + j) * C * D
    values += (row * J + j) * C * D
    each = tl.cdiv(tl.cdiv(at, BS), N) * BS
    begin = split * each
    end = tl.minimum(begin + each, at)
    if EARLY:
        if FETCHED:
            near = tl.minimum(begin + s, tl.maximum(at, 1) - 1) * D
            fetch(keys + near, FETCHED)
            fetch(values + near, FETCHED)
        wait()
    if COUNTED:
        if taken == 0:
            return
    there = (g < T * G)[:, None] & (d < D)[None, :]
    query += row * T * q_stride
    key += row * T * k_stride
    value += row * T * v_stride
    cos += row * T * angle_stride
    sin += row * T * angle_stride
    head, turn = g // G * q_stride + (j * G + g % G) * APART, g // G * angle_stride
    q = _turned(query, q_by, cos, sin, head, turn, d, there, eps, offset, D, R, NORMED)
    q = (q * scale).to(keys.dtype.element_ty)
    top = tl.full([BG], -float("inf"), tl.float32)
    weight = tl.zeros([BG], tl.float32)
    total = tl.zeros([BG, BD], tl.float32)
    if split == 0:  # the tokens themselves
        if T == 1:
            head = (g * 0 + j) * D
            k = _turned(key, k_by, cos, sin, head, g * 0, d, there, eps, offset, D, R, NORMED)
            k = k.to(keys.dtype.element_ty)
            v = tl.load(value + head[:, None] + d[None, :], mask=there, other=0.0)
            v = v.to(values.dtype.element_ty)
            first = (g == 0)[:, None] & there & (tl.broadcast_to(at, [BG, BD]) < C)
            tl.store(keys + at * D + (g * 0)[:, None] + d[None, :], k, mask=first)
            tl.store(values + at * D + (g * 0)[:, None] + d[None, :], v, mask=first)
            top = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
            weight += 1.0
            total += v.to(tl.float32)
        else:
            t = tl.arange(0, BT)
            real = (t < taken)[:, None] & (d < D)[None, :]
            k = _turned(key, k_by, cos, sin, t * k_stride + j * D, t * angle_stride, d, real, eps, offset, D, R, NORMED)
            k = k.to(keys.dtype.element_ty)
            v = tl.load(value + (t * v_stride + j * D)[:, None] + d[None, :], mask=real, other=0.0)
            v = v.to(values.dtype.element_ty)
            place, fits = (at + t) * D, (at + t < C)[:, None] & real
            tl.store(keys + place[:, None] + d[None, :], k, mask=fits)
            tl.store(values + place[:, None] + d[None, :], v, mask=fits)
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
            score = tl.where(t[None, :] <= (g // G)[:, None], score, -float("inf"))
            top = tl.max(score, 1)
            now = tl.exp(score - top[:, None])
            weight = tl.sum(now, 1)
            total = tl.dot(now.to(v.dtype), v, input_precision="ieee")
    for first in range(begin, end, BS):
        p = first + s
        held = (p < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + p[:, None] * D + d[None, :], mask=held, other=0.0)
        v = tl.load(values + p[:, None] * D + d[None, :], mask=held, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = tl.where((p < end)[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        less = tl.exp(top - higher)
        now = tl.exp(score - higher[:, None])
        weight = weight * less + tl.sum(now, 1)
        total = total * less[:, None] + tl.dot(now.to(v.dtype), v, input_precision="ieee")
        top = higher
    place = ((row * J + j) * N + split) * T * G + g
    tl.store(tops + place, top, mask=g < T * G)
    tl.store(weights + place, weight, mask=g < T * G)
    tl.store(sums + place[:, None] * D + d[None, :], total, mask=there)


@Kernel
@triton.jit
def _join(
    sums,
    tops,
    weights,
    gate,
    count,
    out,
    gate_stride,
    T: tl.constexpr,
    J: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    APART: tl.constexpr,
    N: tl.constexpr,
    GATED: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token // T
    if EARLY:
        launch()
    taken = T
    if COUNTED:
        taken = tl.load(count + row)
    if EARLY:
        wait()
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    some, inside = n < N, d < D
    out += (token * J * G + head) * D + d
    if COUNTED:
        if taken == 0:
            tl.store(out, tl.zeros([BD], tl.float32).to(out.dtype.element_ty), mask=inside)
            return
    place = (((row * J + head // G) * N + n) * T + token % T) * G + head % G
    top = tl.load(tops + place, mask=some, other=-float("inf"))
    share = tl.exp(top - tl.max(top, 0))
    share = tl.where(some, share, 0.0)
    weight = tl.sum(share * tl.load(weights + place, mask=some, other=0.0), 0)
    both = some[:, None] & inside[None, :]
    total = tl.sum(share[:, None] * tl.load(sums + place[:, None] * D + d[None, :], mask=both, other=0.0), 0)
    y = total / weight
    if GATED:
        y /= 1.0 + tl.exp(
            -tl.load(gate + token * gate_stride + head * APART + d, mask=inside, other=0.0).to(tl.float32)
        )
    tl.store(out, y.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Norms:
    """RMS norms (D,) of queries and keys, each weight + `offset`."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    count: Tensor | None,
    *,
    scale: float,
    norms: Norms | None = None,
    angles: tuple[Tensor, Tensor] | None = None,
    gated: bool = False,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Attend with T tokens of each row, whose keys and values go into `keys` and `values` (B, J, C, D): (B T, H D).

    query (B T, H D), key and value (B T, J D), of any stride between tokens. `gated`: query is (B T, H 2 D), each
    head's query and then its output's gate, of which the logistic function is taken. angles: cosines and sines (B T, R)
    of the first R channels, R even. start: (B,) or (1,), where rows stand; count: (B,), 0..T, None for all. Each token
    attends to all keys before `start`, and to its row's new ones up to its own. Outputs beyond a row's count are junk.
    """
    rows, J, C, D = keys.shape
    apart = 2 * D if gated else D
    heads = query.shape[1] // apart
    G, T = heads // J, len(query) // rows
    assert len(query) == rows * T == len(key) == len(value)
    assert keys.is_contiguous() and values.is_contiguous() and values.shape == keys.shape
    assert query.stride(1) == key.stride(1) == value.stride(1) == 1 and key.shape[1] == J * D
    cos, sin = (query, query) if angles is None else angles
    tile = tile or _tile(rows * J, D * keys.element_size(), T)
    if splits is None:
        splits = max(1, min(MOST_SPLITS, triton.cdiv(C, tile.keys), tile.programs // (rows * J)))
    sums = torch.empty(rows, J, splits, T * G, D, dtype=torch.float32, device=query.device)
    tops, weights = (torch.empty(rows, J, splits, T * G, dtype=torch.float32, device=query.device) for _ in range(2))
    out = torch.empty(rows * T, heads * D, dtype=query.dtype, device=query.device)
    by = (query, query, 0.0, 0.0) if norms is None else (norms.query, norms.key, norms.eps, norms.offset)
    counted, width = start if count is None else count, triton.next_power_of_2(D)
    options, size = early(query.device), D * keys.element_size()  # bytes of a key
    _attend[(rows, J, splits)](
        query,
        key,
        value,
        by[0],
        by[1],
        cos,
        sin,
        keys,
        values,
        start,
        counted,
        sums,
        tops,
        weights,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        1 if len(start) == rows and rows > 1 else 0,
        0 if angles is None else cos.stride(0),
        C,
        by[2],
        by[3],
        scale,
        T=T,
        J=J,
        G=G,
        D=D,
        R=0 if angles is None else cos.shape[1],
        APART=apart,
        N=splits,
        NORMED=norms is not None,
        COUNTED=count is not None,
        FETCHED=size if size % 16 == 0 else 0,
        BT=max(16, triton.next_power_of_2(T)),
        BG=max(16, triton.next_power_of_2(T * G)),
        BD=max(16, width),
        BS=tile.keys,
        num_warps=tile.warps,
        **options,
    )
    _join[(rows * T, heads)](
        sums,
        tops,
        weights,
        query[:, D:] if gated else query,
        counted,
        out,
        query.stride(0),
        T=T,
        J=J,
        G=G,
        D=D,
        APART=apart,
        N=splits,
        GATED=gated,
        COUNTED=count is not None,
        BN=triton.next_power_of_2(splits),
        BD=width,
        num_warps=4,
        **options,
    )
    return out


def _tile(heads: int, size: int, tokens: int) -> Tile:
    """What was best on an H100 for so many heads of keys in all rows, keys of `size` bytes."""
    if heads < 32 or tokens > 1:
        return Tile(32, 4, 264)
    return Tile(64, 2, 264) if size <= 256 else Tile(32, 2, 528)
