"""The index of qwen4_exp, which chooses the blocks of tokens that a query attends to.

B rows, T new tokens, S entries of the index, S' positions before the pass, E the model's width, H heads of size D, R of
which are rotated, P blocks of K tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statecache.models.cache import StateCache
from statecache.models.mixers.base import Mixer


class BlockIndex(Mixer):
    """Scores blocks by the mean of their keys, turned to where they begin; and adds the block that is not full yet.

    A block has K tokens in a row, from the row's first. It can be chosen once its last token is there.
    """

    convolutions = ()

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """Which keys each of the tokens attends to, (B, 1, T, S) bool. See `Mixer.forward`.

        position_embeddings: cosines and sines (B, S' + T, R), of the positions before the pass and of its own.
        """
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, StateCache)), None)
        if cache is None:
            return self.unmodified(hidden_states, position_embeddings, *args, **kwargs)
        with torch.no_grad(), self.weights():
            return self._choose(hidden_states, *position_embeddings, cache)

    def _choose(self, x: Tensor, cos: Tensor, sin: Tensor, cache: StateCache) -> Tensor:
        m: Any = self.module
        block: int = m.compress_ratio
        q, key = m.index_qk_proj(x).split([m.index_n_heads * m.index_head_dim, m.index_head_dim], -1)
        index = cache.update_indexer(key, self.layer)  # (B, S, D)
        step = cache.writer.step
        assert step is not None
        position = step.places(x.device)  # (B or 1, T)
        tokens, slots = x.shape[1], index.shape[1]

        whole = slots // block
        first = torch.arange(whole, device=x.device) * block
        seen = first + block <= position.unsqueeze(-1) + 1  # (B or 1, T, P)
        if whole > m.block_topk:  # else all blocks that are full are chosen
            before, start = cos.shape[1] - tokens, position[:, :1]
            # in the pass itself a position stands behind all that were before, however short the row
            at = torch.where(first < start, first, (first + before - start).clamp(max=cos.shape[1] - 1))
            keys = torch.unflatten(index[:, : whole * block], 1, (whole, block))
            keys = m.k_layernorm(keys.float().mean(2).to(index.dtype))  # (B, P, D)
            keys = _rotated(keys, *(part.take_along_dim(at.unsqueeze(-1), 1) for part in (cos, sin)))
            q = m.q_layernorm(torch.unflatten(q, -1, (m.index_n_heads, m.index_head_dim)))  # (B, T, H, D)
            q = _rotated(q, *(part[:, before:].unsqueeze(2) for part in (cos, sin)))
            scores = (q.float() @ keys.float().mT.unsqueeze(1)).relu().sum(2) / m.index_head_dim**0.5  # (B, T, P)
            chosen = scores.masked_fill(~seen, -1).topk(m.block_topk, -1).indices
            seen = seen & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)

        place, last = torch.arange(slots, device=x.device), position.unsqueeze(-1)
        tail = (place >= (last + 1) // block * block) & (place <= last)  # (B or 1, T, S)
        in_block = torch.nn.functional.pad(seen.repeat_interleave(block, -1), (0, slots - whole * block))
        return (in_block | tail).unsqueeze(1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first R of x (..., D) turned by angles, the halves against each other: cos and sin (..., R)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half, other = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-other, half], -1) * sin, rest], -1)
