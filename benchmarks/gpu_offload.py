"""What a decode step costs where states live in host memory: beside the bus, and beside a step without.

    python benchmarks/gpu_offload.py --rows 8 --context 4096 --out results/offload.json

A random hybrid of gated delta nets and attention, prepared, on one GPU. A step is a pass and the choice of the next
tokens, which the host reads before it begins another; they are timed ten at a time, both sides in turns. The floor is
the larger of a step without offload and the bytes that cross the bus at the bandwidth measured here, pinned memory, one
way: what comes is every buffer of the cache, what goes back is counted, too.
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
import transformers
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import statecache as sc
from statecache import offload
from statecache.models.names import cache_name

STEPS = 10  # of one timing


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median time of a call, the device idle before and after."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second from pinned memory to the device."""
    host, there = (
        torch.empty(size, dtype=torch.uint8, pin_memory=True),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    return size / milliseconds(lambda: there.copy_(host, non_blocking=True), 20) * 1e3


def decoding(model: Any, rows: int, context: int, **options: Any) -> tuple[Callable[[], object], sc.StateCache]:
    """A step of one token in each row, after a prompt."""
    cache = sc.StateCache(model.config, **options)
    given = {cache_name(model.forward): cache, "use_cache": True}
    model(torch.randint(1, 1000, (rows, context), device="cuda"), logits_to_keep=1, **given)
    ids = torch.ones(rows, 1, dtype=torch.long, device="cuda")

    def step() -> object:
        ids.copy_(model(ids, **given).logits[:, -1:].argmax(-1))
        return ids.tolist()

    for _ in range(10):
        step()
    return step, cache


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--out", type=Path)
    opts = parser.parse_args()
    config = Qwen3_5TextConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=6144, num_hidden_layers=opts.layers
    )
    model = sc.prepare(Qwen3_5ForCausalLM(config).to("cuda", torch.bfloat16).eval())
    torch.backends.cuda.enable_cudnn_sdp(False)  # which plans anew, 11 ms a layer, for every number of keys
    bus = bandwidth()
    weights = torch.cuda.memory_allocated()
    step, cache = decoding(model, opts.rows, opts.context, offload=True)
    here = torch.cuda.memory_allocated() - weights
    beside, kept = decoding(model, opts.rows, opts.context)
    total = kept.nbytes().total
    most = torch.cuda.memory_allocated() - weights - here
    times: dict[str, list[float]] = {"plain": [], "offloaded": []}
    for _ in range(opts.rounds):  # in turns
        for name, run in (("plain", beside), ("offloaded", step)):
            times[name].append(milliseconds(lambda run=run: [run() for _ in range(STEPS)], 1) / STEPS)
    plain, offloaded = (statistics.median(times[name]) for name in ("plain", "offloaded"))
    crossed, plainly = [0], offload._copy

    def counted(to: torch.Tensor, what: torch.Tensor) -> None:
        crossed[0] += what.nbytes if to.device != what.device else 0
        plainly(to, what)

    offload._copy = counted
    step()
    offload._copy = plainly
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    during = torch.cuda.max_memory_allocated() - resting
    floor = max(plain, crossed[0] / bus * 1e3)
    found = {
        "rows": opts.rows,
        "context": opts.context,
        "layers": opts.layers,
        "cache, MB": total / 1e6,
        "bytes over the bus a step, MB": crossed[0] / 1e6,
        "bus, GB/s": bus / 1e9,
        "step without offload, ms": plain,
        "bytes over the bus, ms": crossed[0] / bus * 1e3,
        "step with offload, ms": offloaded,
        "over the larger": offloaded / floor,
        "device memory of the cache, MB: without": most / 1e6,
        "device memory of the cache, MB: with": here / 1e6,
        "and at most while a step runs, activations included": (here + during) / 1e6,
        "asked": 1.2,
        "versions": f"statecache {sc.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "machine": torch.cuda.get_device_name(),
        "commit": opts.commit,
    }
    assert cache.nbytes().total == total
    print(json.dumps(found, indent=1))
    if opts.out is not None:
        opts.out.parent.mkdir(parents=True, exist_ok=True)
        opts.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
