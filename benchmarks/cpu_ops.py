"""Prepared models beside unprepared ones, on a CPU: prefill and decode, as ratios from one run.

    python benchmarks/cpu_ops.py                       # all of it
    python benchmarks/cpu_ops.py --quick               # every code path, in seconds
    python benchmarks/cpu_ops.py --json result.json --only mamba2

How it measures is in benchmarks/README.md. The exit status is 0 also where a target is missed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import statecache
from shapes import DEEP, build, figure, table, tokens_of, versions
from statecache.cli.measure import cpu_name

CONTEXT = 128  # tokens before decoding
NOISE = 1.05  # of a ratio that ought to be 1 at most, on an idle machine
BASE = "unprepared"
SLACK = 8
WITH_SLACK = tuple(f"{model}, slack {SLACK}" for model in (BASE, "prepared"))
LINEAR = "linear layers"  # alone: what is left of decoding if all else took no time
VARIANTS = (BASE, "DynamicCache", "prepared", *WITH_SLACK, LINEAR)


@dataclass
class Cell:
    """One shape at one piece of work: seconds of every variant, round by round."""

    shape: str
    work: str  # "prefill" or "decode"
    rows: int
    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, variant: str) -> tuple[float, float, float]:
        """Median and quartiles of the rounds' ratios to the unprepared model with the same cache."""
        paired = [a / b for a, b in zip(self.seconds[variant], self.seconds[BASE], strict=True)]
        if len(paired) == 1:
            return paired[0], paired[0], paired[0]
        low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
        return middle, low, high


