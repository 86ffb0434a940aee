"""A smaller model that drafts by a decoder: its steps, and the pass over what was kept, are captured.

B rows that have not ended, R rows of the cache, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statecache.decode.decoder import Decoder
from statecache.decode.drafters import Assistant
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
        decoder = self._catch_up(rows)
        self._mark = self.cache.checkpoint() if n > 1 else None
        drafted = [decoder.tokens.clone(), *[decoder.step().clone() for _ in range(n - 1)]]
        self.forwards += n - 1
        return torch.stack(drafted, 1)[self._places].to(self.device), None

    def _go_back(self) -> None:
        assert self._decoder is not None
        self._decoder.restore(self._mark)

    def _make_room(self, known: int, rows: int) -> None:
        free = [place for place in range(self._rows) if place not in self._places]
        self._places += free[: rows - known]

    def _let_stay(self, known: list[int]) -> None:
        gone = [place for row, place in enumerate(self._places) if row not in known]
        if self._decoder is not None:
            self._decoder.reset(gone)
        self._places = [self._places[row] for row in known]

    # ---- a pass

    def _catch_up(self, rows: Sequence[list[int]]) -> Decoder:
        """Take in what rows have become: the decoder, whose `tokens` follow them."""
        decoder = self._decoder = self._decoder or Decoder(self.model, self.cache, buckets=[self._rows])
        read = sum(held > 0 for held in self.held)  # the others come behind them
        if read:
            self._take(decoder, [row[held:] for row, held in zip(rows[:read], self.held, strict=False)])
        if read < len(rows):
            decoder.prefill(rows[read:], self._places[read:])
            self.forwards += len({len(row) for row in rows[read:]})
            if decoder.captures and not decoder.counts.graphs:
                decoder.captures = decoder.try_capture("the assistant's")
        return decoder

    def _take(self, decoder: Decoder, missing: list[list[int]]) -> None:
        """Take in these tokens of each row, one at least, in as few passes as the slack lets them be."""
        passes = -(-max(map(len, missing)) // (1 + self.most))
        for left in reversed(range(passes)):
            now = [min(1 + self.most, len(tokens) - left) for tokens in missing]
            width = _width(max(now), 1 + self.most)
            packed, counts = [[0] * width for _ in range(self._rows)], [0] * self._rows
            for place, tokens, n in zip(self._places, missing, now, strict=False):
                packed[place][:n], counts[place] = tokens[:n], n
            decoder.take(torch.tensor(packed, device=decoder.device), counts)
            missing = [tokens[n:] for tokens, n in zip(missing, now, strict=True)]
        self.forwards += passes


def _width(tokens: int, most: int) -> int:
    """For how many tokens a pass is captured that takes in so many: few sizes, so that there are few graphs."""
    return next(n for n in (1, 5, AHEAD, most) if tokens <= n <= most)
