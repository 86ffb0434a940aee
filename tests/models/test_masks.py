"""Masks of four axes that a caller hands to a prepared model: exact where they say what one of two axes could.

B rows, H heads, T new tokens, S columns: those held, and the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch
from tiny_models import assert_same, draw
from torch import Tensor

import statecache as sc
from statecache import errors

NAMES = ["llama", "qwen3_5", "bamba", "falcon_h1", "lfm2"]


@pytest.fixture(autouse=True)
def _no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def prepared(name: str) -> Any:
    if name in families.FAMILIES:
        return sc.prepare(families.build(name)[0])
    tiny.build.cache_clear()  # of a model that no other test has
    model = sc.prepare(tiny.build(name))
    tiny.build.cache_clear()
    return model


def shown(real: Tensor, tokens: int, blank: str = "") -> Tensor:
    """The mask (B, 1, T, S) of the last T columns, of which `real` (B, S) are tokens; a pad sees `blank`."""
    columns = real.shape[1]
    place = torch.arange(columns)
    seen = (place <= place[-tokens:, None]) & real[:, None]
    pads = ~real[:, -tokens:, None]
    if blank:
        seen = torch.where(pads, blank == "all", seen)
    return seen[:, None]


def forms(seen: Tensor) -> list[Tensor]:
    """The same in every form in which it may come."""
    low = torch.finfo(torch.float32).min
    return [
        seen,
        seen.expand(-1, 4, -1, -1),
        torch.zeros(seen.shape).masked_fill(~seen, low),
        torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    ]


def go_on(model: Any, held: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=True, **{families.cache_arg(model): held}).logits


@pytest.mark.parametrize("blank", ["", "all", "nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_causal_mask_by_row_says_what_one_of_two_axes_does(name: str, blank: str) -> None:
    model = prepared(name)
    ids = draw(2, 9)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :2] = False  # pads on the left
    real[0, 7:] = blank == "all"  # and behind a row's end, where what sees all could be a token
    wanted = sc.StateCache(model.config)
    want = [go_on(model, wanted, ids[:, :5], real[:, :5].long()), go_on(model, wanted, ids[:, 5:], real.long())]
    for form in range(4):
        held = sc.StateCache(model.config)
        first, second = forms(shown(real[:, :5], 5, blank))[form], forms(shown(real, 4, blank))[form]
        assert_same(go_on(model, held, ids[:, :5], first), want[0], 1e-6)
        assert_same(go_on(model, held, ids[:, 5:], second), want[1], 1e-6)
        assert held.lengths.tolist() == wanted.lengths.tolist() == real.sum(1).tolist()


def test_one_mask_may_serve_all_rows() -> None:
    model, ids = prepared("lfm2"), draw(3, 6)
    held = sc.StateCache(model.config, capacity=16)
    mask = shown(torch.ones(1, 6, dtype=torch.bool), 6)
    assert_same(go_on(model, held, ids, mask), model(ids, use_cache=False).logits, 1e-5)
    step = shown(torch.ones(1, 7, dtype=torch.bool), 1)
    go_on(model, held, draw(3, 1, 2), step)
    assert held.lengths.tolist() == [7, 7, 7]


def _spoiled(seen: Tensor, at: tuple[int, ...]) -> Tensor:
    seen = seen.clone()
    seen[at] = ~seen[at]
    return seen


WHOLE = shown(torch.ones(2, 6, dtype=torch.bool), 4)
REFUSED = {
    "a token is hidden from one query": (_spoiled(WHOLE, (0, 0, 2, 3)), r"this shows token 2 of row 0 something else"),
    "a token held is hidden": (
        WHOLE & (torch.arange(6) != 1),
        r"this shows row 0 1 of the tokens before, and the cache holds 2 of it",
    ),
    "a token is shown too early": (_spoiled(WHOLE, (1, 0, 0, 4)), r"this shows token 0 of row 1 something else"),
    "no token sees itself": (WHOLE.tril(1), "this shows token 1 of row 0 something else"),
    "heads see other tokens": (
        torch.cat([WHOLE, _spoiled(WHOLE, (0, 0, 3, 2))], 1),
        "this shows other tokens to other heads",
    ),
    "of the new columns alone": (WHOLE[..., 2:], r"is to be \(2 or 1, heads or 1, 4, 6\), for the columns held"),
    "of other rows": (WHOLE[[0, 0, 1]], r"is to be \(2 or 1, heads or 1, 4, 6\)"),
    "of numbers": (WHOLE.long(), "is of bool, or zero where tokens are seen and as low"),
    "a bias": (torch.where(WHOLE, 0.0, -3.0), "is of bool, or zero where tokens are seen and as low"),
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_any_other_mask_of_four_axes_is_refused(name: str, case: str) -> None:
    model, (mask, why) = prepared(name), REFUSED[case]
    held = sc.StateCache(model.config)
    go_on(model, held, draw(2, 2), None)
    with pytest.raises(errors.ShapeError, match=rf"attention_mask: came .* expected \(2, 4 or more\).*{why}"):
        go_on(model, held, draw(2, 4), mask)
    assert held.lengths.tolist() == [2, 2]
    go_on(model, held, draw(2, 4), WHOLE)
    assert held.lengths.tolist() == [6, 6]


def test_pads_that_a_row_holds_no_token_for_are_not_shown() -> None:
    model, ids, real = prepared("bamba"), draw(2, 6), torch.ones(2, 6, dtype=torch.bool)
    held = sc.StateCache(model.config)
    go_on(model, held, ids[:, :2], torch.tensor([[1, 1], [0, 1]]))
    with pytest.raises(errors.ShapeError, match="this shows row 1 2 of the tokens before, and the cache holds 1"):
        go_on(model, held, ids[:, 2:], shown(real, 4))


def test_a_mask_of_four_axes_is_refused_where_layers_have_windows() -> None:
    model = prepared("mistral")
    with pytest.raises(errors.ShapeError, match="says nothing of layers with a window"):
        go_on(model, sc.StateCache(model.config), draw(2, 4), WHOLE[..., 2:])


def test_pads_in_an_unprepared_models_cache_are_not_hidden_by_a_mask_of_four_axes() -> None:
    model = families.build("qwen3_5")[0]
    held, real = sc.StateCache(model.config), torch.ones(2, 6, dtype=torch.bool)
    real[1, :1] = False
    go_on(model, held, draw(2, 2), real[:, :2].long())
    with pytest.raises(errors.ShapeError, match="this shows row 1 1 of the tokens before, and the cache holds 2"):
        go_on(sc.prepare(model), held, draw(2, 4), shown(real, 4))


def test_without_a_cache_attention_alone_sees_what_any_mask_shows() -> None:
    model = prepared("llama")
    ids, mask = draw(2, 5), _spoiled(shown(torch.ones(2, 5, dtype=torch.bool), 5), (0, 0, 1, 3))
    got = model(ids, attention_mask=mask, use_cache=False).logits
    assert_same(got, tiny.build("llama")(ids, attention_mask=mask, use_cache=False).logits, 1e-6)
    with pytest.raises(errors.ShapeError, match="this shows token 1 of row 0 something else"):
        prepared("bamba")(ids, attention_mask=mask, use_cache=False)


def test_a_compiled_step_takes_no_mask_of_four_axes() -> None:
    model = prepared("lfm2")
    held = sc.StateCache(model.config, capacity=16)
    go_on(model, held, draw(1, 4), None)
    step = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="cannot be looked at in a compiled or captured step"):
        go_on(step, held, draw(1, 1), shown(torch.ones(1, 5, dtype=torch.bool), 1))
