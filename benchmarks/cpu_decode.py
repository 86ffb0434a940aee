"""Decode time and memory of StateCache beside transformers' own caches, on a CPU, as ratios from one run.

    python benchmarks/cpu_decode.py                       # all of it
    python benchmarks/cpu_decode.py --quick               # every code path but torch.compile, in seconds
    python benchmarks/cpu_decode.py --json result.json --only qwen3_5 --contexts 8192

How it measures is in benchmarks/README.md. The exit status is 0 also where a target is missed.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

import statecache
from shapes import WIDE, build, figure, table, tokens_of, versions
from statecache import StateCache
from statecache.cli.measure import cpu_name, storages

CHUNK = 1024  # tokens of one prefill forward
WARM = 4  # untimed tokens after the prefill; a compiled variant compiles in them
CACHES: dict[str, Callable[[Any, int], Any]] = {
    "DynamicCache": lambda config, capacity: DynamicCache(config=config),
    "StaticCache": lambda config, capacity: StaticCache(config=config, max_cache_len=capacity),
    "growing": lambda config, capacity: StateCache(config),
    "fixed": lambda config, capacity: StateCache(config, capacity=capacity),
}
COMPILED = {
    "DynamicCache compiled": "DynamicCache",
    "StaticCache compiled": "StaticCache",
    "growing compiled": "growing",
    "fixed compiled": "fixed",
}
GRAPHS = (
    "Compiled, StaticCache and a fixed StateCache take one graph; DynamicCache and a growing StateCache compile again "
    "when a length first changes, and the latter once more when its slots double."
)


# ---- a model at work


class Reader:
    """A model and the cache that it fills; feeds it tokens of one sequence, position after position."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache, self.forward, self.at = model, cache, model.forward, 0
        accepted = inspect.signature(model.forward).parameters
        self.key = "cache_params" if "cache_params" in accepted else "past_key_values"
        self.positioned = "position_ids" in accepted

    def feed(self, ids: Tensor, tokens: int) -> Tensor:
        """Take in the next `tokens` of ids (1, S); the logits of the last one."""
        end = self.at + tokens
        given = {"position_ids": torch.arange(self.at, end)[None]} if self.positioned else {}
        out = self.forward(
            input_ids=ids[:, self.at : end], **{self.key: self.cache}, use_cache=True, logits_to_keep=1, **given
        )
        self.at = end
        logits: Tensor = out.logits
        return logits

    def prefill(self, ids: Tensor, tokens: int) -> None:
        while self.at < tokens:
            self.feed(ids, min(CHUNK, tokens - self.at))

    def decode(self, ids: Tensor, tokens: int, clock: Callable[[], float]) -> float:
        """Seconds for `tokens` single-token forwards, after one that is not timed."""
        self.feed(ids, 1)
        began = clock()
        for _ in range(tokens):
            self.feed(ids, 1)
        return clock() - began

    def compiled(self) -> Reader:
        """The same, from here on, with a copy of the cache and the forward compiled."""
        twin = Reader(self.model, copy.deepcopy(self.cache))
        twin.at = self.at
        twin.forward = torch.compile(self.model.forward, fullgraph=True)
        return twin


# ---- bytes


def reachable_bytes(cache: Any) -> int:
    """Bytes of the storages a cache holds; of a StateCache, after checking that `nbytes` says the same."""
    total = sum(storages(cache).values())
    if isinstance(cache, StateCache):
        said = cache.nbytes().total
        assert said == total, f"nbytes() says {said:,} bytes, and storages of {total:,} bytes can be reached"
    return total


