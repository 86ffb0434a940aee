"""Seconds of a whole text on a GPU: `sc.generate` with a captured step and without, beside transformers' generate.

    python benchmarks/gpu_generate.py --model mamba2
    python benchmarks/gpu_generate.py --model qwen3_5 --rows 4 --json result.json

Each side writes texts of several lengths, a prompt of 512 tokens and greedy, in one process; each call captures anew.
The first text of a process is shown apart, since Triton's kernels are compiled in it. From where captured is the faster
one on, `statecache.decode.capturing.WORTH` has steps captured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import statecache as sc
from gpu_decode import DEVICE, versions
from gpu_shapes import SHAPES
from statecache.decode import capturing

LENGTHS = (16, 32, 64, 128, 512)
NEVER = 1 << 40
ROUNDS = 3


def sides(model: Any, ids: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor]]:
    """By name, what writes so many new tokens."""

    def ours(worth: int) -> Callable[[int], torch.Tensor]:
        def write(new: int) -> torch.Tensor:
            capturing.WORTH = worth
            return sc.generate(model, ids, max_new_tokens=new)

        return write

    def theirs(new: int) -> torch.Tensor:
        return model.generate(ids, max_new_tokens=new, do_sample=False)

    return {"captured": ours(1), "plain": ours(NEVER), "transformers": theirs}


def seconds(write: Callable[[int], torch.Tensor], new: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    write(new)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny model: every code path, in seconds")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    config = SHAPES[given.model](given.small)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 500, (given.rows, 512), device=DEVICE)
    writes = sides(model, ids)
    first = {name: seconds(write, LENGTHS[0]) for name, write in writes.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in writes}
    for new in LENGTHS:
        rounds = [{name: seconds(write, new) for name, write in writes.items()} for _ in range(ROUNDS)]
        for name in writes:
            found[name][new] = statistics.median(each[name] for each in rounds)
    print(f"{given.model}, {given.rows} rows, seconds of a text")
    print("| side | first of 16 |" + "".join(f" {new} |" for new in LENGTHS))
    print("|---|---|" + "---|" * len(LENGTHS))
    for name in writes:
        print(f"| {name} | {first[name]:.2f} |" + "".join(f" {found[name][new]:.3f} |" for new in LENGTHS))
    if given.json:
        machine = {"machine": torch.cuda.get_device_name(), "versions": versions(), "commit": given.commit}
        held = {**machine, "model": given.model, "rows": given.rows, "first": first, "seconds": found}
        given.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
