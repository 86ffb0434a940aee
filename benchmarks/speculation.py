"""Speculative decoding of the embedded pair, on a CPU: tokens of a forward pass, and time as ratios to plain decoding.

    python benchmarks/speculation.py                   # all of it
    python benchmarks/speculation.py --quick           # every code path, in seconds
    python benchmarks/speculation.py --json result.json --only repeats

Stories are gone on with freely; repeats are texts whose prompt says a passage several times. "k drafts" has a fixed
length, instead of one that follows what was accepted. Drafted greedy text must equal plain text, or the run stops.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc
import statecache.tiny
from shapes import figure, table, versions
from statecache.cli.measure import cpu_name
from statecache.decode.draft_length import DraftLength
from statecache.decode.report import Report

TINY = Path(statecache.tiny.__file__).parent
BASE = "plain"

STORIES = (
    "Once upon a time there was a miller who had three sons, and when he grew old he called them to his bed and said:",
    "The fox had not eaten for two days. He came to the edge of the wood, saw the farm, and thought about the hens.",
    '"Where did you put the key?" asked the old woman. Her daughter looked under the table and then behind the stove.',
    "When the snow began to fall the children ran to the river, for they wished to see if the ice would bear them.",
)
PASSAGES = (
    "The goat went up the hill, and over the bridge, and down to the mill, and the miller said: come in, come in. ",
    "One for the king, two for the queen, three for the boy on the village green; four for the cat, five for the hen. ",
    "Run, run, little wheel, run to the door, run to the gate, run to the sea, and bring the sailor home to me. ",
)
PROMPTS = {"stories": STORIES, "repeats": tuple(passage * 4 + passage[:30] for passage in PASSAGES)}
DRAWS: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.8, "top_p": 0.95}}


@dataclass
class Cell:
    """One kind of text, drawn in one way: seconds of every variant, round by round, and what its drafts gave."""

    text: str
    draw: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    reports: dict[str, list[Report]] = field(default_factory=dict)

    def ratio(self, variant: str) -> tuple[float, float, float]:
        """Median and quartiles of the rounds' times for a token, over those of plain decoding."""
        paired = [a / b for a, b in zip(self.per_token(variant), self.per_token(BASE), strict=True)]
        if len(paired) == 1:
            return paired[0], paired[0], paired[0]
        low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
        return middle, low, high

    def per_token(self, variant: str) -> list[float]:
        pairs = zip(self.seconds[variant], self.reports[variant], strict=True)
        return [seconds / report.tokens for seconds, report in pairs]

    def sums(self, variant: str) -> dict[str, float]:
        """Over all rounds."""
        reports = self.reports[variant]
        tokens, turns, drafted, accepted, rounds = (
            sum(getattr(r, name) for r in reports) for name in ("tokens", "turns", "drafted", "accepted", "rounds")
        )
        return {
            "tokens_per_forward": tokens / turns,
            "acceptance": accepted / max(drafted, 1),
            "accepted_per_round": accepted / max(rounds, 1),
        }


@contextmanager
def fixed(length: int | None) -> Iterator[None]:
    """Always draft this many tokens, if not None."""
    follows = DraftLength.length
    if length is not None:
        DraftLength.length = lambda drafts: min(length, drafts.most)  # type: ignore[method-assign]
    try:
        yield
    finally:
        DraftLength.length = follows  # type: ignore[method-assign]


def variants(draft: Any, lengths: list[int]) -> dict[str, tuple[dict[str, Any], int | None]]:
    """The options of `generate`, and the fixed draft length."""
    given: dict[str, tuple[dict[str, Any], int | None]] = {
        BASE: ({}, None),
        "lookup 2": ({"lookup": 2}, None),
        "lookup 3": ({"lookup": 3}, None),
        "draft": ({"assistant": draft}, None),
    }
    return given | {f"draft, {k} drafts": ({"assistant": draft}, k) for k in lengths}


