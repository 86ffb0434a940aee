"""Models that see: pictures move the positions of the text behind them, row by row, wherever the rows go.

B rows, T tokens, V words. The truth is one forward of the unmodified model without a cache, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch
from tiny_models import IMAGE, assert_same
from torch import Tensor
from transformers import DynamicCache

import statecache as sc
from declared_bytes import declared_bytes
from statecache import errors
from statecache.models.forward import stands_in

NAMES = list(tiny.SEEING)
EXACT = 1e-5  # the rotary embedding counts in float32


@pytest.fixture(autouse=True)
def _no_gradient() -> Any:
    with torch.no_grad():
        yield


@cache
def plain(name: str) -> Any:
    return tiny.build_seeing(name)


def prepared(name: str) -> Any:
    return sc.prepare(tiny.build_seeing(name))


Picture = tuple[Tensor, Tensor]


def picture(height: int = 4, width: int = 4, seed: int = 0) -> Picture:
    """Pixels and the grid of a picture; it takes height * width / 4 tokens, and moves text back by fewer."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    return pixels, torch.tensor([[1, height, width]])


A, B = picture(), picture(4, 8, seed=1)
WITH_A = [5, 6, tiny.START, *[IMAGE] * 4, tiny.END, 7]  # the text behind A stands 2 lower
WITH_B = [9, tiny.START, *[IMAGE] * 8, tiny.END, 3]  # and 4 lower behind B


def seen(ids: Tensor, *pictures: Picture) -> dict[str, Tensor]:
    """What a processor gives of ids (B, T) with these pictures, in order."""
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long()}
    if pictures:
        pixels, grids = zip(*pictures, strict=True)
        given.update(pixel_values=torch.cat(pixels), image_grid_thw=torch.cat(grids))
    return given


def truth(name: str, row: Sequence[int], *pictures: Picture) -> Tensor:
    """Logits (T, V)."""
    model = plain(name)
    model.model.rope_deltas = None
    return model(**seen(torch.tensor([list(row)]), *pictures), use_cache=False).logits[0]


def go_on(model: Any, held: Any, rows: Any, *pictures: Picture, **more: Any) -> Tensor:
    """Logits (B, T, V) of `rows` of new tokens on the cache `held`."""
    given = seen(torch.as_tensor(rows), *pictures) if pictures else {"input_ids": torch.as_tensor(rows)}
    return model(**given, **{families.cache_arg(model): held}, use_cache=True, **more).logits


def ask(model: Any, rows: Any, *pictures: Picture, **more: Any) -> Tensor:
    return model.generate(**seen(torch.as_tensor(rows), *pictures), **more)


