"""Whatever is done with a cache whose stores round, it holds what they make of each entry once, bit for bit."""

from __future__ import annotations

import itertools
import random

import lossy_oracle
import oracle
import pytest
import test_mutants
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossy_oracle import Form, Lossy
from mutants import LOSSY

import statecache.offload
import statecache.ring

CORE = oracle.core("statecache")
PLACES = ("growing", "offloaded", "fixed", "on device")
unload = pytest.fixture(autouse=True)(test_mutants.unload.__wrapped__)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # put back after the test, which sets it too
    monkeypatch.setattr(statecache.offload, "AHEAD", False)


def form(attention: str, recurrent: str | None, place: str, **options: object) -> Form:
    fixed = place in ("fixed", "on device")
    made = Form(attention, recurrent, fixed=fixed, on_device=place == "on device", offload=place == "offloaded")
    return lossy_oracle.replace(made, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("attention", "recurrent"),
    [("int8", None), ("fp8", None), ("dense", "bfloat16"), ("int8", "bfloat16"), ("fp8", "bfloat16"), ("dense", None)],
)
@settings(max_examples=25, deadline=None)
@given(
    schedule=st.lists(st.sampled_from(lossy_oracle.WHAT), min_size=1, max_size=25),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    back=st.sampled_from([True, True, True, False]),
    slack=st.sampled_from([3, 3, 4, 0]),
    seed=st.integers(0, 10**6),
)
def test_any_schedule_keeps_what_each_store_makes_of_an_entry_once(
    attention: str,
    recurrent: str | None,
    place: str,
    schedule: list[str],
    dtype: torch.dtype,
    back: bool,
    slack: int,
    seed: int,
) -> None:
    made = form(attention, recurrent, place, dtype=dtype, back=back, slack=slack)
    lossy_oracle.run(Lossy(CORE, made, seed), schedule, seed)


def by_chance(core: object) -> None:
    """Schedules of twenty operations, in every place with every store, several times."""
    rnd = random.Random(7)
    forms = itertools.product(("int8", "fp8"), ("bfloat16", "bfloat16", None), PLACES)
    for seed, (attention, recurrent, place) in enumerate([*forms] * 2):
        schedule = [rnd.choice(lossy_oracle.WHAT) for _ in range(20)]
        lossy_oracle.run(Lossy(core, form(attention, recurrent, place), seed), schedule, seed)


def test_the_core_itself_survives() -> None:
    by_chance(test_mutants.load())


@pytest.mark.parametrize("what", LOSSY)
def test_a_mutant_is_killed(what: str) -> None:
    module, *change = LOSSY[what]
    core = test_mutants.load(module, tuple(change))
    with pytest.raises(Exception):  # noqa: B017, PT011  whichever comes first
        by_chance(core)
