"""Device time of what changes a cache between passes, beside the bytes that it must move: marks, rows and resets.

    python benchmarks/gpu_marks.py                                   # all models, rows and slacks, on a GPU
    python benchmarks/gpu_marks.py --model mamba2 --rows 1 16 --json result.json
    python benchmarks/gpu_marks.py --device cpu --quick              # operators instead of times, tiny models

Asked is a device time of at most twice the bytes, read and written, over the copy bandwidth of the same run, and 20
microseconds. Caches are made from the configuration alone, as prepared models keep them, and hold random numbers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import statecache as sc
from gpu_decode import bandwidth, profiled, seconds, versions
from gpu_shapes import SHAPES
from shapes import table
from statecache.lease import Lease
from statecache.snapshot import Snapshot

MODES = {"slack 1, rounds alone": {"slack": 1, "back": False}, "slack 8": {"slack": 8}}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "detach", "alias"}  # launch nothing
HEAD = ["model", "cache", "rows", "operation", "MB moved", "kernels", "device us", "asked us", "", "wall us"]


@dataclass
class Found:
    """One operation on one cache. `moved`: bytes, read and written. Times in microseconds; None without a GPU."""

    model: str
    cache: str
    rows: int
    operation: str
    moved: int
    kernels: float
    device: float | None = None
    asked: float | None = None
    wall: float | None = None

    def row(self) -> list[str]:
        met = "" if self.device is None or self.asked is None else "ok" if self.device <= self.asked else "MISS"
        device, asked, wall = ("-" if t is None else f"{t:,.0f}" for t in (self.device, self.asked, self.wall))
        counts = [f"{self.moved / 1e6:,.1f}", f"{self.kernels:g}"]
        return [self.model, self.cache, str(self.rows), self.operation, *counts, device, asked, met, wall]


class Operators(TorchDispatchMode):
    """Counts the operators of its block that launch something on a GPU: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.by[name] += 1
        return func(*args, **(kwargs or {}))


def filled(config: Any, rows: int, context: int, capacity: int, device: str, options: dict[str, Any]) -> sc.StateCache:
    """A cache as prepared models keep it, every row of which holds `context` tokens, all of it random numbers."""
    cache = sc.StateCache(config, capacity=capacity, rows=rows, dtype="bfloat16", device=device, **options)
    cache.states.keep_logs()
    for row in range(rows):
        cache.states.admit(row, Snapshot(context, {}, cache.made_for))
    for state in cache.states.values():
        for buffer in state.buffers():
            buffer.normal_()
    return cache


def used(cache: sc.StateCache, context: int) -> Iterator[tuple[int, float]]:
    """Bytes of each state, and which part of them its rows' tokens use."""
    for state in cache.states.values():
        whole = isinstance(state, Lease) or state.spec.window is not None
        yield sum(b.nbytes for b in state.buffers()), 1.0 if whole else context / state.capacity


def operations(cache: sc.StateCache, context: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """What is measured, one after the other: the bytes that it must move, and a call of it, to be made many times."""
    rows = cache.rows or 0
    total = sum(n for n, _ in used(cache, context))
    row = sum(n * part for n, part in used(cache, context)) / rows
    mark = cache.checkpoint()
    yield "checkpoint", 2 * mark.nbytes, cache.checkpoint
    yield "restore", 2 * mark.nbytes, partial(cache.restore, mark)
    orders = {
        "gather, all change places": list(range(rows))[::-1],
        "gather, half are repeated": [n // 2 for n in range(rows)],
        "gather, all shift by one": [*range(1, rows), 0],
    }
    for name, order in orders.items():
        there = {to: n for to, n in enumerate(order) if to != n}
        yield name, int(row * (len(there) + len(set(there.values())))), partial(cache.gather, order)
    some = list(range(0, rows, 2))
    yield "reset, half the rows", total * len(some) // rows, partial(cache.reset, some)
    yield "reset", total, cache.reset


@torch.no_grad()
def measure(opts: argparse.Namespace) -> dict[str, Any]:
    on_gpu = opts.device != "cpu"
    rates = bandwidth(2) if on_gpu else {}
    found: list[Found] = []
    for model in opts.model:
        config = SHAPES[model](opts.quick)
        for rows in opts.rows:
            for kind, options in MODES.items():
                cache = filled(config, rows, opts.context, opts.context + 64, opts.device, options)
                for name, moved, run in operations(cache, opts.context):
                    one = Found(model, kind, rows, name, moved, 0)
                    found.append(one)
                    if on_gpu:
                        run()
                        whole = profiled(run, times=opts.repeats)[0]
                        one.device, one.kernels = whole["us"], whole["calls"]
                        one.asked = 2e6 * moved / rates["copy"] + 20
                        one.wall = seconds(run, opts.repeats) * 1e6
                        continue
                    with Operators() as counted:
                        run()
                    one.kernels = counted.by.total()
                del cache, run
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": opts.commit,
        "machine": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": versions(),
        "context": opts.context,
        "bandwidth": rates,
        "found": [asdict(one) for one in found],
    }


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=512, help="tokens that each row holds")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cpu counts operators")
    parser.add_argument("--quick", action="store_true", help="tiny models of the same kinds")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> int:
    opts = parser().parse_args()
    result = measure(opts)
    found = [Found(**one) for one in result["found"]]
    if result["bandwidth"]:
        print(f"{result['machine']}, copy {result['bandwidth']['copy'] / 1e12:.2f} TB/s\n")
    print(table(HEAD, [one.row() for one in found]))
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("MISS" in one.row() for one in found))


if __name__ == "__main__":
    sys.exit(main())
