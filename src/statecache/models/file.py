"""A cache as a file: its rows as values, in one safetensors file with a description. See docs/format.md.

n entries of a row, *D the shape of one entry, as in `Snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from statecache.errors import FileError
from statecache.snapshot import Snapshot
from statecache.spec import StateSpec, as_dtype

FORMAT = 1
POINT = "p"  # before the number of a point, where tensors have that of a row
AXES = {  # what the axes of an entry are, by kind of state and how many there are
    ("attention", 2): ("heads", "head size"),
    ("sliding", 2): ("heads", "head size"),
    ("attention", 1): ("size",),
    ("conv", 0): (),
    ("conv", 1): ("channels",),
    ("recurrent", 1): ("channels",),
    ("recurrent", 2): ("channels", "state size"),
    ("recurrent", 3): ("heads", "head size", "state size"),
    ("position", 1): ("size",),
}


@dataclass(frozen=True)
class Described:
    """What a file says of itself, checked against its own digest.

    states: by name, what each is; rows: of each its length, where its rotary factors stand, and perhaps its token ids.
    fingerprint: of the model's weights; None where nobody knew them. points: of each the row that it is of, its length,
    and where its rotary factors stand. session: what a conversation is beside its states, None in any other file.
    """

    model: str
    made_for: str
    fingerprint: str | None
    rows: list[dict[str, Any]]
    states: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Any]]
    points: list[dict[str, Any]] = field(default_factory=list)
    session: dict[str, Any] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has taken in."""
        return [row["length"] for row in self.rows]

    def specs(self) -> dict[str, StateSpec]:
        """What each state is, as the cache declared it."""
        found = {}
        for name, state in self.states.items():
            told = {key: value for key, value in state.items() if key != "axes"}
            shape = None if told["shape"] is None else tuple(told["shape"])
            told["blocks"] = tuple(map(tuple, told.get("blocks", ())))
            found[name] = StateSpec(**{**told, "shape": shape, "dtype": told["dtype"] and as_dtype(told["dtype"])})
        return found


# ---- writing


def write(
    path: str | os.PathLike[str],
    snapshots: Sequence[Snapshot],
    specs: Mapping[str, StateSpec],
    *,
    model: str,
    made_for: str,
    fingerprint: str | None,
    points: Sequence[tuple[int, Snapshot]] = (),
    session: Mapping[str, Any] | None = None,
) -> None:
    """Write rows to a file, which is there whole or, until it is, as it was before.

    points: of rows, by number, where these stood before; session: what else there is to a conversation, as JSON.
    Raises OSError where it cannot be written; what was at `path` is there then.
    """
    held = [(str(n), s) for n, s in enumerate(snapshots)] + [(f"{POINT}{n}", s) for n, (_, s) in enumerate(points)]
    entries = {f"{place}/{name}": e.cpu().contiguous() for place, s in held for name, e in s.entries.items()}
    sums = _checksums(entries)
    described = Described(
        model,
        made_for,
        fingerprint,
        [
            {"length": s.length, "rotated": s.rotated, "tokens": None if s.tokens is None else list(s.tokens)}
            for s in snapshots
        ],
        {name: _described(spec) for name, spec in specs.items() if any(name in s.entries for s in snapshots)},
        {
            name: {"dtype": _name(e.dtype), "shape": list(e.shape), "checksum": sums[name]}
            for name, e in entries.items()
        },
        [{"row": row, "length": s.length, "rotated": s.rotated} for row, s in points],
        None if session is None else dict(session),
    )
    told = {"format": FORMAT, **asdict(described)}
    if session is None:  # a file of rows alone, as it always was
        del told["points"], told["session"]
    text = json.dumps(told, sort_keys=True)
    metadata = {"statecache": text, "digest": hashlib.sha256(text.encode()).hexdigest()}
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)
    mode = (target if target.exists() else temporary).stat().st_mode  # as other programs write files
    try:
        save_file(entries, temporary, metadata)
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # that is how it says that the disk is full
            raise OSError(str(error)) from error
        raise
    _sync(target.parent)


