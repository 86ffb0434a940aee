"""The loop: one forward pass a round, in which every row checks its drafts and goes on at its own pace.

B rows that have not ended, K drafted tokens, T new tokens, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from statecache.decode.drafters import Drafter
from statecache.decode.forward import feed
from statecache.decode.report import Report
from statecache.decode.sampling import Drafts, Sampler
from statecache.decode.text import Ending


class Rounds:
    """Writes up to `limit` tokens onto each row of `prompts`, with a prepared model.

    After every round the cache holds each row's tokens but the last. Rows that have ended leave it, or stay and take
    nothing in, if it is to `keep_rows`.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        prompts: Sequence[list[int]],
        limit: int,
        sampler: Sampler,
        ending: Ending,
        drafter: Drafter | None = None,
        keep_rows: bool = False,
    ) -> None:
        self.model, self.cache, self.limit = model, cache, limit
        self.sampler, self.ending, self.drafter, self.keep_rows = sampler, ending, drafter, keep_rows
        self.rows = [list(prompt) for prompt in prompts]
        self.prompt = [len(prompt) for prompt in prompts]
        self.live = list(range(len(self.rows)))  # rows that have not ended
        self.device = next(model.parameters()).device
        self._forwards = self._turns = self._drafted = self._accepted = self._with_drafts = 0

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Each round's new tokens, a list for each row, empty once it has ended."""
        yield self._read()
        while self.live:
            yield self._round()

    def report(self) -> Report:
        """What has been done so far."""
        return Report(
            prompt=sum(self.prompt),
            tokens=sum(map(len, self.rows)) - sum(self.prompt),
            forwards=self._forwards,
            turns=self._turns,
            drafted=self._drafted,
            accepted=self._accepted,
            rounds=self._with_drafts,
            assistant_forwards=0 if self.drafter is None else self.drafter.forwards,
        )

    @torch.no_grad()
    def take_in(self, tokens: Sequence[list[int]]) -> None:
        """Feed some tokens of every row to the cache, and no more than that."""
        if any(tokens):
            feed(self.model, self.cache, tokens)

    @torch.no_grad()
    def _read(self) -> list[list[int]]:
        """Take in the prompts; the first tokens."""
        token, _ = self.sampler.draw(feed(self.model, self.cache, self.rows))
        return self._next(token)

    @torch.no_grad()
    def _round(self) -> list[list[int]]:
        rows = [self.rows[row] for row in self.live]
        drafts = None
        if self.drafter is not None:
            # k drafts and the token that follows them are within the limit
            most = [self.limit - 1 - len(self.rows[row]) + self.prompt[row] for row in self.live]
            drafts = self.drafter.propose(rows, most)
        last = torch.tensor([row[-1:] for row in rows], device=self.device)
        if drafts is not None:
            return self._check(last, drafts)
        token, _ = self.sampler.draw(self._forward(last, [1] * len(rows))[:, -1])
        return self._next(token)

    def _next(self, token: Tensor) -> list[list[int]]:
        """End a round without drafts, which gave each row a token (B,)."""
        self._forwards += 1
        self._turns += len(self.live)
        new, over = self._write([[n] for n in token.tolist()])
        return self._close(new, over)

    def _check(self, last: Tensor, drafts: Drafts) -> list[list[int]]:
        """Feed the last tokens (B, 1) and their drafts; keep what the model would have written."""
        assert self.drafter is not None
        with self.cache.speculate(1 + drafts.tokens.shape[1]) as draft:
            logits = self._forward(torch.cat([last, drafts.tokens], 1), [1 + n for n in drafts.counts])
            accepted, following = self.sampler.verify(logits, drafts)
            told = torch.cat([accepted[:, None], following[:, None], drafts.tokens], 1).tolist()
            agreed = [row[0] for row in told]
            new, over = self._write([[*tokens[:n], token] for n, token, *tokens in told])
            # of what was fed, the token before the drafts, and the new ones but the last: as many as are new
            draft.commit(torch.tensor(self._in_place([len(tokens) for tokens in new])))
        self._forwards += 1
        self._turns += len(self.live)
        self._with_drafts += sum(n > 0 for n in drafts.counts)
        self._drafted += sum(drafts.counts)
        self._accepted += sum(min(n, len(tokens)) for n, tokens in zip(agreed, new, strict=True))
        self.drafter.learn(agreed)
        return self._close(new, over)

    def _forward(self, ids: Tensor, counts: list[int]) -> Tensor:
        """Feed the first `counts` tokens of each row of ids (B, T); logits (B, T, V)."""
        counts = self._in_place(counts)
        width = ids.shape[1]
        if len(counts) > len(ids):
            ids = ids.new_zeros(len(counts), width).index_copy_(0, self._index(), ids)
        mask = None
        if min(counts) < width:
            mask = (torch.arange(width, device=self.device) < torch.tensor(counts, device=self.device)[:, None]).long()
        logits: Tensor = self.model(ids, past_key_values=self.cache, attention_mask=mask, use_cache=True).logits
        return logits if len(counts) == len(self.live) else logits[self._index()]

    def _in_place(self, counts: list[int]) -> list[int]:
        """A number for each row of the cache, of one for each live row: 0 for those that have ended."""
        if not self.keep_rows:
            return counts
        whole = [0] * len(self.rows)
        for row, n in zip(self.live, counts, strict=True):
            whole[row] = n
        return whole

    def _index(self) -> Tensor:
        return torch.tensor(self.live, device=self.device)

    def _write(self, new: list[list[int]]) -> tuple[list[list[int]], list[bool]]:
        """Append to each live row what is within its end; that, and whether the row is over."""
        kept, over = [], []
        for row, tokens in zip(self.live, new, strict=True):
            tokens, ended = self.ending.cut(row, tokens)
            self.rows[row] += tokens
            kept.append(tokens)
            over.append(ended or len(self.rows[row]) - self.prompt[row] >= self.limit)
        return kept, over

    def _close(self, new: list[list[int]], over: list[bool]) -> list[list[int]]:
        """Let rows go that are over; each row's new tokens."""
        told: list[list[int]] = [[] for _ in self.rows]
        for row, tokens in zip(self.live, new, strict=True):
            told[row] = tokens
        if any(over):
            staying = [place for place, ended in enumerate(over) if not ended]
            self.live = [self.live[place] for place in staying]
            if staying:
                if not self.keep_rows:
                    self.cache.gather(staying)
                if self.drafter is not None:
                    self.drafter.keep(staying)
        return told
