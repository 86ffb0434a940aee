"""Tiny float32 models of families beyond the conformance matrix, and how to feed them and compare.

B rows, T tokens, V words.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from torch import Tensor

# inductor where it can build, which takes g++ and Python's headers
BUILDS = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
COMPILER = "inductor" if BUILDS else "aot_eager"

WINDOW = 8  # of every sliding layer
V = 101
NO_END = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZE = {"vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
DENSE = {**SIZE, **HEADS, **NO_END, "num_hidden_layers": 2}
MIXED = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# name: (configuration class, model class, arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DENSE),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DENSE, "head_dim": 16, "sliding_window": WINDOW}),
    "mixtral": (
        *("MixtralConfig", "MixtralForCausalLM"),
        {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DENSE),
    "qwen3": (
        *("Qwen3Config", "Qwen3ForCausalLM"),
        {**DENSE, **MIXED, "head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**DENSE, "head_dim": 32}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DENSE, **MIXED, "head_dim": 16, "sliding_window": WINDOW}),
    "gemma3_text": (
        *("Gemma3TextConfig", "Gemma3ForCausalLM"),
        {**DENSE, **MIXED, "head_dim": 16, "sliding_window": WINDOW},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**DENSE, "sliding_window": WINDOW}),
    "dory": (
        *("DoryConfig", "DoryForCausalLM"),
        {
            **DENSE,
            "num_hidden_layers": 5,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "n_input_layers": 1,
            "n_output_layers": 1,
            "n_recurrent_loops": 3,
            "initializer_range": 0.1,
            "ngpt_alpha_init": 0.5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", *["sliding_attention"] * 2],
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DENSE),
}


IMAGE, START, END = 95, 97, 98  # words that stand for a part of a picture, and around it
EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
# name: (configuration class, model class), of models that give pictures positions of their own
SEEING = {
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration"),
    "qwen4_exp": ("Qwen4ExpConfig", "Qwen4ExpForConditionalGeneration"),
}
SEEING = {name: classes for name, classes in SEEING.items() if name in families.FAMILIES}


def build_seeing(name: str) -> Any:
    """A float64 model with an eye before its decoder."""
    config_class, model_class = (getattr(transformers, cls) for cls in SEEING[name])
    torch.manual_seed(0)
    config = config_class(
        text_config=dict(families.FAMILIES[name]["kwargs"]),
        vision_config={**EYE, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config.text_config._experts_implementation = "eager"  # torch has no grouped product in float64
    model = families._reinit(model_class(config), 0, long_memory=True).double().eval()
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id, settings.do_sample = None, None, 0, False
    return model


def build_bidirectional(name: str) -> Any:
    """A float64 gemma3 or paligemma with an eye: tokens of a picture, or of a prompt, attend to those behind them."""
    text = {**SIZE, **HEADS, **NO_END, "head_dim": 16, "num_hidden_layers": 3}
    eye = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    eye.update(image_size=8, patch_size=4)
    torch.manual_seed(0)
    if name == "gemma3":
        text.update(MIXED, sliding_window=WINDOW)
        of: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_index": IMAGE}
        config = transformers.Gemma3Config(text_config=text, vision_config=eye, **of)
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        text.update(model_type="gemma")
        config = transformers.PaliGemmaConfig(
            text_config=text, vision_config={**eye, "model_type": "siglip_vision_model"}, image_token_index=IMAGE
        )
        model = transformers.PaliGemmaForConditionalGeneration(config)
    families._reinit(model, 0, long_memory=True).double().eval()
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id, settings.do_sample = None, None, 0, False
    return model


def available(name: str) -> bool:
    return all(hasattr(transformers, cls) for cls in MODELS[name][:2])


@cache
def build(name: str, **changes: Any) -> Any:
    """A model whose weights are drawn so that every state matters. Shared between tests: leave it as it is."""
    if name in families.FAMILIES:
        return families.build(name)[0]
    config_class, model_class, arguments = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**copy.deepcopy(arguments), **changes})
    model = families._reinit(getattr(transformers, model_class)(config), 0, long_memory=True).eval()
    settings = model.generation_config
    settings.eos_token_id, settings.bos_token_id, settings.pad_token_id, settings.do_sample = None, None, 0, False
    return model


def renamed(config: Any) -> Any:
    """The same configuration under a model type that is in no table."""
    config = copy.deepcopy(config)
    config.model_type = "somebody_elses"
    return config


def draw(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids (B, T), none of them the pad's."""
    return torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def full(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of one forward without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def feed(model: Any, cache: Any, ids: Tensor, start: int, forward: Any = None) -> Tensor:
    """Logits (B, T, V) of tokens that stand from position `start` on, without a mask."""
    given = {families.cache_arg(model): cache}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return (forward or model)(ids, use_cache=True, **given).logits


def feed_all(model: Any, cache: Any, ids: Tensor, sizes: Any, start: int = 0) -> Tensor:
    """The same in chunks of these sizes; what is left, one by one."""
    got, done = [], 0
    for size in [*sizes, *[1] * (ids.shape[1] - sum(sizes))]:
        got.append(feed(model, cache, ids[:, done : done + size], start + done))
        done += size
    return torch.cat(got, 1)


def write(model: Any, cache: Any, ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """What transformers' `generate` gives: sequences, and logits (B, new, V) of the new tokens."""
    kwargs = {families.cache_arg(model): cache, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    out = model.generate(ids, do_sample=False, **kwargs)
    return out.sequences, torch.stack(out.logits, 1)


def assert_same(got: Tensor, want: Tensor, tolerance: float = 2e-4) -> None:
    assert got.shape == want.shape
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    assert error < tolerance, f"off by {error:.1e}, relative to the largest logit"
