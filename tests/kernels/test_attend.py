"""Attention of few tokens against plain attention in float64: any length, splits, norms, rotation, gates, idle rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import DEVICE, HALF, NAN, draw, error, normed, strided
from torch import Tensor

from statecache.kernels.attend import Norms, Tile, attend

STARTS = [0, 1, 70, 33, 64]
# heads of keys, heads on each, head size, rotated channels, slots, splits, rows
SHAPES = [(2, 2, 16, 0, 80, 1, 5), (1, 4, 32, 8, 80, 3, 4), (2, 1, 20, 20, 72, 2, 3), (1, 16, 64, 16, 96, None, 3)]
MANY = [(8, 1, 16, 8, 96, None, 5), (8, 2, 136, 0, 96, None, 5)]  # heads, so that tiles are others
TILES = {1: Tile(64, 2, 264), 3: Tile(16, 8, 264), 2: Tile(32, 2, 528), None: None}  # by splits


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, H, D) rotated in their first channels."""
    size = cos.shape[-1]
    inside, rest = x[..., :size], x[..., size:]
    half = torch.cat([-inside[..., size // 2 :], inside[..., : size // 2]], -1)
    return torch.cat([inside * cos[:, None] + half * sin[:, None], rest], -1)


@pytest.mark.parametrize("form", ["plain", "whole", "idle"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES + MANY)
def test_attend_is_plain_attention(shape: Any, dtype: torch.dtype, form: str) -> None:
    J, G, D, R, slots, splits, rows = shape
    whole, R = form != "plain", R if form != "plain" else 0
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [n % 2 for n in range(rows)] if form == "idle" else [1] * rows
    query = strided(draw(rows, J * G * D * (2 if whole else 1), dtype=dtype))
    key, value = strided(draw(rows, J * D, dtype=dtype)), strided(draw(rows, J * D, dtype=dtype))
    keys, values = draw(rows, J, slots, D, dtype=dtype), draw(rows, J, slots, D, dtype=dtype)
    for row, start in enumerate(STARTS[:rows]):
        keys[row, :, start:] = values[row, :, start:] = NAN
    norms = Norms(draw(D, dtype=dtype), draw(D, dtype=dtype), 1e-6, 1.0) if whole else None
    angle = draw(rows, R)
    angles = (angle.cos(), angle.sin()) if R else None

    q, gate = query.double().view(rows, J * G, -1), None
    if whole:
        q, gate = q.chunk(2, -1)
    k, v = key.double().view(rows, J, D), value.double().view(rows, J, D)
    if norms is not None:
        q, k = (normed(x, by, 1e-6, 1.0) for x, by in ((q, norms.query), (k, norms.key)))
    if angles is not None:
        q, k = (turned(x, *(a.double() for a in angles)) for x in (q, k))
    want = []
    for row, start in enumerate(STARTS[:rows]):
        seen = [
            torch.cat([old[row, :, :start].double(), new[row, :, None]], 1) for old, new in ((keys, k), (values, v))
        ]
        ks, vs = (x.repeat_interleave(G, 0) for x in seen)
        share = (ks @ q[row, :, :, None] * 0.3).squeeze(-1).softmax(-1)
        y = (share[:, None] @ vs)[:, 0]
        want.append((y if gate is None else y * gate[row].sigmoid()).flatten())

    before = keys.clone(), values.clone()
    count = torch.tensor(counts, device=DEVICE) if form == "idle" else None
    got = attend(
        query,
        key,
        value,
        keys,
        values,
        starts,
        count,
        scale=0.3,
        norms=norms,
        angles=angles,
        gated=whole,
        splits=splits,
        tile=TILES[splits],
    )
    exact = dtype == torch.float32
    alive = [row for row, n in enumerate(counts) if n]
    assert error(got[alive], torch.stack(want)[alive]) < (2e-6 if exact else 5e-3)
    for row, n in enumerate(counts):
        assert n or not got[row].any()
    for held, old, new in ((keys, before[0], k), (values, before[1], v)):
        for row, start in enumerate(STARTS[:rows]):
            if counts[row]:
                assert error(held[row, :, start], new[row]) < (1e-6 if exact else 5e-3)
                old[row, :, start] = held[row, :, start]
        assert torch.equal(held.nan_to_num(nan=7.0), old.nan_to_num(nan=7.0))


TOKENS = {3: 9, 4: 5, 5: 2}  # by the number of rows


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_of_a_round_see_each_other(shape: Any, dtype: torch.dtype) -> None:
    J, G, D, R, slots, splits, rows = shape
    T, whole, starts = TOKENS[rows], G != 1, torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [n % (T + 1) for n in range(T, T + rows)]
    query = strided(draw(rows * T, J * G * D * (2 if whole else 1), dtype=dtype))
    key, value = strided(draw(rows * T, J * D, dtype=dtype)), strided(draw(rows * T, J * D, dtype=dtype))
    keys, values = draw(rows, J, slots, D, dtype=dtype), draw(rows, J, slots, D, dtype=dtype)
    for row, start in enumerate(STARTS[:rows]):
        keys[row, :, start:] = values[row, :, start:] = NAN
    norms = Norms(draw(D, dtype=dtype), draw(D, dtype=dtype), 1e-6, 1.0) if whole else None
    angle = draw(rows * T, R)
    angles = (angle.cos(), angle.sin()) if R else None
    options = {"scale": 0.3, "norms": norms, "gated": whole, "splits": splits}

    want, held = [], (keys.clone(), values.clone())
    for t in range(T):  # token by token
        at, one = [row * T + t for row in range(rows)], None if angles is None else tuple(x[t::T] for x in angles)
        there = torch.tensor([int(n > t) for n in counts], device=DEVICE)
        want.append(attend(query[at], key[at], value[at], *held, starts + t, there, angles=one, **options))
    before = keys.clone(), values.clone()
    count = torch.tensor(counts, device=DEVICE)
    got = attend(query, key, value, keys, values, starts, count, angles=angles, **options).unflatten(0, (rows, T))
    for row, n in enumerate(counts):
        if n:
            expected = torch.stack(want, 1)[row, :n]
            assert error(got[row, :n], expected.double()) < (2e-6 if dtype == torch.float32 else 5e-3)
        else:
            assert not got[row].any()
        for new, old, first in zip((keys, values), held, before, strict=True):
            start = STARTS[row]
            assert error(new[row, :, : start + n], old[row, :, : start + n].double()) < 1e-6 if start + n else True
            assert torch.equal(new[row, :, start + n :].nan_to_num(7.0), first[row, :, start + n :].nan_to_num(7.0))
