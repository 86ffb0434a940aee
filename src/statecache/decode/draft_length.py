"""How many tokens to draft: as many as have paid of late. Counts decide, never clocks, so a run repeats itself."""

from __future__ import annotations

# in forward passes of the model over one token; fitted to the embedded models on a CPU, where passes cost what their
# layers do, as on a GPU: see docs/measured.md
ROUND = 0.5  # what a pass over several costs more, however many they are
WIDTH = 0.1  # what each of them adds, the fold of what is kept of it included

MEMORY = 0.9  # weight of what was known, at each new evidence
PROBE = 16  # rounds without a draft before one is tried again; every refusal in a row doubles them
PATIENCE = 64  # up to so many


class DraftLength:
    """The draft length that the rate of acceptance makes the best of, 0..`most` tokens.

    With rate a, a round of k drafts yields (1 - a**(k + 1)) / (1 - a) tokens (Leviathan et al. 2023, eq. 1) and costs
    1 + ROUND + WIDTH k + `cost` (k + 1) forward passes of the model: a drafter of that `cost` first takes in what was
    kept before. Where no draft pays, a single token is tried now and then, less often while it is refused.
    `accepted` of `tried`: what to expect at first, and how firmly.
    """

    def __init__(self, cost: float, most: int, accepted: float, tried: float) -> None:
        self.cost, self.most = cost, most
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
            cost = 1 + ROUND + k * WIDTH + (k + 1) * self.cost
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
