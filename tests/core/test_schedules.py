"""Any schedule of operations on the states equals the same schedule on lists."""

from __future__ import annotations

import itertools

import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import Form

import statecache.offload
import statecache.ring
import statecache.storage.changes
import statecache.storage.dense

CORE = oracle.core("statecache")


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # put back after the test, which sets it too
    monkeypatch.setattr(statecache.offload, "AHEAD", False)
    monkeypatch.setattr(statecache.offload, "SMALL", 0)  # all are small here
    monkeypatch.setattr(statecache.storage.dense, "WHOLE", 64)
    for name, size in (("ALONE", 100), ("ASIDE", 64), ("MANY", 4)):
        monkeypatch.setattr(statecache.storage.changes, name, size)


each = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
number = st.one_of(st.sampled_from([1, 1, 2, 3]), st.integers(0, 29))  # mostly steps of a few tokens, within the slack
operation = st.tuples(st.sampled_from(oracle.ALL), number, each)
schedules = st.lists(operation, min_size=1, max_size=25)
STORES, BOTH = ("dense", "paged", "coded", "rounded"), (False, True)
often = st.sampled_from([True, True, False])


@pytest.mark.parametrize("leased", [False, True], ids=["put", "leased"])
@pytest.mark.parametrize(
    ("fixed", "on_device", "store"),
    [(False, False, "offload"), *itertools.product([False], [False], STORES), *itertools.product([True], BOTH, STORES)],
)
@settings(max_examples=60, deadline=None)
@given(schedule=schedules, back=often, lazy=st.booleans(), attention=st.sampled_from([None, None, 23, 0]))
@example(
    back=True,
    lazy=False,
    attention=None,
    schedule=[("step", n, (0,)) for n in (9, 1, 1, 1)]
    + [("rollback", 0, (2,)), ("step", 3, (0,)), ("rollback", 0, (2,))],
)
@example(
    back=True,
    lazy=False,
    attention=None,
    schedule=[
        ("step", 4, (0,)),
        ("checkpoint", 0, (0,)),
        ("rollback", 0, (4,)),
        ("step", 1, (0,)),
        ("restore", 0, (0,)),
    ],
)
@example(
    back=True,
    lazy=False,
    attention=None,
    schedule=[
        ("step", 9, (0,)),
        ("checkpoint", 0, (0,)),
        ("rollback", 0, (2,)),
        ("speculate", 2, (0,)),
        ("restore", 0, (0,)),
    ],
)
@example(
    back=True, lazy=True, attention=None, schedule=[("checkpoint", 0, (0,)), ("step", 9, (0,)), ("restore", 0, (0,))]
)
@example(  # a log that is first written in a row admitted to a cache where nothing was
    back=True,
    lazy=True,
    attention=None,
    schedule=[("step", 4, (0,)), ("admit", 0, (0, 0, 1)), *[("step", 1, (0,))] * 4, ("rollback", 1, (0, 2, 0))],
)
def test_any_schedule_equals_lists(
    fixed: bool,
    on_device: bool,
    leased: bool,
    store: str,
    back: bool,
    lazy: bool,
    attention: int | None,
    schedule: list[oracle.Op],
) -> None:
    oracle.run(CORE, schedule, Form(fixed, leased, on_device, back, lazy, store, attention))
