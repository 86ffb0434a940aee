"""Drawing tokens, each row in its own way, and the rule that decides which drafted tokens stay.

B rows, K drafted tokens, T positions, V tokens of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from statecache.decode.noise import Purpose, exponential, uniform
from statecache.decode.request import Request

# a temperature below it is 0, or has no inverse, in float32: of the likeliest token 0 / 0 would be left
TINIEST = torch.finfo(torch.float32).tiny


Verdict = tuple[Tensor, Tensor]  # drafts that each row keeps (B,) long, and the token that follows them (B,) long


@dataclass(frozen=True, eq=False)
class Drafts:
    """Tokens proposed to follow each row, `counts[b]` of them to row b.

    `tokens`: lists of so many, or (B, K) long on the model's device. `probabilities`: (B, K, V) that they were drawn
    from; None where each was certain.
    """

    tokens: Sequence[list[int]] | Tensor
    counts: list[int]
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Uses:
    """Which options any of some rows uses: what none does is not computed.

    draws, greedy: whether any draws, or takes the likeliest token; most: the largest top_k; cuts: whether any has a
    top_p, floors: a min_p.
    """

    draws: bool = False
    greedy: bool = True
    most: int = 0
    cuts: bool = False
    floors: bool = False

    @staticmethod
    def of(requests: Sequence[Request]) -> Uses:
        """What these rows use."""
        return Uses(
            draws=any(r.temperature for r in requests),
            greedy=not all(r.temperature for r in requests),
            most=max((r.top_k for r in requests), default=0),
            cuts=any(r.top_p < 1 for r in requests),
            floors=any(r.min_p for r in requests),
        )


class Columns:
    """The options of B rows as tensors on a device, (B,) or (B, 1, 1), each once it is needed."""

    def __init__(self, requests: Sequence[Request], device: torch.device | str) -> None:
        self.requests, self.device = list(requests), device

    def put(self, row: int, request: Request) -> None:
        """Have this row draw as a request says from now on: in place, in what has been made."""
        self.requests[row] = request
        one = Columns([request], self.device)
        for name, held in vars(self).items():
            if isinstance(held, Tensor):
                held[row] = getattr(one, name)[0]

    def first(self, rows: int) -> Columns:
        """The same options of the first rows, in the same memory."""
        some = Columns(self.requests[:rows], self.device)
        for name in ("temperature", "greedy", "top_p", "top_k", "min_p", "seeds", "before"):
            vars(some)[name] = getattr(self, name)[:rows]
        return some

    def _column(self, values: Sequence[object], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None, None]

    @cached_property
    def temperature(self) -> Tensor:
        # of a row that is greedy any will do
        return self._column([max(r.temperature, TINIEST) if r.temperature else 1.0 for r in self.requests], torch.float)

    @cached_property
    def greedy(self) -> Tensor:
        return self._column([not r.temperature for r in self.requests], torch.bool)

    @cached_property
    def top_p(self) -> Tensor:
        # sums of probabilities may come to a little more than 1: without a limit, 2
        return self._column([r.top_p if r.top_p < 1 else 2.0 for r in self.requests], torch.float)

    @cached_property
    def top_k(self) -> Tensor:
        return self._column([r.top_k for r in self.requests], torch.long)

    @cached_property
    def min_p(self) -> Tensor:
        return self._column([r.min_p for r in self.requests], torch.float)

    @cached_property
    def seeds(self) -> Tensor:
        words = [r.seed - 2**64 if r.seed >= 2**63 else r.seed for r in self.requests]
        return torch.tensor(words, device=self.device)

    @cached_property
    def before(self) -> Tensor:
        return torch.tensor([r.before for r in self.requests], device=self.device)


class Sampler:
    """How each of B rows draws. What one row asks for does not touch the bits of another.

    Options become tensors on `device` once they are needed: those of greedy rows never do.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        device: torch.device | str = "cpu",
        *,
        columns: Columns | None = None,
        uses: Uses | None = None,
    ) -> None:
        """`columns`: the options, if they are there already; `uses`: of which of them there is to be use, at least."""
        self.columns = Columns(requests, device) if columns is None else columns
        self.uses = Uses.of(requests) if uses is None else uses

    @property
    def draws(self) -> bool:
        """Whether any row draws."""
        return self.uses.draws

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distributions (B, T, V) float32 that tokens are drawn from, of logits (B, T, V)."""
        best = logits.argmax(-1, keepdim=True)
        certain = None
        if self.uses.greedy:
            certain = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, best, 1.0)
            if not self.draws:
                return certain
        logits = logits.float()
        logits = (
            logits - logits.gather(-1, best)
        ) / self.columns.temperature  # at most 0: nothing overflows but to -inf
        most = min(self.uses.most, logits.shape[-1])
        if most:
            last = (self.columns.top_k - 1).clamp(0, most - 1).expand(*logits.shape[:2], 1)
            least = logits.topk(most, -1).values.gather(-1, last)
            logits = logits.masked_fill((logits < least) & (self.columns.top_k > 0), float("-inf"))
        p = logits.softmax(-1)
        if self.uses.cuts:
            p = self._nucleus(p)
        if self.uses.floors:
            p = self._above(p)
        return p if certain is None else torch.where(self.columns.greedy, certain, p)

    def draw(self, logits: Tensor, lengths: Tensor, purpose: Purpose = Purpose.DRAW) -> tuple[Tensor, Tensor | None]:
        """A token for each row (B,), and the distribution (B, V) that it is from; None where all are certain.

        logits: (B, V), `lengths`: (B,) long, tokens of each row before this one.
        """
        if not self.draws:
            return logits.argmax(-1), None
        p = self.probabilities(logits[:, None])
        return self._race(p, lengths[:, None], purpose)[:, 0], p[:, 0]

    def verify(self, logits: Tensor, drafts: Drafts, tokens: Tensor, counts: Tensor, lengths: Tensor) -> Verdict:
        """How many of its drafted `tokens` (B, K) each row keeps, and the token that follows them.

        logits: (B, 1 + K, V), column j after the row's `lengths` (B,) tokens and its first j drafts, of which there are
        `counts` (B,). What is kept has the distribution that `draw` would have given, whatever was drafted. If drafts
        are certain, it is the very tokens that `draw` would have given.
        """
        places = lengths[:, None] + torch.arange(logits.shape[1], device=logits.device)
        if drafts.probabilities is not None:
            positions = self._positions(places)
            return accept(
                self.probabilities(logits), drafts.probabilities, tokens, counts, self.columns.seeds, positions
            )
        if not self.draws:
            return agree(logits.argmax(-1), tokens, counts)
        return agree(self._race(self.probabilities(logits), places, Purpose.DRAW), tokens, counts)

    def _race(self, p: Tensor, lengths: Tensor, purpose: Purpose) -> Tensor:
        """Draw from p (B, T, V) after so many tokens (B, T): (B, T)."""
        return race(p, exponential(self.columns.seeds, self._positions(lengths), purpose, p.shape[-1]))

    def _positions(self, lengths: Tensor) -> Tensor:
        return lengths + self.columns.before[:, None]

    def _nucleus(self, p: Tensor) -> Tensor:
        """Of p (B, T, V) the likeliest tokens that make up each row's top_p, scaled to 1."""
        falling, order = p.sort(stable=True, dim=-1, descending=True)
        total = falling.cumsum(-1)
        beyond = total - falling >= self.columns.top_p  # the likelier tokens make it up already
        # the sum of what stays, from the same running sum: `sum` adds in an order that depends on the batch
        kept = total.masked_fill(beyond, 0.0).amax(-1, keepdim=True)
        cut = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        return torch.where(self.columns.top_p > 1, p, cut / kept)

    def _above(self, p: Tensor) -> Tensor:
        """Of p (B, T, V) the tokens that have each row's part of the greatest, scaled to 1."""
        cut = p.masked_fill(p < self.columns.min_p * p.amax(-1, keepdim=True), 0.0)
        return torch.where(self.columns.min_p > 0, cut / cut.cumsum(-1)[..., -1:], p)


