"""Random numbers: the words of SplitMix64, the same wherever they are asked for, uniform, and independent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from statecache.decode import noise
from statecache.decode.noise import Purpose, bits, exponential, uniform
from statecache.decode.request import GOLDEN, MULTIPLIERS, WORD, mix, row_seed


def word(seed: int, position: int, purpose: int, n: int) -> int:
    """The n-th of its stream, in Python's integers, as a long."""
    stream = mix(mix(seed) + (position * len(Purpose) + purpose) * GOLDEN)
    return (mix(stream + (n + 1) * GOLDEN) + 2**63) % 2**64 - 2**63


def test_mix_is_the_finaliser_of_splitmix64():
    # Vigna's splitmix64.c, started from 1234567
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix(1234567 + n * GOLDEN) for n in range(1, 5)] == want


def test_words_are_those_of_integers_without_a_sign():
    seeds, positions = [0, 5, -(2**63), 2**63 - 1], [[0, 1], [7, 2], [2**40, 3], [12, 2**31]]
    for purpose in Purpose:
        got = bits(torch.tensor(seeds), torch.tensor(positions), purpose, 5).tolist()
        pairs = zip(seeds, positions, strict=True)
        want = [[[word(s, p, purpose, n) for n in range(5)] for p in each] for s, each in pairs]
        assert got == want


@pytest.mark.parametrize("n", [1, 5, 37, 4096, 4099])
def test_numbers_are_the_same_bits_in_any_batch(n):
    seeds, positions = torch.randint(-(2**62), 2**62, (7,)), torch.randint(0, 9999, (7, 3))
    for make in (uniform, exponential):
        whole = make(seeds, positions, Purpose.DRAW, n)
        for b in range(7):
            assert torch.equal(make(seeds[b:], positions[b:], Purpose.DRAW, n), whole[b:])
            for t in range(3):
                alone = make(seeds[b : b + 1], positions[b : b + 1, t : t + 1], Purpose.DRAW, n)
                assert torch.equal(alone[0, 0], whole[b, t])


def test_numbers_are_within_their_bounds(monkeypatch):
    words = torch.tensor([[[0, -1, 2**62 - 1, 2**62 - 2, 2**62, 1]]])
    monkeypatch.setattr(noise, "bits", lambda *_: words.clone())
    got = uniform(torch.tensor([0]), torch.tensor([[0]]), Purpose.DRAW, 6)[0, 0]
    assert got.tolist() == [2.0**-62, *[1 - 2.0**-24] * 3, 2.0**-62, 2.0**-61]
    times = exponential(torch.tensor([0]), torch.tensor([[0]]), Purpose.DRAW, 6)[0, 0]
    assert times.isfinite().all() and (times > 0).all()
    assert float(times[0]) == 2.0**-62


# ---- statistics: every test that the numbers pass, numbers with a fault fail


N = 1 << 18


