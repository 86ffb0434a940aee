"""How many tokens to draft: as many as have paid of late. Counts decide, never clocks, so a run repeats itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from statecache.models.prepared import AHEAD

# What a round of so many drafts costs more than a step, in steps. Run plainly: fitted to the embedded models on a CPU,
# where passes cost what their layers do, as on a GPU: see docs/measured.md
ROUND = 0.5  # however many drafts there are
WIDTH = 0.1  # each of them, the fold of what is kept of it included

# As captured on a GPU, by kernels: fitted to rounds of four drafts at 1, 4 and 64 rows, see benchmarks/RESULTS.md
CAPTURED = 0.05
SPREAD = 0.13  # times the square root of all rows' drafts
# Of how many drafts, besides the most, rounds are captured: few, since each takes time. With the last token they are a
# small multiple of what kernels take at once
SIZES = (1, 4, 9, AHEAD - 1)

MEMORY = 0.9  # weight of what was known, at each new evidence
PROBE = 16  # rounds without a draft before one is tried again; every refusal in a row doubles them
PATIENCE = 64  # up to so many


@dataclass(frozen=True)
class Rounds:
    """What rounds cost: one of k drafts `dearer`(k) steps more than a step. `sizes`: besides the most, None: any."""

    dearer: Callable[[int], float]
    sizes: tuple[int, ...] | None = None

    @staticmethod
    def captured(rows: int) -> Rounds:
        """Of so many rows, on a GPU."""
        return Rounds(partial(captured_round, rows), SIZES)


def plain_round(drafts: int) -> float:
    """What a round of so many drafts a row costs more than a step, in steps."""
    return ROUND + WIDTH * drafts


def captured_round(rows: int, drafts: int) -> float:
    """The same of captured rounds of so many rows."""
    return CAPTURED + SPREAD * math.sqrt(rows * drafts)


PLAIN = Rounds(plain_round)


class DraftLength:
    """The draft length that the rate of acceptance makes the best of, 0..`most` tokens.

    With rate a, a round of k drafts yields (1 - a**(k + 1)) / (1 - a) tokens (Leviathan et al. 2023, eq. 1) and costs
    1 + `rounds.dearer`(k) + `cost` (k + 1) steps of the model: a drafter of that `cost` first takes in what was kept.
    Where no draft pays, a single token is tried now and then, less often while it is refused. `accepted` of `tried`:
    what to expect at first, and how firmly.
    """

    def __init__(self, cost: float, most: int, accepted: float, tried: float, rounds: Rounds = PLAIN) -> None:
        self.cost, self.most, self.rounds = cost, most, rounds
        self.accepted, self.tried = accepted, tried
        self.idle = self.wait = PROBE  # rounds without a draft, and how many there are to be

    @property
    def rate(self) -> float:
        """The part of the drafted tokens that is accepted, of those whose turn came."""
        return self.accepted / self.tried

    def length(self) -> int:
        """How many tokens to draft in this round."""
        best = self.best()
        if best or not self.most:
            return best
        self.idle += 1
        return int(self.idle > self.wait)

    def best(self) -> int:
        """How many drafted tokens yield the most tokens for the time."""
        rate, expected, best, speed = self.rate, 1.0, 0, 1.0
        for k in range(1, self.most + 1):
            expected += rate**k
            if self.rounds.sizes is not None and k not in self.rounds.sizes and k != self.most:
                continue
            cost = 1 + self.rounds.dearer(k) + (k + 1) * self.cost
            if expected / cost > speed:
                best, speed = k, expected / cost
        return best

    def learn(self, tried: int, accepted: int) -> None:
        """Take in what became of a round's drafts. `tried`: without those that stood behind a refused one."""
        if not tried:
            return
        self.tried = MEMORY * self.tried + tried
        self.accepted = MEMORY * self.accepted + accepted
        kept = 2 * accepted > tried
        self.wait = PROBE if kept else min(2 * self.wait, PATIENCE)
        self.idle = self.wait if kept else 0  # what goes well is tried again at once