class Pair:
    """A model as it is and prepared, with caches for either."""

    def __init__(self, shape: str, quick: bool) -> None:
        self.model = build(DEEP[shape], quick)
        self.prepared = statecache.prepare(copy.deepcopy(self.model))
        self.linear = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)]
        self.key = "cache_params" if shape.startswith("mamba") else "past_key_values"

    def reader(self, variant: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """A function that feeds ids (B, T) on top of what it was fed before, and returns the last logits, if any."""
        if variant == LINEAR:
            return self._multiply
        model = self.prepared if variant.startswith("prepared") else self.model
        config = model.config
        if variant == "DynamicCache":
            cache: Any = DynamicCache(config=config)
        else:
            cache = statecache.StateCache(config, slack=SLACK if variant in WITH_SLACK else 0)

        def feed(ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(ids, **{self.key: cache}, use_cache=True, logits_to_keep=1).logits
            return logits

        return feed

    def _multiply(self, ids: torch.Tensor) -> None:
        """Run every linear layer once over as many tokens."""
        for layer in self.linear:
            layer(torch.zeros(*ids.shape, layer.in_features))


def rounds(names: tuple[str, ...], n: int, timed: Callable[[str], float]) -> dict[str, list[float]]:
    """Every variant once in each of n rounds, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(n):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order if turn % 2 == 0 else reversed(order):
            seconds[name].append(timed(name))
    return seconds


@torch.inference_mode()
def decode(shape: str, pair: Pair, rows: int, opts: argparse.Namespace) -> Cell:
    """Single-token forwards after a prompt."""
    ids = tokens_of(pair.model, CONTEXT + 1, rows)
    readers = {name: pair.reader(name) for name in VARIANTS}
    expected = None
    for name, feed in readers.items():
        feed(ids[:, :-1])
        logits = feed(ids[:, -1:])
        if logits is None:
            continue
        expected = logits if expected is None else expected
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    def timed(name: str) -> float:
        feed, token = readers[name], ids[:, :1]
        feed(token)
        began = time.perf_counter()
        for _ in range(opts.tokens):
            feed(token)
        return (time.perf_counter() - began) / opts.tokens

    return Cell(shape, "decode", rows, 1, rounds(VARIANTS, opts.rounds, timed))


@torch.inference_mode()
def prefill(shape: str, pair: Pair, rows: int, tokens: int, opts: argparse.Namespace) -> Cell:
    """One forward over a whole prompt."""
    ids = tokens_of(pair.model, tokens, rows)

    def timed(name: str) -> float:
        feed = pair.reader(name)
        began = time.perf_counter()
        feed(ids)
        return time.perf_counter() - began

    names = (BASE, "prepared", f"prepared, slack {SLACK}")
    first = {name: timed(name) for name in names}  # tells how many rounds there is time for
    whole = sum(first.values())
    if whole > 60:  # warm enough by itself
        return Cell(shape, "prefill", rows, tokens, {name: [seconds] for name, seconds in first.items()})
    n = max(1 if opts.quick else 3, min(opts.rounds, int(opts.seconds / whole)))
    return Cell(shape, "prefill", rows, tokens, rounds(names, n, timed))


def targets(cells: list[Cell]) -> Iterator[tuple[bool, str]]:
    """The lines that must hold, each with the figure."""
    for cell in cells:
        ratio = cell.ratio("prepared")[0]
        where = f"{cell.shape}: {cell.work}, {cell.rows} x {cell.tokens:,}"
        yield ratio <= NOISE, f"{where}: prepared / unprepared {ratio:.3f}, at most {NOISE}"
        if cell.work == "decode" and cell.rows == 1:
            yield 1 / ratio >= 1.2, f"{where}: {1 / ratio:.2f} times faster, at least 1.2"


def report(cells: list[Cell], opts: argparse.Namespace) -> str:
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        f"{names}; {cpu_name()}, {opts.threads} threads{load}; float32.",
        "",
        "Time of the unprepared model with a StateCache; the others as its multiples, median (quartiles) of rounds.",
        f"Decoding stands after {CONTEXT} tokens.",
        "",
        table(
            ["shape", "work", "rows x tokens", "rounds", *VARIANTS],
            [
                [cell.shape, cell.work, f"{cell.rows} x {cell.tokens:,}", str(len(cell.seconds[BASE]))]
                + [f"{statistics.median(cell.seconds[BASE]) * 1e3:,.1f} ms"]
                + [figure(cell.ratio(name) if name in cell.seconds else None) for name in VARIANTS[1:]]
                for cell in cells
            ],
        ),
        "",
        *(f"{'PASS' if holds else 'MISS'}  {line}" for holds, line in targets(cells)),
    ]
    return "\n".join(lines)


def as_json(cells: list[Cell], opts: argparse.Namespace) -> str:
    return json.dumps(
        {
            "versions": versions(),
            "cpu": cpu_name(),
            "threads": opts.threads,
            "cells": [vars(cell) | {"ratios": {name: cell.ratio(name) for name in cell.seconds}} for cell in cells],
            "targets": [{"holds": holds, "line": line} for holds, line in targets(cells)],
        },
        indent=1,
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight layers, short prompts, few rounds")
    parser.add_argument("--only", action="append", choices=list(DEEP), help="this shape; may be given again")
    parser.add_argument("--work", choices=["decode", "prefill"], help="this alone")
    parser.add_argument("--rounds", type=int, help="at most; prefills that take long get fewer, at least three")
    parser.add_argument("--tokens", type=int, default=8, help="timed tokens of each variant in a round of decoding")
    parser.add_argument("--seconds", type=float, default=12, help="for one cell of prefill, about")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    opts = parser.parse_args()
    opts.rounds = opts.rounds or (2 if opts.quick else 24)
    opts.prompts = [16, 96] if opts.quick else [512, 4096]
    return opts


def main() -> None:
    opts = options()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(opts.threads)
    began, cells = time.perf_counter(), []
    for shape in opts.only or DEEP:
        pair = Pair(shape, opts.quick)
        for rows in (1, 8):
            if opts.work != "prefill":
                cells.append(decode(shape, pair, rows, opts))
            if opts.work != "decode":
                cells += [prefill(shape, pair, rows, tokens, opts) for tokens in opts.prompts]
            print(f"{shape} x {rows}: {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    print(report(cells, opts))
    print(f"\nTook {time.perf_counter() - began:.0f} s.")
    if opts.json:
        opts.json.write_text(as_json(cells, opts) + "\n")


if __name__ == "__main__":
    main()
