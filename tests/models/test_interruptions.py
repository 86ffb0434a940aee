"""An operation that ends at any of its operators leaves a cache as it was, as it should be, or one that refuses."""

from __future__ import annotations

import random

import attempts
import prepared_oracle as oracle
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import statecache.offload
import statecache.ring
from interruption import Interruption, Operators

KINDS = ["feed"] * 4 + ["round"] * 3 + ["restore"] * 2 + ["rollback", "crop", "gather", "reset", "checkpoint", "fork"]
INTERRUPTED = [f"interrupted {kind}" for kind in KINDS]
PASSES = ["feed"] * 8 + ["ragged"] * 3 + ["rollback"] * 4 + ["speculate"] * 3 + ["checkpoint"] * 4 + ["restore"] * 2
MARKS = ["feed", "ragged", "checkpoint", "restore", "rollback"]
PREPARED = [(name, room) for name in oracle.MODELS for room in oracle.ROOMS]
UNMODIFIED = [(name, room) for name in oracle.UNMODIFIED for room in ("growing", "fixed")]
PREPARED += [(name, room) for name in ("falcon_h1", "gemma3_text") for room in ("offloaded", "paged")]
UNMODIFIED += [("mamba2", "offloaded"), ("qwen3_5", "offloaded"), ("qwen3_5", "paged")]
SEEDS = range(14)
each_seed = pytest.mark.parametrize("seed", [*SEEDS[:7], *(pytest.param(n, marks=pytest.mark.long) for n in SEEDS[7:])])


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # so that rings grow several times within a schedule
    monkeypatch.setattr(statecache.offload, "AHEAD", False)  # so that two layers are not both there
    monkeypatch.setattr(statecache.offload, "SMALL", 0)  # all are small here


def drawn(seed: int) -> tuple[int, list[oracle.Op]]:
    """A slack, and a schedule in which some operations end early: mostly passes of a few tokens, and marks."""
    rnd = random.Random(seed)
    slack, what = rnd.choice([0, 3, 4, 5]), rnd.choice([[*PASSES, "gather", "reset", "fork", "saved", "moved"], MARKS])

    def operation(whats: list[str]) -> oracle.Op:
        number = rnd.choice([0, 1, 2, 3, rnd.randint(0, 35)])
        return rnd.choice(whats), number, tuple(rnd.randint(0, 9) for _ in range(3))

    schedule = [operation(["checkpoint", "feed", "feed"])]
    for _ in range(rnd.randint(1, 3)):
        schedule += [operation(what) for _ in range(rnd.randint(1, 6))]
        schedule.append(operation(INTERRUPTED))
    return slack, schedule + [operation(what) for _ in range(2)]


@each_seed
@pytest.mark.parametrize(("name", "room"), PREPARED)
def test_a_prepared_model_goes_on_rightly_or_not_at_all(name: str, room: str, seed: int) -> None:
    slack, schedule = drawn(seed)
    oracle.run(oracle.build(name), schedule, slack=slack, room=room, seed=seed)


@each_seed
@pytest.mark.parametrize(("name", "room"), UNMODIFIED)
def test_an_unmodified_model_goes_on_rightly_or_not_at_all(name: str, room: str, seed: int) -> None:
    slack, schedule = drawn(seed)
    oracle.run(oracle.build_unmodified(name), schedule, slack=slack, room=room, seed=seed)


def test_the_schedules_do_end_early() -> None:
    early = 0
    for seed in SEEDS:
        slack, schedule = drawn(seed)
        early += oracle.run(oracle.build("gemma3_text"), schedule, slack=slack, room="growing", seed=seed)
    assert early >= len(SEEDS), "an operation a schedule"


each = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
operation = st.tuples(st.sampled_from([*PASSES, *INTERRUPTED]), st.integers(0, 35), each)


@pytest.mark.parametrize("room", oracle.ROOMS)
@settings(max_examples=15, deadline=None, phases=[Phase.generate, Phase.shrink])
@given(slack=st.sampled_from([0, 3, 4]), schedule=st.lists(operation, min_size=3, max_size=12), seed=st.integers(0, 99))
def test_any_interrupted_schedule_equals_full_forwards(
    room: str, slack: int, schedule: list[oracle.Op], seed: int
) -> None:
    oracle.run(oracle.build("falcon_h1"), schedule, slack=slack, room=room, seed=seed)


# ---- one after the other, every operator of an operation

BEFORE = [("feed", 4, (1,)), ("checkpoint", 0, (0,)), ("ragged", 3, (1, 3, 2)), ("feed", 0, (0,)), ("feed", 0, (0,))]


def subject(room: str) -> oracle.Subject:
    """Rows of several tokens, the last of them fed one by one, and a mark."""
    return oracle.started(oracle.build("mamba2"), BEFORE, slack=4, room=room)


PARTS = {"gather": "gather", "rollback": "rollback", "reset": "reset", "restore": "restore", "round": "commit"}


@pytest.mark.parametrize("room", ["growing", "fixed"])
@pytest.mark.parametrize("kind", PARTS)
def test_every_operator_between_passes_may_be_the_last(kind: str, room: str) -> None:
    after = room == "fixed"  # of each operator; in the other room, before it
    for point in range(after, points(kind, room, PARTS[kind]), 2):
        end(kind, room, PARTS[kind], point)


@pytest.mark.parametrize("room", ["growing", "fixed"])
@pytest.mark.parametrize("kind", ["feed", "round"])
def test_any_operator_of_a_pass_may_be_the_last(kind: str, room: str) -> None:
    last = points(kind, room, "forward") - 1
    for point in sorted({last * n // 32 for n in range(33)}):
        end(kind, room, "forward", point)


def points(kind: str, room: str, part: str) -> int:
    s = subject(room)
    return attempts.count(s, planned(kind, s))[part]


def end(kind: str, room: str, part: str, point: int) -> None:
    s = subject(room)
    assert attempts.end(s, planned(kind, s), part, point, random.Random(point)), f"there is no point {point}"


def planned(kind: str, s: oracle.Subject) -> attempts.Attempt:
    attempt = attempts.plan(kind, s, 3, (3, 2, 1), random.Random(0))
    assert attempt is not None
    return attempt


# ---- the interruption itself


def test_every_point_of_a_block_is_reached_once() -> None:
    x = torch.zeros(3)
    with Operators() as whole:
        x.add_(1).mul_(2)
    assert whole.points == 4
    seen = []
    for point in range(5):
        x.zero_()
        try:
            with Operators(point):
                x.add_(1).mul_(2)
        except Interruption:
            seen.append((point, x[0].item()))
    assert seen == [(0, 0), (1, 1), (2, 1), (3, 2)]


def test_an_interruption_is_no_exception_that_code_could_catch_by_accident() -> None:
    assert not issubclass(Interruption, Exception)
