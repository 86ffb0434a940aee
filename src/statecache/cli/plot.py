"""`statecache plan --plot`: bytes over the length of a row, beside a model of attention alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.report import human_bytes
from statecache.models.plan import MOST
from statecache.models.table import attention, model_spec
from statecache.spec import LayerSpec, ModelSpec

SUFFIXES = (".svg", ".png")
SHORTEST, LONGEST = 1 << 8, 1 << 17  # tokens, unless the plan has more


def check_plot(path: Path) -> None:
    """Raise CommandError where nothing could be drawn there."""
    if path.suffix.lower() not in SUFFIXES:
        raise CommandError(f"--plot {path}: give a name that ends in {' or '.join(SUFFIXES)}", 2)
    if not path.parent.is_dir():
        raise CommandError(f"--plot {path}: there is no folder {path.parent}: make it first", 2)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError("--plot needs matplotlib: pip install 'statecache[plot]', or leave it out") from error


def curves(config: Any, plan: sc.Plan, options: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Lengths, and at each the bytes of the planned rows, and of as many in a model of attention alone."""
    first = max(SHORTEST, plan.slack)
    last = LONGEST if plan.capacity in (None, MOST) else plan.capacity or 0
    lengths = list(_doublings(first, max(last, 2 * first)))
    left = ("rows", "capacity", "lengths", "budget", "device", "weights")
    given = {name: x for name, x in options.items() if name not in left}
    ours = [sc.plan(config, rows=plan.rows, lengths=(0, n), **given).states.total for n in lengths]
    alone = attention_alone(model_spec(config), config.get_text_config(decoder=True).hidden_size)
    theirs = [plan.rows * _bytes(alone, n, plan.dtype) for n in lengths]
    return lengths, ours, theirs


def attention_alone(spec: ModelSpec, width: int) -> ModelSpec:
    """The same model if every layer with a state attended to all tokens.

    As wide as the widest of its layers with attention; where there are none, keys and values are of the model's width.
    """
    pairs = [
        (s["key"].shape, s["value"].shape) for s in ({x.name: x for x in n.states} for n in spec.layers) if "key" in s
    ]
    sizes = [(k[0], k[1], v[1]) for k, v in pairs if k and v] or [(1, width, width)]
    heads, key, value = max(sizes, key=lambda size: size[0] * (size[1] + size[2]))
    layers = [n for n in spec.layers if n.states]
    return ModelSpec(tuple(LayerSpec(i, "full_attention", attention(heads, key, value)) for i, _ in enumerate(layers)))


def draw_plan(path: Path, config: Any, plan: sc.Plan, options: dict[str, Any]) -> None:
    """Draw bytes over the length of a row. Raises CommandError where the file cannot be written."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lengths, ours, theirs = curves(config, plan, options)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, theirs, label="attention alone", color="0.55")
    axes.plot(lengths, ours, label=plan.model)
    if plan.budget is not None:
        axes.axhline(plan.budget - (plan.total - plan.states.total), label="budget", color="black", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: human_bytes(int(n))))
    axes.set_xlabel("tokens in each row")
    axes.set_title(f"States of {plan.rows:,} row{'s' * (plan.rows > 1)}, {str(plan.dtype).removeprefix('torch.')}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise CommandError(f"--plot {path}: {error.strerror}") from error


def _doublings(first: int, last: int) -> Iterator[int]:
    while first < last:
        yield first
        first *= 2
    yield last


def _bytes(spec: ModelSpec, capacity: int, dtype: torch.dtype) -> int:
    return sc.States(spec, rows=1, capacity=capacity, dtype=dtype, device="meta").nbytes().total
