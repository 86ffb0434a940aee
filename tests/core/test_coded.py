"""Codes of numbers in bytes: how near, how many bytes, and that what is read can be written again."""

from __future__ import annotations

import pytest
import test_mutants
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants import CODES

from statecache.storage import coded
from statecache.storage.table import STORES

unload = pytest.fixture(autouse=True)(test_mutants.unload.__wrapped__)  # type: ignore[attr-defined]

# of a code: its bytes for D numbers, and how far off a number may be, of itself and of the run's largest
BOUNDS = {
    "Int8": (lambda d: d, 0, lambda place: torch.where(place < 8, 1 / 64, 1 / 128)),
    "Fp8": (lambda d: d + 1, 1 / 16, lambda place: torch.full(place.shape, 2.0**-17)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def holds(code: coded.Code, runs: torch.Tensor) -> None:
    """What a code promises, of runs (n, D) of finite numbers."""
    width, of_itself, of_largest = BOUNDS[type(code).__name__]
    numbers = runs.shape[-1]
    codes = code.encode(runs)
    assert codes.dtype == torch.int8 and codes.shape == (len(runs), width(numbers)) == (len(runs), code.width(numbers))
    seen, exact = code.decode(codes, numbers), runs.float()
    off = exact.abs() * of_itself + exact.abs().amax(-1, keepdim=True) * of_largest(torch.arange(numbers))
    assert bool(((seen - exact).abs() <= off).all())
    assert torch.equal(seen[exact == 0], exact[exact == 0])
    assert torch.equal(seen.bfloat16().float(), seen)
    assert torch.equal(code.encode(coded.within(seen, runs.dtype)), codes)


def runs(numbers: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Runs of sizes from 1e-3 to 1e3, some with one number that is far larger than the others, some of zeros."""
    g = torch.Generator().manual_seed(seed)
    made = torch.randn(40, numbers, generator=g) * 10 ** (6 * torch.rand(40, 1, generator=g) - 3)
    made[::4, seed % numbers] *= 30
    made[5] = 0
    made[6] = made[6, 0].abs() * torch.randn(numbers, generator=g).sign()
    return coded.within(made, dtype)


@pytest.mark.parametrize("code", [coded.Int8(), coded.Fp8()], ids=["int8", "fp8"])
@settings(max_examples=30, deadline=None)
@given(numbers=st.integers(8, 130), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 10**6))
@example(numbers=97, dtype=torch.float16, seed=999999)  # numbers beyond the largest that float16 has
@example(numbers=71, dtype=torch.float16, seed=29)  # fp8 rounds a number of it to 65,536, which float16 does not have
def test_a_code_keeps_its_bounds_and_does_not_drift(
    code: coded.Code, numbers: int, dtype: torch.dtype, seed: int
) -> None:
    holds(code, runs(numbers, dtype, seed))


@pytest.mark.parametrize("code", [coded.Int8(), coded.Fp8()], ids=["int8", "fp8"])
@settings(max_examples=50, deadline=None)
@given(largest=st.floats(2**-100, 2.0**126, width=32))
@example(largest=1.0)
@example(largest=1.9375)  # fp8 rounds it to 2
@example(largest=2 - 2**-23)
def test_a_code_keeps_its_bounds_at_every_size(code: coded.Code, largest: float) -> None:
    one = torch.tensor([[0.3, -0.9, 0, 0.01, 1e-6, 1, 0.5, -0.11, -1, 0.77, 0.99, 0.03]]) * largest
    holds(code, torch.cat([one, one.roll(5, -1), -one]))


@pytest.mark.parametrize("code", [coded.Int8(), coded.Fp8()], ids=["int8", "fp8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_run_with_what_is_not_finite_reads_as_nan(code: coded.Code, bad: float) -> None:
    two = torch.ones(2, 16)
    two[0, 3] = bad
    seen = code.decode(code.encode(two), 16)
    assert bool(seen[0].isnan().all()) and torch.equal(seen[1], two[1])
    assert torch.equal(code.encode(seen), code.encode(torch.where(two[:, :1] == 1, seen, 0)))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_largest_numbers_of_float16_stay_finite(name: str) -> None:
    most = torch.finfo(torch.float16).max
    one = torch.tensor([-most, most, 911.5, *[0.0] * 13]).half()
    store = STORES[name].make(1, 2, (16,), dtype=torch.float16, device=torch.device("cpu"))
    store.write(slice(0, 1), one[None, None])
    seen = store.read(slice(0, 1))[0, 0]
    assert bool(seen.isfinite().all())
    torch.testing.assert_close(seen, one, rtol=1 / 16, atol=most / 64)


@pytest.mark.parametrize("code", [coded.Int8(), coded.Fp8()], ids=["int8", "fp8"])
def test_bytes_of_zero_are_zeros(code: coded.Code) -> None:
    assert not code.decode(torch.zeros(3, code.width(16), dtype=torch.int8), 16).any()


def test_int8_takes_half_the_bytes_of_bfloat16_scales_included() -> None:
    for size in (8, 12, 64, 80, 128, 256):
        made = [
            STORES[name].make(2, 5, (3, size), axis=2, dtype=torch.bfloat16, device=torch.device("cpu"), static=False)
            for name in ("int8", "dense")
        ]
        coded_bytes, dense_bytes = (sum(b.untyped_storage().nbytes() for b in store.buffers()) for store in made)
        assert 2 * coded_bytes == dense_bytes


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_made_on_the_meta_device(name: str) -> None:
    store = STORES[name].make(2, 40, (3, 16), axis=2, dtype=torch.bfloat16, device=torch.device("meta"), static=False)
    assert all(buffer.is_meta for buffer in store.buffers())
    store.grow(80)
    assert all(buffer.is_meta for buffer in store.buffers()) and store.slots == 80


@pytest.mark.parametrize("what", CODES)
def test_a_mutant_of_a_code_is_killed(what: str) -> None:
    mutant = test_mutants.load("storage.coded", CODES[what]).coded
    try:
        for code in (mutant.Int8(), mutant.Fp8()):
            for seed in range(20):
                holds(code, runs(8 + seed, DTYPES[seed % 3], seed))
            two = torch.ones(2, 16)
            two[0, 3] = torch.inf
            assert code.decode(code.encode(two), 16)[0].isnan().all()
    except AssertionError:
        return
    raise AssertionError(f"nothing notices that {what}")
