"""What kernels choose and keep of drafts is what the rule of `sampling` does."""

from __future__ import annotations

import random

import pytest
import torch
from drawn import DEVICE
from torch import Tensor

from statecache.decode.request import Request
from statecache.decode.sampling import Drafts, Sampler, until
from statecache.kernels.choose import choose, likeliest, settle

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_logits(rows: int, tokens: int, V: int, dtype: torch.dtype) -> Tensor:
    """Few numbers, so that many are equal, zeros of both signs and what is no number."""
    pool = [-INF, -3.0, -0.0, 0.0, 1.5, 2.0]
    if random.random() < 0.3:
        pool += [NAN, INF]
    if random.random() < 0.2:
        pool = [-INF]
    picked = torch.tensor(pool)[torch.randint(len(pool), (rows, tokens, V))]
    return (picked if random.random() < 0.5 else torch.randn(rows, tokens, V)).to(DEVICE, dtype)


def whole(*shape: int, most: int) -> Tensor:
    return torch.randint(0, most, shape, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "V"), [(1, 1), (1, 5000), (3, 1024), (5, 2049), (64, 37), (128, 3)])
def test_a_row_goes_on_with_the_likeliest_token(rows: int, V: int, dtype: torch.dtype) -> None:
    for _ in range(3):
        logits, writes = some_logits(rows, 1, V, dtype), whole(rows, most=2)
        last = whole(rows, 1, most=V)
        want = torch.where(writes[:, None] > 0, logits[:, 0].argmax(-1, keepdim=True), last)
        choose(likeliest(logits), last, writes)
        assert torch.equal(last, want)


def test_logits_may_have_gaps() -> None:
    logits = torch.randn(3, 2, 4, 50, device=DEVICE)[:, :, 1]
    last = whole(3, 1, most=50)
    choose(likeliest(logits[:, -1:]), last, torch.ones_like(last[:, 0]))
    assert torch.equal(last, logits[:, -1:].argmax(-1))
    for other in (logits.mT[:, -1:], logits[:, -1:, ::2]):  # between the logits of a row, too
        choose(likeliest(other), last, torch.ones_like(last[:, 0]))
        assert torch.equal(last, other.argmax(-1))


def drafted(likely: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Drafts (B, K) of which many are right, and how many there are of each row."""
    rows, K = len(likely), likely.shape[1] - 1
    right = torch.rand(rows, K, device=DEVICE) < 0.8
    return torch.where(right, likely[:, :-1], whole(rows, K, most=V)), whole(rows, most=K + 1)


@pytest.mark.parametrize("ends", [0, 1, 3])
@pytest.mark.parametrize(("rows", "K", "V"), [(1, 4, 5000), (4, 4, 9), (7, 1, 4), (3, 16, 3), (33, 5, 40)])
def test_rows_keep_what_the_rule_keeps(rows: int, K: int, V: int, ends: int) -> None:
    kept_some = 0
    for _ in range(4 + 24 // rows):  # of one row four may keep nothing
        logits = some_logits(rows, 1 + K, V, random.choice(DTYPES))
        drafts, counts = drafted(logits.argmax(-1), V)
        writes, last = whole(rows, most=5).clamp(max=1), whole(rows, 1, most=V)
        stop = whole(rows, ends, most=V + 2) - 2  # of some rows fewer
        sampler = Sampler([Request([0])] * rows, DEVICE)
        kept, token = until(stop, drafts, sampler.verify(logits, Drafts(drafts, []), drafts, counts, counts))
        after = torch.where(writes > 0, token, last[:, 0])
        found = torch.full((rows,), -7, device=DEVICE)
        taken = settle(likeliest(logits), last, writes, drafts, counts, found, stop)
        assert torch.equal(found, kept * writes)
        assert torch.equal(taken, (1 + kept) * writes)
        assert torch.equal(last[:, 0], after)
        kept_some += int(kept.sum())
    assert kept_some


def test_what_is_sure_is_kept_whatever_is_likely() -> None:
    logits = some_logits(5, 4, 30, torch.float32)
    drafts, counts, last = whole(5, 3, most=30), whole(5, most=4), whole(5, 1, most=30)
    found, writes = torch.empty_like(counts), torch.tensor([1, 1, 0, 1, 1], device=DEVICE)
    want = torch.where(writes > 0, logits.argmax(-1).gather(1, counts[:, None])[:, 0], last[:, 0])
    taken = settle(likeliest(logits), last, writes, drafts, counts, found, None)
    assert torch.equal(found, counts * writes) and torch.equal(taken, (1 + counts) * writes)
    assert torch.equal(last[:, 0], want)
