"""An operation that ends at any of its operators leaves a cache as it was, as it should be, or one that refuses."""

from __future__ import annotations

import random

import prepared_oracle as oracle
import pytest

import statecache.ring

KINDS = ["feed"] * 4 + ["round"] * 3 + ["restore"] * 2 + ["rollback", "crop", "gather", "reset", "checkpoint", "fork"]
INTERRUPTED = [f"interrupted {kind}" for kind in KINDS]
PASSES = ["feed"] * 8 + ["ragged"] * 3 + ["rollback"] * 4 + ["speculate"] * 3 + ["checkpoint"] * 4 + ["restore"] * 2
STYLES = [PASSES + ["gather", "reset", "fork"], ["feed", "ragged", "checkpoint", "restore", "rollback"]]
PREPARED = [(name, room) for name in oracle.MODELS for room in oracle.ROOMS]
UNMODIFIED = [(name, room) for name in oracle.UNMODIFIED for room in ("growing", "fixed")]
SEEDS = range(16)


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # so that rings grow several times within a schedule


def drawn(seed: int) -> tuple[int, list[oracle.Op]]:
    """A slack, and a schedule in which some operations end early: mostly passes of a few tokens, and marks."""
    rnd = random.Random(seed)
    slack, what = rnd.choice([0, 3, 4, 5]), rnd.choice(STYLES)

    def operation(whats: list[str]) -> oracle.Op:
        number = rnd.choice([0, 1, 2, 3, rnd.randint(0, 35)])
        return rnd.choice(whats), number, tuple(rnd.randint(0, 9) for _ in range(3))

    schedule = [operation(["checkpoint", "feed", "feed"])]
    for _ in range(rnd.randint(1, 3)):
        schedule += [operation(what) for _ in range(rnd.randint(1, 6))]
        schedule.append(operation(INTERRUPTED))
    return slack, schedule + [operation(what) for _ in range(2)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "room"), PREPARED)
def test_a_prepared_model_goes_on_rightly_or_not_at_all(name: str, room: str, seed: int) -> None:
    slack, schedule = drawn(seed)
    oracle.run(oracle.build(name), schedule, slack=slack, room=room, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "room"), UNMODIFIED)
def test_an_unmodified_model_goes_on_rightly_or_not_at_all(name: str, room: str, seed: int) -> None:
    slack, schedule = drawn(seed)
    oracle.run(oracle.build_unmodified(name), schedule, slack=slack, room=room, seed=seed)
