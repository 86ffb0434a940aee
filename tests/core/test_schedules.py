"""Any schedule of operations on the rings equals the same schedule on lists."""

from __future__ import annotations

from types import SimpleNamespace

import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statecache.clock
import statecache.errors
import statecache.replay
import statecache.ring
import statecache.round
import statecache.spec
import statecache.states
import statecache.step
from statecache.storage.dense import Dense
from statecache.storage.paged import Paged

CORE = SimpleNamespace(
    clock=statecache.clock,
    errors=statecache.errors,
    replay=statecache.replay,
    ring=statecache.ring,
    round=statecache.round,
    spec=statecache.spec,
    states=statecache.states,
    step=statecache.step,
    stores={"dense": Dense, "paged": Paged},
)
WHAT = (
    ["step"] * 4
    + ["ragged"] * 2
    + ["rollback"] * 3
    + ["speculate"] * 2
    + ["checkpoint", "restore", "gather", "reset", "fork"]
)


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # put back after the test, which sets it too


each = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
number = st.one_of(st.sampled_from([1, 1, 2, 3]), st.integers(0, 29))  # mostly steps of a few tokens, within the slack
operation = st.tuples(st.sampled_from(WHAT), number, each)
schedules = st.lists(operation, min_size=1, max_size=25)


@pytest.mark.parametrize("store", ["dense", "paged"])
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("leased", [False, True], ids=["put", "leased"])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@settings(max_examples=150, deadline=None)
@given(schedule=schedules, back=st.sampled_from([True, True, False]))
@example(
    back=True,
    schedule=[("step", n, (0,)) for n in (9, 1, 1, 1)]
    + [("rollback", 0, (2,)), ("step", 3, (0,)), ("rollback", 0, (2,))],
)
@example(
    back=True,
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
    schedule=[
        ("step", 9, (0,)),
        ("checkpoint", 0, (0,)),
        ("rollback", 0, (2,)),
        ("speculate", 2, (0,)),
        ("restore", 0, (0,)),
    ],
)
def test_any_schedule_equals_lists(
    fixed: bool, leased: bool, on_device: bool, store: str, back: bool, schedule: list[oracle.Op]
) -> None:
    oracle.run(CORE, schedule, fixed=fixed, leased=leased, on_device=on_device, back=back, store=store)
