"""A smaller model that drafts by a decoder: one graph takes in what was kept and looks ahead.

B rows that have not ended, R rows of the cache, K drafted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from statecache.decode.decoder import Decoder, size_of
from statecache.decode.draft_length import SIZES
from statecache.decode.drafters import Assistant
from statecache.decode.sampling import Sampler
from statecache.kernels.cards import upload
from statecache.models.prepared import AHEAD

WIDTHS = (5, AHEAD)  # tokens that a graph takes in: few, since kernels are compiled for each


class CapturedAssistant(Assistant):
    """An `Assistant`, made as one, that drafts its likeliest tokens, on a cache that a decoder takes.

    The cache has a row for each that will ever be, and a slack of 1 + `most`. The model is prepared from the first
    draft until `close`.
    """

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        self._rows = self.cache.rows or 1
        self._places: list[int] = []  # of each row in the cache
        self._decoder: Decoder | None = None

    def close(self) -> None:
        """See `Drafter`."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None

    # ---- rows of the cache

    def _draft(self, rows: Sequence[list[int]], n: int, sampler: Sampler) -> tuple[Tensor, Tensor | None]:
        decoder = self._decoder = self._decoder or Decoder(self.model, self.cache, buckets=[self._rows])
        old = [(row[held:], at) for row, held, at in zip(rows, self.held, self._places, strict=True) if held]
        # all have taken part in as many rounds since, with a token or more in each: enough for so many passes
        longest = max((len(tokens) for tokens, _ in old), default=0)
        for left in reversed(range(1, -(-longest // (1 + self.most)))):
            now = [(tokens[: min(1 + self.most, len(tokens) - left)], at) for tokens, at in old]
            self._take(decoder, now, 1)
            old = [(tokens[len(taken) :], at) for (tokens, at), (taken, _) in zip(old, now, strict=True)]
        drafted = self._take(decoder, old + self._read(decoder, rows), n)[:, :n]
        if self._places != list(range(self._rows)):
            drafted = drafted[upload(self._places, decoder.device)]
        return drafted.to(self.device), None

    def _take(self, decoder: Decoder, missing: Sequence[tuple[list[int], int]], n: int) -> Tensor:
        """Take in these tokens, each with the place of its row, and look n tokens ahead, or more: (R, n or more)."""
        width = size_of(max(len(tokens) for tokens, _ in missing), 1 + self.most, WIDTHS)
        ahead = size_of(n, self.most, SIZES)
        packed, counts = [[0] * width for _ in range(self._rows)], [0] * self._rows
        for tokens, place in missing:
            packed[place][: len(tokens)], counts[place] = tokens, len(tokens)
        decoder.try_capture("the assistant's draft", width - 1, ahead)
        self.forwards += ahead
        return decoder.draft(upload(packed, decoder.device), counts, ahead)

    def _read(self, decoder: Decoder, rows: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        """Take in all but the last token of rows that joined: those, each with the place of its row."""
        new = [(row, at) for row, held, at in zip(rows, self.held, self._places, strict=True) if not held]
        if new:
            decoder.prefill([row[:-1] for row, _ in new], [at for _, at in new])
            self.forwards += len({len(row) for row, _ in new})
        return [(row[-1:], at) for row, at in new]

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
