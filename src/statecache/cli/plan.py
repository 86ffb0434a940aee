"""`statecache plan`: what a cache will take, and how much of it fits."""

import json as json_format
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

import statecache as sc
from statecache.cli.model import load_config
from statecache.cli.report import KIND_NAMES, human_bytes
from statecache.models.plan import MOST


def plan_command(model: str | None, options: dict[str, Any], plot: Path | None, *, json: bool) -> None:
    """Print what a cache takes, and draw it over the length of a row. Exit status 1 where it does not fit."""
    if plot is not None:
        from statecache.cli.plot import check_plot

        check_plot(plot)
    config = load_config(model)
    plan = sc.plan(config, **options)
    if plot is not None:
        from statecache.cli.plot import draw_plan

        draw_plan(plot, config, plan, options)
    if json:
        print(json_format.dumps(_report(model, plan)))
    else:
        screen = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        screen.print(_shown(plan))
        if plot is not None:
            screen.print(f"drawn: {plot}")
    if not plan.fits:
        raise typer.Exit(1)


def _report(model: str | None, plan: sc.Plan) -> dict[str, Any]:
    def by_kind(sizes: Any) -> dict[str, int]:
        return {**sizes.by_kind, "total": sizes.total}

    return {
        "model": model or "embedded",
        "model_type": plan.model,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "rows": plan.rows,
        "capacity": None if plan.capacity == MOST else plan.capacity,
        "lengths": plan.lengths,
        "slack": plan.slack,
        "bytes": by_kind(plan.states),
        "bytes_per_row": by_kind(plan.per_row),
        "bytes_per_token": by_kind(plan.per_token),
        "checkpoints": plan.checkpoints,
        "bytes_per_checkpoint": plan.checkpoint,
        "weights": plan.weights,
        "total": plan.total,
        "budget": plan.budget,
        "fits": plan.fits,
    }


def _shown(plan: sc.Plan) -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "all rows", "a row", "a token"):
        table.add_column(name, justify="right" if name else "left")
    for kind, n in plan.states.by_kind.items():
        if n:
            table.add_row(
                KIND_NAMES.get(kind, kind), *map(_size, (n, _of(plan.per_row, kind), _of(plan.per_token, kind)))
            )
    table.add_section()
    table.add_row(
        "all states", *map(_size, (plan.states.total, plan.per_row.total, plan.per_token.total)), style="bold"
    )
    if plan.checkpoints:
        table.add_row(
            f"{plan.checkpoints} checkpoint{'s' * (plan.checkpoints > 1)}", _size(plan.checkpoints * plan.checkpoint)
        )
    if plan.weights is not None:
        table.add_row("weights", _size(plan.weights))
    if plan.checkpoints or plan.weights is not None:
        table.add_row("together", _size(plan.total), style="bold")
    return Group(_title(plan), table, *map(Text, _remarks(plan)))


def _of(sizes: Any, kind: str) -> int:
    return int(sizes.by_kind[kind])


def _title(plan: sc.Plan) -> Text:
    rows = f"{plan.rows:,} row{'s' * (plan.rows > 1)}"
    if plan.capacity == MOST:
        room = "of any length"
    elif plan.capacity is not None:
        room = f"of {plan.capacity:,} tokens"
    else:
        room = f"grown to {max(plan.lengths):,} tokens" if plan.lengths else "before the first token"
    slack = f", slack {plan.slack}" if plan.slack else ""
    return Text(f"{plan.model}, {str(plan.dtype).removeprefix('torch.')}: {rows} {room}{slack}", style="bold")


def _remarks(plan: sc.Plan) -> list[str]:
    said = [] if plan.checkpoints else [f"A checkpoint of all rows would take {human_bytes(plan.checkpoint)}."]
    if plan.budget is not None:
        left = plan.budget - plan.total
        of = f"of {human_bytes(plan.budget)}"
        said.append(
            f"It fits: {human_bytes(left)} {of} are left."
            if plan.fits
            else f"It does not fit: {human_bytes(-left)} more than the {human_bytes(plan.budget)} there are."
        )
    return said


def _size(n: int) -> str:
    return human_bytes(n) if n else ""