@pytest.mark.parametrize("name", NAMES)
def test_text_does_not_stand_where_the_request_before_left_off(name: str) -> None:
    model = prepared(name)
    ask(model, [WITH_A], A, max_new_tokens=2)
    held = sc.StateCache(model.config, slack=2)
    go_on(model, held, [[0, 5], [6, 7]], attention_mask=torch.tensor([[0, 1], [1, 1]]))
    got = go_on(model, held, [[8], [9]])
    assert_same(got[0], truth(name, [5, 8])[-1:], EXACT)
    assert_same(got[1], truth(name, [6, 7, 9])[-1:], EXACT)
    held.rollback(torch.tensor([0, 2]))
    got = go_on(model, held, [[3, 4], [3, 0]], attention_mask=torch.tensor([[1, 1], [1, 0]]))
    assert_same(got[0], truth(name, [5, 8, 3, 4])[-2:], EXACT)
    assert_same(got[1, :1], truth(name, [6, 3])[-1:], EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_requests_that_take_turns_are_apart_in_prepared_models_alone(name: str) -> None:
    want = truth(name, [*WITH_A, 11], A)[-1]

    def turns(model: Any, make: Any) -> Tensor:
        first, second = make(), make()
        go_on(model, first, [WITH_A], A)
        go_on(model, second, [WITH_B], B)
        return go_on(model, first, [[11]])[0, -1]

    as_shipped = tiny.build_seeing(name)
    mixed = turns(as_shipped, lambda: sc.StateCache(as_shipped.config))
    assert (mixed - want).abs().max() > 1e-3  # it goes on where the second picture ended
    assert_same(mixed, turns(as_shipped, lambda: DynamicCache(config=as_shipped.config)), EXACT)
    model = prepared(name)
    assert_same(turns(model, lambda: sc.StateCache(model.config)), want, EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_sc_generate_writes_the_same_after_a_request_with_pictures(name: str) -> None:
    model, prompts = prepared(name), tiny.draw(2, 7, seed=3)
    ask(model, [WITH_A], A, max_new_tokens=1)
    assert torch.equal(sc.generate(model, prompts, max_new_tokens=6), ask(plain(name), prompts, max_new_tokens=6))


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("name", NAMES)
def test_where_a_row_goes_on_goes_along_with_the_row(name: str, capacity: int | None) -> None:
    model = prepared(name)
    held = sc.StateCache(model.config, slack=12, capacity=capacity)
    text = [11, 12, 13, 14, 15, 16, 17, 18, 19]
    mask = torch.ones(2, len(WITH_A), dtype=torch.long)
    mask[1, :4] = 0
    got = go_on(model, held, [WITH_A, [0, 0, 0, 0, 21, 22, 23, 24, 25]], A, attention_mask=mask)
    assert_same(got[0], truth(name, WITH_A, A), EXACT)
    assert_same(got[1, 4:], truth(name, [21, 22, 23, 24, 25]), EXACT)

    got = go_on(model, held, [[11, 12], [26, 27]])
    assert_same(got[0], truth(name, [*WITH_A, 11, 12], A)[-2:], EXACT)
    assert_same(got[1], truth(name, [21, 22, 23, 24, 25, 26, 27])[-2:], EXACT)

    held.gather([1, 0])
    held.rollback(torch.tensor([0, 1]))
    got = go_on(model, held, [[28], [13]])
    assert_same(got[0], truth(name, [21, 22, 23, 24, 25, 26, 27, 28])[-1:], EXACT)
    assert_same(got[1], truth(name, [*WITH_A, 11, 13], A)[-1:], EXACT)

    other = held.fork()
    got = go_on(model, other, [WITH_B, [*text, 20, 31, 32]], B)
    assert_same(got[0], truth(name, [21, 22, 23, 24, 25, 26, 27, 28, *WITH_B], B)[-12:], EXACT)
    assert_same(got[1], truth(name, [*WITH_A, 11, 13, *text, 20, 31, 32], A)[-12:], EXACT)
    got = go_on(model, held, [[40], [41]])  # the one it was copied from
    assert_same(got[1], truth(name, [*WITH_A, 11, 13, 41], A)[-1:], EXACT)

    got = go_on(model, other, [[33], [34]])
    assert_same(got[0], truth(name, [21, 22, 23, 24, 25, 26, 27, 28, *WITH_B, 33], B)[-1:], EXACT)
    other.rollback(torch.tensor([12, 0]))  # to where the second picture begins
    got = go_on(model, other, [[35], [36]])
    assert_same(got[0], truth(name, [21, 22, 23, 24, 25, 26, 27, 28, 9, 35])[-1:], EXACT)


def test_pads_inside_and_behind_a_picture_move_nothing() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config)
    go_on(model, held, [[50, 51], [52, 0]], attention_mask=torch.tensor([[1, 1], [1, 0]]))
    row = [5, tiny.START, IMAGE, 0, IMAGE, IMAGE, 0, IMAGE, tiny.END, 7, 0]
    mask = torch.tensor([[token != 0 for token in row], [False] * len(row)]).long()
    got = go_on(model, held, [row, [0] * len(row)], A, attention_mask=mask)
    whole = truth("qwen3_5", [50, 51, *(token for token in row if token)], A)
    assert_same(got[0, mask[0] == 1], whole[2:], EXACT)
    got = go_on(model, held, [[8], [9]])
    assert_same(got[0], truth("qwen3_5", [50, 51, *(token for token in row if token), 8], A)[-1:], EXACT)
    assert_same(got[1], truth("qwen3_5", [52, 9])[-1:], EXACT)


def test_expected_rows_get_their_pictures() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config, rows=3, dtype=torch.float64, device="cpu", slack=2)
    held.expect([len(WITH_A), 3], rows=[2, 0])
    go_on(model, held, [WITH_A, [1, 2, 3, 0, 0, 0, 0, 0, 0]], A)
    held.expect([1, 1], rows=[0, 2])
    got = go_on(model, held, [[4], [11]])
    assert_same(got[0], truth("qwen3_5", [1, 2, 3, 4])[-1:], EXACT)
    assert_same(got[1], truth("qwen3_5", [*WITH_A, 11], A)[-1:], EXACT)
    held.expect([len(WITH_B), 1], rows=[2, 0])
    got = go_on(model, held, [WITH_B, [5, *[0] * 11]], B)
    assert_same(got[0], truth("qwen3_5", [*WITH_A, 11, *WITH_B], A, B)[-12:], EXACT)


