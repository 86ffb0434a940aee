"""The selective scan of Mamba-1 (Gu & Dao 2023, arXiv:2312.00752).

    S_t = exp(dt_t A) S_(t-1) + (dt_t x_t) B_t        y_t = S_t C_t

dt >= 0, after its softplus, is the gate: a token of dt = 0 is no token. The skip D x_t is the caller's.

Letters: B rows, T new tokens, G groups, P channels of a group, N state size, M chunks, Q tokens of a chunk,
n marks of a row.
"""

import torch
from torch import Tensor

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}
FEW = 16  # so many tokens are one chunk


@chunks.uncast
def chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens: x and dt (B, T, G, P), A (G, P, N) < 0, B and C (B, T, G, N), state (B, G, P, N) or None.

    Returns the outputs (B, T, G, P), the state after the first `count` (B,) tokens of each row, None for all, and
    the states after `at` (B, n) tokens, each 0..T, (B, n, G, P, N), or None.
    """
    dtype = chunks.working(x, state)
    rows, tokens = x.shape[:2]
    band, size = _sizes(tokens, chunks.room(x) // (rows * A.numel()))
    dt, A = chunks.split(chunks.gated(dt, count, dtype), size), A.to(dtype)
    x, B, C = (chunks.split(tensor.to(dtype), size) for tensor in (x, B, C))
    new = x * dt
    state = x.new_zeros(rows, *A.shape) if state is None else state
    kept, outputs = chunks.begun(state, at), []
    for first in range(0, x.shape[1], band):
        chosen = slice(first, first + band)
        decay = _decay(dt[:, chosen], A)
        if band == 1:
            carries = state.unsqueeze(1)
        else:
            # each chunk from zero first, then from what the chunks before it leave
            ends, _ = _scan(torch.zeros_like(decay[:, :, 0]), decay, new[:, chosen], B[:, chosen], None)
            whole, each = _decay(dt[:, chosen].sum(2), A), [state]
            for m in range(ends.shape[1] - 1):
                each.append(torch.addcmul(ends[:, m], each[-1], whole[:, m]))
                kept = chunks.passed(kept, each[-1], at, size, first + m)
            carries = torch.stack(each, 1)
        ends, y = _scan(carries, decay, new[:, chosen], B[:, chosen], C[:, chosen])
        outputs.append(y)
        state = ends[:, -1].contiguous()
        kept = chunks.passed(kept, state, at, size, first + carries.shape[1] - 1)
    if kept is not None and at is not None:
        dt, new, B = chunks.rest(at, size, (dt, new), (B,))
        kept, _ = _scan(kept, _decay(dt, A), new, B, None)
    return chunks.join(torch.cat(outputs, 1), tokens), state, kept


@chunks.forward_only
def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, G, P, N) in place: x, dt (B, G, P), A (G, P, N), B and C (B, G, N); (B, G, P)."""
    if torch.compiler.is_exporting():
        return _step_traced(x, dt, A, B, C, state)
    _advance(x, dt, B, A, state)
    return _read(state, C.to(state.dtype))


def _step_traced(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """`step` as one loop over the state, if a compiler makes it: no library reads it."""
    x, dt, A, B, C = (each.to(state.dtype) for each in (x, dt, A, B, C))
    after = state * (dt.unsqueeze(-1) * A).exp() + (x * dt).unsqueeze(-1) * B.unsqueeze(-2)
    state.copy_(after)
    return (after * C.unsqueeze(-2)).sum(-1)


@chunks.forward_only
def fold(x: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, G, P, N) in place over the first `count` (B,) tokens of a record, None for all.

    The record: x and dt (B, T, G, P), B (B, T, G, N).
    """
    dt = chunks.gated(dt, count, state.dtype)
    for t in range(x.shape[1]):
        _advance(x[:, t], dt[:, t], B[:, t], A, state)


def _advance(x: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor) -> None:
    # contiguous operands: the bits then cannot depend on how the caller cut them
    dt = dt.to(state.dtype).contiguous()
    new = (x.to(state.dtype) * dt).contiguous()
    B = B.to(state.dtype).contiguous()
    state.mul_((dt.unsqueeze(-1) * A.to(state.dtype)).exp_())
    state.addcmul_(new.unsqueeze(-1), B.unsqueeze(-2))


def _sizes(tokens: int, room: int) -> tuple[int, int]:
    """Chunks of a band and tokens of a chunk, about as many, for bands of at most `room` tokens."""
    room = chunks.size(tokens, max(room, FEW))
    return (1, room) if room <= FEW else (-(-room // round(room**0.5)), round(room**0.5))


def _decay(dt: Tensor, A: Tensor) -> Tensor:
    return (dt.unsqueeze(-1) * A).exp_()


def _scan(state: Tensor, decay: Tensor, new: Tensor, B: Tensor, C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Walk all chunks abreast, token by token: state (B, M, G, P, N), decay (B, M, Q, G, P, N), the others alike.

    Returns the states after the chunks (B, M, G, P, N) and the outputs (B, M, Q, G, P), none without C.
    """
    outputs = []
    news, Bs = new.unsqueeze(-1).unbind(2), B.unsqueeze(-2).unbind(2)
    for q, factor in enumerate(decay.unbind(2)):
        # in place where autograd keeps nothing: it keeps the factors of a product, not the product
        state = (state * factor).addcmul_(news[q], Bs[q])
        if C is not None:
            outputs.append(_read(state, C[:, :, q]))
    return state, torch.stack(outputs, 2) if outputs else new[:, :, :0]


def _read(state: Tensor, C: Tensor) -> Tensor:
    """Outputs (..., P) of a state (..., P, N) and C (..., N)."""
    # a row times a matrix: the other way round is several times slower on a processor
    P, N = state.shape[-2:]
    return torch.bmm(C.reshape(-1, 1, N), state.reshape(-1, P, N).mT).view(state.shape[:-1])
