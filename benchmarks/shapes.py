"""The models that the CPU benchmarks run, and how they write their figures down."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    Qwen3_5TextConfig,
)

import statecache

MIX = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
COMMON = {"vocab_size": 8192, "hidden_size": 512, "tie_word_embeddings": True, "pad_token_id": 0}


def mamba(layers: int) -> Any:
    return MambaConfig(num_hidden_layers=layers, state_size=16, expand=2, time_step_rank=32, **COMMON)


def mamba2(layers: int) -> Any:
    return Mamba2Config(
        num_hidden_layers=layers,
        num_heads=16,
        head_dim=64,
        state_size=64,
        n_groups=1,
        expand=2,
        chunk_size=64,
        **COMMON,
    )


def granitemoehybrid(layers: int) -> Any:
    """Without experts: every layer has the shared feed-forward alone."""
    return GraniteMoeHybridConfig(
        num_hidden_layers=layers,
        layer_types=MIX * (layers // 4),
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=0,
        num_experts_per_tok=0,
        intermediate_size=1024,
        shared_intermediate_size=1024,
        mamba_n_heads=16,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=1,
        mamba_chunk_size=64,
        mamba_expand=2,
        position_embedding_type="rope",
        max_position_embeddings=16384,
        **COMMON,
    )


def qwen3_5(layers: int) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return Qwen3_5TextConfig(
        num_hidden_layers=layers,
        layer_types=MIX * (layers // 4),
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=16384,
        rope_parameters=rope | {"mrope_section": [3, 3, 2], "mrope_interleaved": True},
        **COMMON,
    )


def lfm2(layers: int) -> Any:
    return Lfm2Config(
        num_hidden_layers=layers,
        layer_types=["conv", "conv", "conv", "full_attention"] * (layers // 4),
        intermediate_size=1024,
        num_attention_heads=8,
        num_key_value_heads=8,
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=16384,
        **COMMON,
    )


SHAPES: dict[str, tuple[Callable[[int], Any], int]] = {
    "mamba": (mamba, 12),
    "mamba2": (mamba2, 12),
    "granitemoehybrid": (granitemoehybrid, 12),
    "qwen3_5": (qwen3_5, 8),
    "lfm2": (lfm2, 12),
}


def build(shape: str, quick: bool) -> Any:
    make, layers = SHAPES[shape]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make(4 if quick else layers)).eval()


def tokens_of(model: Any, n: int, rows: int = 1) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (rows, n), generator=torch.Generator().manual_seed(1))


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    return {
        "statecache": statecache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def figure(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f})"