@pytest.mark.parametrize("first", [False, True])
def test_a_mark_comes_back_to_where_the_row_went_on(first: bool) -> None:
    model = prepared("qwen3_5")
    held, row, pictures = sc.StateCache(model.config, slack=1), [1, 2, 3], ()
    go_on(model, held, [row])
    if first:  # the mark stands behind a picture; else before the first
        row, pictures = [*row, *WITH_A], (A,)
        go_on(model, held, [WITH_A], A)
    mark = held.checkpoint()
    go_on(model, held, [WITH_B], B)
    go_on(model, held, [[8, 9, 10]])
    held.restore(mark)
    got = go_on(model, held, [[11, 12]])
    assert_same(got[0], truth("qwen3_5", [*row, 11, 12], *pictures)[-2:], EXACT)


@pytest.mark.parametrize("kept", [0, 7, 11])
def test_a_round_keeps_of_a_picture_what_it_commits(kept: int) -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config, slack=11)
    go_on(model, held, [WITH_A], A)
    row = [tiny.START, *[IMAGE] * 8, tiny.END, 3]
    with held.speculate(11) as draft:
        go_on(model, held, [row], B)
        draft.commit(torch.tensor([kept]))
    got = go_on(model, held, [[4]])[0]
    if kept == 11:
        assert_same(got, truth("qwen3_5", [*WITH_A, *row, 4], A, B)[-1:], EXACT)
    elif kept == 0:
        assert_same(got, truth("qwen3_5", [*WITH_A, 4], A)[-1:], EXACT)
    else:  # a line of four tokens and two of the next, at 8 to 11, of what no whole forward has
        assert held.snapshot(0).entries["position"].tolist() == [[-4]] and held.lengths.tolist() == [17]


def test_a_row_is_admitted_with_its_pictures() -> None:
    model = prepared("qwen3_5")
    one = sc.StateCache(model.config)
    go_on(model, one, [WITH_A], A)
    taken = one.snapshot(0)
    two = sc.StateCache(model.config, rows=2, dtype=torch.float64, device="cpu")
    two.admit(1, taken)
    got = go_on(model, two, [[11], [12]])
    assert_same(got[0], truth("qwen3_5", [11]), EXACT)
    assert_same(got[1], truth("qwen3_5", [*WITH_A, 12], A)[-1:], EXACT)
    text = sc.StateCache(model.config.text_config, rows=1, dtype=torch.float64, device="cpu")
    with pytest.raises(errors.ConfigError, match='state "position": the snapshot holds one, and the cache declares'):
        text.admit(0, taken)
    two.reset(rows=[1])
    text.admit(0, two.snapshot(1))
    assert text.lengths.tolist() == [0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_writes_what_the_unmodified_model_does(options: dict[str, Any]) -> None:
    model = prepared("qwen3_5")
    padded = [[0, 0, 0, *WITH_A], WITH_B]
    mask = torch.tensor([[token != 0 for token in row] for row in padded]).long()
    more = {**options, "attention_mask": mask, "max_new_tokens": 6}
    assert torch.equal(ask(model, padded, A, B, **more), ask(plain("qwen3_5"), padded, A, B, **more))


def test_a_second_turn_brings_its_own_pictures() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config)
    given = {families.cache_arg(model): held}
    first = ask(model, [WITH_A], A, max_new_tokens=4, **given)
    turn = [*first[0].tolist(), *WITH_B]
    want = ask(plain("qwen3_5"), [turn], A, B, max_new_tokens=5)
    assert torch.equal(ask(model, [turn], B, max_new_tokens=5, **given), want)
    assert held.lengths.tolist() == [len(turn) + 4]
    turn = [*want[0].tolist(), 4, 5]
    want = ask(plain("qwen3_5"), [turn], A, B, max_new_tokens=5)
    assert torch.equal(ask(model, [turn], max_new_tokens=5, **given), want)