def _described(spec: StateSpec) -> dict[str, Any]:
    """What a state is, whatever form a cache keeps it in: inputs token by token, and recurrences without logs."""
    if spec.kind == "conv" and spec.leased and spec.shape is not None:
        spec = replace(spec, shape=spec.shape[:-1], window=spec.shape[-1], axis=1, leased=False)
    spec = replace(spec, logged=False)
    told = asdict(spec)
    if spec.dtype is not None:
        told["dtype"] = _name(spec.dtype)
    if not spec.blocks:  # channels that stand each for itself
        del told["blocks"]
    told["axes"] = None if spec.shape is None else AXES.get((spec.kind, len(spec.shape)))
    return told


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sync(path: str | os.PathLike[str]) -> None:
    """Have the disk hold it: a file's content, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading


def describe(path: str | os.PathLike[str]) -> Described:
    """What a file says of itself. Reads no tensor. Raises FileError for one that is damaged or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            text = metadata.get("statecache")
            if text is None:
                raise FileError(f"{path} is a safetensors file of something else: statecache did not write it")
            if hashlib.sha256(text.encode()).hexdigest() != metadata.get("digest"):
                raise _damaged(path, "its description is not what was written")
            told = json.loads(text)
            if told.pop("format", None) != FORMAT:
                raise FileError(f"{path} is of another format than {FORMAT}: read it with the statecache that wrote it")
            described = Described(**told)
            if set(described.tensors) != names:
                raise _damaged(path, "it has other tensors than it says")
            _check_forms(path, described)
            return described
    except FileNotFoundError as error:
        raise FileError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise _damaged(path, f"its description makes no sense ({error})") from error


def _check_forms(path: object, described: Described) -> None:
    """Whether every state of every row has as many entries as its length and window say, of the shape that it says."""
    specs = described.specs()
    for point in described.points:
        if not 0 <= point["length"] <= described.rows[point["row"]]["length"]:
            raise _damaged(path, f"a point of {point['length']} tokens is not of row {point['row']}")
    for name, told in described.tensors.items():
        place, _, state = name.partition("/")
        of_point = place.startswith(POINT)
        spec, held = specs[state], described.points if of_point else described.rows
        length = held[int(place.removeprefix(POINT))]["length"]
        if of_point and spec.window is None:
            raise _damaged(path, f"{name} belongs to a row, and not to a point")
        n = 1 if spec.leased else length if spec.window is None else min(length, spec.window)
        if told["shape"] != [n, *(spec.shape or ())]:
            raise _damaged(path, f"{name} has {told['shape']} entries, and its row {length} tokens")


def read(path: str | os.PathLike[str], described: Described) -> list[Snapshot]:
    """The rows of a file, each of their tensors checked. Raises FileError for one that is damaged."""
    return [
        Snapshot(
            row["length"],
            held,
            described.made_for,
            None if row["tokens"] is None else tuple(row["tokens"]),
            row["rotated"],
        )
        for row, held in zip(described.rows, _entries(path, described, "", len(described.rows)), strict=True)
    ]


def read_points(path: str | os.PathLike[str], described: Described) -> list[Snapshot]:
    """Where the rows of a file stood before, each tensor checked. Raises FileError for one that is damaged."""
    return [
        Snapshot(point["length"], held, described.made_for, rotated=point["rotated"], point=True)
        for point, held in zip(described.points, _entries(path, described, POINT, len(described.points)), strict=True)
    ]


def _entries(path: object, described: Described, kind: str, n: int) -> list[dict[str, Tensor]]:
    """By number, the states of rows, or of points. kind: what their tensors' names begin with."""
    entries: list[dict[str, Tensor]] = [{} for _ in range(n)]
    try:
        with safe_open(path, "pt") as file:
            found = {n: file.get_tensor(n) for n in described.tensors if n.startswith(POINT) == bool(kind)}
            for name, tensor in found.items():
                told = described.tensors[name]
                if (_name(tensor.dtype), list(tensor.shape)) != (told["dtype"], told["shape"]):
                    raise _damaged(path, f"{name} is of another form than it says")
            for name, found_sum in _checksums(found).items():
                if found_sum != described.tensors[name]["checksum"]:
                    raise _damaged(path, f"{name} is not what was written")
            for name, tensor in found.items():
                place, _, state = name.partition("/")
                entries[int(place.removeprefix(kind))][state] = tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    return entries


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each, on as many threads as there are processors: zlib lets go of Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return dict(zip(tensors, threads.map(checksum, tensors.values()), strict=True))


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a contiguous tensor's bytes, in hexadecimal."""
    return f"{zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data) if tensor.numel() else 0:08x}"


def _damaged(path: object, why: str) -> FileError:
    return FileError(f"{path} is damaged: {why}; take an older copy of it")
