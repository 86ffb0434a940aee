"""Experts against plain PyTorch in float64, on fresh random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import DEVICE, HALF, NAN, ROUNDED, draw, error, normed, strided
from torch.nn import functional as F

from statecache.kernels.experts import Shared, experts, route


def summed(x: Any, up: Any, down: Any, index: Any, share: Any, gated: bool) -> torch.Tensor:
    """The same token by token."""
    rows = []
    for seen, own, by in zip(x.double(), index.tolist(), share.double(), strict=True):
        inside = [up[n].double() @ seen for n in own]
        made = [F.silu(y.chunk(2)[0]) * y.chunk(2)[1] if gated else F.relu(y).square() for y in inside]
        rows.append(sum(b * (down[n].double() @ y) for n, y, b in zip(own, made, by, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("tokens", "count", "chosen"), [(1, 2, 1), (3, 7, 7), (5, 64, 6), (2, 300, 22)])
def test_the_best_are_chosen(tokens: int, count: int, chosen: int, normalised: bool, softmax: bool) -> None:
    logits = strided(draw(tokens, count))
    scores = logits.double().softmax(-1) if softmax else logits.double().sigmoid()
    for bias in (None, draw(count)):
        given = {"softmax": softmax, "normed": normalised, "eps": 1e-3, "scale": 2.5, "bias": bias}
        index, share, none = route(logits, chosen, **given)
        want = (scores if bias is None else scores + bias.double()).topk(chosen, -1).indices
        assert torch.equal(index, want) and index.dtype == torch.int64 and share.dtype == torch.float32
        shares = scores.gather(1, want)
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-3) if normalised else shares
        assert error(share, 2.5 * shares) < 2e-6 and none.numel() == 0


@pytest.mark.filterwarnings("ignore:invalid value")  # by the interpreter
@pytest.mark.parametrize("softmax", [True, False])
def test_of_equals_the_first_is_chosen_and_of_what_is_no_number_one_that_is_there(softmax: bool) -> None:
    index, share, _ = route(torch.zeros(2, 6, device=DEVICE), 3, softmax=softmax, normed=True)
    assert index.tolist() == [[0, 1, 2]] * 2 and share.sum(-1).tolist() == pytest.approx([1, 1])
    logits = torch.full((2, 6), NAN, device=DEVICE)
    logits[1, 4] = 1.0
    index, _, _ = route(logits, 3, softmax=softmax, normed=True)
    assert index.min() >= 0 and index.max() < 6
    assert softmax or index[1, 0] == 4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("tokens", "chosen", "inputs", "inside"), [(1, 1, 48, 37), (1, 4, 130, 64), (3, 2, 1040, 20), (5, 3, 16, 1100)]
)
def test_each_token_gets_what_its_own_give(
    tokens: int, chosen: int, inputs: int, inside: int, dtype: torch.dtype, gated: bool
) -> None:
    x = strided(draw(tokens, inputs, dtype=dtype))
    up = draw(6, inside * (1 + gated), inputs, dtype=dtype) / inputs**0.5
    down = draw(6, inputs, inside, dtype=dtype) / inside**0.5
    index = torch.stack([torch.randperm(6)[:chosen] for _ in range(tokens)]).to(x.device)
    share = draw(tokens, chosen).to(dtype)
    got = experts(x, up, down, index, share, gated=gated)
    assert got.dtype == dtype and got.shape == (tokens, inputs)
    assert error(got, summed(x, up, down, index, share, gated)) < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_unit_goes_along(dtype: torch.dtype, gated: bool, opened: bool) -> None:
    x, gate = strided(draw(3, 520 * (1 + gated), dtype=dtype)), strided(draw(3, 1, dtype=dtype)) if opened else None
    first = x.double()
    want = F.silu(first.chunk(2, 1)[0]) * first.chunk(2, 1)[1] if gated else first.relu().square()
    want = want if gate is None else want * gate.double().sigmoid()
    logits = draw(3, 7)
    index, share, inside = route(logits, 2, softmax=True, normed=False, shared=Shared(x, gated, gate))
    assert inside.dtype == dtype and error(inside, want) < (2e-6 if dtype == torch.float32 else 2 * ROUNDED)
    alone = route(logits, 2, softmax=True, normed=False)
    assert torch.equal(index, alone[0]) and torch.equal(share, alone[1])


@pytest.mark.parametrize("gated", [True, False])
def test_with_a_norm_before_and_a_sum_behind(gated: bool) -> None:
    x, by = strided(draw(3, 100)), draw(100)
    up, down = draw(4, 24 * (1 + gated), 100) / 10, draw(4, 100, 24) / 5
    index, share = torch.tensor([[1, 0], [3, 2], [0, 3]], device=x.device), draw(3, 2)
    residual = strided(draw(3, 100, dtype=torch.float64).float())
    more = {"norm": by, "eps": 1e-4, "offset": 1.0, "residual": residual, "scale": 0.3}
    seen = normed(x.double(), by, 1e-4, 1.0)
    want = residual.double() + 0.3 * summed(seen, up, down, index, share, gated)
    assert error(experts(x, up, down, index, share, gated=gated, **more), want) < 2e-6


def test_shares_are_of_any_dtype_and_experts_of_several_tokens() -> None:
    x, up, down = draw(4, 32, dtype=HALF), draw(2, 40, 32, dtype=HALF) / 6, draw(2, 32, 20, dtype=HALF) / 4
    index, share = torch.tensor([[1, 0]] * 4, device=x.device), draw(4, 2)
    assert error(experts(x, up, down, index, share, gated=True), summed(x, up, down, index, share, True)) < 2e-2
    apart = strided(share, 4)
    assert torch.equal(experts(x, up, down, index, apart, gated=True), experts(x, up, down, index, share, gated=True))
