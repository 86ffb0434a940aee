"""A cache as a file: its rows as values, in one safetensors file with a description. See docs/format.md.

n entries of a row, *D the shape of one entry, as in `Snapshot`.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from statecache.errors import FileError, RowsError
from statecache.models import layout
from statecache.snapshot import Snapshot
from statecache.spec import StateSpec, as_dtype
from statecache.states import States
from statecache.storage import at_rest
from statecache.storage.coded import BITS

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

    states: by name, what each is; rows: of each its length, where its rotary factors stand, and perhaps its token
    ids and a digest of them.
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

    def check_begins(self, path: object, tokens: Sequence[Sequence[int]]) -> None:
        """Raise FileError where the ids of a row are not what those given for it begin with, or nobody knows them."""
        if len(tokens) != len(self.rows):
            raise RowsError(f"tokens= has {len(tokens)} rows, and {path} {len(self.rows)}: give ids for each row")
        for n, (row, ids) in enumerate(zip(self.rows, tokens, strict=True)):
            held, told = row["length"], row.get("digest")  # files of before have ids alone
            if told is None and row["tokens"] is not None:
                told = digest(row["tokens"])
            if told is None:
                raise FileError(f"{path} does not say which tokens row {n} holds: save it with tokens=")
            if digest(ids[:held]) != told:
                raise FileError(
                    f"{path} holds {held} tokens in row {n}, and the {len(ids)} given for it do not begin with those: "
                    "read them into a new cache"
                )

    def dtypes(self, row: int) -> dict[str, torch.dtype]:
        """Of each state that a row has, the dtype in which it is written."""
        held = ((name.partition("/"), tensor) for name, tensor in self.tensors.items())
        return {state: as_dtype(tensor["dtype"]) for (place, _, state), tensor in held if place == str(row)}

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
    states: States,
    tokens: Sequence[Sequence[int]] | None = None,
    *,
    fingerprint: str | None,
    keep_tokens: bool = True,
    recurrent_store: str | None = None,
    points: Sequence[tuple[int, Snapshot]] = (),
    session: Mapping[str, Any] | None = None,
) -> None:
    """Write all rows of a cache to a file, which is there whole or, until it is, as it was before.

    tokens: the ids that each row holds, of which without `keep_tokens` only a digest is written; points: of rows, by
    number, where these stood before; session: what else there is to a conversation, as JSON. recurrent_store: of
    recurrent states, "int8" or None for what they are.
    Raises RowsError for other numbers of tokens, StepError in a round, and OSError where it cannot be written; what was
    at `path` is there then.
    """
    rows = states.rows or 0
    if tokens is not None and len(tokens) != rows:
        raise RowsError(f"tokens= has {len(tokens)} rows, and the cache {rows}: give the ids of each row")
    if not rows:
        states.check_whole()
    ids = [None] * rows if tokens is None else tokens
    snapshots, specs = [states.snapshot(row, ids[row], view=True) for row in range(rows)], states.declared
    held = [(str(n), s) for n, s in enumerate(snapshots)] + [(f"{POINT}{n}", s) for n, (_, s) in enumerate(points)]
    entries = {f"{place}/{name}": e for place, s in held for name, e in s.entries.items()}
    forms: dict[str, dict[str, Any]] = {
        name: {"dtype": _name(e.dtype), "shape": list(e.shape)} for name, e in entries.items()
    }
    for name, state in entries.items():
        code = at_rest.code_of(specs[name.partition("/")[2]], recurrent_store)
        if code is not None and at_rest.rests(state):
            entries[name], forms[name]["code"] = at_rest.rested(code, state), code
    described = Described(
        states.spec.model,
        states.made_for,
        fingerprint,
        [
            {
                "length": s.length,
                "rotated": s.rotated,
                "tokens": list(s.tokens) if s.tokens is not None and keep_tokens else None,
                "digest": None if s.tokens is None else digest(s.tokens),
            }
            for s in snapshots
        ],
        {name: _described(spec) for name, spec in specs.items() if any(name in s.entries for s in snapshots)},
        forms,
        [{"row": row, "length": s.length, "rotated": s.rotated} for row, s in points],
        None if session is None else dict(session),
    )
    told = {"format": FORMAT, **asdict(described)}
    if session is None:  # a file of rows alone, as it always was
        del told["points"], told["session"]

    def metadata(sums: Mapping[str, str]) -> dict[str, str]:
        for name, tensor in described.tensors.items():
            tensor["checksum"] = sums[name]
        text = json.dumps({**told, "tensors": described.tensors}, sort_keys=True)
        return {"statecache": text, "digest": hashlib.sha256(text.encode()).hexdigest()}

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)
    mode = (target if target.exists() else temporary).stat().st_mode  # as other programs write files
    try:
        with temporary.open("wb") as opened:
            layout.write(opened.fileno(), entries, metadata)
            temporary.chmod(mode)
            os.fsync(opened.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def digest(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, each as 8 bytes, the lowest first, in hexadecimal."""
    return hashlib.sha256(struct.pack(f"<{len(ids)}q", *ids)).hexdigest()


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


