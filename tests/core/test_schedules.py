"""Any schedule of operations on the rings equals the same schedule on lists."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statecache.cache
import statecache.clock
import statecache.errors
import statecache.replay
import statecache.ring
import statecache.spec

CORE = SimpleNamespace(
    cache=statecache.cache,
    errors=statecache.errors,
    ring=statecache.ring,
    spec=statecache.spec,
    clock=statecache.clock,
    replay=statecache.replay,
)
WHAT = (
    ["step"] * 4
    + ["ragged"] * 2
    + ["rollback"] * 3
    + ["speculate"] * 2
    + ["lasting"]
    + ["checkpoint", "restore", "gather", "reset", "fork"]
)


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # put back after the test, which sets it too


each = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
number = st.one_of(st.sampled_from([1, 1, 2, 3]), st.integers(0, 29))  # mostly steps of a few tokens, within the slack
operation = st.tuples(st.sampled_from(WHAT), number, each)
schedules = st.lists(operation, min_size=1, max_size=25)


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("leased", [False, True], ids=["put", "leased"])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@settings(max_examples=150, deadline=None)
@given(schedule=schedules)
@example(
    schedule=[("step", n, (0,)) for n in (9, 1, 1, 1)]
    + [("rollback", 0, (2,)), ("step", 3, (0,)), ("rollback", 0, (2,))]
)
@example(
    schedule=[
        ("step", 4, (0,)),
        ("checkpoint", 0, (0,)),
        ("rollback", 0, (4,)),
        ("step", 1, (0,)),
        ("restore", 0, (0,)),
    ]
)
@example(
    schedule=[
        ("step", 9, (0,)),
        ("checkpoint", 0, (0,)),
        ("rollback", 0, (2,)),
        ("speculate", 2, (0,)),
        ("restore", 0, (0,)),
    ]
)
def test_any_schedule_equals_lists(fixed: bool, leased: bool, on_device: bool, schedule: list[oracle.Op]) -> None:
    oracle.run(CORE, schedule, fixed=fixed, leased=leased, on_device=on_device)
