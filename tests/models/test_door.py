"""What a prepared model lets in, what it refuses before anything is changed, and what it hands back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import families
import pytest
import tiny_models
import torch
from tiny_models import assert_same, draw
from torch import Tensor

import statecache as sc
from statecache import errors
from statecache.models.unmodified import Unmodified

ATTENDING = ["falcon_h1", "qwen3_5", "lfm2"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """A model as it is, and prepared."""
    plain = families.build(name, **options)[0]
    return plain, sc.prepare(copy.deepcopy(plain))


def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, **{families.cache_arg(model): cache}).logits


def full(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def padded(ids: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    """The ids with pads in front of the second row, and their mask."""
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids * mask, mask


# ---- caches that an unprepared model has filled


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5", "falcon_h1"])
def test_a_mark_from_before_a_prepared_model_went_on_is_stale(name: str, capacity: int | None) -> None:
    plain, prepared = pair(name)
    ids, cache = draw(2, 12), sc.StateCache(plain.config, slack=4, capacity=capacity)
    feed(plain, cache, ids[:, :6])
    mark = cache.checkpoint()
    feed(prepared, cache, ids[:, 6:8])
    with pytest.raises(errors.StaleMarkError, match="a prepared model has gone on with the cache since"):
        cache.restore(mark)
    assert_same(feed(prepared, cache, ids[:, 8:]), full(plain, ids)[:, 8:])


@pytest.mark.parametrize("name", ["mamba2", *ATTENDING])
def test_pads_that_an_unprepared_model_fed_are_refused_where_the_mask_shows_them(name: str) -> None:
    plain, prepared = pair(name)
    ids, cache = draw(2, 10), sc.StateCache(plain.config, slack=4)
    new, mask = padded(ids, 3)
    feed(plain, cache, new[:, :8], mask[:, :8])
    with pytest.raises(errors.RaggedError, match="begin with a new cache, or prepare the model before the first turn"):
        feed(prepared, cache, ids[:, 8:9], mask[:, :9])
    feed(plain, cache, ids[:, 8:9], mask[:, :9])  # as if nothing had happened
    assert cache.lengths.tolist() == [9, 9]


def test_a_pass_that_is_refused_does_not_take_a_cache_over() -> None:
    plain, prepared = pair("mamba2")
    ids, cache = draw(2, 12), sc.StateCache(plain.config, slack=4, capacity=12)
    feed(plain, cache, ids[:, :6])
    for n in (6, 7):
        feed(plain, cache, ids[:, n : n + 1])
    with pytest.raises(errors.RowsError):
        feed(prepared, cache, ids[:1, 8:10])
    fixed = sc.StateCache(families.build("lfm2")[1], capacity=4)
    with pytest.raises(errors.CapacityError):
        feed(pair("lfm2")[1], fixed, ids[:, :5])
    assert isinstance(fixed.writer, Unmodified)
    cache.rollback(1)
    assert_same(feed(plain, cache, ids[:, 7:8]), full(plain, ids)[:, 7:8])


# ---- what is refused, and changes nothing


def _other_dtype(model: Any, cache: Any, ids: Tensor) -> None:
    feed(copy.deepcopy(model).bfloat16(), cache, ids)


def _ids_and_embeddings(model: Any, cache: Any, ids: Tensor) -> None:
    embeddings = model.get_input_embeddings()(ids)
    model(ids, inputs_embeds=embeddings, **{families.cache_arg(model): cache})


def _no_such_id(model: Any, cache: Any, ids: Tensor) -> None:
    feed(model, cache, ids + 5000)


def _no_token(model: Any, cache: Any, ids: Tensor) -> None:
    feed(model, cache, ids[:, :0])


REFUSED: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "a model of another dtype": (_other_dtype, errors.DtypeError, "came in torch.bfloat16"),
    "ids and embeddings": (_ids_and_embeddings, ValueError, "exactly one"),
    "an id beyond the embeddings": (_no_such_id, IndexError, "out of range"),
    "no token": (_no_token, errors.ShapeError, "a forward pass takes at least one"),
}


@pytest.mark.parametrize("name", ["mamba", "qwen3_5", "falcon_h1", "minimax"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_pass_that_fails_before_a_layer_writes_leaves_the_cache(case: str, name: str) -> None:
    fail, error, why = REFUSED[case]
    plain, prepared = pair(name)
    ids, cache = draw(2, 12), sc.StateCache(plain.config, slack=4)
    feed(prepared, cache, ids[:, :8])
    with pytest.raises(error, match=why):
        fail(prepared, cache, ids[:, 8:10])
    assert cache.lengths.tolist() == [8, 8]
    cache.rollback(2)
    assert_same(feed(prepared, cache, ids[:, 6:]), full(plain, ids)[:, 6:])


@pytest.mark.parametrize("changed", [{"sliding_window": 4}, {"num_key_value_heads": 4}], ids=str)
def test_a_cache_of_another_configuration_is_refused(changed: dict[str, Any]) -> None:
    plain = tiny_models.build("gemma3_text", **changed)
    prepared, cache = sc.prepare(copy.deepcopy(plain)), sc.StateCache(tiny_models.build("gemma3_text").config)
    with pytest.raises(errors.ConfigError, match="of other sizes or windows: make it from"):
        feed(prepared, cache, draw(2, 6))


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "jamba"])
def test_gradient_checkpointing_takes_no_cache(name: str) -> None:
    plain, prepared = pair(name)
    enable = getattr(prepared, "activation_checkpointing_enable", None) or prepared.gradient_checkpointing_enable
    prepared.train()
    enable()
    cache, ids = sc.StateCache(plain.config), draw(2, 6)
    with torch.enable_grad():
        assert prepared(ids, use_cache=True).get(families.cache_arg(prepared)) is None
        with pytest.raises(errors.StepError, match="train with use_cache=False"):
            feed(prepared, cache, ids)
    assert cache.lengths.tolist() == []


def test_a_copy_inside_a_round_is_refused() -> None:
    plain, prepared = pair("falcon_h1")
    cache = sc.StateCache(plain.config, slack=4)
    feed(prepared, cache, draw(2, 6))
    with cache.speculate(2), pytest.raises(errors.StepError, match="a speculative round is open"):
        copy.deepcopy(cache)
    copy.deepcopy(cache).reset()


# ---- what it hands back


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "falcon_h1", "minimax"])
def test_everything_that_comes_one_a_token_is_in_its_column(name: str, cached: bool) -> None:
    plain, prepared = pair(name, attn="eager")
    routes = name in ("jamba", "granitemoehybrid")
    ids = draw(2, 12)
    new, mask = padded(ids, 5)
    asked: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True, "use_cache": cached}
    if routes:
        asked["output_router_logits"] = True
    got = prepared(new, attention_mask=mask, **asked)
    want = plain(ids[1:, 5:], **asked | {"use_cache": False})
    assert_same(got.logits[1:, 5:], want.logits)
    assert len(got.hidden_states) == len(want.hidden_states)
    for there, here in zip(got.hidden_states, want.hidden_states, strict=True):
        assert_same(there[1:, 5:], here)
    layers = [[a for a in out.attentions if a is not None and a.dim() == 4] for out in (got, want)]
    assert layers[0]
    for there, here in zip(*(each[-1:] if name == "minimax" else each for each in layers), strict=True):
        assert_same(there[1:, :, 5:, 5:], here)
        assert not there[1, :, :, :5].any()
    if routes:
        assert want.router_logits or name != "jamba"  # granitemoehybrid gives none in transformers 5.17
        for there, here in zip(got.router_logits or (), want.router_logits or (), strict=True):
            assert_same(there.view(2, 12, -1)[1, 5:], here)


def weights(out: Any) -> list[Tensor]:
    return [each for each in out.attentions if each is not None and each.dim() == 4]


@pytest.mark.parametrize("told", [True, False], ids=["of all columns", "of the new ones"])
@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("name", ["lfm3", "falcon_h1", "qwen4_exp"])
def test_attention_weights_are_by_column(name: str, capacity: int | None, told: bool) -> None:
    if name not in families.FAMILIES:
        name = "zaya"
    plain, prepared = pair(name, attn="eager")
    ids, mask = draw(3, 19), torch.ones(3, 19, dtype=torch.long)
    mask[1, :3] = mask[2, 9:11] = mask[2, 14:16] = 0  # pads on the left; inside, behind what the first pass brings
    cache, last = sc.StateCache(plain.config, capacity=capacity, slack=4), 0
    for end in (11, 17, 19):
        given = mask[:, :end] if told or end == 11 else mask[:, last:end]
        out = prepared(
            ids[:, last:end], attention_mask=given, output_attentions=True, **{families.cache_arg(prepared): cache}
        )
        for row in range(3):
            real = mask[row, :end] == 1
            alone = plain(ids[row : row + 1, :end][:, real], output_attentions=True, use_cache=False)
            new = real[last:]
            for layer, (got, want) in enumerate(zip(weights(out), weights(alone), strict=True)):
                window = None if "sliding" not in _attending(plain.config)[layer] else 8
                first = 0 if window is None else max(last - window + 1, 0)
                if capacity is None:
                    assert got.shape[3] == end - first
                elif window is None:
                    assert got.shape[3] == capacity
                if not told and row == 2 and last:
                    continue  # its tokens are taken to stand at the end of the columns before
                kept = got[row, :, new][:, :, : end - first]
                assert_same(kept[..., real[first:]], want[0, :, -int(new.sum()) :, int(real[:first].sum()) :], 1e-5)
                assert not kept[..., ~real[first:]].any()
        last = end
    if capacity is None:
        assert [each.shape for each in weights(out)] == [each.shape for each in weights(_with_theirs(plain, ids, mask))]


@pytest.mark.parametrize("capacity", [None, 24])
def test_keys_in_outputs_are_as_many_as_columns(capacity: int | None) -> None:
    model = pair("zaya")[1]
    held, mask = sc.StateCache(model.config, capacity=capacity), torch.ones(2, 12, dtype=torch.long)
    mask[:, :5] = mask[1, 6] = 0
    feed(model, held, draw(2, 12), mask)
    whole = [layer.keys for layer in held.layers if layer.keys is not None and not layer.is_sliding]
    assert [tuple(keys.shape) for keys in whole] == [(2, 2, 12 if capacity is None else 24, 16)] * 2
    assert whole[0][0, :, :7].abs().sum(-1).all() and not whole[0][:, :, 7:].any()
    assert next(layer.keys for layer in held.layers if layer.is_sliding).shape[2] == 7


def _attending(config: Any) -> list[str]:
    """The types of layers that attend."""
    kinds = [kind for kind in config.get_text_config().layer_types if kind not in ("conv", "linear_attention")]
    return [kind.replace("hybrid", "full") for kind in kinds]


def _with_theirs(plain: Any, ids: Tensor, mask: Tensor) -> Any:
    """The last of the passes over the columns, of an unmodified model with the cache that it makes itself."""
    held = plain(ids[:, :17], attention_mask=mask[:, :17], use_cache=True)[families.cache_arg(plain)]
    asked: dict[str, Any] = {"output_attentions": True, families.cache_arg(plain): held}
    return plain(ids[:, 17:], attention_mask=mask, **asked)


@pytest.mark.parametrize("name", ATTENDING)
def test_a_mask_wider_than_the_tokens_is_read_without_a_cache_too(name: str) -> None:
    plain, prepared = pair(name)
    ids = draw(2, 7)
    assert_same(prepared(ids, attention_mask=torch.ones(2, 10).long(), use_cache=False).logits, full(plain, ids))


@pytest.mark.parametrize("model", [0, 1], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("name", ["mamba2", *ATTENDING])
def test_after_a_reset_nothing_is_left_of_a_request_that_was_no_number(
    name: str, capacity: int | None, model: int
) -> None:
    plain, subject = pair(name)[0], pair(name)[model]
    ids, cache = draw(2, 12), sc.StateCache(plain.config, capacity=capacity)
    embeddings = plain.get_input_embeddings()(ids)
    embeddings[0, 3] = float("inf")
    subject(inputs_embeds=embeddings, **{families.cache_arg(subject): cache})
    cache.reset()
    assert_same(feed(subject, cache, ids[:, :5]), full(plain, ids[:, :5]))
