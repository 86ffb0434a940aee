"""Masks against a double loop over queries and keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statecache.mask import additive, visible


def loop(query: Tensor, key: Tensor, window: int | None, real: Tensor | None, chunked: bool) -> Tensor:
    rows, tokens, keys = len(query), query.shape[1], key.shape[1]
    seen = torch.zeros(rows, 1, tokens, keys, dtype=torch.bool)
    for b in range(rows):
        for t in range(tokens):
            for s in range(keys):
                now, then = int(query[b, t]), int(key[b % len(key), s])
                pad = real is not None and not real[b, t]
                near = window is None or (now // window == then // window if chunked else now - then < window)
                seen[b, 0, t, s] = pad or (now >= then and near)
    return seen


@given(st.data())
def test_visible_is_the_double_loop(data: st.DataObject) -> None:
    rows, tokens, keys = (data.draw(st.integers(1, most)) for most in (3, 6, 12))
    start = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows)))
    query = start[:, None] + torch.arange(tokens)
    first = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=1) | st.just(start.tolist())))
    key = first[:, None] + torch.arange(keys)
    window = data.draw(st.none() | st.integers(1, 8))
    count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=rows, max_size=rows))
    real = None if count is None else torch.arange(tokens) < torch.tensor(count)[:, None]
    chunked = window is not None and data.draw(st.booleans())
    assert torch.equal(visible(query, key, window, real, chunked), loop(query, key, window, real, chunked))


def test_a_query_sees_itself_and_nothing_after_it() -> None:
    position = torch.arange(4)[None]
    assert torch.equal(visible(position, position)[0, 0], torch.ones(4, 4).tril().bool())
    assert torch.equal(visible(position, position, window=1)[0, 0], torch.eye(4).bool())


def test_what_is_no_token_sees_everything() -> None:
    seen = visible(torch.tensor([[0, 1]]), torch.tensor([[5, 6, 7]]), real=torch.tensor([[True, False]]))
    assert seen[0, 0].tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_additive_is_zero_where_seen_and_the_least_number_elsewhere(dtype: torch.dtype) -> None:
    seen = torch.tensor([[[[True, False], [True, True]]]])
    summand = additive(seen, dtype)
    assert summand.dtype == dtype
    assert torch.equal(summand == 0, seen)
    assert (summand[~seen] == torch.finfo(dtype).min).all()


def test_softmax_of_the_additive_form_is_that_of_the_seen_scores() -> None:
    query, key = torch.arange(3, 6)[None], torch.arange(8)[None]
    scores, seen = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)), visible(query, key, window=3)
    weights = (scores + additive(seen, scores.dtype)).softmax(-1)
    for t in range(3):
        kept = seen[0, 0, t]
        torch.testing.assert_close(weights[0, 0, t, kept], scores[0, 0, t, kept].softmax(-1))
        assert not weights[0, 0, t, ~kept].any()
