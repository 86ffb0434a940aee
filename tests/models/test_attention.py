"""How attention of a prepared model goes through the cache: what each layer is told, and when it is as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import families
import prepared_oracle as oracle
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_same, draw
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import statecache as sc
from statecache import errors
from statecache.models import attention
from statecache.models.names import FUNCTIONS_TAKE
from statecache.models.table import model_spec

SLIDING, CHUNKED, FULL = "sliding_attention", "chunked_attention", "full_attention"
NEAR, FAR = 3, 6  # two windows in one model
TWO_WINDOWS = {  # which of these layers see how far; qwen3 asks for masks by kind of layer, mistral for one mask
    "qwen3": [SLIDING, CHUNKED, FULL, SLIDING],
    "mistral": [CHUNKED, SLIDING, CHUNKED],
}
SEEN = {SLIDING: NEAR, CHUNKED: FAR, FULL: None}
ATTENDING = ["qwen3_5", "lfm2", "falcon_h1", "zamba", "minimax", "nemotron_h"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def small(name: str, **options: Any) -> Any:
    sizes = {**oracle.SIZE, **oracle.HEADS, "head_dim": 8, **options}
    return oracle.precise(copy.deepcopy(tiny_models.build.__wrapped__(name, **sizes)))


def two_windows(name: str) -> oracle.Models:
    """A model whose layers see differently far, as it is and prepared. As it is, each layer is handed its own mask."""
    kinds = TWO_WINDOWS[name]
    plain = small(name, num_hidden_layers=len(kinds), layer_types=[SLIDING] * len(kinds))
    prepared = copy.deepcopy(plain)
    prepared.config.layer_types = kinds
    prepared.config.sliding_window, prepared.config.attention_chunk_size = NEAR, FAR
    assert {s.window for layer in model_spec(prepared.config).layers for s in layer.states} == {SEEN[k] for k in kinds}
    for kind, layer in zip(kinds, plain.model.layers, strict=True):

        def told(module: nn.Module, args: Any, given: dict[str, Any], kind: str = kind) -> Any:
            position, window = torch.arange(given["hidden_states"].shape[1]), SEEN[kind]
            seen = position[:, None] >= position
            if kind == CHUNKED:
                seen &= position[:, None] // FAR == position // FAR
            elif window is not None:
                seen &= position[:, None] - position < window
            return args, {**given, "attention_mask": seen[None, None]}

        layer.self_attn.register_forward_pre_hook(told, with_kwargs=True)
    plain.config = prepared.config  # what the oracle makes caches from; its decoder keeps its own
    return oracle.Models(plain, sc.prepare(prepared), families.cache_arg(plain))


def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, **{families.cache_arg(model): cache}).logits


def attending(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "config", None), attention.Attending)]


# ---- one mask a window


@pytest.mark.parametrize("room", oracle.ROOMS)
@pytest.mark.parametrize("name", TWO_WINDOWS)
def test_two_windows_in_one_model_are_exact_in_any_schedule(name: str, room: str) -> None:
    models = two_windows(name)
    number = st.integers(0, 12)
    rows = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
    what = st.sampled_from(["feed", "feed", "ragged", "rollback", "speculate", "gather", "reset"])

    @settings(max_examples=12, deadline=None)
    @given(slack=st.sampled_from([0, 3]), schedule=st.lists(st.tuples(what, number, rows), min_size=3, max_size=10))
    def check(slack: int, schedule: list[oracle.Op]) -> None:
        oracle.run(models, schedule, slack=slack, room=room)

    check()


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TWO_WINDOWS)
def test_two_windows_are_exact_for_ragged_and_padded_rows(name: str, form: str, capacity: int | None) -> None:
    models, ids = two_windows(name), draw(2, 14) % oracle.V
    models.filling.set_attn_implementation(form)
    cache = sc.StateCache(models.filling.config, capacity=capacity)
    left = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    got = [models.feed(cache, ids[:, :9], left)]
    got += [models.feed(cache, ids[:, 9:12], torch.tensor([[1, 1, 1], [1, 0, 0]]))]
    got += [models.feed(cache, ids[:, n : n + 1], None) for n in (12, 13)]
    for b, real in enumerate([range(14), [4, 5, 6, 7, 8, 9, 12, 13]]):
        assert_same(torch.cat(got, 1)[b, real], models.full(tuple(ids[b, real].tolist())), 1e-8)


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("name", TWO_WINDOWS)
def test_a_mask_is_made_once_a_window_and_pass(
    name: str, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int | None] = []
    make = attention.mask

    def spy(form: str, dtype: Any, device: Any, keys: Any, *rest: Any) -> Tensor | None:
        made.append(keys.window)
        return make(form, dtype, device, keys, *rest)

    monkeypatch.setattr(attention, "mask", spy)
    models = two_windows(name)
    cache = sc.StateCache(models.filling.config, capacity=capacity)
    for tokens in (7, 2, 1):
        made.clear()
        models.feed(cache, draw(2, tokens) % oracle.V, None)
        assert sorted(made, key=str) == sorted({SEEN[kind] for kind in TWO_WINDOWS[name]}, key=str)


@pytest.mark.parametrize("name", [*ATTENDING, "qwen3", "mistral", "gemma3_text"])
def test_transformers_makes_no_masks_in_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = families.build(name)[0] if name in families.FAMILIES else tiny_models.build(name)
    model, ids = sc.prepare(copy.deepcopy(plain)), draw(2, 6)
    cache = sc.StateCache(model.config, capacity=16)

    def fail(**_: Any) -> None:
        raise AssertionError

    for form in ("sdpa", "eager"):
        monkeypatch.setitem(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, form, fail)
    got = torch.cat([feed(model, cache, ids[:, :5]), feed(model, cache, ids[:, 5:])], 1)
    monkeypatch.undo()
    assert_same(got, tiny_models.full(plain, ids))


# ---- who attends


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama"])
def test_attention_outside_of_a_pass_is_that_of_the_unprepared_model(name: str, form: str) -> None:
    plain = copy.deepcopy(tiny_models.build(name))
    plain.set_attn_implementation(form)
    model = sc.prepare(copy.deepcopy(plain))
    x, places = torch.randn(2, 5, 64), torch.arange(5)[None]
    seen = torch.ones(5, 5).tril().log()[None, None]
    outs = []
    for each in (plain, model):
        decoder, cache = each.model, transformers.DynamicCache(config=each.config)
        rotary = decoder.rotary_emb(x, places)
        module = decoder.layers[0].self_attn
        outs.append([module(x, position_embeddings=rotary, attention_mask=mask) for mask in (None, seen)])
        outs[-1] += [module(x, position_embeddings=rotary, attention_mask=None, **{FUNCTIONS_TAKE: cache})]
    for (got, weights), (want, same) in zip(*outs, strict=True):
        assert torch.equal(got, want)
        assert (weights is None) == (same is None) and (weights is None or torch.equal(weights, same))


@pytest.mark.parametrize("name", ATTENDING)
def test_the_form_is_the_models_and_may_change(name: str) -> None:
    model, ids = sc.prepare(families.build(name)[0]), draw(2, 7)
    told = model.config.to_dict()
    assert len(attending(model)) >= 1
    got = []
    for form in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(form)
        cache = sc.StateCache(model.config, capacity=16)
        got.append(torch.cat([feed(model, cache, ids[:, :5]), feed(model, cache, ids[:, 5:])], 1))
        assert model.config._attn_implementation == form
    assert torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
    assert_same(got[0], got[1], 1e-5)
    assert model.config.to_dict() == told


def test_models_that_share_a_configuration_do_not_disturb_each_other() -> None:
    one = copy.deepcopy(tiny_models.build("qwen3"))
    other = type(one)(one.config)
    other.load_state_dict(one.state_dict())
    sc.prepare(one.eval())
    assert attending(one) and not attending(other.eval())
    assert all(m.config is one.config for m in other.modules() if hasattr(m, "config"))
    ids = draw(2, 9)
    assert torch.equal(tiny_models.full(one, ids), tiny_models.full(other, ids))
    sc.unprepare(one)
    assert all(m.config is other.config for m in one.modules() if hasattr(m, "config"))


def test_threads_may_feed_one_model_with_caches_of_their_own() -> None:
    plain = tiny_models.build("qwen3")
    model, wrong = sc.prepare(copy.deepcopy(plain)), []

    def turn(seed: int) -> None:
        with torch.no_grad():
            ids, cache = draw(1 + seed, 8 + seed, seed), sc.StateCache(model.config, capacity=32)
            got = torch.cat([feed(model, cache, part) for part in ids.split(1 + seed, 1)], 1)
            if not torch.allclose(got, tiny_models.full(plain, ids), atol=1e-3):
                wrong.append(seed)

    threads = [threading.Thread(target=turn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_functions_see_the_models_own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = sc.prepare(copy.deepcopy(tiny_models.build("qwen3"))), draw(2, 6)
    want, seen = tiny_models.full(model, ids), []

    def flash(module: Any, *tensors: Tensor, attention_mask: None = None, **options: Any) -> Any:
        query, key, value, mask = tensors
        seen.append((module.config is model.config, module.layer_idx, mask, options.get("sliding_window")))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

    cache = sc.StateCache(model.config)
    feed(model, cache, ids[:, :5])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    assert_same(feed(model, cache, ids[:, 5:]), want[:, 5:])
    window = model.config.sliding_window
    assert seen == [(True, 0, None, window), (True, 1, None, None), (True, 2, None, window)]


def test_the_configuration_of_an_attention_module_follows_the_models() -> None:
    model = sc.prepare(copy.deepcopy(tiny_models.build("qwen3")))
    module = attending(model)[0]
    model.config.attention_dropout = 0.25
    assert module.config.attention_dropout == 0.25
    module.config.attention_dropout = 0.5
    assert model.config.attention_dropout == 0.5
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = module.config.no_such_thing


# ---- what is refused


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("capacity", [None, 16])
def test_keys_are_never_repeated_for_one_new_token(
    capacity: int | None, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("qwen3", num_attention_heads=4, num_key_value_heads=2)
    ids, own = draw(2, 9) % model.config.vocab_size, nn.functional.scaled_dot_product_attention
    want = model(ids, use_cache=False).logits
    seen: list[tuple[int, ...]] = []

    def sdpa(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((query.shape[1], key.shape[1]))
        return own(query, key, *rest, **options)

    sc.prepare(model)
    cache = sc.StateCache(model.config, capacity=capacity)
    got = [feed(model, cache, ids[:, :6])]
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
    if compiling:  # where transformers repeats them
        monkeypatch.setattr("transformers.integrations.sdpa_attention.is_torchdynamo_compiling", lambda: True)
    got += [feed(model, cache, ids[:, n : n + 1]) for n in range(6, 9)]
    assert_same(torch.cat(got, 1), want)
    assert set(seen) == {(2, 2)}


def test_asking_for_it_by_name_is_refused() -> None:
    config = copy.deepcopy(tiny_models.build("llama").config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention.FORM)
    with pytest.raises(errors.ConfigError, match=r'attn_implementation="statecache" is what .* load the model with'):
        model(draw(1, 3))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_that_does_not_hand_its_pass_on_is_refused(name: str) -> None:
    model, ids = sc.prepare(copy.deepcopy(tiny_models.build(name))), draw(2, 4)

    def lose(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        return args, {key: value for key, value in given.items() if key != attention.ARGUMENT}

    hook = model.model.layers[1].register_forward_pre_hook(lose, with_kwargs=True)
    cache = sc.StateCache(model.config)
    with pytest.raises(errors.StepError, match=r"Attention did not get the pass .* statecache_pass= must go with"):
        feed(model, cache, ids)
    hook.remove()
    assert_same(feed(model, sc.StateCache(model.config), ids), tiny_models.full(model, ids))


def test_attention_that_cannot_be_told_is_refused_and_the_model_left_alone() -> None:
    model = copy.deepcopy(tiny_models.build("llama"))
    model.model.layers[1].self_attn.__class__ = type("Fixed", (nn.Module,), {"forward": lambda self, x: x})
    with pytest.raises(errors.UnknownLayerError, match=r'layer 1 \("full_attention"\) is a LlamaDecoderLayer in which'):
        sc.prepare(model)
    assert not attending(model)