def peak_resident() -> int:
    """The process's peak resident bytes, since `forget_peak` where there is one."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Let `peak_resident` count from here; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@torch.inference_mode()
def measure_memory(shape: str, context: int, cache: str, quick: bool) -> dict[str, int | None]:
    """Peaks of this process, which has done nothing else."""
    model = build(WIDE[shape], quick)
    ids = tokens_of(model, context + 16)
    forget_peak()
    before = peak_resident()
    reader = Reader(model, CACHES[cache](model.config, context + 16))
    reader.prefill(ids, context)
    whole = peak_resident()
    again = forget_peak()
    for _ in range(16):
        reader.feed(ids, 1)
    return {
        "model": before,
        "peak": max(whole, peak_resident()),
        "decode_peak": peak_resident() if again else None,
        "cache": reachable_bytes(reader.cache),
    }


def memory_in_subprocess(shape: str, context: int, cache: str, quick: bool, threads: int) -> dict[str, int | None]:
    command = [sys.executable, __file__, "--memory-of", shape, str(context), cache, "--threads", str(threads)]
    # large tensors are mapped one by one, so that what is freed leaves the resident set
    freed = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command + ["--quick"] * quick, env=os.environ | freed, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    result: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- time


@dataclass
class Cell:
    """One shape at one context: seconds per token of every variant, round by round."""

    shape: str
    context: int
    attention: bool
    seconds: dict[str, list[float]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)  # reachable, at the end
    failed: dict[str, str] = field(default_factory=dict)
    prefill_s: float = 0.0
    warm_s: float = 0.0

    def ratio(self, variant: str, base: str) -> tuple[float, float, float] | None:
        """Median and quartiles of the rounds' ratios; None where either did not run."""
        if variant not in self.seconds or base not in self.seconds:
            return None
        paired = [a / b for a, b in zip(self.seconds[variant], self.seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
        return middle, low, high

    def milliseconds(self, variant: str) -> float:
        return statistics.median(self.seconds[variant]) * 1e3


@torch.inference_mode()
def measure_time(shape: str, model: Any, context: int, opts: argparse.Namespace) -> Cell:
    """Fill every cache by real forwards, then decode in rounds, every variant in each, in changing order."""
    clock = time.process_time if opts.clock == "cpu" else time.perf_counter
    capacity = context + WARM + opts.rounds * (opts.tokens + 1)
    ids = tokens_of(model, capacity)
    cell = Cell(shape, context, attention="full_attention" in model.config.layer_types)
    began = time.perf_counter()
    readers = {name: Reader(model, make(model.config, capacity)) for name, make in CACHES.items()}
    for reader in readers.values():
        reader.prefill(ids, context)
    cell.prefill_s = time.perf_counter() - began

    began, expected = time.perf_counter(), None
    if not opts.no_compile:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 32  # all variants are graphs of one forward
        readers |= {name: readers[source].compiled() for name, source in COMPILED.items() if source in opts.compiled}
    for name in list(readers):
        try:
            logits = [readers[name].feed(ids, 1) for _ in range(WARM)][-1]
        except Exception as error:  # the others are still worth measuring
            if name not in COMPILED:
                raise
            cell.failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            del readers[name]
            continue
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    cell.warm_s = time.perf_counter() - began

    names = list(readers)
    cell.seconds = {name: [] for name in names}
    for turn in range(opts.rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn % 2 == 0 else reversed(order):
            cell.seconds[name].append(readers[name].decode(ids, opts.tokens, clock) / opts.tokens)
    cell.nbytes = {name: reachable_bytes(reader.cache) for name, reader in readers.items()}
    return cell


# ---- what is said


def targets(cells: list[Cell]) -> Iterator[tuple[bool, str]]:
    """The lines that must hold, each with the figure."""
    for cell in cells:
        where = f"{cell.shape} at {cell.context:,}"
        limits = [("growing", "DynamicCache", 1.03), ("fixed", "StaticCache", 1.05)]
        if cell.attention and cell.context >= 8192:
            limits[0] = ("growing", "DynamicCache", 0.95)
        for variant, base, limit in limits:
            ratio = cell.ratio(variant, base)
            assert ratio is not None
            yield ratio[0] <= limit, f"{where}: {variant} / {base} {ratio[0]:.3f}, at most {limit}"


def megabytes(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e6:,.1f}"


def report(cells: list[Cell], memory: dict[tuple[str, int], dict[str, Any]], opts: argparse.Namespace) -> str:
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    versions = (
        f"statecache {statecache.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}; {cpu_name()}, {opts.threads} threads{load}"
    )
    how = f"{opts.clock} time, {opts.rounds} rounds of {opts.tokens} tokens"
    lines = [
        f"{versions}; float32, batch 1; {how}.",
        "",
        "Decode time per token with DynamicCache; the others as its multiples: median of paired rounds (quartiles).",
        "",
    ]
    columns = [("StaticCache", "DynamicCache"), ("growing", "DynamicCache"), ("fixed", "DynamicCache")]
    columns += [(name, "DynamicCache") for name, source in COMPILED.items() if source in opts.compiled]
    lines += [
        table(
            ["shape", "context", "DynamicCache", *(name for name, _ in columns), "fixed / StaticCache"],
            [
                [cell.shape, f"{cell.context:,}", f"{cell.milliseconds('DynamicCache'):.1f} ms"]
                + [figure(cell.ratio(*pair)) for pair in [*columns, ("fixed", "StaticCache")]]
                for cell in cells
            ],
        ),
        "",
        "Not compiled: --no-compile or --quick." if opts.no_compile else GRAPHS,
        *(
            f"{cell.shape} at {cell.context:,}: {name} failed: {why}"
            for cell in cells
            for name, why in cell.failed.items()
        ),
        "",
        "MB of storages reachable from each cache after the last token; of a StateCache, equal to `nbytes().total`.",
        "",
        table(
            ["shape", "context", *CACHES],
            [[cell.shape, f"{cell.context:,}", *(megabytes(cell.nbytes[name]) for name in CACHES)] for cell in cells],
        ),
        "",
    ]
    if memory:
        lines += [
            "Peak resident MB of a process of its own: the model alone; prefill and 16 tokens; those 16 tokens only.",
            "",
            table(
                ["shape", "context", "cache", "model", "peak", "peak of decoding", "cache bytes"],
                [
                    [shape, f"{context:,}", name, *(megabytes(m[k]) for k in ("model", "peak", "decode_peak", "cache"))]
                    for (shape, context), by_cache in memory.items()
                    for name, m in by_cache.items()
                ],
            ),
            "",
        ]
    lines += [f"{'PASS' if holds else 'MISS'}  {line}" for holds, line in targets(cells)]
    return "\n".join(lines)


def as_json(cells: list[Cell], memory: dict[tuple[str, int], dict[str, Any]], opts: argparse.Namespace) -> str:
    return json.dumps(
        {
            "versions": versions(),
            "cpu": cpu_name(),
            "threads": opts.threads,
            "clock": opts.clock,
            "rounds": opts.rounds,
            "tokens": opts.tokens,
            "cells": [
                vars(cell)
                | {
                    "milliseconds": {name: cell.milliseconds(name) for name in cell.seconds},
                    "to_dynamic": {name: cell.ratio(name, "DynamicCache") for name in cell.seconds},
                    "fixed_to_static": cell.ratio("fixed", "StaticCache"),
                }
                for cell in cells
            ],
            "memory": [{"shape": s, "context": c, "peaks": by_cache} for (s, c), by_cache in memory.items()],
            "targets": [{"holds": holds, "line": line} for holds, line in targets(cells)],
        },
        indent=1,
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="eight layers, short contexts, few rounds, no torch.compile"
    )
    parser.add_argument("--only", action="append", choices=list(WIDE), help="this shape; may be given again")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens; 128 2048 8192 if left out")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int, default=8, help="timed tokens of each variant in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, for --threads 1 on a busy machine"
    )
    parser.add_argument("--compiled", nargs="+", choices=CACHES, default=list(CACHES), help="caches to compile with")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of resident memory")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    opts = parser.parse_args()
    opts.no_compile |= opts.quick
    opts.rounds = opts.rounds or (4 if opts.quick else 24)
    opts.contexts = opts.contexts or ([32, 96] if opts.quick else [128, 2048, 8192])
    return opts


def main() -> None:
    opts = options()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(opts.threads)
    if opts.memory_of:
        shape, context, cache = opts.memory_of
        print(json.dumps(measure_memory(shape, int(context), cache, opts.quick)))
        return
    began = time.perf_counter()
    cells: list[Cell] = []
    memory: dict[tuple[str, int], dict[str, Any]] = {}
    for shape in opts.only or list(WIDE):
        model = build(WIDE[shape], opts.quick)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        for context in opts.contexts:
            cell = measure_time(shape, model, context, opts)
            cells.append(cell)
            spent = f"prefill {cell.prefill_s:.0f} s, warm-up {cell.warm_s:.0f} s"
            so_far = f"{time.perf_counter() - began:.0f} s so far"
            print(f"{shape} ({size:.1f} M parameters) at {context:,}: {spent}, {so_far}", file=sys.stderr, flush=True)
        del model
        if not opts.no_memory:
            longest = max(opts.contexts)
            memory[shape, longest] = {
                cache: memory_in_subprocess(shape, longest, cache, opts.quick, opts.threads) for cache in CACHES
            }
    print(report(cells, memory, opts))
    print(f"\nTook {time.perf_counter() - began:.0f} s.")
    if opts.json:
        opts.json.write_text(as_json(cells, memory, opts) + "\n")


if __name__ == "__main__":
    main()
