"""The models that the GPU benchmarks run: random bfloat16 weights, sizes of models that people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GraniteMoeHybridConfig, Lfm2Config, Mamba2Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

WIDTH, VOCABULARY = 2048, 65536


def _common(small: bool) -> dict[str, Any]:
    return {
        "vocab_size": 512 if small else VOCABULARY,
        "hidden_size": 128 if small else WIDTH,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": None,
    }


def mamba2(small: bool) -> Any:
    """1.4 B parameters, 48 layers without attention."""
    given = _common(small)
    return Mamba2Config(
        num_hidden_layers=4 if small else 48,
        num_heads=2 * given["hidden_size"] // 64,
        head_dim=64,
        state_size=128,
        n_groups=1,
        expand=2,
        chunk_size=256,
        **given,
    )


def granite_h(small: bool) -> Any:
    """2.1 B parameters, 36 layers of Mamba-2 and 4 of attention, without experts."""
    given, layers = _common(small), 4 if small else 40
    width = given["hidden_size"]
    attends = {1} if small else set(range(5, layers, 10))
    return GraniteMoeHybridConfig(
        num_hidden_layers=layers,
        layer_types=["full_attention" if n in attends else "linear_attention" for n in range(layers)],
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=2 * width,
        intermediate_size=2 * width,
        mamba_n_heads=2 * width // 64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_d_head=64,
        position_embedding_type=None,
        embedding_multiplier=1.0,
        **given,
    )


def _delta(small: bool) -> dict[str, Any]:
    """What models of gated delta nets and attention have in common."""
    given = _common(small)
    width = given["hidden_size"]
    heads = max(1, width // 128)
    return {
        "num_hidden_layers": 4 if small else 24,
        "num_attention_heads": max(1, width // 256),
        "num_key_value_heads": max(1, width // 1024),
        "head_dim": 256,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        **given,
    }


def qwen3_5(small: bool) -> Any:
    """1.5 B parameters, 18 layers of the gated delta rule and 6 of attention."""
    given = _delta(small)
    return Qwen3_5TextConfig(intermediate_size=3 * given["hidden_size"], **given)


def qwen3_5_moe(small: bool) -> Any:
    """10.3 B parameters, 8 of 128 experts in each layer: 18 layers of the gated delta rule and 6 of attention."""
    given = _delta(small)
    inside = given["hidden_size"] // 4
    return Qwen3_5MoeTextConfig(
        num_experts=16 if small else 128,
        num_experts_per_tok=4 if small else 8,
        moe_intermediate_size=inside,
        shared_expert_intermediate_size=inside,
        **given,
    )


def lfm2(small: bool) -> Any:
    """1.2 B parameters, 10 layers of short convolutions and 6 of attention."""
    given, attends = _common(small), {1} if small else {2, 5, 8, 10, 12, 14}
    width, layers = given["hidden_size"], 4 if small else 16
    return Lfm2Config(
        num_hidden_layers=layers,
        layer_types=["full_attention" if n in attends else "conv" for n in range(layers)],
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        intermediate_size=4 * width,
        block_auto_adjust_ff_dim=False,
        **given,
    )


def drafting(small: bool) -> Any:
    """A model that drafts for any of these: their tokens, a quarter of their width, four layers of Mamba-2."""
    given = {**_common(small), "hidden_size": 64 if small else WIDTH // 4}
    return Mamba2Config(num_hidden_layers=4, num_heads=given["hidden_size"] // 32, head_dim=64, n_groups=1, **given)


SHAPES: dict[str, Callable[[bool], Any]] = {
    "mamba2": mamba2,
    "granite_h": granite_h,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "lfm2": lfm2,
}
