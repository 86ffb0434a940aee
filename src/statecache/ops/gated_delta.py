"""The gated delta rule (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464).

    S = exp(g_t) S_(t-1)        S_t = S + k_t outer beta_t (v_t - k_t S)        y_t = q_t S_t

The decay g_t is one number a head, or one a channel of its keys: then it is Kimi Delta Attention (Kimi Team 2025,
arXiv:2510.26692), and exp(g_t) scales the rows of S. The shape of g says which: (.., H) or (.., H, K).

q and k are l2-normalised here, q then scaled by K**-0.5. g <= 0 and beta (0..2) together are the gate: a token of
g = beta = 0 is no token. A chunk solves for what its tokens write, d (Q, V), at once:
with D_ij = exp(g_(j+1) + .. + g_i), which scales channels,

    d_i + beta_i sum_(j<i) (k_i D_ij k_j) d_j = beta_i (v_i - k_i D_i0 S)

Letters: B rows, T new tokens, H value heads, J key heads (H/J value heads share one), K key size, V value size,
M chunks, Q tokens of a chunk, n marks of a row.
"""

import torch
from torch import Tensor

from statecache.ops import chunks

EXACTNESS = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}
MOST = 64  # tokens of a chunk
MOST_BY_CHANNEL = 16  # the same where every channel has a decay: a pair of tokens then costs K exponentials, not one


@chunks.uncast
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    count: Tensor | None = None,
    at: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take in T tokens: q, k (B, T, J, K), v (B, T, H, V), beta (B, T, H), state (B, H, K, V) or None for zeros.

    g is (B, T, H), or (B, T, H, K).

    Returns the outputs (B, T, H, V), the state after the first `count` (B,) tokens of each row, None for all, and
    the states after `at` (B, n) tokens, each 0..T, (B, n, H, K, V), or None.
    """
    dtype = chunks.working(v, state)
    rows, tokens, heads, V = v.shape
    K = q.shape[-1]
    by_channel = g.ndim > beta.ndim
    size = chunks.size(tokens, MOST_BY_CHANNEL if by_channel else MOST)
    q, k = _unit(q.to(dtype)) * K**-0.5, _unit(k.to(dtype))
    q, k, v = (chunks.split(tensor, size) for tensor in (q, k, v.to(dtype)))
    g, beta = (chunks.split(chunks.gated(gate, count, dtype), size) for gate in (g, beta))
    state = v.new_zeros(rows, heads, K, V) if state is None else state
    pairs = size * size * K if by_channel else size * (K + size)
    band = max(1, chunks.room(v) // (rows * heads * pairs))
    y, state, states = chunks.sweep(_parts, _through, (g, beta), (q, k, v), state, at, band)
    return chunks.join(y, tokens), state, states


@chunks.forward_only
def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Take in one token, `state` (B, H, K, V) in place: q, k (B, J, K), v (B, H, V), beta (B, H); (B, H, V).

    g is (B, H), or (B, H, K).
    """
    if torch.compiler.is_exporting():
        return _step_traced(q, k, v, g, beta, state)
    k, q = _by_head(torch.stack([k, q], 2), state).unbind(1)
    new = _write(k, v, g, beta, state)
    rows, heads, K, V = state.shape
    return torch.baddbmm(new, q, state.view(-1, K, V), beta=0, alpha=K**-0.5).view(rows, heads, V)


