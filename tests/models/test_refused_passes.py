"""A forward pass that is refused leaves states, lengths and the way back, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import statecache as sc
from statecache import errors

SLACK, CAPACITY = 8, 24
NAMES = ["mamba", "mamba2", "qwen3_5", "lfm2", "falcon_h1", "minimax"]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def draw(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def feed(model: Any, cache: sc.StateCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=True, **{families.cache_arg(model): cache}).logits


def _of_another_dtype(model: Any, cache: sc.StateCache) -> None:
    with pytest.raises(errors.DtypeError, match=r"bfloat16.*float32"):
        feed(copy.deepcopy(model).bfloat16(), cache, draw(2, 4, 7))


def _with_an_unknown_id(model: Any, cache: sc.StateCache) -> None:
    with pytest.raises(IndexError):
        feed(model, cache, draw(2, 4, 7) + 5000)


def _with_more_rows(model: Any, cache: sc.StateCache) -> None:
    with pytest.raises(errors.RowsError, match=r"3 rows, and the cache holds 2"):
        feed(model, cache, draw(3, 4, 7))


def _with_more_tokens_than_fit(model: Any, cache: sc.StateCache) -> None:
    if cache.get_max_length() == -1:
        return  # such a cache has no end
    with pytest.raises(errors.CapacityError, match=r"capacity=|max_tokens="):
        feed(model, cache, draw(2, CAPACITY, 7))


def _with_a_mask_of_other_rows(model: Any, cache: sc.StateCache) -> None:
    with pytest.raises(errors.ShapeError, match="attention_mask"):
        feed(model, cache, draw(2, 4, 7), torch.ones(3, 4))


def _of_other_layers(model: Any, cache: sc.StateCache) -> None:
    other = sc.prepare(families.build("bamba")[0])
    with pytest.raises(errors.ConfigError, match="make it from"):
        feed(other, cache, draw(2, 4, 7))


REFUSED: dict[str, Callable[[Any, sc.StateCache], None]] = {
    "another dtype": _of_another_dtype,
    "unknown id": _with_an_unknown_id,
    "more rows": _with_more_rows,
    "more tokens than fit": _with_more_tokens_than_fit,
    "mask of other rows": _with_a_mask_of_other_rows,
    "other layers": _of_other_layers,
}


def filled(name: str, capacity: int | None) -> tuple[Any, sc.StateCache]:
    """A prepared model, and rows of 16 tokens, the last of them fed one by one, so that much could be taken back."""
    model, config = families.build(name)
    cache, ids = sc.StateCache(config, capacity=capacity, slack=SLACK), draw(2, 16, 0)
    sc.prepare(model)
    feed(model, cache, ids[:, :10])
    for n in range(10, 16):
        feed(model, cache, ids[:, n : n + 1])
    return model, cache


@pytest.mark.parametrize("in_a_round", [False, True], ids=["alone", "in a round"])
@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_pass_changes_nothing(case: str, name: str, capacity: int | None, in_a_round: bool) -> None:
    model, cache = filled(name, capacity)
    untouched, held = cache.fork(), [buffer.clone() for buffer in cache.buffers()]
    if in_a_round:
        with cache.speculate(SLACK):
            REFUSED[case](model, cache)
    else:
        REFUSED[case](model, cache)
    assert cache.capabilities["step"]
    if capacity is not None:
        assert all(torch.equal(a, b) for a, b in zip(cache.buffers(), held, strict=True))
    assert torch.equal(cache.lengths, untouched.lengths)
    for forget in (0, SLACK):  # bit for bit what one gives that nobody asked, and from as far back
        asked, unasked = cache.fork(), untouched.fork()
        asked.rollback(forget)
        unasked.rollback(forget)
        again = draw(2, 3, 9)
        assert torch.equal(feed(model, asked, again), feed(model, unasked, again)), f"{forget} tokens back"


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_the_states_are_not_folded_by_a_model_that_is_refused(name: str) -> None:
    model, cache = filled(name, None)
    recurrent = {n: s.buffers()[0] for n, s in cache.states.items() if n.endswith("recurrent")}
    before = {n: entry.clone() for n, entry in recurrent.items()}
    with suppress(errors.DtypeError):
        feed(copy.deepcopy(model).bfloat16(), cache, draw(2, 4, 7))
    assert before and all(torch.equal(before[n], entry) for n, entry in recurrent.items())
