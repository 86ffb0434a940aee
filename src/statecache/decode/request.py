"""What one row is to write, and how its tokens are drawn. No torch, so that a scheduler can hold and test it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeGuard

from statecache.errors import OptionError

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd
MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFTS = 30, 27, 31
WORD = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """A prompt and what is to become of it.

    - `prompt`: ids of tokens, at least one.
    - `max_new_tokens`: after so many the row ends; `ends`: ids that end it before, and are its last token then.
    - `temperature`: 0 takes the likeliest token, more draws; `top_k`, 0 for all, and `top_p`, of which tokens.
    - `seed`: what is drawn depends on it, on the position of the token in its row, and on the model. On nothing else.
    - `min_p`: draw only from tokens at least that likely, as a part of the likeliest one's probability.
    - `processors`: change logits before all that, see `statecache.decode.processors`.
    - `before`: tokens that the row's cache holds already, from which positions are counted on; `history`: those tokens,
      if they are known, which processors see before the prompt.

    Raises OptionError for values that make no sense.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    ends: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    processors: Sequence[Callable[..., Any]] = ()
    seed: int = 0
    before: int = 0
    history: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise OptionError("prompt: it has no token: give at least one")
        _check_integer("max_new_tokens", self.max_new_tokens, least=1)
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature={self.temperature!r}: give 0 for the likeliest token, or more to draw")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={self.top_p!r}: give a probability above 0, up to 1 for all tokens")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise OptionError(
                f"min_p={self.min_p!r}: give a part of the likeliest token's probability, 0 for all tokens"
            )
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise OptionError(f"top_k={self.top_k!r}: give the number of tokens to draw from, or 0 for all of them")
        check_seed(self.seed)
        _check_integer("before", self.before, least=0)


def check_seed(seed: object) -> None:
    """Raise OptionError unless `seed` is an integer of 64 bits, with or without a sign."""
    if not _is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise OptionError(f"seed={seed!r}: give an integer from -2**63 to 2**64 - 1, or None")


def row_seed(seed: int, row: int) -> int:
    """The seed of this row of several that share one: its own for row 0, else 0..2**64 - 1, as if drawn by it."""
    return mix(seed + GOLDEN * row) if row else seed


def mix(x: int) -> int:
    """Mix the bits of a word of 64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x &= WORD
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ (x >> shift)) * multiplier & WORD
    return x


def _check_integer(name: str, value: object, least: int) -> None:
    if not _is_integer(value) or value < least:
        raise OptionError(f"{name}={value!r}: give an integer of at least {least}")


def _is_integer(x: object) -> TypeGuard[int]:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)
