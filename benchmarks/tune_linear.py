"""Which tile is best for each product of a decoding step on this GPU: where `kernels.linear.TILES` is from.

python benchmarks/tune_linear.py --rows 1 --json tiles.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from statecache.kernels.linear import Tile, linear

# outputs, inputs, what stands around: those of gpu_shapes
PRODUCTS = {
    "in_proj": (8512, 2048, "norm"),
    "out_proj": (2048, 4096, "gate"),
    "mlp in": (8192, 2048, "norm"),
    "mlp out": (2048, 4096, "unit"),
    "delta in": (8224, 2048, "norm"),
    "wide in": (12288, 2048, "norm"),
    "wide out": (2048, 6144, "unit"),
    "square": (2048, 2048, "plain"),
}
COPIES = 6  # of a weight, so that no cache holds it


def tiles(rows: int) -> list[Tile]:
    if rows == 1:
        made = [Tile(*t) for t in itertools.product((4, 8, 16), (512, 1024, 2048), (2, 4, 8))]
        return [t for t in made if 4096 <= t.outputs * t.inputs <= 16384 * 2 and t.outputs * t.inputs <= 8192 * t.warps]
    made = [Tile(*t) for t in itertools.product((16, 32, 64), (128, 256, 512), (2, 4))]
    return [t for t in made if t.outputs * t.inputs <= 16384]


def run(name: str, rows: int, tile: Tile, calls: int, weights: list[torch.Tensor]) -> float:
    """Microseconds of one product, in a graph of many."""
    outputs, inputs, form = PRODUCTS[name]
    x = torch.randn(rows, inputs * (2 if form == "unit" else 1), device="cuda", dtype=torch.bfloat16)
    by = torch.randn(inputs, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(rows, outputs, device="cuda") if form in ("gate", "unit") else None
    given: dict[str, Any] = {"residual": residual, "unit": form == "unit", "tile": tile}
    if form in ("norm", "gate"):
        given["norm"] = by
    if form == "gate":
        given["gate"] = x
    for weight in weights[: 1 if calls == 1 else None]:
        linear(x, weight, **given)
    if calls == 1:
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            linear(x, weights[n % len(weights)], **given)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / (3 * calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    opts = parser.parse_args()
    if opts.only:  # compile for one product, beside others
        outputs, inputs, _ = PRODUCTS[opts.only]
        weight = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)]
        for tile in tiles(opts.rows):
            run(opts.only, opts.rows, tile, 1, weight)
        return
    command = [sys.executable, str(Path(__file__).resolve()), "--rows", str(opts.rows), "--only"]
    for child in [subprocess.Popen([*command, name]) for name in PRODUCTS]:
        child.wait()
    found: dict[str, Any] = {}
    for name, (outputs, inputs, _) in PRODUCTS.items():
        weights = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
        took = {tile: run(name, opts.rows, tile, 24, weights) for tile in tiles(opts.rows)}
        best = sorted(took.items(), key=lambda pair: pair[1])
        size = outputs * inputs * 2
        found[name] = [[t.outputs, t.inputs, t.warps, round(us, 2), round(size / us / 1e6, 2)] for t, us in best]
        plain = torch.randn(opts.rows, inputs, device="cuda", dtype=torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        torch.nn.functional.linear(plain, weights[0])
        with torch.cuda.graph(graph):
            for n in range(24):
                torch.nn.functional.linear(plain, weights[n % COPIES])
        graph.replay()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        library = begin.elapsed_time(end) * 1e3 / 72
        print(
            f"{name:9} library {library:6.2f} us {size / library / 1e6:5.2f} TB/s;", *found[name][:4], found[name][-1]
        )
    if opts.json:
        opts.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
