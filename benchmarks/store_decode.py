"""Decode with each store beside `dense`, in one run: the stores take turns, and the ratio is that of medians.

    python benchmarks/store_decode.py --length 8192

A prepared Qwen3.5 of four layers, one of them full attention, with random weights in float32. CPU, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import statecache as sc
from statecache.storage.table import STORES


def build() -> Qwen3_5ForCausalLM:
    config = Qwen3_5TextConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    )
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sc.prepare(build())
    prompt, one = torch.randint(0, 1024, (1, args.length)), torch.ones(1, 1, dtype=torch.long)
    caches = {name: sc.StateCache(model.config, store=name) for name in STORES}
    times: dict[str, list[float]] = {name: [] for name in STORES}
    for cache in caches.values():
        for piece in prompt.split(512, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
    for _ in range(args.steps):
        for name, cache in caches.items():
            start = time.perf_counter()
            model(one, past_key_values=cache)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, cache in caches.items():
        print(
            f"{name:6} {medians[name] * 1e3:7.2f} ms a token, {medians[name] / medians['dense']:5.2f} x dense, "
            f"attention {cache.nbytes().by_kind['attention']:,} bytes, {STORES[name].exactness}"
        )


if __name__ == "__main__":
    main()
