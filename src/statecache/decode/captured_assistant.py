"""A smaller model that drafts by a decoder: its steps, and the pass over what was kept, are captured.

B rows that have not ended, R rows of the cache, K drafted tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from statecache.decode.decoder import Decoder
from statecache.decode.draft_length import DraftLength
from statecache.decode.sampling import Drafts, Sampler
from statecache.models.cache import StateCache
from statecache.models.prepared import AHEAD
from statecache.snapshot import Mark


class CapturedAssistant:
    """Lets a smaller model draft its likeliest tokens, as `Assistant` does, on a cache that a decoder takes.

    The cache has a row for each that will ever be, and a slack of 1 + `most`. `cost`: of a forward pass, as a part of
    one of the large model. The model is prepared from the first draft until `close`.
    """

    def __init__(self, model: Any, most: int, cost: float, device: torch.device, cache: StateCache) -> None:
        self.model, self.cache, self.most, self.cost, self.device = model, cache, most, cost, device
        self.forwards, self._rows = 0, cache.rows or 1
        self.places: list[int] = []  # of each row in the cache
        self.lengths: list[DraftLength] = []
        self.held: list[int] = []  # tokens of each row that the cache holds
        self._decoder: Decoder | None = None
        self._mark: Mark | None = None  # before the drafts
        self._last: list[int] = []  # drafts of each row's last proposal
        self._ahead = 0  # how many drafted tokens the cache has taken in

    def propose(self, rows: Sequence[list[int]], most: Sequence[int], sampler: Sampler) -> Drafts | None:
        """See `Drafter`."""
        self.lengths += [DraftLength(self.cost, self.most, accepted=7, tried=8) for _ in rows[len(self.lengths) :]]
        wanted = [min(length.length(), limit) for length, limit in zip(self.lengths, most, strict=True)]
        n = max(wanted)
        if not n:
            return None
        decoder = self._catch_up(rows)
        self._mark = self.cache.checkpoint() if n > 1 else None
        drafted = [decoder.tokens.clone(), *[decoder.step().clone() for _ in range(n - 1)]]
        self.forwards += n - 1
        self.held, self._ahead, self._last = [len(row) for row in rows], n - 1, wanted
        return Drafts(torch.stack(drafted, 1)[self.places].to(self.device), wanted)

    def learn(self, accepted: Sequence[int]) -> None:
        """See `Drafter`."""
        assert self._decoder is not None
        if min(accepted) >= self._ahead:
            self.held = [held + self._ahead for held in self.held]
        elif self._mark is not None:
            self._decoder.restore(self._mark)
        for length, n, kept in zip(self.lengths, self._last, accepted, strict=True):
            length.learn(min(n, kept + 1), kept)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Drafter`."""
        known = [row for row in rows if row < len(self.places)]  # the others joined after the last proposal
        gone = [place for row, place in enumerate(self.places) if row not in known]
        if self._decoder is not None and gone:
            self._decoder.reset(gone)
        self.places, self.held = [self.places[row] for row in known], [self.held[row] for row in known]
        self.lengths = [self.lengths[row] for row in rows if row < len(self.lengths)]

    def close(self) -> None:
        """See `Drafter`."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    def _catch_up(self, rows: Sequence[list[int]]) -> Decoder:
        """Take in what rows have become: the decoder, whose `tokens` follow them."""
        decoder = self._decoder or Decoder(self.model, self.cache, buckets=[self._rows])
        self._decoder = decoder
        known = len(self.places)
        if known:
            self._take(decoder, [row[held:] for row, held in zip(rows, self.held, strict=False)])
        if known < len(rows):
            free = [place for place in range(self._rows) if place not in self.places]
            self.places += free[: len(rows) - known]
            decoder.prefill(rows[known:], self.places[known:])
            self.forwards += len({len(row) for row in rows[known:]})
            self._capture(decoder)
        return decoder

    def _take(self, decoder: Decoder, missing: list[list[int]]) -> None:
        """Take in these tokens of each row, one at least, in as few passes as the slack lets them be."""
        passes = -(-max(map(len, missing)) // (1 + self.most))
        for left in reversed(range(passes)):
            now = [min(1 + self.most, len(tokens) - left) for tokens in missing]
            width = _width(max(now), 1 + self.most)
            packed, counts = [[0] * width for _ in range(self._rows)], [0] * self._rows
            for place, tokens, n in zip(self.places, missing, now, strict=True):
                packed[place][:n], counts[place] = tokens[:n], n
            decoder.take(torch.tensor(packed, device=decoder.device), counts)
            missing = [tokens[n:] for tokens, n in zip(missing, now, strict=True)]
        self.forwards += passes

    def _capture(self, decoder: Decoder) -> None:
        """Have the decoder capture its step, or run it plainly from then on."""
        if decoder.counts.graphs or not decoder.captures:
            return
        mark, last = self.cache.checkpoint(), decoder.tokens.clone()
        try:
            decoder.capture()
        except RuntimeError as error:
            decoder.captures = False
            decoder.restore(mark)
            decoder.tokens.copy_(last)
            warnings.warn(f"the assistant's step could not be captured, and is run plainly: {error}", stacklevel=2)


def _width(tokens: int, most: int) -> int:
    """For how many tokens a pass is captured that takes in so many: few sizes, so that there are few graphs."""
    return next(n for n in (1, 5, AHEAD, most) if tokens <= n <= most)
