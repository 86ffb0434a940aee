"""What the first prompt, step and rounds of a process take on a GPU whose kernels were never compiled, or were.

    python benchmarks/gpu_cold.py --model mamba2
    python benchmarks/gpu_cold.py --model qwen3_5 --drafts 4 9 --json result.json

Triton's cache is a folder of its own, empty in the first of two processes and filled in the second. In each the model
is there, and has run once by torch's operators. `kernels` of a stage are those that it compiled or read, and `work` the
seconds of all threads in that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from transformers import AutoModelForCausalLM

from gpu_decode import DEVICE, versions
from gpu_rounds import decoder
from gpu_shapes import SHAPES


@torch.no_grad()
def stages(opts: argparse.Namespace) -> list[dict[str, Any]]:
    """Each stage of a process by what it is called, with its seconds."""
    made: list[float] = []
    triton.knobs.compilation.listener = lambda *, times, **_: made.append(times.total / 1e6)
    torch.manual_seed(0)
    config = SHAPES[opts.model](opts.small)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    prompt = torch.randint(1, config.vocab_size, (1, opts.context), device=DEVICE)
    model(prompt[:, :8])
    found = []

    def stage(name: str, run: Callable[[], object]) -> None:
        made.clear()
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append({"stage": name, "s": time.perf_counter() - began, "kernels": len(made), "work": sum(made)})

    most = max(opts.drafts)
    with decoder(model, 1, opts.context + 64, 1 + most) as first:
        stage(f"prompt of {opts.context}", lambda: first.prefill(prompt.tolist()))
        stage("step", first.step)
        for drafts in opts.drafts:
            draft = torch.zeros(1, drafts, dtype=torch.long, device=DEVICE)
            stage(f"round of {drafts} drafts", lambda draft=draft: first.check(draft))  # type: ignore[misc]
    return found


def process(folder: str) -> list[dict[str, Any]]:
    """The stages of a process of its own whose kernels are in that folder."""
    command = [sys.executable, __file__, *sys.argv[1:], "--inside"]
    told = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": folder}, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, Any]] = json.loads(told.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--drafts", type=int, nargs="+", default=[4, 1, 9, 15], help="rounds of so many, in that order")
    parser.add_argument("--small", action="store_true", help="a tiny model of the same kind")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    opts = parser.parse_args()
    if opts.inside:
        print(json.dumps(stages(opts)))
        return
    with tempfile.TemporaryDirectory() as folder:
        empty, filled = process(folder), process(folder)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": opts.commit,
        "machine": torch.cuda.get_device_name(),
        "versions": versions(),
        "model": opts.model,
        "empty": empty,
        "filled": filled,
    }
    print(f"{opts.model}, {result['machine']}: seconds with an empty kernel cache, and with a filled one")
    for cold, warm in zip(empty, filled, strict=True):
        print(
            f"    {cold['stage']:20} {cold['s']:6.2f} {warm['s']:6.2f}    {cold['kernels']:3} kernels, "
            f"{cold['work']:.1f} s of work"
        )
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