def _step_traced(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """`step` as two loops over the state, if a compiler makes them: one reads it for both k and q, one writes it."""
    dtype, K = state.dtype, state.shape[2]
    q, k = (_unit(each.to(dtype)).repeat_interleave(state.shape[1] // k.shape[1], 1) for each in (q, k))  # (B, H, K)
    decay = (g if g.ndim > beta.ndim else g.unsqueeze(-1)).to(dtype).exp()
    kept = state * decay.unsqueeze(-1)
    new = (v.to(dtype) - (kept * k.unsqueeze(-1)).sum(2)) * beta.to(dtype).unsqueeze(-1)
    y: Tensor = ((kept * q.unsqueeze(-1)).sum(2) + (q * k).sum(-1, keepdim=True) * new) * K**-0.5
    state.copy_(kept + k.unsqueeze(-1) * new.unsqueeze(2))
    return y


@chunks.forward_only
def fold(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, count: Tensor | None = None) -> None:
    """Step `state` (B, H, K, V) in place over the first `count` (B,) tokens of a record, None for all.

    The record: k (B, T, J, K), v (B, T, H, V), beta (B, T, H), g (B, T, H) or (B, T, H, K).
    """
    g, beta = (chunks.gated(gate, count, state.dtype) for gate in (g, beta))
    for t in range(v.shape[1]):
        _write(_by_head(k[:, t].unsqueeze(2), state)[:, 0], v[:, t], g[:, t], beta[:, t], state)


def _by_head(x: Tensor, state: Tensor) -> Tensor:
    """Unit vectors for every value head, from x (B, J, n, K): (B H, n, 1, K)."""
    rows, heads, K, _ = state.shape
    x = _unit(x.to(state.dtype))
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x.view(rows * heads, -1, 1, K)


def _write(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Write one token into `state`, k (B H, 1, K) as `_by_head` gives it; what was written for it, (B H, 1, V)."""
    K, V = state.shape[2:]
    state = state.view(-1, K, V)
    state.mul_(g.to(state.dtype).exp().reshape(len(state), -1, 1))
    new = torch.baddbmm(v.to(state.dtype).reshape(-1, 1, V), k, state, alpha=-1)
    new.mul_(beta.to(state.dtype).reshape(-1, 1, 1))
    state.addcmul_(k.mT, new)
    return new


def _unit(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).add_(1e-6).rsqrt_()


def _parts(g: Tensor, beta: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What a chunk's passage needs besides the carry, inputs (B, M, Q, ...)."""
    Q, shared = v.shape[2], v.shape[3] // k.shape[3]
    q, k = q.transpose(2, 3), k.transpose(2, 3)  # (B, M, J, Q, K)
    v, beta = v.transpose(2, 3), beta.transpose(2, 3).unsqueeze(-1)  # (B, M, H, Q, V), (B, M, H, Q, 1)
    total, dtype = chunks.total(g).transpose(2, 3), v.dtype
    total = total if total.ndim == k.ndim else total.unsqueeze(-1)  # (B, M, H, Q, K or 1)
    q_scores, k_scores = _scores(q, k, total, shared)
    system = (k_scores * beta).tril(-1)
    identity = torch.eye(Q, dtype=v.dtype, device=v.device)
    solve = torch.linalg.solve_triangular(
        system + identity, identity.expand_as(system), upper=False, unitriangular=True
    )
    q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    last = total[..., -1:, :]
    since, until = total.to(dtype).exp(), (last - total).to(dtype).exp()
    decay = last.to(dtype).exp().mT
    return torch.cat([k * since * beta, q * since], -2), v * beta, solve, q_scores, k * until, decay


def _scores(q: Tensor, k: Tensor, total: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """The products of q and of k (B, M, J, Q, K) with the decayed keys up to each token: (B, M, H, Q, Q) each."""
    if total.shape[-1] == 1:
        decay = chunks.between(total.squeeze(-1), k.dtype)
        return (q @ k.mT).repeat_interleave(shared, 2) * decay, (k @ k.mT).repeat_interleave(shared, 2) * decay
    q, k = q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)
    later = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool, device=k.device).triu(1).unsqueeze(-2)
    decay = (total.unsqueeze(-1) - total.mT.unsqueeze(-3)).to(k.dtype).masked_fill_(later, -torch.inf).exp_()
    both = torch.stack([q, k], -2) @ (decay * k.mT.unsqueeze(-3))  # (B, M, H, Q, 2, K) @ (.., Q, K, Q)
    q_scores, k_scores = both.unbind(-2)
    return q_scores, k_scores


def _through(
    state: Tensor, reads: Tensor, v: Tensor, solve: Tensor, scores: Tensor, writes: Tensor, decay: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk: state (B, H, K, V), reads (B, H, 2Q, K), v (B, H, Q, V), the rest as `_parts` gives it."""
    Q = v.shape[-2]
    seen = reads @ state
    new = solve @ (v - seen[..., :Q, :])
    return (seen[..., Q:, :] + scores @ new).transpose(1, 2), state * decay + writes.mT @ new
