"""Rows that go on together: one forward pass a round, in which each checks its drafts and goes on at its own pace.

B rows that have not ended, K drafted tokens, V tokens of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from statecache.decode.decoder import Decoder, size_of
from statecache.decode.draft_length import SIZES
from statecache.decode.drafters import Drafter
from statecache.decode.feed import advance, feed, input_device
from statecache.decode.processors import processed
from statecache.decode.report import Reason, Report
from statecache.decode.request import Request
from statecache.decode.sampling import Drafts, Sampler
from statecache.decode.text import Text
from statecache.errors import RowsError
from statecache.kernels.cards import upload


@dataclass(frozen=True, eq=False)
class Coming:
    """What a step has written, on its way from the device: `told` (B,), of these rows, once `there` is over."""

    rows: list[Row]
    told: Tensor
    there: Any

    @staticmethod
    def of(rows: list[Row], tokens: Tensor) -> Coming:
        """Begin to copy the tokens (B,) of a step."""
        if not tokens.is_cuda:
            return Coming(rows, tokens.clone(), None)
        told = tokens.to("cpu", non_blocking=True)
        return Coming(rows, told, torch.cuda.current_stream(tokens.device).record_event())

    def by_row(self) -> dict[Row, int]:
        """The token of each row. Waits for it."""
        if self.there is not None:
            self.there.synchronize()
        last = self.told.tolist()
        return {row: last[row.place] for row in self.rows}


@dataclass(eq=False)
class Row:
    """A request on its way. `text`: of its new tokens, if a string of it may end the row, or if anybody reads it."""

    request: Request
    place: int  # of its row in the cache
    text: Text | None = None
    tokens: list[int] = field(init=False)  # of the prompt, and new ones
    over: bool = False
    anew: bool = False  # whether its row of the cache has been emptied, and is to be read from its first token on
    reason: Reason = "closed"

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def known(self) -> list[int]:
        """Its tokens, behind those of its cache that are known."""
        return [*self.request.history, *self.tokens]

    @property
    def unread(self) -> list[int]:
        """Of a row that waits, the tokens that its cache does not hold."""
        return self.known if self.anew else self.tokens

    @property
    def left(self) -> int:
        """How many tokens it may still write."""
        return self.request.max_new_tokens + len(self.request.prompt) - len(self.tokens)

    def write(self, new: Sequence[int]) -> list[int]:
        """Append tokens up to the row's end; return those."""
        for n, token in enumerate(new, 1):
            self.tokens.append(token)
            stopped = self.text is not None and self.text.push(token)
            if stopped or token in self.request.ends or not self.left:
                self.over = True
                self.reason = "stop" if stopped else "end" if token in self.request.ends else "length"
                return list(new[:n])
        return list(new)


