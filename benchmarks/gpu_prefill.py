"""Milliseconds and memory of reading a prompt on a GPU: `sc.Decoder`, a prepared model's own forward, and transformers.

    python benchmarks/gpu_prefill.py --model qwen3_5
    python benchmarks/gpu_prefill.py --model mamba2 --tokens 512 4096 --json result.json
    python benchmarks/gpu_prefill.py --model granite_h --profile

Each side reads the prompt in turn in each round, the decoder into its cache emptied again, the others into a new one of
their own; transformers with the fused kernels that are installed, which the versions tell. First: the seconds of a
side's first prompt, with what is compiled then. Memory: the peak beside what is held before, weights and the decoder's
cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import statecache as sc
from gpu_decode import DEVICE, Side, profiled, versions
from gpu_shapes import SHAPES
from shapes import table

KERNELS = ("fla-core", "mamba-ssm", "causal-conv1d")  # that transformers runs where they are installed


class Theirs(Side):
    """A model as it is."""

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def read(self) -> None:
        self.model(self.prompt, **{self.key: self.cache()}, use_cache=True, logits_to_keep=1)


class Prepared(Theirs):
    """A prepared model's forward."""

    def cache(self) -> Any:
        return sc.StateCache(self.model.config)


class Decoding(Side):
    """The decoder, which reads prompts for `generate`, too."""

    def __init__(self, model: Any, prompt: Tensor, capacity: int) -> None:
        super().__init__(model, prompt, capacity)
        room = {"capacity": capacity, "rows": len(prompt), "dtype": model.dtype, "device": DEVICE}
        self.texts = prompt.tolist()
        self.decoder = sc.Decoder(model, sc.StateCache(model.config, **room, slack=1, back=False))

    def read(self) -> None:
        self.decoder.reset(range(len(self.texts)))
        self.decoder.prefill(self.texts)


SIDES = {"decoder": Decoding, "prepared": Prepared, "transformers": Theirs}


def taken(side: Theirs | Decoding) -> tuple[float, float]:
    """Seconds of one prompt, and the peak of memory above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    side.read()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(name: str, rows: int, tokens: int, rounds: int, small: bool, profile: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = SHAPES[name](small)
    prompt = torch.randint(1, config.vocab_size, (rows, tokens), device=DEVICE)
    sides: dict[str, Theirs | Decoding] = {}
    for side, kind in SIDES.items():
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        sides[side] = kind(sc.prepare(model) if kind is Prepared else model, prompt, tokens + 1)
    first = {side: taken(each)[0] for side, each in sides.items()}
    rounds_of: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, each in sides.items():
            rounds_of[side].append(taken(each))
    found = {"model": name, "rows": rows, "tokens": tokens, "first": first}
    found["seconds"] = {side: [t for t, _ in each] for side, each in rounds_of.items()}
    found["bytes"] = {side: max(held for _, held in each) for side, each in rounds_of.items()}
    if profile:
        found["kernels"] = {side: profiled(each.read, most=20, times=1) for side, each in sides.items()}
    return found


def row(found: dict[str, Any]) -> list[str]:
    middle = {side: statistics.median(each) for side, each in found["seconds"].items()}
    times = [f"{middle[side] * 1e3:.1f}" for side in SIDES]
    firsts = [f"{found['first'][side]:.1f}" for side in SIDES]
    memory = [f"{found['bytes'][side] / 2**20:,.0f}" for side in SIDES]
    ratio = f"{middle['decoder'] / middle['transformers']:.2f}"
    return [found["model"], str(found["rows"]), f"{found['tokens']:,}", *times, ratio, *firsts, *memory]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(SHAPES), help="may be given again; all, if left out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="also what kernels a prompt runs")
    parser.add_argument("--small", action="store_true", help="tiny models: every code path, in seconds")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    found = [
        measure(name, opts.rows, tokens, opts.rounds, opts.small, opts.profile)
        for name in opts.model or SHAPES
        for tokens in opts.tokens
    ]
    of = [f"{what}, {side}" for what in ("ms", "first s", "MiB") for side in SIDES]
    print(torch.cuda.get_device_name(), versions(*KERNELS))
    print(
        table(
            ["model", "rows", "tokens", *of[: len(SIDES)], "ours / theirs", *of[len(SIDES) :]],
            [row(each) for each in found],
        )
    )
    for each in found:
        for side, kernels in each.get("kernels", {}).items():
            print(f"{each['model']}, {each['tokens']:,} tokens, {side}")
            for kernel in kernels:
                print(f"  {kernel['us']:9.1f} us {kernel['calls']:7.1f} x {kernel['name']}")
    if opts.json:
        held = {"date": str(datetime.date.today()), "commit": opts.commit, "machine": torch.cuda.get_device_name()}
        opts.json.write_text(json.dumps({**held, "versions": versions(*KERNELS), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
