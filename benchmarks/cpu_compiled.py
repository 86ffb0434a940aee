"""A decoding step on a CPU, compiled ahead of time, beside the model's linear layers alone; and how it loads.

    python benchmarks/cpu_compiled.py                            # six models, 1 and 8 rows: half an hour
    python benchmarks/cpu_compiled.py --only lfm2 --rows 1 --json result.json

Sides, in turn in each round: a prepared model on a fixed StateCache, plainly and by the code that `sc.Decoder` and
`sc.generate` run on a CPU; transformers' StaticCache, plainly and compiled; the linear layers alone. The code is read
again by a process of its own, which has the model loaded: `load` is the time from there to its first logits. It is
checked there against the plain step. "embedded" is the model that comes with the package.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import statecache as sc
from shapes import DEEP, build, table, tokens_of, versions
from statecache.cli.measure import cpu_name
from statecache.cli.model import EMBEDDED
from statecache.decode.compiled import TOLERANCE, Hollow, inputs, load_code
from statecache.decode.compiling import compile_step
from statecache.models.names import cache_name

CONTEXT, CAPACITY = 128, 512
ROOM: dict[str, Any] = {"capacity": CAPACITY, "slack": 1, "back": False}  # as `generate` makes caches
MODELS = [*DEEP, "embedded"]
OURS, LINEAR = "compiled", "linear layers"
SIDES = ("plain", OURS, "StaticCache", "StaticCache, compiled", LINEAR)


def step(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """The logits (B, 1, V) after one token of each row."""
    logits: Tensor = model(ids, use_cache=True, **{cache_name(type(model).forward): cache}).logits
    return logits


def ready(model: Any, rows: int) -> sc.StateCache:
    """A fixed cache that has read a prompt."""
    cache = sc.StateCache(model.config, rows=rows, dtype=torch.float32, device="cpu", **ROOM)
    step(model, cache, tokens_of(model, CONTEXT, rows))
    return cache


def hollow(model: Any) -> Any:
    """A copy of a prepared model as the process that compiles gets it."""
    packed = io.BytesIO()
    Hollow(packed).dump(model)
    return pickle.loads(packed.getvalue())


def by_code(path: Path, model: Any, cache: sc.StateCache, one: Tensor) -> Callable[[], Tensor]:
    """The step by a file of code: its logits (B, V)."""
    run, held, count = load_code(path), inputs(model, cache), torch.ones(len(one), dtype=torch.long)
    return lambda: run.run([*held, one, count])[0]


def loads(shape: str, rows: int, path: Path, quick: bool, threads: int) -> float:
    """Seconds that a process of its own takes from a loaded model to the compiled step's first logits."""
    command = [sys.executable, __file__, "--load", str(path), "--only", shape, "--rows", str(rows)]
    command += ["--threads", str(threads), *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def load(shape: str, rows: int, path: Path, quick: bool) -> float:
    model = sc.prepare(model_of(shape, quick))
    cache, one = ready(model, rows), tokens_of(model, 1, rows)
    want = step(model, cache.fork(), one)[:, -1]
    start = time.perf_counter()
    got = by_code(path, model, cache, one)()
    took = time.perf_counter() - start
    assert (got - want).abs().max() < TOLERANCE * want.abs().max(), "what was read is not the plain step"
    return took


def model_of(shape: str, quick: bool) -> Any:
    if shape == "embedded":
        return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    return build(DEEP[shape], quick)


def measure(shape: str, rows: int, opts: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side, round by round, and what the compiled one costs before."""
    theirs, ours = model_of(shape, opts.quick), sc.prepare(model_of(shape, opts.quick))
    one, prompt = tokens_of(ours, 1, rows), tokens_of(ours, CONTEXT, rows)
    linear = [module for module in theirs.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(rows, 1, module.in_features) for module in linear]

    def multiply() -> None:
        for module, x in zip(linear, inputs, strict=True):
            module(x)

    def static(forward: Any) -> Callable[[], object]:
        cache, name = StaticCache(config=theirs.config, max_cache_len=CAPACITY), cache_name(type(theirs).forward)
        theirs(prompt, use_cache=True, **{name: cache})
        return lambda: forward(one, use_cache=True, **{name: cache})

    plain, fast = ready(ours, rows), ready(ours, rows)
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder, "step.pt2"), time.perf_counter()
        compile_step(hollow(ours), {"rows": rows, **ROOM}, path)
        warm = time.perf_counter() - start
        size, loading = path.stat().st_size, loads(shape, rows, path, opts.quick, opts.threads)
        compiled = by_code(path, ours, fast, one)
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: step(ours, plain, one),
        OURS: compiled,
        "StaticCache": static(theirs.forward),
        "StaticCache, compiled": static(torch.compile(theirs.forward)),
        LINEAR: multiply,
    }
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(-3, opts.rounds):
        for name in SIDES:
            start = time.perf_counter()
            sides[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {"shape": shape, "rows": rows, "compile": warm, "bytes": size, "load": loading, "seconds": seconds}


def ratio(cell: dict[str, Any], name: str, base: str) -> float:
    pairs = zip(cell["seconds"][name], cell["seconds"][base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def report(cells: list[dict[str, Any]]) -> str:
    head = ["shape", "rows", "linear layers", *SIDES[:4], "best StaticCache / compiled", "compiling", "loading"]
    rows = []
    for cell in cells:
        best = min(ratio(cell, name, OURS) for name in SIDES if name.startswith("StaticCache"))
        alone = statistics.median(cell["seconds"][LINEAR]) * 1e3
        times = [f"{ratio(cell, name, LINEAR):.2f}" for name in SIDES[:4]]
        ends = [f"{best:.2f}", f"{cell['compile']:.0f} s", f"{cell['load'] * 1e3:.0f} ms"]
        rows.append([cell["shape"], str(cell["rows"]), f"{alone:.1f} ms", *times, *ends])
    return table(head, rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=MODELS, help="this shape; may be given again")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few layers")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    torch.set_num_threads(opts.threads)
    if opts.load:
        print(load(opts.only[0], opts.rows[0], opts.load, opts.quick))
        return
    cells = []
    for shape in opts.only or MODELS:
        for rows in opts.rows:
            cells.append(measure(shape, rows, opts))
            print(report(cells[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(report(cells))
    if opts.json:
        held = {"versions": versions(), "cpu": cpu_name(), "threads": opts.threads, "commit": opts.commit}
        opts.json.write_text(json.dumps({**held, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
