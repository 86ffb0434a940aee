"""A smaller model that drafts by a decoder: its steps, and the pass over what was kept, are captured.

B rows that have not ended, R rows of the cache, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from statecache.decode.decoder import Decoder
from statecache.decode.draft_length import DraftLength, captured_round
from statecache.decode.drafters import Assistant
from statecache.decode.feed import upload
from statecache.decode.sampling import Sampler
from statecache.models.cache import StateCache
from statecache.models.prepared import AHEAD


class CapturedAssistant(Assistant):
    """An assistant that drafts its likeliest tokens, on a cache that a decoder takes.

    The cache has a row for each that will ever be, and a slack of 1 + `most`. The model is prepared from the first
    draft until `close`.
    """

    def __init__(self, model: Any, most: int, cost: float, device: torch.device, cache: StateCache) -> None:
        super().__init__(model, most, cost, device, cache)
        self._rows = cache.rows or 1
        self._places: list[int] = []  # of each row in the cache
        self._decoder: Decoder | None = None

    def close(self) -> None:
        """See `Drafter`."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    # ---- rows of the cache

    def _draft(self, rows: Sequence[list[int]], n: int, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        decoder = self._read(rows)
        missing = [row[held:] for row, held in zip(rows, self.held, strict=True)]
        ahead, width = _length(n, self.most), _width(min(max(map(len, missing)), 1 + self.most), 1 + self.most)
        if decoder.captures and not decoder.counts.graphs:
            decoder.captures = decoder.try_capture("the assistant's step", lambda: decoder.capture_draft(width, ahead))
        passes = -(-max(map(len, missing)) // (1 + self.most))
        for left in reversed(range(passes)):
            now = [min(1 + self.most, len(tokens) - left) for tokens in missing]
            packed, counts = [[0] * width for _ in range(self._rows)], [0] * self._rows
            for place, tokens, taken in zip(self._places, missing, now, strict=True):
                packed[place][:taken], counts[place] = tokens[:taken], taken
            if left:
                decoder.take(upload(packed, decoder.device), counts)
            missing = [tokens[taken:] for tokens, taken in zip(missing, now, strict=True)]
        drafted = decoder.draft(upload(packed, decoder.device), counts, ahead)[:, :n]
        self.forwards += passes + n - 1
        if self._places != list(range(self._rows)):
            drafted = drafted[upload(self._places, decoder.device)]
        return drafted.to(self.device), None

    def _length(self) -> DraftLength:
        return DraftLength(self.cost, self.most, accepted=7, tried=8, dearer=partial(captured_round, self._rows))

    def _holds_ahead(self, n: int) -> int:
        return 0

    def _make_room(self, known: int, rows: int) -> None:
        free = [place for place in range(self._rows) if place not in self._places]
        self._places += free[: rows - known]

    def _let_stay(self, known: list[int]) -> None:
        gone = [place for row, place in enumerate(self._places) if row not in known]
        if self._decoder is not None:
            self._decoder.reset(gone)
        self._places = [self._places[row] for row in known]

    def _read(self, rows: Sequence[list[int]]) -> Decoder:
        """Take in all but the last token of rows that joined: the decoder, with which all write."""
        decoder = self._decoder = self._decoder or Decoder(self.model, self.cache, buckets=[self._rows])
        new = [n for n, held in enumerate(self.held) if not held]
        if new:
            decoder.prefill([rows[n][:-1] for n in new], [self._places[n] for n in new])
            self.forwards += len({len(rows[n]) for n in new})
            for n in new:
                self.held[n] = len(rows[n]) - 1
        return decoder


def _length(drafts: int, most: int) -> int:
    """For how many drafts there is a graph where so many are needed: few lengths, so that there are few graphs."""
    return next(n for n in (1, 2, 4, 8, most) if drafts <= n <= most)


def _width(tokens: int, most: int) -> int:
    """For how many tokens there is a pass that takes in so many: fewer, since kernels are compiled for each."""
    return next(n for n in (5, AHEAD, most) if tokens <= n <= most)
