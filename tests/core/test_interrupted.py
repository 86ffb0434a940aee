"""A pass that never closed has written all the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from statecache.cache import Rings

from statecache.errors import StaleMarkError
from statecache.spec import LayerSpec, ModelSpec, StateSpec


def test_an_interrupted_pass_makes_marks_of_longer_rows_stale() -> None:
    key = StateSpec("key", "attention", (1, 1), None, axis=1)
    spec = ModelSpec((LayerSpec(0, "test", (key,)),))
    rings = Rings(spec, slack=4, rows=2, dtype=torch.float32, device="cpu")
    rings.close(rings.open(6))
    longer = rings.checkpoint()
    rings.rollback(torch.tensor([2, 0]))
    at_the_end = rings.checkpoint()
    rings.open(1)  # and never closed
    with pytest.raises(StaleMarkError, match=r"row 0 was marked at 6 tokens and written again from 4 on"):
        rings.restore(longer)
    rings.restore(at_the_end)
    assert rings.lengths.tolist() == [4, 6]


@pytest.mark.parametrize("in_a_round", [False, True])
def test_an_interrupted_compiled_pass_does_so_too(monkeypatch: pytest.MonkeyPatch, in_a_round: bool) -> None:
    key = StateSpec("key", "attention", (1, 1), None, axis=1)
    spec = ModelSpec((LayerSpec(0, "test", (key,)),))
    rings = Rings(spec, capacity=16, slack=4, rows=2, dtype=torch.float32, device="cpu")
    rings.close(rings.open(6))
    longer = rings.checkpoint()
    rings.rollback(2)
    at_the_end = rings.checkpoint()
    with rings.speculate(1) if in_a_round else nullcontext(), monkeypatch.context() as compiled:
        compiled.setattr(torch.compiler, "is_compiling", lambda: True)  # the host then knows no length
        rings.open(1)  # and never closed
    with pytest.raises(StaleMarkError, match=r"row 0 was marked at 6 tokens and written again from 4 on"):
        rings.restore(longer)
    rings.restore(at_the_end)
    assert rings.lengths.tolist() == [4, 4]
