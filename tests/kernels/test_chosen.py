"""A decoder whose kernels choose and keep writes what one does whose sampler does."""

from __future__ import annotations

import families
import pytest
import torch
from drawn import DEVICE

import statecache as sc
from statecache.decode.request import Request

K, END = 3, 7


@pytest.mark.parametrize("drawn", [0.0, 0.8])
def test_it_writes_what_the_sampler_would(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATECACHE_COMPILED", "")
    model = families.build("mamba2", num_hidden_layers=2)[0].to(DEVICE)
    wrote = {}
    for fused in (True, False):
        cache = sc.StateCache(
            model.config, capacity=64, rows=3, slack=1 + K, back=False, dtype=model.dtype, device=DEVICE
        )
        with sc.Decoder(model, cache, fused=fused) as decoder:
            decoder.captures = False
            first = decoder.prefill([[5, 6, 7], [8], [9, 4]], temperature=drawn, seed=[1, 2, 3])
            ends = Request([0], temperature=drawn, ends=(END,))
            decoder.begin([2], [ends], first[2:], [2])
            wrote[fused] = [first.tolist(), decoder.step().tolist()]
            decoder.leave([1])
            given = torch.Generator().manual_seed(1)
            for _ in range(4):
                mark, start = decoder.cache.checkpoint(), decoder.tokens.clone()
                right = [decoder.step().clone() for _ in range(K)]
                decoder.restore(mark)
                decoder.tokens.copy_(start)
                wrong = torch.rand(3, K, generator=given).to(DEVICE) < 0.2
                drafts = torch.stack(right, 1).where(~wrong, torch.full_like(wrong, END, dtype=torch.long))
                kept = decoder.check(drafts, [K, 0, K - 1])
                wrote[fused] += [kept.tolist(), decoder.tokens.tolist(), decoder.lengths]
            ahead = decoder.draft(drafts, [2, 1, 3], 3)
            wrote[fused] += [ahead[[0, 2]].tolist(), decoder.tokens.tolist(), decoder.lengths]
    assert wrote[True] == wrote[False]
    kept = wrote[True][2::3][:4]
    assert any(n for row in kept for n in row) and all(row[1] == 0 for row in kept)
