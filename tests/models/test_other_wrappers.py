"""Models that see or hear, around decoders of the families: the text behind what came in, by row.

The truth is one forward of the unmodified model without a cache, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import families
import pytest
import tiny_wrappers
import torch
from tiny_models import END, IMAGE, START, assert_same
from torch import Tensor

import statecache as sc
from statecache import errors
from statecache.models.decoder import decoder_of
from statecache.models.forward import stands_in

NAMES = list(tiny_wrappers.WRAPPERS)
CLOSE = 2e-5  # of float64 models whose recurrence, or rotary embedding, counts in float32
SEEN = [5, 6, START, *[IMAGE] * tiny_wrappers.HEARD, END, 7]


@pytest.fixture(autouse=True)
def _no_gradient() -> Any:
    with torch.no_grad():
        yield


@cache
def plain(name: str) -> Any:
    return tiny_wrappers.build(name)


def forget(model: Any) -> None:
    """Where the text of the last request went on."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


def truth(name: str, row: Sequence[int]) -> Tensor:
    """Logits (T, V)."""
    model, ids = plain(name), torch.tensor([list(row)])
    forget(model)
    more = tiny_wrappers.given(model, name, ids) if IMAGE in row else {}
    return model(ids, use_cache=False, **more).logits[0]


def go_on(model: Any, held: Any, rows: Any, name: str = "", **more: Any) -> Tensor:
    """Logits (B, T, V) of `rows` of new tokens on the cache `held`; of a model by name, with what it sees."""
    ids = torch.as_tensor(rows)
    given = tiny_wrappers.given(model, name, ids) if name else {}
    return model(ids, **{families.cache_arg(model): held}, use_cache=True, **given, **more).logits


@pytest.mark.parametrize("name", NAMES)
def test_an_unprepared_wrapper_goes_on_behind_what_it_saw(name: str) -> None:
    model, row = plain(name), list(SEEN)
    forget(model)
    held = sc.StateCache(model.config)
    assert_same(go_on(model, held, [row], name)[0], truth(name, row), CLOSE)
    got = []
    for token in (11, 12):
        row.append(token)
        got.append(go_on(model, held, [[token]])[0])
    assert_same(torch.cat(got), truth(name, row)[-2:], CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_prepared_wrapper_goes_on_behind_what_it_saw(name: str) -> None:
    model = sc.prepare(tiny_wrappers.build(name))
    held = sc.StateCache(model.config, slack=3)
    first = torch.tensor([SEEN, [0] * (len(SEEN) - 4) + [21, 22, 23, 24]])
    got = go_on(model, held, first, name, attention_mask=(first != 0).long())
    assert_same(got[0], truth(name, SEEN), CLOSE)
    assert_same(got[1, -4:], truth(name, [21, 22, 23, 24]), CLOSE)
    go_on(model, held, [[50, 51, 52], [50, 0, 0]], attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    held.rollback(torch.tensor([3, 1]))
    rows = [*SEEN], [21, 22, 23, 24]
    for tokens in ((11, 25), (12, 26)):
        got = go_on(model, held, torch.tensor(tokens)[:, None])
        for n, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.append(token)
            assert_same(got[n], truth(name, row)[-1:], CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_that_begins_with_a_picture_goes_on_from_the_text_before_it(name: str) -> None:
    model = sc.prepare(tiny_wrappers.build(name))
    held, before, turn = sc.StateCache(model.config), [11, 12, 13], SEEN[2:]
    go_on(model, held, [before])
    got = torch.cat([go_on(model, held, [turn], name)[0], go_on(model, held, [[9]])[0]])
    assert_same(got, truth(name, [*before, *turn, 9])[3:], CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_generate_writes_through_a_wrapper_what_the_unmodified_model_does(name: str) -> None:
    model, ids = sc.prepare(tiny_wrappers.build(name)), torch.tensor([list(range(1, 9))])
    want = plain(name).generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(ids, max_new_tokens=4), want)
    assert torch.equal(sc.generate(model, ids, max_new_tokens=4), want)


def test_pictures_that_are_numbered_are_refused_behind_other_tokens() -> None:
    model = sc.prepare(tiny_wrappers.build_placing("hunyuan_vl"))
    held, ids = sc.StateCache(model.config), torch.tensor([[START, *[IMAGE] * 6, END, 7]])
    go_on(model, held, [[1, 2, 3]])
    given = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).long()}
    with pytest.raises(errors.StepError, match=r"where a HunYuanVLModel places it depends on more .* first token in"):
        go_on(model, held, ids, **given)
    assert held.lengths.tolist() == [3]


def test_a_wrapper_that_finds_pictures_by_itself_is_not_prepared() -> None:
    model = tiny_wrappers.build_placing("qwen2_5_omni")
    with pytest.raises(errors.UnknownLayerError, match=r"a Qwen2_5OmniThinker\w+ makes positions of its own"):
        sc.prepare(model)
    assert not stands_in(decoder_of(model))
