"""What transformers' `generate` does with a prepared model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
import transformers
from tiny_models import draw

import statecache as sc
from statecache import errors
from statecache.models.generation import EitherName, Generation
from statecache.models.prepare import borrowed, is_prepared

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair(name: str) -> tuple[Any, Any]:
    plain = families.build(name)[0]
    return plain, sc.prepare(copy.deepcopy(plain))


def padded(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, the second row of which begins with pads, and their mask."""
    ids = draw(2, n)
    ids[1, :5] = 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5", "lfm2"])
def test_a_static_cache_is_masked_as_without_prepare(name: str) -> None:
    ids, mask = padded()
    options = {**NEW, "attention_mask": mask, "cache_implementation": "static", "disable_compile": True}
    want, got = (model.generate(ids, **options) for model in pair(name))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("kind", ["static", "object"])
def test_models_of_the_other_name_take_foreign_caches(name: str, kind: str) -> None:
    ids, outputs = draw(2, 8), []
    for model in pair(name):
        cache: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
        if kind == "object":
            cache = {"cache_params": transformers.DynamicCache(config=model.config)}
        outputs.append(model.generate(ids, **NEW, **cache))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_pads_are_inferred_as_without_prepare(name: str) -> None:
    plain, model = pair(name)
    ids, _ = padded()
    assert torch.equal(model.generate(ids, **NEW), plain.generate(ids, **NEW))


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
def test_a_forward_shows_the_parameters_of_the_models_own(name: str) -> None:
    plain, model = pair(name)
    own, now = (inspect.signature(m.forward).parameters for m in (plain, model))
    assert [p for p in now if p != "past_key_values"] == list(own)
    assert model._supports_logits_to_keep() is plain._supports_logits_to_keep() is True


@pytest.mark.parametrize("name", ["qwen3_5", "falcon_h1", "lfm2", "mamba2"])
def test_a_decoder_unprepared_by_itself_leaves_generate_as_it_was(name: str) -> None:
    plain, model = pair(name)
    sc.unprepare(model.backbone if name == "mamba2" else model.model)
    ids, mask = padded()
    want, got = (
        m.generate(ids, attention_mask=mask, **{families.cache_arg(m): sc.StateCache(m.config, capacity=40)}, **NEW)
        for m in (plain, model)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["falcon_h1", "mamba"])
def test_a_model_is_prepared_though_its_decoder_was_before(name: str) -> None:
    model, whole = families.build(name)[0], pair(name)[1]
    sc.prepare(model.backbone if name == "mamba" else model.model)
    sc.prepare(model)
    methods = [n for n, value in vars(model).items() if isinstance(value, EitherName) or hasattr(value, "__self__")]
    assert set(methods) == {
        n for n, value in vars(whole).items() if isinstance(value, EitherName) or hasattr(value, "__self__")
    }
    owner = model._prepare_cache_for_generation.__self__
    sc.prepare(model)
    assert isinstance(owner, Generation) and model._prepare_cache_for_generation.__self__ is owner
    out = model.generate(draw(2, 6), return_dict_in_generate=True, **NEW)
    cache = getattr(out, "past_key_values", None) or out.cache_params
    assert isinstance(cache, sc.StateCache)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_makes_a_cache_that_can_go_back(how: str) -> None:
    plain, model = pair("lfm2")  # transformers drafts for no model with a recurrence: statecache.generate does
    ids = draw(1, 6).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": copy.deepcopy(model)}
    assert torch.equal(model.generate(ids, **NEW, **options), plain.generate(ids, **NEW))


# ---- borrowed for a while


def test_prepare_within_makes_it_stay() -> None:
    model = families.build("lfm2")[0]
    with borrowed(model):
        sc.prepare(model)
    assert is_prepared(model)


def test_overlapping_users_leave_the_model_as_it_was() -> None:
    model = families.build("lfm2")[0]
    model.train()
    model.lm_head.eval()
    training = [module.training for module in model.modules()]
    first, second = borrowed(model), borrowed(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_prepared(model) and not model.training
    second.__exit__(None, None, None)
    assert not is_prepared(model)
    assert training == [module.training for module in model.modules()]


def test_unprepare_is_refused_while_a_stream_writes() -> None:
    model = families.build("lfm2")[0]
    with borrowed(model), pytest.raises(errors.StepError, match="end or close it first"):
        sc.unprepare(model)
    assert not is_prepared(model)
