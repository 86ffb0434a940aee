"""Drawing tokens: from logits to probabilities, and the rule that decides which drafted tokens stay.

B rows, K drafted tokens, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from statecache.errors import OptionError

# a temperature below it is 0, or has no inverse, in float32: of the likeliest word 0 / 0 would be left
TINIEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Drafts:
    """Tokens proposed to follow each row: (B, K) long, of which row b has the first `counts[b]`.

    `probabilities`: (B, K, V) that they were drawn from; None where each was certain.
    """

    tokens: Tensor
    counts: list[int]
    probabilities: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Sampler:
    """How tokens are drawn. Temperature 0 takes the likeliest; `top_k` 0 keeps all V words.

    Raises OptionError for values that make no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise OptionError(f"temperature={self.temperature!r}: give 0 for the likeliest token, or more to draw")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise OptionError(f"top_p={self.top_p!r}: give a probability above 0, up to 1 for all words")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise OptionError(f"top_k={self.top_k!r}: give the number of words to draw from, or 0 for all of them")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (..., V) float32 that tokens are drawn from, of logits (..., V)."""
        if not self.temperature:
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits.float()
        temperature = max(self.temperature, TINIEST)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0, so nothing overflows but to -inf
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        p = logits.softmax(-1)
        if self.top_p < 1:
            falling, order = p.sort(stable=True, dim=-1, descending=True)
            beyond = falling.cumsum(-1) - falling >= self.top_p  # the likelier words make it up already
            p = p.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token for each row (B,), of logits (B, V), and the distribution (B, V) it is from; None where certain."""
        if not self.temperature:
            return logits.argmax(-1), None
        p = self.probabilities(logits)
        return race(p, self.generator), p

    def verify(self, logits: Tensor, drafts: Drafts) -> tuple[Tensor, Tensor]:
        """How many of its drafted tokens each row keeps (B,), and the token that follows them (B,).

        logits: (B, 1 + K, V), column j after the row and its first j drafts. What is kept has the distribution that
        `draw` would have given, whatever was drafted (Leviathan et al. 2023, appendix A.1).
        """
        counts = torch.tensor(drafts.counts, device=logits.device)
        if not self.temperature:
            best = logits.argmax(-1)
            accepted = _leading(best[:, :-1] == drafts.tokens, counts)
            return accepted, best.gather(1, accepted[:, None])[:, 0]
        return accept(self.probabilities(logits), drafts, counts, self.generator)


def generator_of(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A generator that starts from `seed`; None without one."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise OptionError(f"seed={seed!r}: give an integer from -2**63 to 2**64 - 1, or None")
    return torch.Generator(device).manual_seed(seed)


def _is_number(x: object) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def accept(p: Tensor, drafts: Drafts, counts: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Keep x with probability min(1, p(x) / q(x)); at the first that is not kept draw from the normalised (p - q)+.

    p: (B, 1 + K, V) of the model, q: of the drafts. Returns how many are kept (B,) and the token that follows (B,).
    """
    tokens, q = drafts.tokens, drafts.probabilities
    most = tokens.shape[1]
    chance = p[:, :-1].gather(-1, tokens[..., None])[..., 0]
    offered = torch.ones_like(chance) if q is None else q.gather(-1, tokens[..., None])[..., 0]
    luck = torch.rand(tokens.shape, generator=generator, device=p.device)
    accepted = _leading(luck * offered < chance, counts)
    rows = torch.arange(len(p), device=p.device)
    after = p[rows, accepted]
    at = accepted.clamp(max=most - 1)
    rest = after.scatter(-1, tokens[rows, at][:, None], 0.0) if q is None else (after - q[rows, at]).clamp(min=0)
    # nothing was refused where all drafts are kept; nothing is left where p and q differ by rounding alone
    whole = (accepted >= counts) | (rest.sum(-1) <= 0)
    return accepted, race(torch.where(whole[:, None], after, rest), generator)


def race(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index of the last axis in proportion to `weights` (..., V) >= 0, without waiting for the device."""
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def _leading(kept: Tensor, counts: Tensor) -> Tensor:
    """How many of the first `counts` (B,) columns of `kept` (B, K) hold, up to the first that does not: (B,)."""
    real = torch.arange(kept.shape[1], device=kept.device) < counts[:, None]
    return (kept & real).long().cumprod(1).sum(1)
