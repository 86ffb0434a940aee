"""A pass that never closed has written all the same."""

from __future__ import annotations

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
