"""How many tokens to draft: as many as have paid of late. Counts decide, never clocks, so a run repeats itself."""

from __future__ import annotations

# in forward passes of the model over one token
ROUND = 0.3  # what a pass over several costs more, however many they are
WIDTH = 0.03  # what each of them adds

MEMORY = 0.9  # weight of what was known, at each new evidence
PROBE = 16  # rounds without a draft before one is tried again


class Pace:
    """The draft length that the rate of acceptance makes the best of, 0..`most` tokens.

    With rate a, a round of k drafts yields (1 - a**(k + 1)) / (1 - a) tokens (Leviathan et al. 2023, eq. 1) and costs
    1 + ROUND + k * `cost` forward passes of the model. Where no draft pays, a single token is tried now and then.
    `accepted` of `tried`: what to expect at first, and how firmly.
    """

    def __init__(self, cost: float, most: int, accepted: float, tried: float) -> None:
        self.cost, self.most = cost, most
        self.accepted, self.tried = accepted, tried
        self.idle = 0  # rounds without a draft

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
        return int(self.idle > PROBE)

    def best(self) -> int:
        """How many drafted tokens yield the most tokens for the time."""
        rate, expected, best, speed = self.rate, 1.0, 0, 1.0
        for k in range(1, self.most + 1):
            expected += rate**k
            cost = 1 + ROUND + k * self.cost
            if expected / cost > speed:
                best, speed = k, expected / cost
        return best

    def learn(self, tried: int, accepted: int) -> None:
        """Take in what became of a round's drafts. `tried`: without those that stood behind a refused one."""
        if tried:
            self.tried = MEMORY * self.tried + tried
            self.accepted = MEMORY * self.accepted + accepted
            self.idle = PROBE if accepted == tried else 0  # what goes well is tried again at once