def test_a_cache_that_the_model_makes_itself_goes_on_behind_pictures() -> None:
    model = prepared("qwen3_5")
    out = model(**seen(torch.tensor([WITH_A]), A), use_cache=True)
    held = out[families.cache_arg(model)]
    assert_same(go_on(model, held, [[8, 9]])[0], truth("qwen3_5", [*WITH_A, 8, 9], A)[-2:], EXACT)


def test_positions_of_the_caller_go_before_those_of_the_cache() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config)
    places = torch.arange(9).view(1, 1, -1) + torch.tensor([0, 3, 5]).view(3, 1, 1)
    got = go_on(model, held, [list(range(1, 10))], position_ids=places)
    want = plain("qwen3_5")(torch.arange(1, 10)[None], position_ids=places, use_cache=False).logits
    assert_same(got, want, EXACT)
    got = go_on(model, held, [[11]])  # from the largest
    behind = torch.cat([places, torch.full((3, 1, 1), 14)], 2)
    want = plain("qwen3_5")(torch.tensor([[*range(1, 10), 11]]), position_ids=behind, use_cache=False).logits
    assert_same(got, want[:, -1:], EXACT)


def test_a_cache_for_text_takes_no_picture() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config.text_config)
    go_on(model, held, [[1, 2, 3]])
    with pytest.raises(errors.ConfigError, match=r"a picture came, and the cache was made for text alone.*Qwen3_5C"):
        go_on(model, held, [WITH_A], A)
    assert held.lengths.tolist() == [3]
    assert_same(go_on(model, held, [[4]])[0], truth("qwen3_5", [1, 2, 3, 4])[-1:], EXACT)


def test_a_cache_that_saw_pictures_before_the_model_was_prepared_is_refused() -> None:
    model = tiny.build_seeing("qwen3_5")
    held, text = sc.StateCache(model.config), sc.StateCache(model.config)
    go_on(model, text, [[1, 2, 3]])
    go_on(model, held, [WITH_A], A)
    sc.prepare(model)
    with pytest.raises(errors.StepError, match="filled by a Qwen3_5Model that was not prepared and has seen pictures"):
        go_on(model, held, [[4]])
    assert held.lengths.tolist() == [len(WITH_A)]
    sc.unprepare(model)
    model.model.rope_deltas = None  # as where there was no picture
    sc.prepare(model)
    assert_same(go_on(model, text, [[4]])[0], truth("qwen3_5", [1, 2, 3, 4])[-1:], EXACT)


def test_a_picture_is_not_placed_by_a_mask_of_four_axes() -> None:
    model, n = prepared("qwen3_5"), len(WITH_A)
    held, mask = sc.StateCache(model.config), torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    with pytest.raises(errors.ShapeError, match=r"attention_mask: came \(1, 1, 9, 9\).*by a mask of two axes"):
        go_on(model, held, [WITH_A], A, attention_mask=mask)
    got = go_on(model, held, [list(range(1, 10))], attention_mask=mask)
    assert_same(got[0], truth("qwen3_5", range(1, 10)), EXACT)


def test_text_costs_nothing_where_rings_grow() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config, slack=2)
    go_on(model, held, [[1, 2, 3]])
    assert held.nbytes().by_kind["position"] == 0
    go_on(model, held, [WITH_A], A)
    assert held.nbytes().by_kind["position"] == 3 * 8
    assert declared_bytes(held.spec, 1, 64, slack=2).by_kind["position"] == 3 * 8


