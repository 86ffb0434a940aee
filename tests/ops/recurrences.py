"""The recurrences as data: what one test asks of all of them.

Letters as in `statecache.ops`; every size differs from the others, so that no two axes can be confused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import oracles
import torch
from torch import Tensor

from statecache.ops import delay, gated_delta, lightning, rg_lru, selective_scan, ssd

B, H, G, P, N = 3, 4, 2, 5, 7
DECAYS = {"strong": 50.0, "plain": 0.5, "weak": 1e-4}  # the largest of a token, as the exponent


@dataclass(frozen=True)
class Recurrence:
    module: ModuleType
    oracle: Callable[..., tuple[Tensor, list[Tensor]]]
    draw: Callable[[int, float], tuple[Tensor, ...]]  # tokens, largest decay: chunk's inputs
    state: tuple[int, ...]
    gates: tuple[int, ...]  # of the inputs
    constant: int | None  # the one input without time
    record: tuple[int, ...]  # fold's arguments, of the inputs

    def cut(self, inputs: tuple[Tensor, ...], index: slice | int) -> tuple[Tensor, ...]:
        """The inputs of some tokens, or of one without its time axis."""
        return tuple(x if i == self.constant else x[:, index] for i, x in enumerate(inputs))

    def idle(self, inputs: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, ...]:
        """The inputs with the gates of `tokens` (B, T) zero."""
        return tuple(
            x.masked_fill(tokens.reshape(*tokens.shape, *[1] * (x.ndim - 2)), 0) if i in self.gates else x
            for i, x in enumerate(inputs)
        )

    def expected(self, inputs: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The oracle's outputs (B, T, ...) and states (B, T+1, ...)."""
        y, states = self.oracle(*inputs, torch.zeros(B, *self.state, dtype=inputs[0].dtype) if state is None else state)
        return y, torch.stack(states, 1)


def _mamba(tokens: int, decay: float, heads: tuple[int, ...], constant: tuple[int, ...]) -> tuple[Tensor, ...]:
    dt = torch.rand(B, tokens, *heads)
    x = torch.randn(B, tokens, *(heads if len(heads) > 1 else (*heads, P)))
    return x, dt, -decay * torch.rand(constant), torch.randn(B, tokens, G, N), torch.randn(B, tokens, G, N)


def _delta(tokens: int, decay: float) -> tuple[Tensor, ...]:
    q, k, v = torch.randn(B, tokens, G, N), torch.randn(B, tokens, G, N), torch.randn(B, tokens, H, P)
    return q, k, v, -decay * torch.rand(B, tokens, H), 2 * torch.rand(B, tokens, H)


def _delta_by_channel(tokens: int, decay: float) -> tuple[Tensor, ...]:
    q, k, v, _, beta = _delta(tokens, decay)
    return q, k, v, -decay * torch.rand(B, tokens, H, N), beta


def _lightning(tokens: int, decay: float) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(B, tokens, H, P) for _ in range(3))
    return q, k, v, torch.rand(B, tokens) > 0.2, decay * (0.1 + torch.rand(H))


def _rg_lru(tokens: int, decay: float) -> tuple[Tensor, ...]:
    return torch.randn(B, tokens, P), -decay * torch.rand(B, tokens, P), torch.randn(B, tokens, P)


def _delay(tokens: int, decay: float) -> tuple[Tensor, ...]:
    return torch.randn(B, tokens, H, P), torch.rand(B, tokens) > 0.2


def draw(recurrence: Recurrence, tokens: int, decay: str = "plain", seed: int = 0, given: bool = True):
    """Fresh float64 inputs and an initial state, None where not `given`."""
    torch.manual_seed(1000 * seed + tokens)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        inputs = recurrence.draw(tokens, DECAYS[decay])
        return inputs, torch.randn(B, *recurrence.state) if given else None
    finally:
        torch.set_default_dtype(before)


RECURRENCES = {
    "selective_scan": Recurrence(
        selective_scan,
        oracles.selective_scan,
        lambda t, d: _mamba(t, d, (G, P), (G, P, N)),
        (G, P, N),
        (1,),
        2,
        (0, 1, 3, 2),
    ),
    "ssd": Recurrence(ssd, oracles.ssd, lambda t, d: _mamba(t, d, (H,), (H,)), (H, P, N), (1,), 2, (0, 1, 3, 2)),
    "gated_delta": Recurrence(gated_delta, oracles.gated_delta, _delta, (H, N, P), (3, 4), None, (1, 2, 3, 4)),
    "gated_delta_by_channel": Recurrence(
        gated_delta, oracles.gated_delta, _delta_by_channel, (H, N, P), (3, 4), None, (1, 2, 3, 4)
    ),
    "lightning": Recurrence(lightning, oracles.lightning, _lightning, (H, P, P), (3,), 4, (1, 2, 3, 4)),
    "rg_lru": Recurrence(rg_lru, oracles.rg_lru, _rg_lru, (P,), (1,), None, (0, 1)),
    "delay": Recurrence(delay, oracles.delay, _delay, (H, P), (1,), None, (0, 1)),
}