def agree(drawn: Tensor, tokens: Tensor, counts: Tensor) -> Verdict:
    """Keep of the certain drafts `tokens` (B, K) what agrees with the tokens `drawn` (B, 1 + K) in their places.

    So x is kept with probability p(x), and what follows a refusal has the distribution p without x: the rule of
    `accept`, for a q of 1, with the same tokens as without drafts.
    """
    accepted = _leading(drawn[:, :-1] == tokens, counts)
    return accepted, drawn.gather(1, accepted[:, None])[:, 0]


def accept(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, seeds: Tensor, positions: Tensor) -> Verdict:
    """Keep x with probability min(1, p(x) / q(x)); at the first that is not kept draw from the normalised (p - q)+.

    p: (B, 1 + K, V) of the model, q: (B, K, V) of the drafts `tokens` (B, K). `seeds`: (B,), `positions`: (B, 1 + K)
    (Leviathan et al. 2023, appendix A.1).
    """
    at = tokens[..., None]
    chance, offered = p[:, :-1].gather(-1, at)[..., 0], q.gather(-1, at)[..., 0]
    luck = uniform(seeds, positions[:, :-1], Purpose.ACCEPT, 1)[..., 0]
    accepted = _leading(luck * offered < chance, counts)
    rows = torch.arange(len(p), device=p.device)
    after = p[rows, accepted]
    rest = (after - q[rows, accepted.clamp(max=q.shape[1] - 1)]).clamp(min=0)
    # nothing was refused where all drafts are kept; nothing is left where p and q differ by rounding alone
    whole = (accepted >= counts) | (rest.amax(-1) <= 0)
    weights = torch.where(whole[:, None], after, rest)
    place = positions.gather(1, accepted[:, None])
    return accepted, race(weights, exponential(seeds, place, Purpose.DRAW, p.shape[-1])[:, 0])


def race(weights: Tensor, times: Tensor) -> Tensor:
    """Draw an index of the last axis in proportion to `weights` (..., V) >= 0, by `times` (..., V), exponential."""
    return (weights / times).argmax(-1)


def until(ends: Tensor, tokens: Tensor, verdict: Verdict) -> Verdict:
    """Keep what a verdict on the drafts `tokens` (B, K) does up to a row's first end token; that follows it then.

    ends: (B, E) long, filled up with -1.
    """
    kept, token = verdict
    ending = (tokens[..., None] == ends[:, None]).any(-1)
    before = _leading(~ending, kept)
    end = tokens.gather(1, before.clamp(max=tokens.shape[1] - 1)[:, None])[:, 0]
    return before, torch.where(before < kept, end, token)


def _leading(kept: Tensor, counts: Tensor) -> Tensor:
    """How many of the first `counts` (B,) columns of `kept` (B, K) hold, up to the first that does not: (B,)."""
    real = torch.arange(kept.shape[1], device=kept.device) < counts[:, None]
    return (kept & real).long().cumprod(1).sum(1)
