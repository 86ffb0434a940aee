"""The models that the CPU benchmarks run, and how they write their figures down."""

from __future__ import annotations

import platform
from collections.abc import Callable
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


def _common(width: int) -> dict[str, Any]:
    return {"vocab_size": 8192, "hidden_size": width, "tie_word_embeddings": True, "pad_token_id": 0}


def _mix(layers: int, every: int) -> list[str]:
    """Layers of which the last of `every` so many attends to all tokens."""
    return (["linear_attention"] * (every - 1) + ["full_attention"]) * (layers // every)


def mamba(layers: int, width: int) -> Any:
    return MambaConfig(num_hidden_layers=layers, state_size=16, expand=2, time_step_rank=width // 16, **_common(width))


def mamba2(layers: int, width: int, state: int) -> Any:
    return Mamba2Config(
        num_hidden_layers=layers,
        num_heads=2 * width // 64,
        head_dim=64,
        state_size=state,
        n_groups=1,
        expand=2,
        chunk_size=64,
        **_common(width),
    )


def granitemoehybrid(layers: int, width: int, *, every: int, kv: int, ffn: int, head: int, state: int) -> Any:
    """Without experts: every layer has the shared feed-forward alone."""
    return GraniteMoeHybridConfig(
        num_hidden_layers=layers,
        layer_types=_mix(layers, every),
        num_attention_heads=width // 64,
        num_key_value_heads=kv,
        num_local_experts=0,
        num_experts_per_tok=0,
        intermediate_size=ffn,
        shared_intermediate_size=ffn,
        mamba_n_heads=2 * width // head,
        mamba_d_head=head,
        mamba_d_state=state,
        mamba_n_groups=1,
        mamba_chunk_size=64,
        mamba_expand=2,
        position_embedding_type="rope",
        max_position_embeddings=16384,
        **_common(width),
    )


def qwen3_5(layers: int, width: int, *, heads: int, kv: int, ffn: int, linear: tuple[int, int]) -> Any:
    """`linear`: heads of a delta net, and their size."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return Qwen3_5TextConfig(
        num_hidden_layers=layers,
        layer_types=_mix(layers, 4),
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=64,
        linear_num_key_heads=linear[0],
        linear_num_value_heads=linear[0],
        linear_key_head_dim=linear[1],
        linear_value_head_dim=linear[1],
        max_position_embeddings=16384,
        rope_parameters=rope | {"mrope_section": [3, 3, 2], "mrope_interleaved": True},
        **_common(width),
    )


def lfm2(layers: int, width: int) -> Any:
    attends = (2, 5, 9, 13, 17, 21, 24, 27)
    return Lfm2Config(
        num_hidden_layers=layers,
        layer_types=["full_attention" if n in attends else "conv" for n in range(layers)],
        intermediate_size=9 * width // 2,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        block_auto_adjust_ff_dim=False,
        max_position_embeddings=16384,
        **_common(width),
    )


Make = tuple[Callable[[int], Any], int]  # a configuration of so many layers, and how many there are

# Few layers and 8 key-value heads where there is attention: what a cache costs shows.
WIDE: dict[str, Make] = {
    "mamba2": (lambda n: mamba2(n, 512, state=64), 12),
    "granitemoehybrid": (lambda n: granitemoehybrid(n, 512, every=4, kv=8, ffn=1024, head=64, state=64), 12),
    "qwen3_5": (lambda n: qwen3_5(n, 512, heads=8, kv=8, ffn=1024, linear=(8, 64)), 8),
}

# As deep as a small published model of each family, and narrowed until it has 20 to 31 million parameters.
DEEP: dict[str, Make] = {
    "mamba": (lambda n: mamba(n, 352), 24),
    "mamba2": (lambda n: mamba2(n, 352, state=128), 24),
    "granitemoehybrid": (lambda n: granitemoehybrid(n, 256, every=8, kv=2, ffn=640, head=32, state=128), 32),
    "qwen3_5": (lambda n: qwen3_5(n, 224, heads=7, kv=1, ffn=784, linear=(4, 112)), 24),
    "lfm2": (lambda n: lfm2(n, 192), 30),
}


def build(shape: Make, quick: bool) -> Any:
    """The model; of few layers if `quick`."""
    make, layers = shape
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make(8 if quick else layers)).eval()


def tokens_of(model: Any, n: int, rows: int = 1) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (rows, n), generator=torch.Generator().manual_seed(1))


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
