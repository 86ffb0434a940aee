"""Milliseconds and memory of reading a prompt on a GPU: a prepared model on a StateCache, and transformers.

    python benchmarks/gpu_prefill.py --model qwen3_5
    python benchmarks/gpu_prefill.py --model mamba2 --tokens 512 4096 --json result.json

Each side reads the prompt into a new cache of its own, in turn in each round; transformers with the fused kernels that
are installed, which the versions tell. First: the seconds of a side's first prompt, with what is compiled then. Memory:
the peak beside the weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import statecache as sc
from gpu_decode import DEVICE, Side, versions
from gpu_shapes import SHAPES
from shapes import table

KERNELS = ("fla-core", "mamba-ssm", "causal-conv1d")  # that transformers runs where they are installed


class Theirs(Side):
    """A model as it is."""

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)


class Ours(Side):
    """A prepared model."""

    def cache(self) -> Any:
        return sc.StateCache(self.model.config)


SIDES = {"statecache": Ours, "transformers": Theirs}


def read(side: Side) -> tuple[float, float]:
    """Seconds of one prompt, and the peak of memory above what was held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    cache = side.cache()
    side.model(side.prompt, **{side.key: cache}, use_cache=True, logits_to_keep=1)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(name: str, rows: int, tokens: int, rounds: int, small: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = SHAPES[name](small)
    prompt = torch.randint(1, config.vocab_size, (rows, tokens), device=DEVICE)
    sides: dict[str, Side] = {}
    for side, kind in SIDES.items():
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        sides[side] = kind(sc.prepare(model) if kind is Ours else model, prompt, tokens)
    first = {side: read(each)[0] for side, each in sides.items()}
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, each in sides.items():
            taken[side].append(read(each))
    found = {"model": name, "rows": rows, "tokens": tokens, "first": first}
    found["seconds"] = {side: [t for t, _ in each] for side, each in taken.items()}
    found["bytes"] = {side: max(held for _, held in each) for side, each in taken.items()}
    return found


def row(found: dict[str, Any]) -> list[str]:
    middle = {side: statistics.median(each) for side, each in found["seconds"].items()}
    times = [f"{middle[side] * 1e3:.1f}" for side in SIDES]
    firsts = [f"{found['first'][side]:.1f}" for side in SIDES]
    memory = [f"{found['bytes'][side] / 2**20:,.0f}" for side in SIDES]
    ratio = f"{middle['statecache'] / middle['transformers']:.2f}"
    return [found["model"], str(found["rows"]), f"{found['tokens']:,}", *times, ratio, *firsts, *memory]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(SHAPES), help="may be given again; all, if left out")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny models: every code path, in seconds")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    found = [
        measure(name, opts.rows, tokens, opts.rounds, opts.small)
        for name in opts.model or SHAPES
        for tokens in opts.tokens
    ]
    of = [f"{what}, {side}" for what in ("ms", "first s", "MiB") for side in SIDES]
    print(torch.cuda.get_device_name(), versions(*KERNELS))
    print(table(["model", "rows", "tokens", *of[:2], "ours / theirs", *of[2:]], [row(each) for each in found]))
    if opts.json:
        held = {"date": str(datetime.date.today()), "commit": opts.commit, "machine": torch.cuda.get_device_name()}
        opts.json.write_text(json.dumps({**held, "versions": versions(*KERNELS), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
