"""Who proposes the tokens that a round checks: the row's own past, or a smaller model.

B rows, K drafted tokens, T new tokens, V tokens of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from statecache.decode.draft_length import PLAIN, DraftLength, Rounds
from statecache.decode.feed import feed
from statecache.decode.noise import Purpose
from statecache.decode.sampling import Drafts, Sampler
from statecache.models.cache import StateCache
from statecache.models.ready import promised


class Drafter(Protocol):
    """Proposes what may follow each row. Between two calls of `propose` comes one of `learn`, if it gave drafts.

    Rows that join come behind the others, in the next call of `propose`.
    """

    forwards: int  # forward passes of its own so far

    def propose(self, rows: Sequence[list[int]], most: Sequence[int], sampler: Sampler) -> Drafts | None:
        """Up to `most[b]` tokens to follow the tokens of row b, drawn as `sampler` has it; None where there is none."""

    def learn(self, accepted: Sequence[int]) -> None:
        """Hear how many of its last drafts each row has kept."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the rows, in this order; with none, too."""

    def close(self) -> None:
        """Give back what was borrowed. Idempotent; runs nothing."""


class Lookup:
    """Proposes what followed the newest earlier occurrence of a row's last `n` tokens, or fewer, down to one.

    `rounds`: see `DraftLength`.
    """

    def __init__(self, n: int, most: int, rounds: Rounds = PLAIN) -> None:
        self.n, self.forwards = n, 0
        self.lengths = {run: DraftLength(0.0, most, accepted=2, tried=3, rounds=rounds) for run in range(1, n + 1)}
        self.past: list[dict[tuple[int, ...], int]] = []  # of each row: where what followed a run of tokens begins
        self.known: list[int] = []  # how far each row is in `past`
        self._last: list[tuple[int, int]] = []  # run length and drafts of each row's last proposal

    def propose(self, rows: Sequence[list[int]], most: Sequence[int], sampler: Sampler) -> Drafts | None:
        """See `Drafter`."""
        for _ in rows[len(self.past) :]:
            self.past.append({})
            self.known.append(1)
        drafted: list[list[int]] = []
        lengths: dict[int, int] = {}
        self._last = []
        for b, (row, limit) in enumerate(zip(rows, most, strict=True)):
            run, at = self._find(b, row)
            if run and run not in lengths:
                lengths[run] = self.lengths[run].length()
            tokens = _follow(row, at, min(lengths.get(run, 0), limit))
            drafted.append(tokens)
            self._last.append((run, len(tokens)))
        return Drafts(drafted, [len(tokens) for tokens in drafted]) if any(drafted) else None

    def learn(self, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        for run, length in self.lengths.items():
            of_run = [(n, kept) for (r, n), kept in zip(self._last, accepted, strict=True) if r == run and n]
            length.learn(sum(min(n, kept + 1) for n, kept in of_run), sum(kept for _, kept in of_run))

    def keep(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        # rows that joined after the last proposal are not known yet
        known = [row for row in rows if row < len(self.past)]
        self.past, self.known = [self.past[row] for row in known], [self.known[row] for row in known]

    def close(self) -> None:
        """See `Drafter`."""

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

    Each row has a draft length of its own, so that what is drafted for it, and so what is drawn, depends on no other.
    `cost`: of its forward pass, as a part of one of the large model; `rounds`: see `DraftLength`. Drafts come on
    `device`.
    """

    def __init__(
        self,
        model: Any,
        most: int,
        cost: float,
        device: torch.device,
        cache: StateCache | None = None,
        rounds: Rounds = PLAIN,
    ) -> None:
        self.model, self.most, self.cost, self.device, self.forwards = model, most, cost, device, 0
        self.rounds = rounds
        with promised():
            self.cache: Any = StateCache(model.config) if cache is None else cache
        self._mark: Any = None  # before the drafts
        self.lengths: list[DraftLength] = []
        self.held: list[int] = []  # tokens of each row that the cache holds
        self._last: list[int] = []  # drafts of each row's last proposal
        self._ahead = 0  # how many drafted tokens the cache has taken in

    def propose(self, rows: Sequence[list[int]], most: Sequence[int], sampler: Sampler) -> Drafts | None:
        """See `Drafter`."""
        self._admit(len(rows))
        wanted = [min(length.length(), limit) for length, limit in zip(self.lengths, most, strict=True)]
        wanted = self._rotated(rows, wanted)
        n = max(wanted)
        if not n:
            return None
        tokens, chances = self._draft(rows, n, sampler)
        self.held, self._ahead, self._last = [len(row) for row in rows], self._holds_ahead(n), wanted
        return Drafts(tokens, wanted, chances)

    def learn(self, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        if min(accepted) < self._ahead:
            self._go_back()
        else:
            self.held = [held + self._ahead for held in self.held]
        for length, n, kept in zip(self.lengths, self._last, accepted, strict=True):
            length.learn(min(n, kept + 1), kept)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        known = [row for row in rows if row < len(self.held)]  # the others joined after the last proposal
        if known != list(range(len(self.held))):
            self._let_stay(known)
        self.held, self.lengths = [self.held[row] for row in known], [self.lengths[row] for row in known]

    def close(self) -> None:
        """See `Drafter`."""

    def _admit(self, rows: int) -> None:
        """Have so many rows: empty ones come behind those that there are."""
        known = len(self.held)
        if known < rows:
            self._make_room(known, rows)
        self.held += [0] * (rows - known)
        new = range(known, rows)
        self.lengths += [DraftLength(self.cost, self.most, accepted=7, tried=8, rounds=self.rounds) for _ in new]

    # ---- rows of the cache

    def _draft(self, rows: Sequence[list[int]], n: int, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        """Take in what rows have become, and draft n tokens for each (B, n), with what they were drawn from."""
        missing = [row[held:] for row, held in zip(rows, self.held, strict=True)]
        after = torch.tensor([len(row) for row in rows], device=self.device)
        tokens, chances = [], []
        logits = self._feed(missing)
        self._mark = self.cache.checkpoint() if n > 1 else None
        for ahead in range(n):
            token, q = sampler.draw(logits, after + ahead, Purpose.DRAFT)
            tokens.append(token)
            chances += [] if q is None else [q]
            if ahead < n - 1:
                logits = self._feed(token[:, None])
        return torch.stack(tokens, 1), torch.stack(chances, 1) if chances else None

    def _holds_ahead(self, n: int) -> int:
        """How many of n drafted tokens the cache has taken in."""
        return n - 1

    def _go_back(self) -> None:
        """Drop what was taken in of the drafts."""
        self.cache.restore(self._mark)

    def _make_room(self, known: int, rows: int) -> None:
        """Have empty rows behind the first `known`, so many in all."""
        if self.cache.rows is not None:
            self.cache.gather([*range(known), *[0] * (rows - known)])
            self.cache.reset(list(range(known, rows)))

    def _let_stay(self, known: list[int]) -> None:
        """Have these rows alone, in this order."""
        if known and self.cache.rows is not None:
            self.cache.gather(known)

    def _rotated(self, rows: Sequence[list[int]], wanted: list[int]) -> list[int]:
        """How many drafts can be made, by row, with keys that are rotated as those of the row's last token are.

        Rows whose keys would have to be rotated anew are read again, and all others with them.
        """
        rotary, ends = self.cache.spec.rotary, [len(row) for row in rows]
        if rotary is None:
            return wanted
        missing = [end - held for end, held in zip(ends, self.held, strict=True)]
        if any(self.cache.turned(b, n) for b, n in enumerate(missing)):
            self.cache.reset()
            self.held = [0] * len(rows)
            missing = ends
        if len(self.cache.alike(missing)) > 1:
            return [0] * len(rows)
        rooms = [longest - end for end in ends if (longest := rotary.longest(end)) is not None]
        return [min(n, 1 + min(rooms, default=n)) for n in wanted]

    def _feed(self, tokens: Sequence[list[int]] | Tensor) -> Tensor:
        """Take in some tokens of each row; the logits after the last ones (B, V)."""
        self.forwards += 1
        return feed(self.model, self.cache, tokens).to(self.device)
