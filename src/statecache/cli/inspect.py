"""`statecache inspect`: what a model's cache is made of, and what a saved one holds."""

import json as json_format
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import statecache as sc
from statecache.cli.model import load_config
from statecache.cli.report import byte_rows, human_bytes, two_columns
from statecache.models.file import Described, describe, read, read_points
from statecache.models.table import model_spec, shares_last
from statecache.spec import LayerSpec, ModelSpec, StateSpec


def inspect_command(model: str | None, rows: int, length: int, dtype: str | None, *, json: bool) -> None:
    """Print a table of the states of every layer, and what rows x length of them take."""
    config = load_config(model).get_text_config(decoder=True)
    kept_in = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    spec = model_spec(config)
    known = all(state.shape is not None for _, state in spec.states()) and not any(x.open for x in spec.layers)
    room: dict[str, Any] = {"lengths" if shares_last(config) else "capacity": length}
    sizes = sc.plan(config, rows=rows, dtype=kept_in, **room).states if known else None
    if json:
        report = {
            "model": model or "embedded",
            "model_type": spec.model,
            "dtype": _name(kept_in),
            "layers": [
                {"layer": x.index, "kind": x.kind, "states": [_state(s, kept_in) for s in x.states]}
                for x in spec.layers
            ],
            "rows": rows,
            "length": length,
            "bytes": None if sizes is None else {**sizes.by_kind, "total": sizes.total},
        }
        print(json_format.dumps(report))
        return
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    screen.print(_table(spec, kept_in))
    if sizes is None:
        screen.print("Some shapes are unknown until the model first writes them, so there are no totals.")
    else:
        screen.print(f"{rows} row{'s' * (rows > 1)} of {length:,} tokens:")
        screen.print(two_columns(byte_rows(sizes.by_kind, sizes.total)))


def inspect_file(path: Path, *, json: bool) -> None:
    """Print what a saved cache holds, every checksum compared. Raises FileError for one that is damaged."""
    described = describe(path)
    by_kind: Counter[str] = Counter()
    for snapshot in read(path, described) + read_points(path, described):
        for name, entries in snapshot.entries.items():
            by_kind[described.states[name]["kind"]] += entries.nbytes
    talk = _session(described)
    report = {
        "file": str(path),
        "model_type": described.model,
        "weights": described.fingerprint,
        "rows": [{"length": row["length"], "tokens": row["tokens"] is not None} for row in described.rows],
        "bytes": {**by_kind, "total": by_kind.total()},
        "checksums": "right",
        "session": talk,
    }
    if json:
        print(json_format.dumps(report))
        return
    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    weights = "unverified" if described.fingerprint is None else described.fingerprint[:16]
    lengths = ", ".join(f"{length:,}" for length in described.lengths) or "none"
    said = [("model", described.model), ("weights", weights), ("tokens of its rows", lengths)]
    if talk is not None:
        back = ", ".join(f"{length:,}" for length in talk["points"]) or "none"
        said += [
            ("conversation with", f"{talk['model']}, {talk['dtype']}"),
            ("its system message", talk["system"] or "none"),
            ("its tokens", f"{talk['tokens']:,}"),
            ("its turns", str(len(talk["turns"]))),
            ("goes back to tokens", back),
        ]
    screen.print(two_columns([*said, *byte_rows(by_kind, by_kind.total()), ("checksums", "right")]))


def _session(described: Described) -> dict[str, Any] | None:
    """What a conversation is beside its rows."""
    told = described.session
    if told is None:
        return None
    return {
        **{name: told.get(name) for name in ("model", "dtype", "system")},
        "tokens": sum(described.lengths) + len(told.get("unread", ())),
        "turns": [turn.get("line") for turn in told.get("turns", ())],
        "points": [point["length"] for point in described.points],
    }


def _state(state: StateSpec, model: torch.dtype) -> dict[str, Any]:
    entry = None if state.shape is None else state.entry_bytes(model)
    everything = state.window is None
    return {
        "name": state.name,
        "kind": state.kind,
        "window": state.window,
        "shape": state.shape,
        "dtype": _name(state.dtype_for(model)),
        "bytes_per_row": None if entry is None else 0 if state.window is None else state.window * entry,
        "bytes_per_token": None if entry is None else entry if everything else 0,
    }


def _table(spec: ModelSpec, dtype: torch.dtype) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), title=f"{spec.model}, {_name(dtype)}", title_justify="left")
    for name in ("layers", "kind", "state", "window", "entry", "dtype", "per row", "per token"):
        table.add_column(name, justify="right" if name in ("window", "per row", "per token") else "left")
    alike: dict[LayerSpec, list[int]] = {}
    for layer in spec.layers:
        alike.setdefault(replace(layer, index=0), []).append(layer.index)
    for layer, indices in alike.items():
        head = (f"{_runs(indices)} ({len(indices)})", layer.kind)
        for state in layer.states:
            x = _state(state, dtype)
            entry = "?" if x["shape"] is None else "x".join(map(str, x["shape"]))
            window = "all" if state.window is None else str(state.window)
            fixed, growing = _bytes(x["bytes_per_row"]), _bytes(x["bytes_per_token"])
            table.add_row(*head, state.name, window, entry, x["dtype"], fixed, growing)
            head = ("", "")
        if not layer.states:
            table.add_row(*head, "known at the first write" if layer.open else "none")
    return table


def _runs(indices: list[int]) -> str:
    """[0, 1, 2, 4] -> 0-2, 4."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _bytes(n: int | None) -> str:
    return "?" if n is None else human_bytes(n) if n else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