class Batch:
    """Rows that a prepared model writes side by side. Requests may join, and rows leave, between any two rounds.

    After every round the cache holds each row's tokens but the last, or all of them with `runs_ahead`. Rows that have
    ended leave it; or with `keep_rows` they stay where they are, taking nothing in, until a request joins in their
    place.

    captured: steps and rounds are those of a `Decoder`, captured or compiled, on a cache that one takes; with
    `keep_rows` and without processors. Where there are drafts, which then are certain, a row that a string ends within
    them leaves more in the cache than it has written. Until `close` it has the model prepared.

    runs_ahead: nobody looks at the cache, so that a captured step need not wait until the host has the tokens of the
    one before. One that nobody waits for, since all of its rows had ended, counts nowhere.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        drafter: Drafter | None = None,
        *,
        keep_rows: bool = False,
        captured: bool = False,
        runs_ahead: bool = False,
    ) -> None:
        self.model, self.cache, self.drafter = model, cache, drafter
        self.keep_rows, self.captured, self.runs_ahead = keep_rows, captured, runs_ahead
        self.waiting: list[Row] = []  # joined since the last round
        self.live: list[Row] = []  # the others that have not ended
        self.device = input_device(model)
        self._sampler: Sampler | None = None  # of the live rows
        self._decoder: Decoder | None = None  # which these rows write with
        self._coming: Coming | None = None  # of a step that was begun ahead
        self._goes_on = False  # whether those that wait are all rows of the cache
        self._prompt = self._tokens = self._forwards = self._turns = 0
        self._drafted = self._accepted = self._with_drafts = self._compiled = 0

    def join(
        self, requests: Sequence[Request], texts: Sequence[Text | None] = (), *, goes_on: bool = False
    ) -> list[Row]:
        """Add rows, which the next round reads, each onto an empty row of the cache.

        `goes_on`: they are the first, and begin where the cache's rows stand, all of them, in order.
        Raises RowsError where the cache has no room for so many; none joins then. May allocate, where the cache grows.
        """
        places = list(range(len(requests))) if goes_on else self._make_room(len(requests))
        self._goes_on = goes_on
        joined = [
            Row(request, place, text)
            for request, place, text in zip(requests, places, texts or [None] * len(requests), strict=True)
        ]
        self.waiting += joined
        self._prompt += sum(len(request.prompt) for request in requests)
        return joined

    @property
    def running(self) -> bool:
        """Whether there is a row that has not ended."""
        return bool(self.waiting or self.live)

    @torch.no_grad()
    def round(self) -> dict[Row, list[int]]:
        """Run one pass; return what it adds to the rows that took part, one token at least. Rows that end leave.

        If rows have joined it gives them their first tokens, and the others wait. Waits for the device once.
        """
        self._start_over()
        new = self._read() if self.waiting else self._step()
        self._forwards += 1
        self._turns += len(new)
        self._tokens += sum(map(len, new.values()))
        self.leave([row for row in new if row.over])
        return new

    def leave(self, rows: Sequence[Row]) -> None:
        """Let rows go, whether they have ended or not. May allocate, where the cache grows."""
        gone = set(rows)
        if gone.isdisjoint([*self.live, *self.waiting]):
            return
        self._part_with(gone)
        self.waiting = [row for row in self.waiting if row not in gone]
        if self.keep_rows or not self.running:
            return
        left = [*self.live, *self.waiting]
        if self.cache.rows is not None:
            self.cache.gather([row.place for row in left])
        for place, row in enumerate(left):
            row.place = place

    @torch.no_grad()
    def take_in(self, rows: Sequence[Row]) -> None:
        """Feed the last token of these rows to the cache, for which they must have ended or left."""
        anew = {row for row in rows if self._turned(row, 1)}
        if anew:
            self.cache.reset([row.place for row in anew])
        last = {row: row.known if row in anew else row.tokens[-1:] for row in rows}
        for part in self._parts(list(rows), last):
            feed(self.model, self.cache, [last[row] for row in part], self._places(part))

    def close(self) -> None:
        """Drop what was captured. Idempotent; runs nothing."""
        if self._decoder is not None:
            counts = self._decoder.counts
            self._drop_coming()
            self._compiled += counts.replayed + counts.compiled
            self._decoder.close()
            self._decoder = None
        if self.drafter is not None:
            self.drafter.close()

    def report(self) -> Report:
        """What has been done so far."""
        return Report(
            prompt=self._prompt,
            tokens=self._tokens,
            forwards=self._forwards,
            turns=self._turns,
            drafted=self._drafted,
            accepted=self._accepted,
            rounds=self._with_drafts,
            compiled=self._compiled,
            assistant_forwards=0 if self.drafter is None else self.drafter.forwards,
        )

    @property
    def _may_run_ahead(self) -> bool:
        """Whether the step after the one whose tokens are awaited may begin."""
        return self.runs_ahead and self.drafter is None and self._decoder is not None and self._decoder.captures

    # ---- a round

    def _read(self) -> dict[Row, list[int]]:
        """Take in the prompts of those that wait; their first tokens."""
        rows = sorted(self.waiting, key=lambda row: row.place)
        unread = {row: row.unread for row in rows}
        whole = self._goes_on or self._places(rows) is None
        if whole and len(self.cache.alike([len(unread[row]) for row in rows])) == 1:
            logits = feed(self.model, self.cache, list(unread.values()))
        else:
            if self.cache.rows is None:
                self.cache.states.clock_for(len(rows), self.device)
            parts = self._parts(rows, unread)
            rows = [row for part in parts for row in part]
            self._forwards += len(parts) - 1
            logits = torch.cat(
                [feed(self.model, self.cache, [unread[r] for r in part], self._places(part)) for part in parts]
            )
        for row in rows:
            row.anew = False
        lengths = torch.tensor([len(row.tokens) for row in rows], device=self.device)
        logits = _processed(logits[:, None], rows)[:, 0]
        token, _ = Sampler([row.request for row in rows], self.device).draw(logits, lengths)
        self.live, self.waiting, self._sampler = self.live + self.waiting, [], None
        self._goes_on = False
        if self._decoder is not None:
            self._begin(self._decoder, rows, token)
        return {row: row.write([n]) for row, n in zip(rows, token.tolist(), strict=True)}

    def _step(self) -> dict[Row, list[int]]:
        """One or more tokens of every live row."""
        rows, drafts = self.live, None
        if self.captured and self._decoder is None:
            self._capture()
        if self._sampler is None:
            self._sampler = Sampler([row.request for row in rows], self.device)
        if self._decoder is not None:
            return self._by_decoder(self._decoder, self._sampler)
        parts = self.cache.alike([1] * len(rows), [row.place for row in rows])
        if self.drafter is not None and len(parts) == 1:  # a round is one pass
            # k drafts and the token that follows them are within the limit
            drafts = self.drafter.propose(
                [row.tokens for row in rows], [self._most(row) for row in rows], self._sampler
            )
        if drafts is not None:
            return self._check(self._sampler, drafts)
        packed = torch.tensor([[row.tokens[-1], len(row.tokens)] for row in rows], device=self.device)
        logits = _processed(self._advance(packed[:, :1], parts), rows)[:, -1]
        token, _ = self._sampler.draw(logits, packed[:, 1])
        return {row: row.write([n]) for row, n in zip(rows, token.tolist(), strict=True)}

    def _capture(self) -> None:
        """Have the live rows write with a decoder, unless its step cannot be captured."""
        decoder = self._decoder = Decoder(self.model, self.cache, buckets=[self.cache.rows])
        self._begin(decoder, self.live, torch.tensor([row.tokens[-1] for row in self.live]))
        if not decoder.try_capture("this model's step"):
            decoder.close()
            self.captured, self._decoder = False, None

    def _by_decoder(self, decoder: Decoder, sampler: Sampler) -> dict[Row, list[int]]:
        """The same, by a step of the decoder or by a round of it."""
        rows, drafts = self.live, None
        if self.drafter is not None:
            drafts = self.drafter.propose([row.tokens for row in rows], [row.left - 1 for row in rows], sampler)
        if drafts is None:
            coming = self._coming or Coming.of(rows, decoder.step())
            goes_on = self._may_run_ahead and all(row.left > 1 for row in rows)  # with the token that is coming too
            self._coming = Coming.of(rows, decoder.step()) if goes_on else None
            return {row: row.write([token]) for row, token in coming.by_row().items() if row in rows}
        assert drafts.probabilities is None and self.drafter is not None
        total, most = len(decoder.tokens), size_of(max(drafts.counts), self.cache.slack - 1, SIZES)
        places, counts = [row.place for row in rows], [0] * total
        for place, n in zip(places, drafts.counts, strict=True):
            counts[place] = n
        decoder.try_capture("this model's round", most)
        kept = decoder.check(self._packed(drafts, places, total, most), counts)
        verdict = (kept, decoder.tokens)
        if places != list(range(total)):
            at = upload(places, self.device)
            verdict = kept[at], decoder.tokens[at]
        agreed, written, lists = self._download(drafts, verdict)
        # an end token among the drafts is no part of what is kept, and follows it
        agreed = [n + (tokens[n : n + 1] == each[n:]) for n, tokens, each in zip(agreed, lists, written, strict=True)]
        new = {row: row.write(each) for row, each in zip(rows, written, strict=True)}
        self._count_round(drafts, agreed, new)
        return new

    def _count_round(self, drafts: Drafts, agreed: list[int], new: dict[Row, list[int]]) -> None:
        """Take note of what a round made of its drafts."""
        assert self.drafter is not None
        self._with_drafts += sum(n > 0 for n in drafts.counts)
        self._drafted += sum(drafts.counts)
        self._accepted += sum(min(n, len(each)) for n, each in zip(agreed, new.values(), strict=True))
        self.drafter.learn(agreed)

    def _begin(self, decoder: Decoder, rows: Sequence[Row], tokens: Tensor) -> None:
        """Have rows write with a decoder, behind these last tokens (n,), which their cache does not hold."""
        held = [row.request.before + len(row.tokens) - 1 for row in rows]
        decoder.begin([row.place for row in rows], [row.request for row in rows], tokens, held)

    def _advance(self, ids: Tensor, parts: list[list[int]]) -> Tensor:
        """Take in ids (B, 1) of the live rows, each of the `parts` of them in a pass of its own: logits (B, 1, V)."""
        if len(parts) == 1:
            return advance(self.model, self.cache, ids, None, self._places(self.live))
        self._forwards += len(parts) - 1
        apart = [
            advance(self.model, self.cache, ids[part], None, self._places([self.live[n] for n in part]))
            for part in parts
        ]
        order = torch.tensor([n for part in parts for n in part], device=ids.device)
        return torch.cat(apart)[order.argsort().to(apart[0].device)]

    def _check(self, sampler: Sampler, drafts: Drafts) -> dict[Row, list[int]]:
        """Feed the last token of each row and its drafts; keep what the model would have written."""
        assert self.drafter is not None
        rows, places = self.live, self._places(self.live)
        counts = [1 + n for n in drafts.counts]
        ids, counted, lengths = self._upload(drafts, counts)
        tokens = ids[:, 1:]
        with self.cache.speculate(ids.shape[1]) as draft:
            logits = advance(self.model, self.cache, ids, counts, places, counted)
            logits = _processed(logits, rows, drafts)
            verdict = sampler.verify(logits, drafts, tokens, counted - 1, lengths)
            agreed, written, _ = self._download(drafts, verdict)
            new = {row: row.write(each) for row, each in zip(rows, written, strict=True)}
            # of what was fed, the token before the drafts, and the new ones but the last: as many as are new
            draft.commit([len(each) for each in new.values()])
        self._count_round(drafts, agreed, new)
        return new

    def _upload(self, drafts: Drafts, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What is fed (B, 1 + K), how many of it (B,), and the rows' lengths (B,): all that goes to the device."""
        ahead = [[len(row.tokens), n, row.tokens[-1]] for row, n in zip(self.live, counts, strict=True)]
        if isinstance(drafts.tokens, Tensor):
            packed = torch.tensor(ahead, device=self.device)
            ids = torch.cat([packed[:, 2:], drafts.tokens], 1)
        else:
            pads = max(counts)
            filled = [[*a, *d, *[0] * (pads - n)] for a, d, n in zip(ahead, drafts.tokens, counts, strict=True)]
            packed = torch.tensor(filled, device=self.device)
            ids = packed[:, 2:]
        return ids, packed[:, 1], packed[:, 0]

    def _packed(self, drafts: Drafts, places: list[int], total: int, most: int) -> Tensor:
        """Drafted tokens where their rows are in the cache, (R, `most`) on the device, zeros beside them."""
        if isinstance(drafts.tokens, Tensor):
            tokens = pad(drafts.tokens, (0, most - drafts.tokens.shape[1]))
            if places == list(range(total)):
                return tokens
            return tokens.new_zeros(total, most).index_copy_(0, upload(places, self.device), tokens)
        packed = [[0] * most for _ in range(total)]
        for place, tokens_of, n in zip(places, drafts.tokens, drafts.counts, strict=True):
            packed[place][:n] = tokens_of[:n]
        return upload(packed, self.device)

    def _download(
        self, drafts: Drafts, verdict: tuple[Tensor, Tensor]
    ) -> tuple[list[int], list[list[int]], list[list[int]]]:
        """How many drafts each row keeps, those with the token that follows them, and all drafts: what comes back."""
        back = torch.stack(verdict, 1)
        drafted = drafts.tokens
        if isinstance(drafted, Tensor):
            told = torch.cat([back, drafted], 1).tolist()
            drafted = [tokens[2 : 2 + n] for tokens, n in zip(told, drafts.counts, strict=True)]
        else:
            told = back.tolist()
        written = [[*tokens[:n], token] for (n, token, *_), tokens in zip(told, drafted, strict=True)]
        return [n for n, *_ in told], written, [list(tokens) for tokens in drafted]

    # ---- rotary factors that change with the length of a row

    def _start_over(self) -> None:
        """Have rows whose keys would have to be rotated anew wait: they are read again, as far as they are known."""
        turned = [row for row in self.live if self._turned(row, 1)]
        again = [*turned, *(row for row in self.waiting if self._turned(row, len(row.tokens)))]
        if not again:
            return
        self._part_with(set(turned))
        self.waiting += turned
        self.cache.reset([row.place for row in again])
        for row in again:
            row.anew = True

    def _turned(self, row: Row, tokens: int) -> bool:
        known = len(row.request.history) == row.request.before
        return known and self.cache.spec.rotary is not None and self.cache.turned(row.place, tokens)

    def _most(self, row: Row) -> int:
        """How many drafts of a row can be checked: less than it may write, and rotated as its last token is."""
        rotary, n = self.cache.spec.rotary, row.request.before + len(row.tokens)
        longest = None if rotary is None else rotary.longest(n)
        return row.left - 1 if longest is None else min(row.left - 1, longest - n)

    # ---- rows of the cache

    def _part_with(self, gone: set[Row]) -> None:
        """Have these rows live no longer."""
        staying = [n for n, row in enumerate(self.live) if row not in gone]
        if self.drafter is not None and len(staying) < len(self.live):
            self.drafter.keep(staying)
        if self._decoder is not None:
            self._decoder.leave([row.place for row in self.live if row in gone])
        self.live = [self.live[n] for n in staying]
        self._sampler = None
        if self._coming is not None and set(self._coming.rows).isdisjoint(self.live):
            self._drop_coming()

    def _drop_coming(self) -> None:
        """Wait no longer for a step that was begun ahead, if there is one, and count it nowhere."""
        self._compiled -= self._coming is not None
        self._coming = None

    def _parts(self, rows: list[Row], tokens: Mapping[Row, Sequence[int]]) -> list[list[Row]]:
        """The rows in passes that bring all of their rows as many tokens, so that there is no padding."""
        rows = sorted(rows, key=lambda row: len(tokens[row]))
        parts = [list(part) for _, part in groupby(rows, key=lambda row: len(tokens[row]))]
        alike = [(part, self.cache.alike([len(tokens[r]) for r in part], [r.place for r in part])) for part in parts]
        return [[part[n] for n in group] for part, groups in alike for group in groups]

    def _places(self, rows: Sequence[Row]) -> list[int] | None:
        """Where these rows are in the cache; None where they are all of it, in order."""
        places = [row.place for row in rows]
        whole = len(self.live) + len(self.waiting) if self.cache.rows is None else self.cache.rows
        return None if places == list(range(whole)) else places

    def _make_room(self, n: int) -> list[int]:
        """Places of n empty rows."""
        taken = {row.place for row in [*self.live, *self.waiting]}
        there = self.cache.rows
        if there is None:  # the first pass makes them
            return list(range(len(taken), len(taken) + n))
        if self.keep_rows:
            free = [place for place in range(there) if place not in taken][:n]
            if len(free) < n:
                raise RowsError(
                    f"{n} requests came, and {len(free)} of the cache's {there} rows are free: let rows end or leave "
                    "first, or make the cache with more rows="
                )
        else:
            free = list(range(len(taken), len(taken) + n))
            self.cache.gather([*range(len(taken)), *[0] * n])
        if free:
            self.cache.reset(free)
        return free


def _processed(logits: Tensor, rows: Sequence[Row], drafts: Drafts | None = None) -> Tensor:
    """Logits (B, T, V) as each row's processors leave them. Waits for the device where drafts are there alone."""
    changes = [row.request.processors for row in rows]
    if not any(changes):
        return logits
    drafted = [list[int]()] * len(rows)
    if drafts is not None:
        tokens = drafts.tokens.tolist() if isinstance(drafts.tokens, Tensor) else drafts.tokens
        drafted = [row[:n] for row, n in zip(tokens, drafts.counts, strict=True)]
    return processed(logits, changes, [row.known for row in rows], drafted)
