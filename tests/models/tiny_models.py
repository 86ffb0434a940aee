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
LATENT = {
    **SIZE,
    **NO_END,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
}

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
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", DENSE),
    "kimi_linear": (
        *("KimiLinearConfig", "KimiLinearForCausalLM"),
        {**LATENT, "linear_head_dim": 16, "linear_num_heads": 4},
    ),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", {**LATENT, "head_dim": 16}),
    "lfm3": (
        *("Lfm3Config", "Lfm3ForCausalLM"),
        {
            **DENSE,
            "num_hidden_layers": 5,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["conv", "sliding_attention", "conv", "full_attention", "conv"],
        },
    ),
    "zaya": (
        *("ZayaConfig", "ZayaForCausalLM"),
        {
            **{k: v for k, v in DENSE.items() if k != "intermediate_size"},
            "num_hidden_layers": 3,
            "head_dim": 16,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
            "sliding_window": WINDOW,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        },
    ),
    "inkling": (
        *("InklingTextConfig", "InklingForCausalLM"),
        {
            **DENSE,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window_size": WINDOW,
            "conv_kernel_size": 4,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "route_scale": 1.0,
            "logits_mup_width_multiplier": 1.0,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        },
    ),
    "inkling2": (
        *("Inkling2TextConfig", "Inkling2ForCausalLM"),
        {
            **{k: v for k, v in DENSE.items() if k != "intermediate_size"},
            "num_hidden_layers": 3,
            "head_dim": 16,
            "unpadded_vocab_size": V,
            "sliding_window_size": WINDOW,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 4,
            "rel_extent": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_layers_per_attn_res_block": 2,
            "route_scale": 1.0,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        },
    ),
}


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
