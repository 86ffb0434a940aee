"""Entries in a narrower dtype than they are read in: how near, and that what is read can be written again."""

from __future__ import annotations

import itertools
import random

import oracle
import pytest
import test_mutants
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import ROUNDS

from statecache.storage.rounded import Rounded
from statecache.storage.table import RECURRENT

unload = pytest.fixture(autouse=True)(test_mutants.unload.__wrapped__)  # type: ignore[attr-defined]
ONE = slice(0, 1)


def made(name: str = "bfloat16", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Rounded:
    store = RECURRENT[name].make(2, 1, (3, 5), axis=1, dtype=dtype, device=torch.device(device), static=False)
    assert isinstance(store, Rounded)
    return store


@settings(max_examples=30, deadline=None)
@given(size=st.floats(2.0**-100, 2.0**100), seed=st.integers(0, 10**6))
def test_bfloat16_is_off_by_half_its_last_place_and_does_not_drift(size: float, seed: int) -> None:
    store, entries = made(), torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(seed)) * size
    store.write(ONE, entries)
    seen = store.read(ONE)
    assert seen.dtype == torch.float32 and bool(((seen - entries).abs() <= entries.abs() * 2**-8).all())
    assert not torch.equal(seen, entries)
    store.write(ONE, seen)
    assert torch.equal(store.read(ONE), seen)


def test_what_is_not_finite_is_read_as_it_was() -> None:
    store, entries = made(), torch.full((2, 1, 3, 5), torch.nan)
    entries[0], entries[1, 0, 0] = torch.inf, -torch.inf
    store.write(ONE, entries)
    assert torch.equal(store.read(ONE).nan_to_num(7.0), entries.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_a_copy_and_what_is_lent_is_not(dtype: torch.dtype) -> None:
    store = made(dtype=dtype)
    store.read(ONE).fill_(1)
    assert not store.read(ONE).any()
    assert store.plain.dtype == torch.bfloat16 and store.plain.shape == (2, 1, 3, 5)
    store.plain.fill_(1)
    assert torch.equal(store.read(ONE), torch.ones(2, 1, 3, 5, dtype=dtype))


@pytest.mark.parametrize("name", RECURRENT)
def test_it_takes_half_the_bytes_of_float32_on_any_device(name: str) -> None:
    assert RECURRENT[name].exactness == "lossy"
    for device in ("cpu", "meta"):
        assert sum(buffer.nbytes for buffer in made(name, device).buffers()) == 2 * 3 * 5 * 2


@pytest.mark.parametrize("what", ROUNDS)
def test_a_mutant_of_it_is_killed(what: str) -> None:
    core, rnd = test_mutants.load("storage.rounded", ROUNDS[what]), random.Random(7)
    for i, leased in itertools.product(range(30), (True, False)):
        schedule, form = test_mutants.by_chance(rnd, i)
        try:
            oracle.run(core, schedule, oracle.replace(form, leased=leased, store="rounded"))
        except Exception:
            return
    raise AssertionError(f"nothing notices that {what}")
