"""What transformers' `generate` does with a prepared model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers
from tiny_models import draw

import statecache as sc
from statecache import errors
from statecache.models.generation import AnyName, Generation
from statecache.models.names import FUNCTIONS_TAKE
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


# ---- pads where a tokenizer puts them


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_prompts_padded_anywhere_go_on_as_each_alone(name: str, capacity: int | None) -> None:
    plain, model = pair(name)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]])
    ids = draw(4, 7)
    cache = sc.StateCache(model.config, capacity=capacity)
    out = model.generate(ids, attention_mask=mask, **{families.cache_arg(model): cache}, **NEW)
    for row, real, got in zip(ids, mask, out, strict=True):
        tokens = row[real == 1][None]
        alone = sc.prepare(plain).generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **NEW)
        assert torch.equal(got[7:], alone[0, tokens.shape[1] :])


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "lfm2", "mamba"])
def test_a_padded_column_has_what_the_last_token_before_it_has(name: str) -> None:
    _, model = pair(name)
    ids, mask = draw(2, 5), torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    decoder = model.backbone if "mamba" in name else model.model
    hidden = decoder(ids, attention_mask=mask, use_cache=True).last_hidden_state
    alone = decoder(ids[:1, [1, 3]], use_cache=True).last_hidden_state
    torch.testing.assert_close(hidden[0], torch.stack([0 * alone[0, 0], *alone[0, [0, 0, 1, 1]]]))


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "falcon_h1", "mamba2"])
def test_pads_fed_behind_an_early_end_are_not_taken_for_text(name: str, capacity: int | None) -> None:
    plain, model = pair(name)
    ids = draw(2, 4)
    words = [plain.generate(row[None], use_cache=False, **NEW)[0, 4:].tolist() for row in ids]
    end = next(w for w in words[1][:3] if w not in words[0])
    stop = words[1].index(end)
    argument, cache = families.cache_arg(model), sc.StateCache(model.config, capacity=capacity, slack=6)
    options = {**NEW, "eos_token_id": end, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **{argument: cache}, **options)
    turn = torch.cat([out, draw(2, 2, seed=2)], 1)
    mask = torch.ones_like(turn)
    mask[1, 4 + stop + 1 : out.shape[1]] = 0
    with pytest.raises(
        errors.RaggedError, match=r"row 1 holds .* tokens, and the mask shows .* forget them with rollback"
    ):
        model.generate(turn, attention_mask=mask, **{argument: cache}, **NEW)
    pads = int((mask[1] == 0).sum()) - 1  # the newest of them was not fed
    cache.rollback([0, pads])
    got = model.generate(turn, attention_mask=mask, **{argument: cache}, **NEW)
    for row, real, written in zip(turn, mask, got, strict=True):
        tokens = row[real == 1][None]
        alone = plain.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **NEW)
        assert torch.equal(written[turn.shape[1] :], alone[0, tokens.shape[1] :])


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("kind", ["static", "object"])
def test_models_of_the_other_name_take_foreign_caches(name: str, kind: str) -> None:
    ids, outputs = draw(2, 8), []
    for model in pair(name):
        cache: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
        if kind == "object":
            cache = {families.cache_arg(model): transformers.DynamicCache(config=model.config)}
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
    methods = [n for n, value in vars(model).items() if isinstance(value, AnyName) or hasattr(value, "__self__")]
    assert set(methods) == {
        n for n, value in vars(whole).items() if isinstance(value, AnyName) or hasattr(value, "__self__")
    }
    owner = model._prepare_cache_for_generation.__self__
    sc.prepare(model)
    assert isinstance(owner, Generation) and model._prepare_cache_for_generation.__self__ is owner
    out = model.generate(draw(2, 6), return_dict_in_generate=True, **NEW)
    cache = out[FUNCTIONS_TAKE]
    assert isinstance(cache, sc.StateCache)


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_assisted_decoding_makes_a_cache_that_can_go_back(how: str) -> None:
    plain, model = pair("lfm2")  # transformers drafts for no model with a recurrence: statecache.generate does
    ids = draw(1, 6).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": copy.deepcopy(model)}
    assert torch.equal(model.generate(ids, **NEW, **options), plain.generate(ids, **NEW))


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
@pytest.mark.parametrize("drafts", [2, 26])
def test_a_prepared_assistant_takes_back_what_it_drafted(drafts: int, schedule: str) -> None:
    plain, model = pair("lfm2")
    ids, options = draw(1, 6).repeat(1, 3), {"max_new_tokens": 60, "do_sample": False}
    want = plain.generate(ids, **options)
    for seed in (0, 1):  # all drafts are right, or hardly any
        assistant = sc.prepare(families.build("lfm2", seed=seed)[0])
        for key, value in {
            "num_assistant_tokens": drafts,
            "num_assistant_tokens_schedule": schedule,
            "assistant_confidence_threshold": 0,
        }.items():
            setattr(assistant.generation_config, key, value)
        for main in (model, copy.deepcopy(plain)):
            assert torch.equal(main.generate(ids, assistant_model=assistant, **options), want)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2", "jamba", "lfm2"])
def test_guidance_writes_what_it_writes_without_a_cache(name: str) -> None:
    plain, model = pair(name)
    ids, other = draw(1, 5), draw(1, 3, seed=5)
    options = {"negative_prompt_ids": other, "negative_prompt_attention_mask": torch.ones_like(other), **NEW}
    got, want = (
        m.generate(ids, guidance_scale=1.7, **use, **options) for m, use in ((model, {}), (plain, {"use_cache": False}))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_a_hook_on_the_model_outlives_prepare(name: str, hooked: str) -> None:
    plain, model = pair(name)
    sc.unprepare(model)
    ids, calls = draw(1, 4), []

    def hook() -> None:  # as accelerate puts one
        model._hf_hook, model._old_forward = object(), model.forward
        model.forward = lambda *args, **kwargs: (calls.append(1), model._old_forward(*args, **kwargs))[1]

    if hooked == "before":
        hook()
    sc.prepare(model)
    if hooked == "after":
        hook()
    want = plain(ids).logits
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-3, atol=1e-4)
        sc.unprepare(model)
    assert len(calls) == 2 and model._old_forward.__func__ is type(model).forward


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


def test_a_cache_of_no_class_of_ours_goes_through_as_it_came() -> None:
    """As that of `generate_batch` does, with masks of its own."""

    class Foreign:
        def update(
            self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return key.flip(2), value.flip(2)  # so that it shows

    plain, ids = copy.deepcopy(tiny_models.build("llama")), draw(1, 7)
    given = {FUNCTIONS_TAKE: Foreign(), "position_ids": torch.arange(7)[None], "use_cache": False}
    given["attention_mask"] = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    want = plain(ids, **given).logits
    assert not torch.equal(want, plain(ids, use_cache=False).logits)
    assert torch.equal(sc.prepare(plain)(ids, **given).logits, want)