def _sync(folder: Path) -> None:
    """Have the disk hold a folder's names."""
    handle = os.open(folder, os.O_RDONLY)
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
            for name, tensor in described.tensors.items():
                there = file.get_slice(name)
                if (there.get_dtype(), list(there.get_shape())) != _form(tensor):
                    raise _damaged(path, f"{name} is of another form than it says")
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


def _form(told: Mapping[str, Any]) -> tuple[str, list[int]]:
    """The dtype, by the format's name, and the shape of a tensor in the file."""
    dtype = as_dtype(told["dtype"])
    if "code" in told:
        if told["code"] not in at_rest.CODES or not told["shape"] or told["shape"][-1] < BITS:
            raise ValueError(f"no {told['code']} is of {told['shape']}")
        dtype = torch.int8
    return layout.DTYPES[dtype], told["shape"]


def _check_forms(path: object, described: Described) -> None:
    """Whether every state of every row has as many entries as its length and window say, of the shape that it says."""
    specs = described.specs()
    for n, row in enumerate(described.rows):
        if row["tokens"] is not None and row.get("digest") not in (None, digest(row["tokens"])):
            raise _damaged(path, f"the digest of row {n} is of other tokens than it has")
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


def read(
    path: str | os.PathLike[str], described: Described, places: Sequence[Mapping[str, Tensor]] = ()
) -> list[Snapshot]:
    """The rows of a file, each of their tensors checked. Raises FileError for one that is damaged.

    places: of each row, by state, where (n, *D) its entries are put, in whatever dtype; the snapshots do not have them.
    """
    return [
        Snapshot(
            row["length"],
            held,
            described.made_for,
            None if row["tokens"] is None else tuple(row["tokens"]),
            row["rotated"],
        )
        for row, held in zip(described.rows, _entries(path, described, "", len(described.rows), places), strict=True)
    ]


def read_points(path: str | os.PathLike[str], described: Described) -> list[Snapshot]:
    """Where the rows of a file stood before, each tensor checked. Raises FileError for one that is damaged."""
    return [
        Snapshot(point["length"], held, described.made_for, rotated=point["rotated"], point=True)
        for point, held in zip(described.points, _entries(path, described, POINT, len(described.points)), strict=True)
    ]


def _entries(
    path: str | os.PathLike[str],
    described: Described,
    kind: str,
    n: int,
    places: Sequence[Mapping[str, Tensor]] = (),
) -> list[dict[str, Tensor]]:
    """By number, the states of rows, or of points. kind: what their tensors' names begin with."""
    entries: list[dict[str, Tensor]] = [{} for _ in range(n)]
    try:
        with Path(path).open("rb") as opened:
            held, jobs, coded = layout.header(opened.fileno()), {}, list[tuple[dict[str, Tensor], str, str]]()
            for name, told in described.tensors.items():
                if name.startswith(POINT) != bool(kind):
                    continue
                dtype, shape = as_dtype(told["dtype"]), told["shape"]
                if held[name][:2] != _form(told):
                    raise _damaged(path, f"{name} is of another form than it says")
                number, _, state = name.removeprefix(kind).partition("/")
                to = places[int(number)].get(state) if places else None
                if "code" in told:
                    to, dtype = torch.empty(shape, dtype=torch.int8), torch.int8
                    entries[int(number)][state] = to
                    coded.append((entries[int(number)], state, told["code"]))
                elif to is None:
                    to = entries[int(number)][state] = torch.empty(shape, dtype=dtype)
                jobs[name] = held[name][2], to, dtype
            for name, found in layout.read(opened.fileno(), jobs).items():
                if found != described.tensors[name]["checksum"]:
                    raise _damaged(path, f"{name} is not what was written")
            for row, state, code in coded:
                row[state] = at_rest.woken(code, row[state])
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise _damaged(path, str(error)) from error
    return entries


def _damaged(path: object, why: str) -> FileError:
    return FileError(f"{path} is damaged: {why}; take an older copy of it")