def test_a_compiled_step_goes_on_behind_a_picture() -> None:
    model = prepared("qwen3_5")
    held = sc.StateCache(model.config, capacity=64)
    go_on(model, held, [WITH_A], A)
    step = torch.compile(model, backend="eager", fullgraph=True)
    row = list(WITH_A)
    for token in (11, 12, 13):
        row.append(token)
        got = step(torch.tensor([[token]]), **{families.cache_arg(model): held}, use_cache=True).logits
        assert_same(got[0], truth("qwen3_5", row, A)[-1:], EXACT)


def test_unprepare_gives_pictures_their_own_positions_back() -> None:
    model = prepared("qwen3_5")
    assert "compute_3d_position_ids" in vars(model.model)
    sc.unprepare(model)
    assert "compute_3d_position_ids" not in vars(model.model)


# ---- wrappers that make masks


def gemma(row: Sequence[int], pixels: Tensor | None = None) -> Tensor:
    """Logits (T, V) of an unmodified model."""
    ids = torch.tensor([list(row)])
    given = {} if pixels is None else {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    return tiny.build_bidirectional("gemma3")(ids, use_cache=False, **given).logits[0]


GLANCE = [5, 97, *[IMAGE] * 4, 98, 7]


def pixels() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_text_through_a_wrapper_that_makes_masks_is_masked_by_row() -> None:
    model = sc.prepare(tiny.build_bidirectional("gemma3"))
    held = sc.StateCache(model.config, slack=3)
    go_on(model, held, [[0, 5, 6], [7, 8, 9]], attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    held.rollback(torch.tensor([0, 2]))
    got = go_on(model, held, [[8], [9]])
    assert_same(got[0], gemma([5, 6, 8])[-1:], EXACT)
    assert_same(got[1], gemma([7, 9])[-1:], EXACT)
    prompts = tiny.draw(2, 12)
    want = tiny.build_bidirectional("gemma3").generate(prompts, max_new_tokens=6)
    text = {"token_type_ids": torch.zeros_like(prompts)}
    assert torch.equal(model.generate(prompts, max_new_tokens=6, **text), want)
    assert torch.equal(sc.generate(model, prompts, max_new_tokens=6), want)


def test_tokens_that_attend_to_those_behind_them_are_refused() -> None:
    model = sc.prepare(tiny.build_bidirectional("gemma3"))
    ids = torch.tensor([GLANCE])
    given = {"pixel_values": pixels(), "token_type_ids": (ids == IMAGE).long()}
    held = sc.StateCache(model.config)
    go_on(model, held, [[1, 2]])
    with pytest.raises(
        errors.StepError, match="a picture came, and in a Gemma3Model its tokens attend to those behind"
    ):
        go_on(model, held, ids, **given)
    assert held.lengths.tolist() == [2]
    with pytest.raises(errors.StepError, match=r"before statecache\.prepare"):
        model.generate(ids, max_new_tokens=2, **given)
    assert_same(model(ids, use_cache=False, **given).logits[0], gemma(GLANCE, pixels()), EXACT)  # without a cache


def test_a_picture_may_come_before_the_model_is_prepared() -> None:
    model, ids = tiny.build_bidirectional("gemma3"), torch.tensor([GLANCE])
    held = sc.StateCache(model.config)
    got = go_on(model, held, ids, pixel_values=pixels(), token_type_ids=(ids == IMAGE).long())
    assert_same(got[0], gemma(GLANCE, pixels()), EXACT)
    got = go_on(sc.prepare(model), held, [[8, 9]])
    assert_same(got[0], gemma([*GLANCE, 8, 9], pixels())[-2:], EXACT)
    assert type(sc.unprepare(model).model).forward is model.model.forward.__func__


def test_a_wrapper_whose_masks_cannot_be_left_out_is_not_prepared() -> None:
    model = tiny.build_bidirectional("paligemma")
    with pytest.raises(errors.UnknownLayerError, match="GemmaDecoderLayer that attends to what comes after, too"):
        sc.prepare(model)
    assert not stands_in(model.model.language_model)
