"""Decoder: a model's step captured once, for all lengths and for any rows of one cache.

On a CUDA device a step is two graphs: the forward pass of a prepared model, with kernels where there are some, and the
choice of the next tokens. A round, which checks drafted tokens, is one graph: pass, verdict and commit. So is a draft,
which takes in tokens and looks ahead. On a CPU the
pass of a step is code that torch compiled ahead of time, as soon as there is some, see `compiled`. Elsewhere, and until
then, the same steps and rounds run plainly.

B rows of the cache, b of them in a bucket, K drafted tokens, V tokens of the model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor

from statecache import kernels
from statecache.decode.compiled import Ahead
from statecache.decode.feed import advance, feed, input_device, step
from statecache.decode.options import check_kinds, each_row, seeds_of
from statecache.decode.request import Request
from statecache.decode.sampling import Columns, Drafts, Sampler, Uses, until
from statecache.errors import CapacityError, OptionError, RowsError, ShapeError, SlackError, StepError
from statecache.kernels.cards import DTYPES, upload
from statecache.models.cache import StateCache
from statecache.models.fused import by_kernels
from statecache.models.prepare import lend
from statecache.snapshot import Mark

GREEDY = Request([0])


@dataclass
class Counts:
    """What a decoder has done: `graphs` captured; steps and rounds `replayed`, run `compiled`, and run `plain`ly."""

    graphs: int = 0
    replayed: int = 0
    compiled: int = 0
    plain: int = 0


@dataclass(frozen=True, eq=False)
class Draft:
    """What a round checks and finds: `tokens` (B, K) and `counts` (B,) of them, and how many are `kept` (B,)."""

    tokens: Tensor
    counts: Tensor
    kept: Tensor

    @staticmethod
    def empty(rows: int, most: int, device: torch.device) -> Draft:
        """None yet."""
        tokens, counts, kept = (torch.zeros(rows, *n, dtype=torch.long, device=device) for n in ((most,), (), ()))
        return Draft(tokens, counts, kept)


class Decoder:
    """Writes with a model on the rows of one cache, a captured step at a time.

    cache: with `capacity=`, `rows=`, `dtype=` and `device=`; the decoder owns it from then on. Kernels need one with
    `slack=1, back=False`; rounds of K drafts a slack of 1 + K. buckets: a step is captured for the first so many rows
    each, and runs in the smallest that has all that write; powers of two up to all rows, if left out. fused: with
    kernels where there are some.

    The model is prepared and in eval mode until `close`. Raises OptionError, ConfigError or UnknownLayerError.
    """

    def __init__(
        self, model: Any, cache: StateCache, *, buckets: Sequence[int] | None = None, fused: bool = True
    ) -> None:
        check_kinds(model, None, cache, None, None)
        if cache is None or cache.capacity is None or cache.rows is None:
            raise OptionError(
                "a decoder needs a cache that never moves: make it with capacity=, rows=, dtype=, device="
            )
        if cache.spec.rotary is not None:
            raise OptionError(
                f"the rotary factors of a {cache.spec.model} model change with the length, which no captured step "
                "follows: write with generate()"
            )
        rows = cache.rows
        self.buckets = _buckets(buckets, rows)
        self.model, self.cache, self.device = model, cache, input_device(model)
        self.counts = Counts()
        self._fused = fused and kernels.available(self.device)
        self._loan = lend(model)
        with torch.inference_mode(False):
            self._ids = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
            self._count = torch.zeros(rows, dtype=torch.long, device=self.device)
            self._columns = Columns([GREEDY] * rows, self.device)
            self._by_bucket = {n: self._columns.first(n) for n in self.buckets}
            self._ends = torch.empty(rows, 0, dtype=torch.long, device=self.device)
        self._requests: list[Request | None] = [None] * rows  # of the rows that write
        self._lengths, self._limit = cache.lengths.tolist(), cache.get_max_length()
        self._uses = Uses()
        self.captures = self.device.type == "cuda"  # False from now on: all runs plainly
        self._ahead = Ahead(model, cache)
        self._passes: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._choices: dict[tuple[int, Uses], torch.cuda.CUDAGraph] = {}
        self._rounds: dict[tuple[int, int, Uses, int], torch.cuda.CUDAGraph] = {}  # of checks, and of drafts
        self._drafted: dict[int, Draft] = {}  # by the number of drafts
        self._proposed: dict[int, Tensor] = {}  # (B, n), by n
        self._ahead_of = False  # whether the device may hold less of rows than `_lengths` says, after a round
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    # ---- what there is

    @property
    def tokens(self) -> Tensor:
        """The last token of each row, (B,) long on the device: live, so that the next step overwrites it."""
        return self._ids[:, 0]

    @property
    def writing(self) -> list[int]:
        """The rows that write."""
        return [row for row, request in enumerate(self._requests) if request is not None]

    @property
    def lengths(self) -> list[int]:
        """Tokens that the cache holds of each row: as the host knows, and after a round as the device says."""
        self._catch_up()
        return list(self._lengths)

    # ---- rows that come and go

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]] | Tensor,
        rows: Sequence[int] | None = None,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_p: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Read a prompt into each of these rows, behind what they hold; their first tokens (n,), on the device.

        From then on they write with every step. rows: idle ones, the first if left out. Options are those of
        `generate`, one for all or a list, and draw what it draws. Waits for the device.
        Raises OptionError, RowsError or CapacityError before anything is read.
        """
        texts = [[int(token) for token in prompt] for prompt in prompts]
        places = self._idle(len(texts), rows)
        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        given = {name: each_row(name, value, len(texts)) for name, value in options.items()}
        requests = [Request(text, **{name: v[n] for name, v in given.items()}) for n, text in enumerate(texts)]
        requests = [replace(r, seed=s) for r, s in zip(requests, seeds_of(seed, requests), strict=True)]
        limit = self._limit
        self._catch_up()
        for place, text in zip(places, texts, strict=True):
            if 0 <= limit < self._lengths[place] + len(text):
                raise CapacityError(
                    f"row {place} holds {self._lengths[place]} tokens and its prompt brings {len(text)}: make the "
                    f"cache with more than capacity={self.cache.capacity}"
                )
        first = torch.empty(len(texts), dtype=torch.long, device=self.device)
        widths = sorted({len(text) for text in texts})
        for width in widths:  # a pass for each length, so that there is no padding
            part = [n for n, text in enumerate(texts) if len(text) == width]
            at = [places[n] for n in part]
            logits = feed(self.model, self.cache, [texts[n] for n in part], at)
            lengths = torch.tensor([self._lengths[row] + width for row in at], device=self.device)
            token, _ = Sampler([requests[n] for n in part], self.device).draw(logits, lengths)
            first[part] = token
        held = [self._lengths[place] + len(text) for place, text in zip(places, texts, strict=True)]
        self.begin(places, requests, first, held)
        return first

    def begin(self, rows: Sequence[int], requests: Sequence[Request], tokens: Tensor, lengths: Sequence[int]) -> None:
        """Have these rows write with every step, where somebody else has fed their cache.

        Each has chosen one of `tokens` (n,), behind the `lengths` that the cache holds of it, and draws as its request
        says, at positions counted from the row's first token. `check` keeps nothing from a row's end token on.
        Processors are not applied.
        """
        self._widen(max(len(request.ends) for request in requests))
        for row, request, length in zip(rows, requests, lengths, strict=True):
            drawn = replace(request, prompt=[0], before=0)
            self._lengths[row], self._requests[row] = length, drawn
            self._columns.put(row, drawn)
        index = torch.tensor(rows, device=self.device)
        ends = [[*request.ends, *[-1] * (self._ends.shape[1] - len(request.ends))] for request in requests]
        self._ends[index] = torch.tensor(ends, dtype=torch.long, device=self.device)
        self._ids[index, 0] = tokens.to(self.device)
        self._count[index] = 1
        self._changed()

    @torch.no_grad()
    def capture(self, drafts: int = 0, ahead: int = 0) -> None:
        """Capture the step that the rows that write now take next, which otherwise happens in it. Nothing is fed.

        drafts: a `check` of so many instead, or with `ahead` a `draft` of that many, which takes in 1 + `drafts`.
        """
        if not self.captures or not (rows := self.writing):
            return
        if drafts:
            self._round_graph(self._bucket(rows), self._draft_of(drafts), ahead)
        else:
            self._graphs(rows)

    def try_capture(self, whose: str, drafts: int = 0, ahead: int = 0) -> bool:
        """The same. Where it cannot be: False, with a warning; nothing is changed, and all runs plainly from now on."""
        if not self.captures or self._has(drafts, ahead):
            return True
        mark, last = self.cache.checkpoint(), self.tokens.clone()
        try:
            self.capture(drafts, ahead)
        except RuntimeError as error:
            self.restore(mark)
            self.tokens.copy_(last)
            self.captures = False
            warnings.warn(f"{whose} could not be captured, and is run plainly: {error}", stacklevel=2)
            return False
        return True

    def _has(self, drafts: int, ahead: int) -> bool:
        """Whether that is captured for the rows that write now."""
        bucket, uses = self._bucket(self.writing), self._uses
        return (bucket, drafts, uses, ahead) in self._rounds if drafts else (bucket, uses) in self._choices

    def leave(self, rows: Sequence[int]) -> None:
        """Have these rows write no longer. They keep what they hold: all their tokens but the last."""
        for row in self._some(rows):
            self._requests[row] = None
            self._count[row] = 0
        self._changed()

    def reset(self, rows: Sequence[int]) -> None:
        """Empty these rows, which then write no longer."""
        self.leave(rows)
        self.cache.reset(rows)
        for row in rows:
            self._lengths[row] = 0

    def restore(self, mark: Mark) -> None:
        """Come back to a mark of the cache. Which rows write, and their last tokens, stay as they are.

        Raises what `StateCache.restore` does.
        """
        self.cache.restore(mark)
        self._lengths, self._ahead_of = self.cache.lengths.tolist(), False

    def bind(self, cache: StateCache, rows: Sequence[int] | None = None) -> None:
        """Copy the rows of another cache for the same model into these, the first if left out. They are idle then.

        That cache may have any capacity and slack; it stays as it is. `prefill` goes on with the last token of each.
        Raises ConfigError, RowsError or CapacityError, and changes nothing then.
        """
        held = cache.lengths.tolist()
        places = self._some(range(len(held)) if rows is None else rows)
        if len(places) != len(held):
            raise RowsError(f"a cache of {len(held)} rows came for {len(places)}: give one row for each")
        limit = self._limit
        if 0 <= limit < max(held, default=0):
            raise CapacityError(
                f"the cache holds a row of {max(held)} tokens: make the decoder's with more than "
                f"capacity={self.cache.capacity}"
            )
        copies = [cache.snapshot(row) for row in range(len(held))]
        self.leave(places)
        for place, copied in zip(places, copies, strict=True):
            self.cache.admit(place, copied)
            self._lengths[place] = copied.length

    # ---- a step

    @torch.no_grad()
    def step(self) -> Tensor:
        """Take in the last token of every row that writes, and choose the next: `tokens`, (B,) long on the device.

        Idle rows keep theirs. The host waits for nothing once a step over as many rows, with as many options, was
        captured. Raises StepError where no row writes, CapacityError where one is full; nothing is changed then.
        """
        rows = self._ready([1] * len(self._lengths))
        if self.captures:
            forward, choice = self._graphs(rows)
            forward.replay()
            choice.replay()
            self.counts.replayed += 1
        else:
            with self._kernels():
                self._choose(len(self._lengths), self._uncaptured())
        for row in rows:
            self._lengths[row] += 1
        return self.tokens

    @torch.no_grad()
    def check(self, drafts: Tensor, counts: Tensor | Sequence[int] | None = None) -> Tensor:
        """Take in the last token of every row that writes and those of its drafts that it would have written as well.

        drafts: (B, K) long, what is proposed to follow the last tokens; counts: (B,) long, how many of them are, None
        for all. Gives how many each row keeps, (B,) long on the device, 0 where rows are idle; they become part of it,
        and `tokens` are what follows them: together the tokens that as many steps would have given, but for ties in
        narrow dtypes. The host waits for nothing once a round of as many drafts was captured.

        Raises ShapeError, SlackError for more drafts than the cache's slack takes back, CapacityError where a row has
        no room for its drafts, all K of them unless `counts` is a list, StepError where no row writes; nothing is
        changed then.
        """
        total = len(self._lengths)
        if drafts.dim() != 2 or len(drafts) != total or not drafts.shape[1]:
            raise ShapeError(f"drafts {tuple(drafts.shape)}: give ({total}, K), at least one for each row of the cache")
        most = drafts.shape[1]
        self._check_slack(most)
        most_of = [most] * total if counts is None or isinstance(counts, Tensor) else [int(n) for n in counts]
        if len(most_of) != total or not all(0 <= n <= most for n in most_of):
            raise ShapeError(f"counts={counts}: give {total}, of 0 to {most} drafts, one for each row of the cache")
        rows, draft = self._ready([1 + n for n in most_of]), self._fill(drafts, counts)
        self._run(rows, draft, 0)
        for row in rows:
            self._lengths[row] += 1 + most_of[row]
        self._ahead_of = True
        return draft.kept

    @torch.no_grad()
    def take(self, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Take in the first `counts` (B,) of these tokens (B, T) long in place of the last of every row that writes.

        Gives what follows: `tokens`, (B,) long. Rows that write take one at least. As `check` of drafts that are known
        to be right, and as a `step` where T is 1; raises what they do.
        """
        if tokens.dim() == 2 and tokens.shape[1] > 1:
            self.draft(tokens, counts, 1)
            return self.tokens
        self._ready_to_take(tokens, counts, 0)
        self._put(tokens[:, 0])
        return self.step()

    @torch.no_grad()
    def draft(self, tokens: Tensor, counts: Sequence[int], n: int) -> Tensor:
        """Take in tokens as `take` does, two columns at least, and look n tokens ahead: what steps would give, (B, n).

        The first is `tokens`; no other becomes part of a row, whose states come back to where they were. One graph. On
        the device, live: the next call overwrites it. Rows need room for n - 1 tokens more. Raises what `take` does.
        """
        rows, most = self._ready_to_take(tokens, counts, n - 1), tokens.shape[1] - 1
        if most < 1 or n < 1:
            raise ShapeError(f"tokens {tuple(tokens.shape)} and n={n}: give two columns and one token ahead at least")
        self._put(tokens[:, 0])
        draft = self._fill(tokens[:, 1:], [max(taken - 1, 0) for taken in counts])
        self._run(rows, draft, n)
        for row in rows:
            self._lengths[row] += counts[row]
        return self._ahead_by(n)

    def _ready_to_take(self, tokens: Tensor, counts: Sequence[int], more: int) -> list[int]:
        """The rows that write, each of which has room for its part of these tokens (B, T), and so many more."""
        total = len(self._lengths)
        wrong = len(counts) != total or any(not 1 <= counts[row] <= tokens.shape[1] for row in self.writing)
        if tokens.dim() != 2 or len(tokens) != total or wrong:
            raise ShapeError(
                f"tokens {tuple(tokens.shape)}, counts={list(counts)}: give ({total}, T), and of each row that writes "
                "1 to T"
            )
        self._check_slack(tokens.shape[1] - 1)
        return self._ready([taken + more for taken in counts])

    def _put(self, tokens: Tensor) -> None:
        """Have these (B,) be the last tokens of the rows that write."""
        last = self._ids[:, 0]
        last.copy_(torch.where(self._count > 0, tokens.to(self.device), last))

    def _fill(self, drafts: Tensor, counts: Tensor | Sequence[int] | None) -> Draft:
        """Where a round reads so many drafts (B, K), of which there are so many (B,), or all."""
        most = drafts.shape[1]
        draft = self._draft_of(most)
        draft.tokens.copy_(drafts)
        if counts is None:
            draft.counts.fill_(most)
        else:
            given = counts if isinstance(counts, Tensor) else upload(counts, self.device)
            draft.counts.copy_(given).clamp_(0, most)
        return draft

    def _draft_of(self, most: int) -> Draft:
        """Where a round reads K drafts."""
        made = self._drafted.get(most)
        if made is None:
            with torch.inference_mode(False):
                made = self._drafted[most] = Draft.empty(len(self._lengths), most, self.device)
        return made

    def _ahead_by(self, n: int) -> Tensor:
        """Where a draft of n tokens is written."""
        made = self._proposed.get(n)
        if made is None:
            with torch.inference_mode(False):
                made = self._proposed[n] = torch.zeros(len(self._lengths), n, dtype=torch.long, device=self.device)
        return made

    def _run(self, rows: list[int], draft: Draft, ahead: int) -> None:
        """A round in which these rows write: of a check, or with `ahead` of a draft of so many."""
        if self.captures:
            self._round_graph(self._bucket(rows), draft, ahead).replay()
            self.counts.replayed += 1
        else:
            with self._kernels():
                self._check_or_look(len(self._lengths), draft, ahead)
            self.counts.plain += 1

    def _check_or_look(self, bucket: int, draft: Draft, ahead: int) -> None:
        if ahead:
            self._look_ahead(bucket, draft, ahead)
        else:
            self._round(bucket, draft)

    def _round(self, bucket: int, draft: Draft, sure: bool = False) -> None:
        """Check the drafts of the first b rows, of which idle ones take nothing in. `sure`: keep all of them."""
        ids = torch.cat([self._ids[:bucket], draft.tokens[:bucket]], 1)
        draft.kept.zero_()
        with self.cache.speculate(ids.shape[1], unseen=True) as ahead:
            self.cache.expect(self._count[:bucket] * (1 + draft.counts[:bucket]))
            logits = advance(self.model, self.cache, ids, None)
            decide = self._settle if self._by_kernels(logits) else self._judge
            ahead.commit(decide(bucket, draft, logits, sure).to(self._held(bucket).device))

    def _judge(self, bucket: int, draft: Draft, logits: Tensor, sure: bool) -> Tensor:
        """Find what the first b rows keep and put what follows in place; how many tokens they take in, (b,).

        logits: (b, 1 + K, V), after the last tokens and each draft.
        """
        tokens, counts, writes = draft.tokens[:bucket], draft.counts[:bucket], self._count[:bucket]
        sampler, lengths = self._sampler(bucket), self._held(bucket).to(self.device) + 1
        if sure:
            at = counts[:, None, None].expand(-1, -1, logits.shape[-1])
            kept, token = counts, sampler.draw(logits.gather(1, at)[:, 0], lengths + counts)[0]
        else:
            verdict = sampler.verify(logits, Drafts(tokens, []), tokens, counts, lengths)
            kept, token = until(self._ends[:bucket], tokens, verdict)
        draft.kept[:bucket].copy_(writes * kept)
        self._follow(bucket, token)
        return writes * (1 + kept)

    def _settle(self, bucket: int, draft: Draft, logits: Tensor, sure: bool) -> Tensor:
        """The same by kernels, where no row draws."""
        from statecache.kernels.choose import settle

        ends = None if sure else self._ends[:bucket]
        some = draft.tokens[:bucket], draft.counts[:bucket], draft.kept[:bucket]
        keys = self._likeliest(logits, None if sure else draft)
        return settle(keys, self._ids[:bucket], self._count[:bucket], *some, ends)

    def _look_ahead(self, bucket: int, draft: Draft, n: int) -> None:
        """Take in the last tokens and the drafts of the first b rows, and find what n steps would choose then."""
        last, ahead = self._ids[:bucket, 0], self._ahead_by(n)[:bucket]
        self._round(bucket, draft, sure=True)
        ahead[:, 0].copy_(last)
        with self.cache.states.undone() if n > 1 else nullcontext():
            for k in range(1, n):
                self._choose(bucket, self._forward(bucket))
                ahead[:, k].copy_(last)
        last.copy_(ahead[:, 0])

    def _uncaptured(self) -> Tensor:
        """The logits (B, V) after the last tokens of all rows, by compiled code where there is some."""
        logits = self._ahead.step(self._ids, self._count)
        if logits is not None:
            self.counts.compiled += 1
            return logits
        start = time.perf_counter()
        logits = self._forward(len(self._lengths))
        self._ahead.spent(time.perf_counter() - start)
        self.counts.plain += 1
        return logits

    def _forward(self, bucket: int) -> Tensor:
        """The logits (b, V) after the last tokens of the first b rows, of which idle ones take nothing in."""
        return step(self.model, self.cache, self._ids[:bucket], self._count[:bucket])

    def _choose(self, bucket: int, logits: Tensor) -> None:
        """Put the next tokens in place of the last ones, in the rows that write."""
        if self._by_kernels(logits):
            from statecache.kernels.choose import choose

            choose(self._likeliest(logits[:, None]), self._ids[:bucket], self._count[:bucket])
            return
        self._follow(bucket, self._sampler(bucket).draw(logits, self._held(bucket).to(self.device))[0])

    def _sampler(self, bucket: int) -> Sampler:
        """How the first b rows draw."""
        return Sampler((), self.device, columns=self._by_bucket[bucket], uses=self._uses)

    def _held(self, bucket: int) -> Tensor:
        """Tokens that the cache holds of the first b rows, (b,) on its device."""
        clock = self.cache.states.clock
        assert clock is not None
        return clock.lengths[:bucket]

    def _follow(self, bucket: int, token: Tensor) -> None:
        """Put these tokens (b,) in place of the last ones, in the rows that write."""
        last = self._ids[:bucket, 0]
        last.copy_(torch.where(self._count[:bucket] > 0, token, last))

    def _by_kernels(self, logits: Tensor) -> bool:
        """Whether kernels choose: where all rows take the likeliest token."""
        return self._fused and not self._uses.draws and logits.dtype in DTYPES and logits.device == self.device

    def _likeliest(self, logits: Tensor, draft: Draft | None = None) -> Tensor:
        """The likeliest tokens after all that was taken in, as `settle` takes them; `draft`: what is checked."""
        from statecache.kernels.choose import likeliest

        return likeliest(logits)

    # ---- capturing

    def _graphs(self, rows: list[int]) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
        """The pass and the choice of a step in which these rows write, captured if they were not yet."""
        bucket = self._bucket(rows)
        return self._pass(bucket), self._choice(bucket)

    def _bucket(self, rows: list[int]) -> int:
        """Of how many rows there are graphs in which these take part."""
        return next(n for n in self.buckets if n > rows[-1])

    def _round_graph(self, bucket: int, draft: Draft, ahead: int) -> torch.cuda.CUDAGraph:
        key = bucket, draft.tokens.shape[1], self._uses, ahead
        made = self._rounds.get(key)
        if made is None:
            if ahead:
                self._ahead_by(ahead)  # outside of the graph's memory
            with self.cache.narrowed(bucket), self._kernels():
                made = self._rounds[key] = self._captured(key, lambda: self._check_or_look(bucket, draft, ahead))[0]
        return made

    def _pass(self, bucket: int) -> torch.cuda.CUDAGraph:
        made = self._passes.get(bucket)
        if made is None:
            with self.cache.narrowed(bucket), self._kernels():
                made = self._passes[bucket] = self._captured((bucket,), lambda: self._forward(bucket))
        return made[0]

    def _choice(self, bucket: int) -> torch.cuda.CUDAGraph:
        key = bucket, self._uses
        made = self._choices.get(key)
        if made is None:
            logits = self._passes[bucket][1]
            made = self._choices[key] = self._captured(key, lambda: self._choose(bucket, logits))[0]
        return made

    def _captured(self, key: tuple[Any, ...], run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of what `run` does, rehearsed and run before, and what it gave. No row takes anything in meanwhile.

        key: of its kernels, beside the model and the cache's slack.
        """
        taken = self._count.clone()
        self._count.zero_()
        try:
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._first(key, run)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = run()
        finally:
            self._count.copy_(taken)
        self.counts.graphs += 1
        return graph, out

    def _first(self, key: tuple[Any, ...], run: Callable[[], Any]) -> None:
        """Call `run`, with its kernels compiled side by side before, unless this model's were."""
        if not self._fused:
            run()
            return
        from statecache.kernels.rehearsal import rehearsed

        rehearsed(run, (ref(self.model), *key, self.cache.slack))

    def _kernels(self) -> AbstractContextManager[None]:
        return by_kernels(self.model) if self._fused else nullcontext()

    # ---- inside

    def _ready(self, tokens: Sequence[int]) -> list[int]:
        """The rows that write, each of which has room for so many tokens (B,)."""
        rows, limit = self.writing, self._limit
        if self._loan.model is None:
            raise StepError("the decoder was closed: make another")
        if not rows:
            raise StepError("no row writes: prefill() one")
        if limit < 0:
            return rows
        if any(self._lengths[row] + tokens[row] > limit for row in rows):
            self._catch_up()
        full = next((row for row in rows if self._lengths[row] + tokens[row] > limit), None)
        if full is not None:
            left = limit - self._lengths[full]
            why = f"has room for {left} tokens of {tokens[full]}" if left else "is full"
            raise CapacityError(f"row {full} {why}, at capacity={self.cache.capacity}: leave() or reset() it")
        return rows

    def _catch_up(self) -> None:
        """Know the lengths again, after rounds. Waits for the device then."""
        if self._ahead_of:
            self._lengths, self._ahead_of = self.cache.lengths.tolist(), False

    def _check_slack(self, drafts: int) -> None:
        """Whether a round of so many drafts can be."""
        if drafts and drafts >= self.cache.slack:
            raise SlackError(
                f"a round feeds a token and {drafts} drafts, and takes back what is refused: the cache was made with "
                f"slack={self.cache.slack}; make it with slack={1 + drafts}"
            )

    def _widen(self, ends: int) -> None:
        """Have room for so many end tokens of a row."""
        rows, there = self._ends.shape
        if ends > there:
            with torch.inference_mode(False):
                more = torch.full((rows, ends - there), -1, dtype=torch.long, device=self.device)
                self._ends = torch.cat([self._ends, more], 1)
            self._rounds.clear()  # which read the others
            if not self._passes and self._pool is not None:
                self._pool = torch.cuda.graph_pool_handle()  # a pool goes with the last of its graphs

    def _changed(self) -> None:
        """Other rows write, or in another way."""
        requests = [request for request in self._requests if request is not None]
        uses = Uses.of(requests)
        most = min(2 ** (uses.most - 1).bit_length(), 2**30) if uses.most else 0  # few graphs for many top_k
        self._uses = replace(uses, greedy=True, most=most)

    def _some(self, rows: Sequence[int]) -> list[int]:
        """These rows, if there are such."""
        chosen, count = [int(row) for row in rows], len(self._lengths)
        if len(set(chosen)) != len(chosen) or not all(0 <= row < count for row in chosen):
            raise RowsError(f"rows {chosen} of {count}: give each once, in 0..{count - 1}")
        return chosen

    def _idle(self, n: int, rows: Sequence[int] | None) -> list[int]:
        """Where n prompts go: these rows, or the first that do not write."""
        free = [row for row, request in enumerate(self._requests) if request is None]
        chosen = free[:n] if rows is None else self._some(rows)
        if len(chosen) != n or not n:
            raise RowsError(f"{n} prompts came for {len(chosen)} rows: give one for each, to rows that do not write")
        busy = [row for row in chosen if row not in free]
        if busy:
            raise RowsError(f"rows {busy} still write: leave() or reset() them first")
        return chosen

    # ---- its end

    def close(self) -> None:
        """Give the model back, as it was, and drop the graphs. The cache keeps what it holds."""
        self._loan.end()
        self._passes.clear()
        self._choices.clear()
        self._rounds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def size_of(needed: int, most: int, sizes: Sequence[int]) -> int:
    """For how many there is a graph where so many are needed: one of few sizes, or `most`, so that there are few."""
    return next(n for n in (*sizes, most) if needed <= n <= most)


def _buckets(given: Sequence[int] | None, rows: int) -> list[int]:
    """Of how many rows steps are captured, the last of all."""
    if given is None:
        return [2**n for n in range(rows.bit_length()) if 2**n < rows] + [rows]
    sizes = sorted({*given, rows})
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= rows for n in sizes):
        raise OptionError(f"buckets={list(given)!r}: give numbers of rows, from 1 to the cache's {rows}")
    return sizes
