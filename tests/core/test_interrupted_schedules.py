"""Whatever operator an operation of the core ends at, its states go on rightly or not at all."""

from __future__ import annotations

import random

import interrupted_oracle
import oracle
import pytest

import statecache.ring

KINDS = (
    ["pass"] * 6 + ["round"] * 3 + ["checkpoint"] * 3 + ["restore"] * 3 + ["rollback"] * 2 + ["gather", "reset", "fork"]
)


@pytest.fixture(autouse=True)
def first_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statecache.ring, "FIRST_SLOTS", 3)  # put back after the test, which sets it too


def drawn(seed: int) -> list[oracle.Op]:
    rnd = random.Random(seed)

    def operation() -> oracle.Op:
        return rnd.choice(KINDS), rnd.randint(0, 9), tuple(rnd.randint(0, 9) for _ in range(3))

    schedule = [operation() for _ in range(rnd.randint(1, 4))]
    for _ in range(3):
        schedule += [("interrupted", rnd.randint(0, 99), (0,)), *[operation() for _ in range(rnd.randint(1, 4))]]
    return schedule


FORMS = {"growing": (False, "dense"), "fixed": (True, "dense"), "paged": (False, "paged")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(40))
def test_an_interrupted_operation_goes_on_rightly_or_not_at_all(seed: int, form: str) -> None:
    schedule = drawn(seed)
    try:
        fixed, store = FORMS[form]
        interrupted_oracle.run(oracle.core("statecache"), schedule, fixed=fixed, store=store)
    except BaseException as error:
        error.add_note(f"schedule: {schedule!r}")
        raise
