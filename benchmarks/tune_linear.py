"""Which tile is best for each product of a decoding step on this GPU: where `kernels.linear.TILES` is from.

python benchmarks/tune_linear.py --rows 1 5 16 64 --json tiles.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from statecache.kernels.held import ROWS
from statecache.kernels.linear import FEW_ROWS, Held, Tile, linear

# outputs, inputs, what stands around: those of gpu_shapes
PRODUCTS = {
    "in_proj": (8512, 2048, "norm"),
    "without": (8512, 2048, "alone"),
    "mlp in": (4096, 2048, "norm unit"),
    "out": (2048, 4096, "residual"),
    "wide in": (6144, 2048, "norm unit"),
    "wide out": (2048, 6144, "residual"),
    "square": (2048, 2048, "residual"),
}
COPIES = 6  # of a weight, so that no cache holds it
SHARED = 160 * 1024  # bytes that a program's loads may take


def tiles(rows: int, inputs: int, unit: bool) -> list[Tile | Held]:
    """What may be best. Whether programs of several kernels fit beside each other, no product alone shows."""
    if rows == 1:
        made = [Tile(*t) for t in itertools.product((2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8))]
        return [t for t in made if 2048 <= t.outputs * t.inputs <= min(16384 * 2, 8192 * t.warps)]
    ways = itertools.product((16, 32, 64), (128, 256, 512), (2, 4), (2, 3, 4, 5), (0, 1024), (False, True))
    room = SHARED // (4 if unit else 2)
    made = [Tile(*way) for way in ways]
    found = [t for t in made if 4096 <= t.outputs * t.inputs <= 16384 and t.outputs * t.inputs * t.stages <= room]
    if rows > ROWS:
        return found
    held = [Held(*way) for way in itertools.product((4, 8), (1, 2), (2, 4, 8, 12, 16))]
    chunks = {h: inputs // (32 * h.warps) for h in held}
    return [h for h in held if h.ahead <= chunks[h] and h.ahead * (2 if unit else h.outputs) <= 20] + found


def run(name: str, rows: int, tile: Tile | Held, calls: int, weights: list[Any]) -> float:
    """Microseconds of one product, in a graph of many."""
    outputs, inputs, form = PRODUCTS[name]
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    given: dict[str, Any] = {"unit": "unit" in form, "tile": tile}
    if "norm" in form and rows <= FEW_ROWS:
        given["norm"] = torch.randn(inputs, device="cuda", dtype=torch.bfloat16)
    if "residual" in form:
        given["residual"] = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
    for weight in weights[: 1 if calls == 1 else None]:
        linear(x, weight, **given)
    if calls == 1:
        return 0.0
    return timed(lambda n: linear(x, weights[n % len(weights)], **given), calls)


def timed(call: Any, calls: int) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            call(n)
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(3):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / (3 * calls)


def weights_of(name: str, copies: int) -> list[Any]:
    outputs, inputs, form = PRODUCTS[name]

    def one() -> torch.Tensor:
        return torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)

    return [(one(), one()) if "unit" in form else one() for _ in range(copies)]


def jobs(rows: list[int]) -> list[tuple[str, int, Tile | Held]]:
    return [
        (name, n, tile)
        for n in rows
        for name, (_, inputs, form) in PRODUCTS.items()
        for tile in tiles(n, inputs, "unit" in form)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", type=int, nargs=2, help=argparse.SUPPRESS)
    opts = parser.parse_args()
    if opts.part:  # compile some, beside others
        first, of = opts.part
        for name, rows, tile in jobs(opts.rows)[first::of]:
            try:
                run(name, rows, tile, 1, weights_of(name, 1))
            except Exception as error:
                print(f"{name} {rows} {tile}: {type(error).__name__}: {str(error)[:200]}")
        return
    command, of = [sys.executable, str(Path(__file__).resolve()), "--rows", *map(str, opts.rows)], os.cpu_count() or 1
    for child in [subprocess.Popen([*command, "--part", str(n), str(of)]) for n in range(of)]:
        child.wait()
    found: dict[str, Any] = {}
    for name, (outputs, inputs, form) in PRODUCTS.items():
        weights = weights_of(name, COPIES)
        size = outputs * inputs * (4 if "unit" in form else 2)
        for rows in opts.rows:
            took: dict[Tile | Held, float] = {}
            for tile in tiles(rows, inputs, "unit" in form):
                try:
                    took[tile] = run(name, rows, tile, 24, weights)
                except Exception:  # which the compiling processes have told
                    continue
            best = sorted(took.items(), key=lambda pair: pair[1])
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            plain = [w if isinstance(w, torch.Tensor) else torch.cat(w) for w in weights]
            torch.nn.functional.linear(x, plain[0])
            library = timed(lambda n, x=x, plain=plain: torch.nn.functional.linear(x, plain[n % COPIES]), 24)
            found[f"{name} {rows}"] = told = [[str(t), round(us, 2), round(size / us / 1e6, 2)] for t, us in best]
            print(f"{name:9} {rows:2} library {library:6.2f} us {size / library / 1e6:5.2f} TB/s;", *told[:4])
    if opts.json:
        opts.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
