"""Models of attention alone are prepared whatever their name, where they go by transformers' attention interface.

Each is built as small as its configuration allows. The oracle is one forward of the unprepared model without a cache.
"""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
import transformers
from tiny_models import assert_same, draw
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import statecache as sc
from statecache import errors

WINDOW, LAYERS = 8, 4
# what a size is called in one family or another
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 64),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts"], 4),
    **dict.fromkeys(["sliding_window", "attention_chunk_size", "rotary_dim", "qk_rope_head_dim"], WINDOW),
    **dict.fromkeys(["head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "num_key_value_heads": 2,
    "q_lora_rank": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

# one of each way to attend: chunks, sinks, latents, learned positions, one set of keys, several windows, other names
SOME = [
    *("llama4_text", "gpt_oss", "deepseek_v3", "opt", "gpt_bigcode", "gpt2", "gptj", "cohere2", "olmo3", "moshi"),
    *("glm4_moe", "exaone4", "gpt_neox", "minicpm3"),
]
OTHERS = [
    *("afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "beam", "biogpt", "bitnet", "codegen"),
    *("cohere", "cohere2_moe", "ctrl", "deepseek_v2", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone"),
    *("exaone_moe", "flex_olmo", "flint", "glm", "glm4", "glm4_moe_lite", "granite", "granite_swa", "granitemoe"),
    *("granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax"),
    *("internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "mellum", "mimo_v2_flash", "minimax_m2"),
    *("ministral", "ministral3", "nanochat", "olmo", "olmoe", "persimmon", "phi", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("sarvam_mla", "sarvam_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu"),
]
REFUSED = {
    "bloom": "BloomBlock in which nothing asks transformers' AttentionInterface",
    "gpt_neox_japanese": "nothing asks transformers' AttentionInterface",
    "nemotron": r"NemotronDecoderLayer.forward does not hand further arguments on \(\*\*kwargs\)",
    "stablelm": "StableLmDecoderLayer.forward does not hand further arguments on",
    "doge": "attention makes masks of its own",
}
ONE_LENGTH = {"llama4_text"}  # scales queries by one length for all rows


def smallest(name: str) -> Any:
    """The configuration of a small model of this type."""
    kind = CONFIG_MAPPING[name]
    standard = kind()
    config = kind(**{size: value for size, value in SIZES.items() if hasattr(standard, size) or "token_id" in size})
    if hasattr(config, "kv_lora_rank"):  # a latent is for all heads, and positions are all of its rotated part
        config.num_key_value_heads, config.head_dim = config.num_attention_heads, config.qk_rope_head_dim
    config._experts_implementation = "eager"
    return config


def tiny(name: str) -> Any:
    """A model of this type, in float64 where it computes in what it is given."""
    torch.manual_seed(0)
    model = families._reinit(getattr(transformers, CLASSES[name])(smallest(name)), 0).double().eval()
    model.generation_config.eos_token_id = None
    return model


def known(names: Any) -> list[str]:
    return [name for name in names if name in CLASSES]


def alone(model: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=row[None], use_cache=False).logits[0]


def check(name: str, capacity: int | None) -> None:
    """A padded prompt, steps, a rollback and several tokens again, of rows of different lengths where that may be."""
    model = tiny(name)
    prepared = sc.prepare(copy.deepcopy(model))
    lengths = (15, 15) if name in ONE_LENGTH else (7, 15)
    rows = [draw(1, n + 6, seed=n + i)[0] for i, n in enumerate(lengths)]
    want = [alone(model, row) for row in rows]
    cache = sc.StateCache(prepared.config, capacity=capacity, slack=4)

    def feed(ids: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            return prepared(input_ids=ids, use_cache=True, **{families.cache_arg(prepared): cache}, **options).logits

    ids = torch.stack([torch.nn.functional.pad(row[:n], (15 - n, 0)) for row, n in zip(rows, lengths, strict=True)])
    prompt = feed(ids, **({} if name in ONE_LENGTH else {"attention_mask": (ids > 0).long()}))
    for row, n in enumerate(lengths):
        assert_same(prompt[row, 15 - n :], want[row][:n], 2e-6)  # routers of experts compute in float32
    at = list(lengths)
    for tokens in (1, 1, 1, -2, 3):
        if tokens < 0:
            cache.rollback(-tokens)
        else:
            got = feed(torch.stack([row[n : n + tokens] for row, n in zip(rows, at, strict=True)]))
            for row, n in enumerate(at):
                assert_same(got[row], want[row][n : n + tokens], 2e-6)
        at = [n + tokens for n in at]


@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", known(SOME))
def test_rows_get_what_they_would_get_alone(name: str, capacity: int | None) -> None:
    check(name, capacity)


@pytest.mark.long
@pytest.mark.parametrize("capacity", [None, 64], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", known(OTHERS))
def test_rows_of_every_family_get_what_they_would_get_alone(name: str, capacity: int | None) -> None:
    check(name, capacity)


@pytest.mark.parametrize("name", known(SOME))
def test_generate_writes_what_it_writes_without_a_cache(name: str) -> None:
    model, ids = tiny(name), draw(2, 5)
    want = model.generate(ids, max_new_tokens=2 * WINDOW, do_sample=False, use_cache=False)
    assert torch.equal(sc.prepare(model).generate(ids, max_new_tokens=2 * WINDOW, do_sample=False), want)


@pytest.mark.parametrize(("name", "why"), [(name, why) for name, why in REFUSED.items() if name in CLASSES])
def test_attention_that_cannot_be_told_what_rows_see_is_refused(name: str, why: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[name])(smallest(name))
    before = [sorted(vars(module)) for module in model.modules()]
    with pytest.raises(errors.UnknownLayerError, match=rf"{why}.*as it is"):
        sc.prepare(model)
    assert [sorted(vars(module)) for module in model.modules()] == before


def test_a_class_of_ones_own_that_inherits_its_forward_is_prepared() -> None:
    model = tiny("llama")
    for module in (model.model, *model.model.layers, *(layer.self_attn for layer in model.model.layers)):
        module.__class__ = type("Mine", (type(module),), {})
    ids = draw(1, 8)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        cache = sc.StateCache(sc.prepare(model).config)
        assert_same(model(ids, **{families.cache_arg(model): cache}).logits, want)
    assert cache.lengths.tolist() == [8]


@pytest.mark.skipif("llama4_text" not in CLASSES, reason="no such model in this transformers")
def test_attention_that_goes_by_one_length_takes_no_rows_of_several() -> None:
    model = sc.prepare(tiny("llama4_text"))
    cache = sc.StateCache(model.config)
    ids = draw(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad(), pytest.raises(errors.RaggedError, match="llama4_text models goes by one length"):
        model(input_ids=ids, attention_mask=mask, **{families.cache_arg(model): cache})
    assert cache.rows is None


def test_a_window_that_the_model_never_looks_through_is_none() -> None:
    """Moshi's configuration names one; its attention is full."""
    spec = sc.StateCache(CONFIG_MAPPING["moshi"]()).spec
    assert {state.window for layer in spec.layers for state in layer.states} == {None}
