"""Who proposes the tokens that a round checks: the row's own past, or a smaller model.

B rows, K drafted tokens, T new tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from statecache.decode.forward import feed
from statecache.decode.pace import Pace
from statecache.decode.sampling import Drafts, Sampler
from statecache.models.cache import StateCache

LONGEST = 64  # tokens in a run that is looked up: a row of T tokens keeps T runs of every length, T n**2 / 2 tokens


class Drafter(Protocol):
    """Proposes what may follow each row. Between two calls of `propose` comes one of `learn`, if it gave drafts."""

    forwards: int  # forward passes of its own so far

    def propose(self, rows: Sequence[list[int]], most: Sequence[int]) -> Drafts | None:
        """Up to `most[b]` tokens to follow the tokens of row b; None where there is none for any row."""

    def learn(self, accepted: Sequence[int]) -> None:
        """Hear how many of its last drafts each row has kept."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the rows, in this order."""


class Lookup:
    """Proposes what followed the newest earlier occurrence of a row's last `n` tokens, or fewer, down to one."""

    def __init__(self, n: int, most: int, device: torch.device) -> None:
        self.n, self.device, self.forwards = n, device, 0
        self.paces = {length: Pace(0.0, most, accepted=2, tried=3) for length in range(1, n + 1)}
        self.past: list[dict[tuple[int, ...], int]] = []  # of each row: where what followed a run of tokens begins
        self.known: list[int] = []  # how far each row is in `past`
        self._last: list[tuple[int, int]] = []  # run length and drafts of each row's last proposal

    def propose(self, rows: Sequence[list[int]], most: Sequence[int]) -> Drafts | None:
        """See `Drafter`."""
        if not self.past:
            self.past, self.known = [{} for _ in rows], [1] * len(rows)
        drafted, self._last, lengths = [], [], {}
        for b, (row, limit) in enumerate(zip(rows, most, strict=True)):
            run, at = self._find(b, row)
            if run and run not in lengths:
                lengths[run] = self.paces[run].length()
            tokens = _follow(row, at, min(lengths.get(run, 0), limit))
            drafted.append(tokens)
            self._last.append((run, len(tokens)))
        counts = [len(tokens) for tokens in drafted]
        if not any(counts):
            return None
        padded = [tokens + [0] * (max(counts) - len(tokens)) for tokens in drafted]
        return Drafts(torch.tensor(padded, device=self.device), counts)

    def learn(self, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        for run, pace in self.paces.items():
            of_run = [(n, kept) for (r, n), kept in zip(self._last, accepted, strict=True) if r == run and n]
            pace.learn(sum(min(n, kept + 1) for n, kept in of_run), sum(kept for _, kept in of_run))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        if self.past:
            self.past, self.known = [self.past[row] for row in rows], [self.known[row] for row in rows]

    def _find(self, b: int, row: list[int]) -> tuple[int, int]:
        """The longest run at the row's end that it has had before, and where what followed begins; (0, 0) without."""
        past = self.past[b]
        for end in range(self.known[b], len(row)):
            for run in range(1, min(self.n, end) + 1):
                past[tuple(row[end - run : end])] = end
        self.known[b] = len(row)
        for run in range(min(self.n, len(row) - 1), 0, -1):
            at = past.get(tuple(row[-run:]))
            if at is not None:
                return run, at
        return 0, 0


def _follow(row: list[int], at: int, n: int) -> list[int]:
    """The n tokens of `row` from `at` on; beyond its end what has gone before repeats."""
    tokens = row[at : at + n]
    while len(tokens) < n:
        tokens.append(tokens[len(tokens) - (len(row) - at)])
    return tokens


class Assistant:
    """Lets a smaller, prepared model draft, one token at a time for all rows. It keeps its own cache.

    The cache goes back to a mark where drafts were refused, and takes in again what was kept of them with what is
    missing: a pass over a few tokens costs about one step, where a log would make every step of the drafting dearer.

    `cost`: of its forward pass, as a part of one of the large model. Drafts come on `device`.
    """

    def __init__(self, model: Any, sampler: Sampler, most: int, cost: float, device: torch.device) -> None:
        self.model, self.sampler, self.device, self.forwards = model, sampler, device, 0
        self.cache: Any = StateCache(model.config)
        self._mark: Any = None  # before the drafts
        self.pace = Pace(cost, most, accepted=7, tried=8)
        self.held: list[int] = []  # tokens of each row that the cache holds
        self._last: list[int] = []  # drafts of each row's last proposal
        self._ahead = 0  # how many drafted tokens the cache has taken in

    def propose(self, rows: Sequence[list[int]], most: Sequence[int]) -> Drafts | None:
        """See `Drafter`."""
        if not self.held:
            self.held = [0] * len(rows)
        n = min(self.pace.length(), max(most))
        if not n:
            return None
        missing = [row[held:] for row, held in zip(rows, self.held, strict=True)]
        tokens, chances = [], []
        logits = self._feed(missing)
        self._mark = self.cache.checkpoint() if n > 1 else None
        for left in range(n - 1, -1, -1):
            token, q = self.sampler.draw(logits)
            tokens.append(token)
            chances += [] if q is None else [q]
            if left:
                logits = self._feed(token[:, None])
        self.held, self._ahead = [len(row) for row in rows], n - 1
        self._last = [min(n, limit) for limit in most]
        return Drafts(torch.stack(tokens, 1), self._last, torch.stack(chances, 1) if chances else None)

    def learn(self, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        if min(accepted) < self._ahead:
            self.cache.restore(self._mark)
        else:
            self.held = [held + self._ahead for held in self.held]
        tried = sum(min(n, kept + 1) for n, kept in zip(self._last, accepted, strict=True))
        self.pace.learn(tried, sum(accepted))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        if self.held:
            if self.cache.rows is not None:
                self.cache.gather(list(rows))
            self.held = [self.held[row] for row in rows]

    def _feed(self, tokens: Sequence[list[int]] | Tensor) -> Tensor:
        """Take in some tokens of each row; the logits after the last ones (B, V)."""
        self.forwards += 1
        return feed(self.model, self.cache, tokens).to(self.device)
