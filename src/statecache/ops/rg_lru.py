"""The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv:2402.19427).

    h_t = exp(g_t) h_(t-1) + sqrt(1 - exp(2 g_t)) x_t        y_t = c_t h_t

All of it by channel. g <= 0, the logarithm of the decay, is the gate: a token of g = 0 is no token. One that is to
forget all that was before it has g = FORGETS.

Letters: B rows, T new tokens, W channels, M chunks, Q tokens of a chunk, n marks of a row.
"""

import torch
from torch import Tensor

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}
FORGETS = -1e4  # its decay is zero in every dtype, and differences of sums with it stay finite
FEW = 8  # so many tokens are one chunk
STEEP = 1e3  # the largest derivative of the root, which has none at g = 0; transformers' bound


@chunks.uncast
def chunk(
    x: Tensor,
    g: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens: x, g and c (B, T, W), state (B, W) or None.

    Returns the outputs (B, T, W), the state after the first `count` (B,) tokens of each row, None for all, and the
    states after `at` (B, n) tokens, each 0..T, (B, n, W), or None.
    """
    dtype = chunks.working(x, state)
    rows, tokens, width = x.shape
    size = chunks.size(tokens, max(FEW, round(tokens**0.5)))
    state = x.new_zeros(rows, width, dtype=dtype) if state is None else state
    g = chunks.split(chunks.gated(g, count, dtype), size)
    decay, new = g.exp(), chunks.split(x.to(dtype), size) * _share(g)
    # all chunks abreast from zero, then each from what the chunks before it leave
    within = [new[:, :, 0]]
    for q in range(1, size):
        within.append(torch.addcmul(new[:, :, q], decay[:, :, q], within[-1]))
    alone, since = torch.stack(within, 2), g.cumsum(2).exp()  # (B, M, Q, W)
    carries = [state]
    for m in range(alone.shape[1] - 1):
        carries.append(torch.addcmul(alone[:, m, -1], since[:, m, -1], carries[-1]))
    h = chunks.join(torch.addcmul(alone, since, torch.stack(carries, 1).unsqueeze(2)), tokens)
    after = h[:, -1].clone() if tokens else state.clone()
    kept = None
    if at is not None:
        kept = torch.cat([state.unsqueeze(1), h], 1).take_along_dim(at.unsqueeze(-1), 1)
    return h * c.to(dtype), after, kept


@chunks.forward_only
def step(x: Tensor, g: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, W) in place: x, g and c (B, W). Returns (B, W)."""
    _advance(x, g, state)
    return state * c.to(state.dtype)


@chunks.forward_only
def fold(x: Tensor, g: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, W) in place over the first `count` (B,) tokens of a record, None for all.

    The record: x and g (B, T, W).
    """
    g = chunks.gated(g, count, state.dtype)
    for t in range(x.shape[1]):
        _advance(x[:, t], g[:, t], state)


def _advance(x: Tensor, g: Tensor, state: Tensor) -> None:
    # contiguous operands: the bits then cannot depend on how the caller cut them
    x, g = x.to(state.dtype).contiguous(), g.to(state.dtype).contiguous()
    state.mul_(g.exp()).addcmul_(x, _share(g))


def _share(g: Tensor) -> Tensor:
    """What of a token's input goes into the state: sqrt(1 - exp(2 g))."""
    rest = -torch.expm1(2 * g)
    root = rest.sqrt()
    if not (rest.requires_grad and torch.is_grad_enabled()):
        return root
    slope = rest.detach().mul(4).clamp(min=STEEP**-2).rsqrt()
    return root.detach() + (rest - rest.detach()) * slope