def along(axis: str) -> Tensor:
    """N neighbouring numbers along one of the axes they depend on."""
    zero, rising = torch.zeros(1, dtype=torch.long), torch.arange(N)
    if axis == "tokens":
        return uniform(zero, zero[:, None], Purpose.DRAW, N).flatten()
    if axis == "positions":
        return uniform(zero, rising[None], Purpose.DRAW, 1).flatten()
    if axis == "seeds":
        return uniform(rising, zero[:, None].expand(N, 1), Purpose.DRAW, 1).flatten()
    if axis == "purposes":
        each = [uniform(zero, rising[None, : N // 2], p, 1) for p in (Purpose.DRAW, Purpose.ACCEPT)]
        return torch.stack(each, -1).flatten()
    seeds = torch.tensor([(row_seed(7, row) + 2**63) % 2**64 - 2**63 for row in range(N)])
    return uniform(seeds, zero[:, None].expand(N, 1), Purpose.DRAW, 1).flatten()


AXES = ["tokens", "positions", "seeds", "purposes", "rows"]


def surprises(u: Tensor) -> dict[str, float]:
    """How many standard deviations each statistic of uniform numbers (N,) is off."""
    u = u.double()
    n = len(u)
    z = (u - 0.5) * math.sqrt(12)

    def off(counts: Tensor) -> float:
        free = len(counts) - 1
        expected = counts.sum() / len(counts)
        return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))

    pairs = (u[0::2] * 32).long() * 32 + (u[1::2] * 32).long()
    low = (u * 2**20).long() % 64  # the bits below the first fourteen
    runs = (u[1:] > u[:-1]).double()
    found = {
        "mean": float(z.mean() * math.sqrt(n)),
        "spread": float((z.square() - 1).mean() * math.sqrt(n / 0.8)),
        "cells": off(torch.bincount((u * 1024).long(), minlength=1024).double()),
        "pairs": off(torch.bincount(pairs, minlength=1024).double()),
        "low bits": off(torch.bincount(low, minlength=64).double()),
        "rises": float((runs.mean() - 0.5) * math.sqrt(12 * n)),
    }
    for lag in (1, 2, 3, 64):
        found[f"lag {lag}"] = float((z[lag:] * z[:-lag]).mean() * math.sqrt(n))
    return {name: abs(x) for name, x in found.items()}


@pytest.mark.parametrize("axis", AXES)
def test_numbers_along_every_axis_are_uniform_and_independent(axis):
    assert max(surprises(along(axis)).values()) < 4.9  # 1e-6, for each of ten statistics of five axes


def avalanche() -> float:
    """How many standard deviations the worst bit of a word is from changing half the time when one of its key does."""
    n, worst = 4000, 0.0
    seeds, positions = torch.randint(-(2**62), 2**62, (n,)), torch.randint(0, 2**30, (n, 1))
    before = bits(seeds, positions, Purpose.DRAW, 1)
    places = torch.arange(64)
    for bit in range(64):
        keys = [(seeds ^ (1 << bit if bit < 63 else -(2**63)), positions)]
        keys += [(seeds, positions ^ (1 << bit))] if bit < 30 else []
        for key in keys:
            changed = ((bits(*key, Purpose.DRAW, 1) ^ before).flatten()[:, None] >> places) & 1
            worst = max(worst, float((changed.double().mean(0) - 0.5).abs().max()) * 2 * math.sqrt(n))
    return worst


def test_every_bit_of_seed_and_position_changes_half_the_bits():
    assert avalanche() < 6.5


def no_mixing(x: Tensor) -> Tensor:
    return x


def no_shifts(x: Tensor) -> Tensor:
    for multiplier in MULTIPLIERS:
        x.mul_(noise._signed(multiplier))
    return x


def test_words_that_are_mixed_upwards_alone_are_found(monkeypatch):
    monkeypatch.setattr(noise, "_mix", no_shifts)
    assert avalanche() > 20


@pytest.mark.parametrize("axis", AXES[:-1])
def test_numbers_that_are_not_mixed_are_found(monkeypatch, axis):
    monkeypatch.setattr(noise, "_mix", no_mixing)
    assert max(surprises(along(axis)).values()) > 20


def distinct() -> int:
    """How many words there are for all keys of small numbers, 2**18 of them."""
    seeds, positions = torch.arange(-32, 32), torch.arange(64).expand(64, 64)
    return len(torch.cat([bits(seeds, positions, purpose, 21).flatten() for purpose in Purpose]).unique())


def test_no_two_keys_share_a_word(monkeypatch):
    assert distinct() == 64 * 64 * 21 * len(Purpose)
    monkeypatch.setattr(noise, "_mix", no_mixing)  # seed and position are one sum then
    assert distinct() < 64 * 64 * 21 * len(Purpose) / 10


def test_exponential_numbers_have_their_distribution():
    times = exponential(torch.tensor([1]), torch.arange(8)[None], Purpose.DRAW, N // 8).flatten().double()
    assert max(surprises(1 - (-times).exp()).values()) < 4.9
    # the smallest decide who wins a race of many: of 2**24, as many as there should be lie below 2**-18
    small = sum(
        int((exponential(torch.tensor([s]), torch.arange(16)[None], Purpose.DRAW, 1 << 18) < 2.0**-18).sum())
        for s in range(4)
    )
    assert abs(small - 64) < 4.9 * 8


def test_seeds_of_rows_are_the_seeds_own_and_all_different():
    assert row_seed(7, 0) == 7
    assert row_seed(-3, 0) == -3
    seeds = {row_seed(seed, row) & WORD for seed in range(50) for row in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= seed <= WORD for seed in seeds)
