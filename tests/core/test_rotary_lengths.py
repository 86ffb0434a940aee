"""Which rows are rotated alike, against the definition: rows whose factors are the same."""

from __future__ import annotations

import random

import pytest

from statecache import errors
from statecache.rotary import Rotary

LONG = Rotary("longrope", once=(4,))
KINDS = [LONG, Rotary("longrope", once=(3, 7)), Rotary("dynamic", always=5), Rotary("both", once=(3,), always=6)]
FAR = 40


def factors(rotary: Rotary, length: int) -> tuple[int, int]:
    """What stands for the factors of a row of this length."""
    always = rotary.always
    return sum(length > n for n in rotary.once), length if always is not None and length > always else 0


@pytest.mark.parametrize("rotary", KINDS, ids=str)
def test_the_shortest_and_the_longest_row_that_is_rotated_alike(rotary: Rotary) -> None:
    for length in range(1, 12):
        alike = [n for n in range(FAR) if factors(rotary, n) == factors(rotary, length)]
        assert rotary.shortest(length) == alike[0]
        assert rotary.longest(length) == (None if alike[-1] == FAR - 1 else alike[-1])
    assert rotary.first == rotary.longest(1)
    rotary.check_unseen(rotary.first)
    for limit in (rotary.first + 1, None):
        with pytest.raises(errors.RotaryError, match=rf"make the cache with capacity={rotary.first} or less"):
            rotary.check_unseen(limit)


@pytest.mark.parametrize("rotary", KINDS, ids=str)
def test_a_pass_is_taken_where_it_mixes_no_factors(rotary: Rotary) -> None:
    draw = random.Random(0)
    taken = refused = 0
    for _ in range(400):
        held = [draw.choice([0, draw.randrange(1, 10)]) for _ in range(4)]
        rotated = [rotary.shortest(n) if n else 0 for n in held]
        chosen = draw.sample(range(4), draw.randrange(1, 5))
        lengths = [held[row] for row in chosen]
        ends = [n + draw.randrange(3) for n in lengths]
        moved = [(a, b) for a, b in zip(lengths, ends, strict=True) if a != b]
        wanted = {factors(rotary, end) for _, end in moved}
        mixes = len(wanted) > 1 or any(a and factors(rotary, a) != factors(rotary, b) for a, b in moved)
        over = None if chosen == [0, 1, 2, 3] else chosen
        if mixes:
            refused += 1
            with pytest.raises(errors.RotaryError):
                rotary.rotate(rotated, over, lengths, ends)
            continue
        taken += 1
        after = list(rotated)
        for row, start, end in zip(chosen, lengths, ends, strict=True):
            after[row] = rotary.shortest(end) if end != start else rotated[row]
        assert rotary.rotate(rotated, over, lengths, ends) == after
    assert taken > 50 and refused > 50


def test_a_refusal_names_the_first_row_and_the_one_that_differs() -> None:
    with pytest.raises(errors.RotaryError, match="rows 0 and 2 are 2 and 5 tokens long after the step"):
        LONG.rotate([0, 0, 0], None, [0, 0, 0], [2, 3, 5])
    with pytest.raises(errors.RotaryError, match="row 2 holds 4 tokens and the step makes them 5"):
        LONG.rotate([0, 0, 0], [2], [4], [5])
