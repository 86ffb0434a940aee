"""What changes a cache between passes takes a few launches, as benchmarks/gpu_marks.py counts them without a GPU."""

from __future__ import annotations

import pytest

import gpu_marks

MOST = {"checkpoint": 3, "restore": 4, "gather": 8, "reset": 4}  # launches, of 4 layers as of 40


@pytest.mark.parametrize("model", gpu_marks.SHAPES)
def test_every_operation_takes_a_few_launches(model: str) -> None:
    given = f"--device cpu --quick --context 40 --rows 1 4 --model {model}"
    found = gpu_marks.measure(gpu_marks.parser().parse_args(given.split()))["found"]
    assert len(found) == 2 * 2 * 7
    for one in found:
        assert 0 < one["kernels"] <= MOST[one["operation"].partition(",")[0]], one
        assert one["moved"] > 0 or (one["rows"] == 1 and one["operation"].startswith("gather"))
