"""Random numbers without a state: a function of where they are used, so that none depends on what is drawn beside it.

B rows, T positions, V tokens.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from statecache.decode.request import GOLDEN, MULTIPLIERS, SHIFTS


class Purpose(IntEnum):
    """What a number is for; different ones are independent."""

    DRAW = 0  # a token of the model
    ACCEPT = 1  # whether a drafted token stays
    DRAFT = 2  # a token of the model that drafts


PURPOSES = len(Purpose)


def exponential(seeds: Tensor, positions: Tensor, purpose: Purpose, n: int) -> Tensor:
    """Exponential numbers of mean 1, float32, above 0: (B, T, n), of seeds (B,) and positions (B, T), both long."""
    return uniform(seeds, positions, purpose, n).neg_().log1p_().neg_()


def uniform(seeds: Tensor, positions: Tensor, purpose: Purpose, n: int) -> Tensor:
    """Uniform numbers within (0, 1), float32: (B, T, n), of seeds (B,) and positions (B, T), both long.

    Near 0 they are as fine as float32 is, so that one in 2**62 is as rare as that.
    """
    words = bits(seeds, positions, purpose, n).bitwise_and_(2**62 - 1)
    # rounded to 24 bits the largest would be 1
    return words.add_(1).to(torch.float32).mul_(2.0**-62).clamp_(max=1 - 2.0**-24)


def bits(seeds: Tensor, positions: Tensor, purpose: Purpose, n: int) -> Tensor:
    """Words of 64 random bits, as long: (B, T, n). Seed and position choose a stream of SplitMix64, its first n."""
    stream = _mix(seeds.clone())[:, None] + (positions * PURPOSES + int(purpose)) * _signed(GOLDEN)
    steps = torch.arange(1, n + 1, device=seeds.device) * _signed(GOLDEN)
    return _mix(_mix(stream)[..., None] + steps)


def _mix(x: Tensor) -> Tensor:
    """As `statecache.decode.request.mix`, in place."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        x.bitwise_xor_(_shifted(x, shift)).mul_(_signed(multiplier))
    return x.bitwise_xor_(_shifted(x, SHIFTS[-1]))


def _shifted(x: Tensor, n: int) -> Tensor:
    """The words n bits to the right, zeros from the left: a long has a sign, which would come in there."""
    return (x >> n).bitwise_and_((1 << (64 - n)) - 1)


def _signed(word: int) -> int:
    """The long of these 64 bits."""
    return word - 2**64 if word >= 2**63 else word
