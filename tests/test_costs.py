"""What a decoded token costs is what is asked of it: the counts of benchmarks/counts.py, without its one time."""

from __future__ import annotations

import pytest
import torch

import counts


@pytest.mark.parametrize("measure", [name for name in counts.MEASURES if name != "marks"])
def test_counts_are_what_is_asked(measure: str) -> None:
    with torch.no_grad():
        found = counts.MEASURES[measure]()
    assert found
    assert [m.row() for m in found if not m.met] == []
