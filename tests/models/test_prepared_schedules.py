"""Any schedule of operations on a prepared model equals full forwards of the unprepared one, row by row."""

from __future__ import annotations

import itertools

import prepared_oracle as oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statecache.offload
import statecache.ring

WHAT = (
    ["feed"] * 4
    + ["ragged"] * 3
    + ["rollback"] * 4
    + ["speculate"] * 4
    + ["checkpoint", "restore", "restore", "gather", "reset", "fork", "given up", "saved", "moved"]
)


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # so that rings grow several times within a schedule
    monkeypatch.setattr(statecache.offload, "AHEAD", False)  # so that two layers are not both there
    monkeypatch.setattr(statecache.offload, "SMALL", 0)  # all are small here


each = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
number = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, 35))  # mostly passes of a few tokens
operation = st.tuples(st.sampled_from(WHAT), number, each)
schedules = st.lists(operation, min_size=4, max_size=20)
slacks = st.sampled_from([0, 3, 4, 5])
each_model = pytest.mark.parametrize("name", oracle.MODELS)
each_room = pytest.mark.parametrize("room", oracle.ROOMS)


@each_room
@each_model
@settings(max_examples=20, deadline=None)
@given(slack=slacks, schedule=schedules)
@example(  # a round of one row, a pass of two that gives up before the last layer, and one row again
    slack=4,
    schedule=[
        ("speculate", 0, (0,)),
        ("speculate", 0, (0,)),
        ("speculate", 21, (2,)),
        ("feed", 0, (0,)),
        ("feed", 1, (0,)),
    ],
)
def test_any_schedule_equals_full_forwards(name: str, room: str, slack: int, schedule: list[oracle.Op]) -> None:
    oracle.run(oracle.build(name), schedule, slack=slack, room=room)


@pytest.mark.parametrize("room", ["offloaded", "paged"])
@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5", "gemma3_text"])
@settings(max_examples=15, deadline=None)
@given(slack=slacks, schedule=schedules)
def test_any_schedule_of_states_kept_elsewhere_equals_full_forwards(
    name: str, room: str, slack: int, schedule: list[oracle.Op]
) -> None:
    oracle.run(oracle.build(name), schedule, slack=slack, room=room)


ROUNDING = ["feed"] * 6 + ["ragged", "speculate", "rollback", "checkpoint", "fork"] * 2 + ["restore", "saved"] * 4
ROUNDING += ["gather", "moved"] * 2 + ["reset", "given up"]
rounding = st.lists(st.tuples(st.sampled_from(ROUNDING), number, each), min_size=8, max_size=20)


@pytest.mark.parametrize(
    ("name", "room"),
    [
        *itertools.product(["qwen3_5"], oracle.LOSSY),
        ("falcon_h1", "both"),
        ("gemma3_text", "fp8"),
        *itertools.product(["mamba2", "recurrent_gemma"], ["bfloat16"]),
    ],
)
@settings(max_examples=15, deadline=None)
@given(slack=slacks, schedule=rounding)
def test_any_schedule_with_stores_that_round_stays_near_full_forwards(
    name: str, room: str, slack: int, schedule: list[oracle.Op]
) -> None:
    oracle.run(oracle.build_rounding(name), schedule, slack=slack, room=room)


@pytest.mark.long
@each_room
@each_model
@settings(max_examples=400, deadline=None)
@given(slack=slacks, schedule=schedules)
def test_many_schedules_equal_full_forwards(name: str, room: str, slack: int, schedule: list[oracle.Op]) -> None:
    oracle.run(oracle.build(name), schedule, slack=slack, room=room)
