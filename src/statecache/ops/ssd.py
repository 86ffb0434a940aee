"""State space duality, the recurrence of Mamba-2 (Dao & Gu 2024, arXiv:2405.21060).

    S_t = exp(dt_t A) S_(t-1) + (dt_t x_t) outer B_t        y_t = S_t C_t

dt >= 0 is the gate: a token of dt = 0 is no token. The skip D x_t is the caller's.

Letters: B rows, T new tokens, H heads, G groups (H/G heads share B and C), P head size, N state size,
M chunks, Q tokens of a chunk, n marks of a row.
"""

import torch
from torch import Tensor

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}
MOST = 64  # tokens of a chunk


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
    """Take in T tokens: x (B, T, H, P), dt (B, T, H), A (H,), B and C (B, T, G, N), state (B, H, P, N) or None.

    Returns the outputs (B, T, H, P), the state after the first `count` (B,) tokens of each row, None for all, and
    the states after `at` (B, n) tokens, each 0..T, (B, n, H, P, N), or None.
    """
    dtype = chunks.working(x, state)
    rows, tokens, heads, P = x.shape
    size = chunks.size(tokens, MOST)
    dt = chunks.gated(dt, count, dtype)
    gates = tuple(chunks.split(gate, size) for gate in (dt, dt * A.to(dtype)))
    inputs = tuple(chunks.split(tensor.to(dtype), size) for tensor in (x, B, C))
    # a chunk that has no token keeps the state's bits, so T = 0 needs no case of its own
    state = inputs[0].new_zeros(rows, heads, P, B.shape[3]) if state is None else state
    band = max(1, chunks.room(x) // (rows * heads * size * size))
    y, state, states = chunks.sweep(_parts, _through, gates, inputs, state, at, band)
    return chunks.join(y, tokens), state, states


@chunks.forward_only
def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, H, P, N) in place: x (B, H, P), dt (B, H), A (H,), B and C (B, G, N).

    Returns (B, H, P).
    """
    if torch.compiler.is_exporting():
        return _step_traced(x, dt, A, B, C, state)
    _advance(x, dt, B, A, state)
    rows, heads, P, N = state.shape
    # a row times a matrix: the other way round is several times slower on a processor
    read = torch.bmm(C.to(state.dtype).reshape(-1, 1, N), state.reshape(rows * C.shape[1], -1, N).mT)
    return read.view(rows, heads, P)


def _step_traced(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """`step` as one loop over the state, if a compiler makes it: the output is of what was, and of what is new."""
    dt = dt.to(state.dtype)
    decay, new = (dt * A.to(state.dtype)).exp(), x.to(state.dtype) * dt.unsqueeze(-1)
    B, C = (each.to(state.dtype).repeat_interleave(state.shape[1] // B.shape[1], 1) for each in (B, C))  # (B, H, N)
    kept = state * decay[..., None, None]
    y = (kept * C.unsqueeze(2)).sum(-1) + new * (B * C).sum(-1, keepdim=True)
    state.copy_(kept + new.unsqueeze(-1) * B.unsqueeze(2))
    return y


@chunks.forward_only
def fold(x: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, H, P, N) in place over the first `count` (B,) tokens of a record, None for all.

    The record: x (B, T, H, P), dt (B, T, H), B (B, T, G, N).
    """
    dt = chunks.gated(dt, count, state.dtype)
    for t in range(x.shape[1]):
        _advance(x[:, t], dt[:, t], B[:, t], A, state)


def _advance(x: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor) -> None:
    # contiguous operands: the bits then cannot depend on how the caller cut them
    dt = dt.to(state.dtype)
    new = (x.to(state.dtype) * dt.unsqueeze(-1)).contiguous()
    B = B.to(state.dtype).contiguous()
    state.mul_((dt * A.to(state.dtype)).exp_()[..., None, None])
    groups = (B.shape[1], -1)
    torch.unflatten(state, 1, groups).addcmul_(torch.unflatten(new, 1, groups).unsqueeze(-1), B[:, :, None, None])


def _parts(dt: Tensor, log: Tensor, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    """What passing a chunk needs besides the carry; dt and log = dt A (B, M, Q, H), the others (B, M, Q, ...)."""
    total, dtype = chunks.total(log), x.dtype
    last = total[:, :, -1:]
    decay = chunks.between(total.transpose(2, 3), dtype)  # (B, M, H, Q, Q)
    scores = C.transpose(2, 3) @ B.permute(0, 1, 3, 4, 2)  # (B, M, G, Q, Q)
    weight = torch.unflatten(decay, 2, (scores.shape[2], -1)) * scores.unsqueeze(3)
    new = x * dt.unsqueeze(-1)
    within = (weight.flatten(2, 3) @ new.transpose(2, 3)).transpose(2, 3)  # (B, M, Q, H, P)
    left = new * (last - total).to(dtype).exp().unsqueeze(-1)
    since, last = total.to(dtype).exp().unsqueeze(-1), last.to(dtype).exp()
    return within, since, C, left, B, last.transpose(2, 3).unsqueeze(-1)


def _through(
    state: Tensor, within: Tensor, start: Tensor, C: Tensor, left: Tensor, B: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: state (B, H, P, N), within and left (B, Q, H, P), C and B (B, Q, G, N), decay (B, H, 1, 1)."""
    groups = B.shape[2]
    # the heads of a group are one matrix (H/G P, N): they share B and C
    seen = C.transpose(1, 2) @ torch.unflatten(state, 1, (groups, -1)).flatten(2, 3).mT
    added = torch.unflatten(left, 2, (groups, -1)).flatten(3).permute(0, 2, 3, 1) @ B.transpose(1, 2)
    y = torch.addcmul(within, seen.transpose(1, 2).reshape(within.shape), start)
    return y, torch.addcmul(added.view(state.shape), state, decay)
