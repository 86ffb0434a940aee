"""A pass that never closed has written all the same, if it wrote; one that only opened has not."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from statecache.errors import StaleMarkError, StepError
from statecache.round import Round
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.step import Step

STALE = r"row 0 was marked at 6 tokens and written again from 4 on"


def two_rows(capacity: int | None = None) -> States:
    key = StateSpec("key", "attention", (1, 1), None, axis=1)
    spec = ModelSpec((LayerSpec(0, "test", (key,)),))
    return States(spec, capacity=capacity, slack=4, rows=2, dtype=torch.float32, device="cpu")


def feed(states: States, tokens: int) -> Step:
    """Open a pass and write all of it."""
    step = states.open(tokens)
    states["0.key"].put(torch.ones(2, 1, tokens, 1), step)
    return step


def test_an_interrupted_pass_makes_marks_of_longer_rows_stale() -> None:
    states = two_rows()
    states.close(feed(states, 6))
    longer = states.checkpoint()
    states.rollback(torch.tensor([2, 0]))
    at_the_end = states.checkpoint()
    feed(states, 1)  # and never closed
    with pytest.raises(StaleMarkError, match=STALE):
        states.restore(longer)
    states.restore(at_the_end)
    assert states.lengths.tolist() == [4, 6]


def test_after_an_interrupted_pass_nothing_goes_on_but_a_restore_or_a_reset() -> None:
    states = two_rows()
    states.close(feed(states, 6))
    mark = states.checkpoint()
    for way_out in (lambda: states.restore(mark), states.reset):
        feed(states, 1)
        snapshot_of = (states.checkpoint, states.fork, lambda: states.snapshot(0), lambda: states.reset([0]))
        for refused in (lambda: states.open(1), lambda: states.rollback(1), lambda: states.gather([0]), *snapshot_of):
            with pytest.raises(StepError, match="the last forward pass was interrupted"):
                refused()
        way_out()
        states.close(feed(states, 1))


def test_a_pass_that_opened_and_wrote_nothing_can_be_forgotten() -> None:
    states = two_rows()
    states.close(feed(states, 6))
    longer = states.checkpoint()
    states.rollback(2)
    states.open(1)  # and never written
    states.close(states.open(0))
    assert states.lengths.tolist() == [4, 4]
    states.restore(longer)
    assert states.lengths.tolist() == [6, 6]


@pytest.mark.parametrize("in_a_round", [False, True])
def test_an_interrupted_compiled_pass_makes_them_stale_too(monkeypatch: pytest.MonkeyPatch, in_a_round: bool) -> None:
    states = two_rows(capacity=16)
    states.close(feed(states, 6))
    longer = states.checkpoint()
    states.rollback(2)
    at_the_end = states.checkpoint()
    with Round(states, 1) if in_a_round else nullcontext(), monkeypatch.context() as compiled:
        compiled.setattr(torch.compiler, "is_compiling", lambda: True)  # the host then knows no length
        states.open(1)  # and never closed
    with pytest.raises(StaleMarkError, match=STALE):
        states.restore(longer)
    states.restore(at_the_end)
    assert states.lengths.tolist() == [4, 4]
