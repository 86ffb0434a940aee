"""Which rows are rotated alike, against the definition: rows whose factors are the same."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

KINDS: list[dict[str, Any]] = [
    {"kind": "longrope", "once": (4,)},
    {"kind": "longrope", "once": (3, 7)},
    {"kind": "dynamic", "always": 5},
    {"kind": "both", "once": (3,), "always": 6},
]
FAR = 40


def run(core: SimpleNamespace, kind: dict[str, Any]) -> None:
    """All that `Rotary` says of rows of any length, of the core itself or of a mutant."""
    rotary, error = core.rotary.Rotary(**kind), core.errors.RotaryError
    rows_that_are_rotated_alike(rotary)
    unseen_lengths(rotary, error)
    passes(rotary, error)


def factors(rotary: Any, length: int) -> tuple[int, int]:
    """What stands for the factors of a row of this length."""
    always = rotary.always
    return sum(length > n for n in rotary.once), length if always is not None and length > always else 0


def rows_that_are_rotated_alike(rotary: Any) -> None:
    """The shortest and the longest of them."""
    for length in range(1, 12):
        alike = [n for n in range(FAR) if factors(rotary, n) == factors(rotary, length)]
        assert rotary.shortest(length) == alike[0]
        assert rotary.longest(length) == (None if alike[-1] == FAR - 1 else alike[-1])
    assert rotary.first == rotary.longest(1)


def unseen_lengths(rotary: Any, error: type[Exception]) -> None:
    """Steps whose lengths the host does not see are refused where any could change the factors."""
    rotary.check_unseen(rotary.first)
    for limit in (rotary.first + 1, None):
        with pytest.raises(error, match=rf"make the cache with capacity={rotary.first} or less"):
            rotary.check_unseen(limit)


def passes(rotary: Any, error: type[Exception]) -> None:
    """A pass is taken where it mixes no factors, and says how its rows are rotated then."""
    draw = random.Random(0)
    taken = refused = 0
    for _ in range(400):
        held = [draw.choice([0, draw.randrange(1, 10)]) for _ in range(4)]
        rotated = [rotary.shortest(n) if n else 0 for n in held]
        chosen = draw.sample(range(4), draw.randrange(1, 5))
        lengths = [held[row] for row in chosen]
        ends = [n + draw.choice((0, 0, 1, 1, 2, 2, 6)) for n in lengths]
        moved = [(a, b) for a, b in zip(lengths, ends, strict=True) if a != b]
        wanted = {factors(rotary, end) for _, end in moved}
        mixes = len(wanted) > 1 or any(a and factors(rotary, a) != factors(rotary, b) for a, b in moved)
        over = None if chosen == [0, 1, 2, 3] else chosen
        was = list(rotated)
        if mixes:
            refused += 1
            with pytest.raises(error):
                rotary.rotate(rotated, over, lengths, ends)
        else:
            taken += 1
            after = list(rotated)
            for row, start, end in zip(chosen, lengths, ends, strict=True):
                after[row] = rotary.shortest(end) if end != start else rotated[row]
            assert rotary.rotate(rotated, over, lengths, ends) == after
        assert rotated == was
    assert taken > 50 and refused > 50
