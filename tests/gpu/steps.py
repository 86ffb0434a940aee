"""Tiny models on a GPU, decoding step by step, and what the compiler counted meanwhile."""

from __future__ import annotations

from typing import Any

import families
import torch
import torch._dynamo as dynamo

import statecache as sc

PROMPT, STEPS, TOLERANCE = 21, 8, 2e-4
WARM = 3  # steps until a graph is recorded


def build(name: str, **overrides: Any) -> tuple[Any, Any, torch.Tensor]:
    model, config = families.build(name, **overrides)
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or name == "nemotron_h":
        model.set_experts_implementation("batched_mm")  # grouped products of float32 go through the host
    ids = torch.randint(1, 90, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(5))
    return model.cuda(), config, ids.cuda()


def arguments(model: Any, cache: sc.StateCache, position: torch.Tensor) -> dict[str, Any]:
    kwargs: dict[str, Any] = {families.cache_arg(model): cache, "use_cache": True}
    if "mamba" not in type(model).__name__.lower():
        kwargs["position_ids"] = position
    return kwargs


def prefill(model: Any, ids: torch.Tensor, cache: sc.StateCache) -> None:
    position = torch.arange(PROMPT, device="cuda").expand(len(ids), -1)
    model(ids[:, :PROMPT], **arguments(model, cache, position))


def decode(model: Any, step: Any, ids: torch.Tensor, cache: sc.StateCache) -> tuple[torch.Tensor, int]:
    """Logits of the steps after the prompt, and how many CUDA graphs the steps after the warm-up launched."""
    out, position = [], torch.empty(len(ids), 1, dtype=torch.long, device="cuda")

    def run(first: int, end: int) -> None:
        for n in range(first, end):
            torch.compiler.cudagraph_mark_step_begin()
            kwargs = arguments(model, cache, position.fill_(n))
            out.append(step(ids[:, n : n + 1].clone(), **kwargs).logits.clone())

    run(PROMPT, PROMPT + WARM)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as seen:
        run(PROMPT + WARM, PROMPT + STEPS)
    launches = sum(event.count for event in seen.key_averages() if event.key == "cudaGraphLaunch")
    return torch.cat(out, 1), launches


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def skips() -> int:
    return dynamo.utils.counters["inductor"]["cudagraph_skips"]


def copied_inputs() -> int:
    """Inputs of the graph whose address may change, so that each replay copies them: the tokens and their positions."""
    return dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"]