def measure(text: str, draw: str, model: Any, tokenizer: Any, ways: Any, opts: argparse.Namespace) -> Cell:
    """Go on with every prompt, every variant in each round, in changing order."""
    cell = Cell(text, draw, {name: [] for name in ways}, {name: [] for name in ways})
    prompts = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[text]]

    def run(name: str, seed: int, told: Callable[[Report], object], prompt: Any) -> Any:
        options, length = ways[name]
        with fixed(length):
            return sc.generate(
                model, prompt, max_new_tokens=opts.tokens, seed=seed, report=told, **DRAWS[draw], **options
            )

    for prompt in prompts:  # untimed
        want = run(BASE, 0, lambda _: None, prompt)
        for name in ways:
            got = run(name, 0, lambda _: None, prompt)
            assert draw != "greedy" or torch.equal(got, want), f"{name} changes the text: {tokenizer.decode(got)}"
    names = list(ways)
    for turn in range(opts.rounds):
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn % 2 == 0 else reversed(order):
            reports: list[Report] = []
            began = time.perf_counter()
            for prompt in prompts:
                run(name, turn, reports.append, prompt)
            cell.seconds[name].append(time.perf_counter() - began)
            total = {f: sum(getattr(r, f) for r in reports) for f in Report.__dataclass_fields__}
            cell.reports[name].append(Report(**total))
    return cell


def report(cells: list[Cell], ways: Any, opts: argparse.Namespace) -> str:
    load = f", load average {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = []
    for cell in cells:
        for name in ways:
            sums, rate = cell.sums(name), 1 / statistics.median(cell.per_token(name))
            drafted = name != BASE
            gain = [f"{sums['tokens_per_forward']:.2f}", f"{sums['acceptance']:.0%}" if drafted else "-"]
            rows.append([cell.text, cell.draw, name, *gain, f"{rate:.1f}", figure(cell.ratio(name))])
    how = f"{opts.rounds} rounds of {opts.tokens} new tokens for each prompt. Time for a token, over that of plain "
    how += "decoding: median of paired rounds (quartiles)."
    return "\n".join(
        [
            f"{names}; {cpu_name()}, {opts.threads} threads{load}; float32, batch 1.",
            "",
            how,
            "",
            table(["text", "tokens are", "variant", "tokens per forward", "accepted", "tokens/s", "time"], rows),
        ]
    )


def as_json(cells: list[Cell], ways: Any, opts: argparse.Namespace) -> str:
    return json.dumps(
        {
            "versions": versions(),
            "cpu": cpu_name(),
            "threads": opts.threads,
            "rounds": opts.rounds,
            "tokens": opts.tokens,
            "cells": [
                {
                    "text": cell.text,
                    "draw": cell.draw,
                    "variant": name,
                    **cell.sums(name),
                    "tokens_per_second": 1 / statistics.median(cell.per_token(name)),
                    "time_to_plain": cell.ratio(name),
                    "seconds": cell.seconds[name],
                    "reports": [vars(r) for r in cell.reports[name]],
                }
                for cell in cells
                for name in ways
            ],
        },
        indent=1,
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, few rounds")
    parser.add_argument("--only", action="append", choices=list(PROMPTS), help="this kind of text")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int, help="new tokens for each prompt")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2, 4, 8], help="fixed draft lengths")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    opts = parser.parse_args()
    opts.rounds = opts.rounds or (1 if opts.quick else 12)
    opts.tokens = opts.tokens or (12 if opts.quick else 120)
    return opts


def main() -> None:
    opts = options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(opts.threads)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "story")
    model, draft = (
        sc.prepare(AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval())
        for name in ("story", "draft")
    )
    ways = variants(draft, opts.lengths)
    began, cells = time.perf_counter(), []
    for text in opts.only or PROMPTS:
        for draw in DRAWS:
            cells.append(measure(text, draw, model, tokenizer, ways, opts))
            print(f"{text}, {draw}: {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    print(report(cells, ways, opts))
    print(f"\nTook {time.perf_counter() - began:.0f} s.")
    if opts.json:
        opts.json.write_text(as_json(cells, ways, opts) + "\n")


if __name__ == "__main__":
    main()
