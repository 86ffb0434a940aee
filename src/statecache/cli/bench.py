"""`statecache bench`: what a cache costs in one model on this machine, beside transformers' own."""

import json as json_format
import statistics
import sys
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.measure import Ratio, Timing, cpu_name, measure, ratio
from statecache.cli.model import Settings, load_model
from statecache.cli.report import human_bytes, spinner

NOISE = "~: the middle half of the rounds lies on both sides of 1, which is noise."


def bench_command(settings: Settings, prompt: int, rows: int, rounds: int, *, json: bool) -> None:
    """Print rates and bytes of each way to keep `rows` texts of `prompt` tokens and the settings' new ones.

    Raises CommandError where no way runs.
    """
    model, new = load_model(settings, show=not json), settings.max_new_tokens
    draw = torch.Generator().manual_seed(settings.seed or 0)
    words = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(1, words, (rows, prompt + new), generator=draw).to(model.device)
    with spinner(f"{rounds} rounds of {prompt} and {new} tokens", show=not json):
        timings = measure(model, ids, new, rounds)
    if all(timing.why for timing in timings):
        raise CommandError(f"this model runs with no cache at all: {timings[0].why}")
    base = next(timing for timing in timings if timing.why is None)
    report: dict[str, Any] = {
        "model": settings.model or "embedded",
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (sc, torch, transformers)},
        "settings": {"prompt_tokens": prompt, "new_tokens": new, "rows": rows, "rounds": rounds},
        "beside": base.way.name,
        "caches": [_figures(timing, base, rows * prompt, rows * new) for timing in timings],
    }
    if json:
        print(json_format.dumps(report))
    else:
        _show(report)


def _figures(timing: Timing, base: Timing, prompt: int, new: int) -> dict[str, Any]:
    """What is told of one way, `prompt` and `new` being the tokens of all rows."""
    told: dict[str, Any] = {"cache": timing.way.name, "prepared": timing.way.prepared, "why": timing.why}
    if timing.why is not None:
        return told
    for name, tokens in (("prefill", prompt), ("decode", new)):
        seconds: list[float] = getattr(timing, name)
        beside = None if timing is base else ratio(seconds, getattr(base, name))
        told[name] = {
            "tokens_per_second": round(tokens / statistics.median(seconds), 2),
            "seconds": [round(x, 6) for x in seconds],
            "beside": None if beside is None else _rounded(beside),
        }
    return {**told, "bytes": timing.nbytes}


def _rounded(x: Ratio) -> dict[str, Any]:
    return {"median": round(x.median, 4), "low": round(x.low, 4), "high": round(x.high, 4), "noise": x.noise}


def _show(report: dict[str, Any]) -> None:
    screen = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    threads = f", {report['threads']} thread{'s' * (report['threads'] > 1)}" if report["device"] == "cpu" else ""
    screen.print(f"{report['model_type']}, {report['dtype']}; {report['machine']}{threads}; {versions}")
    asked = report["settings"]
    each = f"{asked['rows']} row{'s' * (asked['rows'] > 1)} of {asked['prompt_tokens']:,} tokens"
    screen.print(f"{each} at once and {asked['new_tokens']:,} one by one, medians of {asked['rounds']} rounds:\n")
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("cache", no_wrap=True)
    for name in ("prefill, tokens/s", "time beside", "decode, tokens/s", "time beside", "bytes"):
        table.add_column(name, justify="right")
    for told in report["caches"]:
        if told["why"] is None:
            rates = [x for name in ("prefill", "decode") for x in _cells(told[name])]
            table.add_row(told["cache"], *rates, human_bytes(told["bytes"]))
        else:
            table.add_row(told["cache"], "-", "-", "-", "-", "-")
    screen.print(table)
    for told in report["caches"]:
        if told["why"] is not None:
            screen.print(f"\n{told['cache']}: {told['why']}")
    beside = f"Time beside {report['beside']}, round by round: the median, and the middle half of the rounds."
    screen.print(f"\n{beside} {NOISE}")


def _cells(told: dict[str, Any]) -> tuple[str, str]:
    beside = told["beside"]
    if beside is None:
        return f"{told['tokens_per_second']:,.1f}", "1"
    about = "~" if beside["noise"] else ""
    figures = f"{about}{beside['median']:.2f} ({beside['low']:.2f}-{beside['high']:.2f})"
    return f"{told['tokens_per_second']:,.1f}", figures
