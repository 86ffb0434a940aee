"""The index of glm5_next, which chooses the pools of tokens that a query attends to.

B rows, T new tokens, S entries of the index, E the model's width, H heads of size D, P pools of K tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.models.cache import StateCache
from statecache.models.mixers.base import Mixer


class PooledIndex(Mixer):
    """Scores pools by a mean of their keys, weighed channel by channel; and adds the pool that is not full yet.

    A pool has K tokens in a row, from the row's first. It can be chosen once its last token is there.
    """

    convolutions = ()

    def forward(self, hidden_states: Tensor, q_resid: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The positions that each of the tokens attends to, -1 for none, (B, T, n) int32. See `Mixer.forward`."""
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, StateCache)), None)
        if cache is None:
            return self.unmodified(hidden_states, q_resid, *args, **kwargs)
        with torch.no_grad(), self.weights():
            return self._choose(hidden_states, q_resid, cache)

    def _choose(self, x: Tensor, query: Tensor, cache: StateCache) -> Tensor:
        m: Any = self.module
        pool: int = m.index_kpool
        q = torch.unflatten(m.wq_b(query), -1, (m.n_heads, m.head_dim))  # (B, T, H, D)
        key, weight = m.k_norm(m.wk(x)), F.linear(x, m.index_kpool_compress_gate)
        index = cache.update_indexer(torch.cat([key, weight, torch.ones_like(key[..., :1])], -1), self.layer)
        step = cache.writer.step
        assert step is not None
        position = step.places(x.device).unsqueeze(-1)  # (B or 1, T, 1)

        whole = index.shape[1] // pool * pool
        pools = torch.unflatten(index[:, :whole], 1, (-1, pool) if whole else (0, pool))
        keys, weights, _ = pools.split_with_sizes((m.head_dim, m.head_dim, 1), -1)  # (B, P, K, D)
        shares = (weights.float() + m.index_kpool_compress_ape.float()).softmax(2).to(keys.dtype)
        keys = (shares * keys).sum(2)  # (B, P, D)
        scores = F.relu((q.float() @ keys.float().mT.unsqueeze(1)) * m.softmax_scale)  # (B, T, H, P)
        wide = next(m.weights_proj.parameters(), x)  # perhaps kept in float32; a quantised layer takes x as it is
        by_head = m.weights_proj(x.to(wide.dtype) if wide.is_floating_point() else x).float() * m.n_heads**-0.5
        scores = (by_head.unsqueeze(-2) @ scores).squeeze(-2)  # (B, T, P)
        there = (torch.arange(scores.shape[-1], device=x.device) + 1) * pool <= position + 1
        scores = scores.masked_fill(~there, torch.finfo(scores.dtype).min)

        chosen = scores.topk(min(m.index_topk // pool, scores.shape[-1]), -1).indices
        first = torch.where(there.expand_as(scores).gather(-1, chosen), chosen * pool, -pool)
        within = torch.arange(pool, device=x.device)
        tokens = torch.where(first.unsqueeze(-1) < 0, -1, first.unsqueeze(-1) + within).flatten(-2)
        if m.index_kpool_always_select_tail:
            begun = (position + 1) % pool  # tokens of the pool that is not full yet
            tail = torch.where(within[:-1] < begun, position + 1 - begun + within[:-1], -1)
            tokens = torch.cat([tokens, tail.expand(len(tokens), -1, -1)], -1)
        return tokens.to(torch.int32)
