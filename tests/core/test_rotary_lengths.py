"""What a pass may mix of rotary factors that change with the length of a row."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import rotary_oracle

from statecache import errors
from statecache.rotary import Rotary

LONG = Rotary("longrope", once=(4,))


@pytest.mark.parametrize("kind", rotary_oracle.KINDS, ids=str)
def test_rows_are_rotated_alike_where_their_factors_are_the_same(kind: dict[str, Any]) -> None:
    rotary_oracle.run(oracle.core("statecache"), kind)


def test_a_refusal_names_the_first_row_and_the_one_that_differs() -> None:
    with pytest.raises(errors.RotaryError, match="rows 0 and 2 are 2 and 5 tokens long after the step"):
        LONG.rotate([0, 0, 0], None, [0, 0, 0], [2, 3, 5])
    with pytest.raises(errors.RotaryError, match="row 2 holds 4 tokens and the step makes them 5"):
        LONG.rotate([0, 0, 0], [2], [4], [5])
