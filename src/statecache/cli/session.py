"""A conversation as a file: its cache, what was said, and where its newest turns began. See docs/format.md."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, new_cache, slack_of, tokens_held
from statecache.errors import FileError, StateCacheError
from statecache.models import file
from statecache.snapshot import Snapshot

POINTS = 4  # turns from the newest on whose beginnings are written; back to older ones their tokens are read again


@dataclass(frozen=True)
class Turn:
    """Where a turn began: the row, its tokens, and what the user said. point: None where it was empty, or is lost."""

    point: Snapshot | None
    ids: list[int]
    line: str


@dataclass(frozen=True)
class Session:
    """What a conversation goes on from. ids: its tokens, of which the cache holds the first ones.

    seed: of the first draws, to which every retry adds one.
    """

    cache: Any
    ids: list[int]
    turns: list[Turn]
    system: str | None
    seed: int
    retries: int = 0


def describe(path: Path) -> file.Described | None:
    """What a session's file says of itself; None where there is none. Raises CommandError or FileError for others."""
    try:
        with path.open("rb"):
            described = file.describe(path)
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise CommandError(f"--session {path}: there is no folder {path.parent}: make it first", 2) from error
        return None
    except OSError as error:
        raise CommandError(f"--session {path}: cannot read it: {error.strerror}") from error
    if described.session is None:
        raise CommandError(f"--session {path}: this is a saved cache, and no conversation: give another name")
    return described


def check_system(path: Path, described: file.Described, system: str | None) -> None:
    """Raise CommandError where a conversation was begun with another system message than is asked for."""
    begun = (described.session or {}).get("system")
    if system is not None and system != begun:
        how = "without --system" if begun is None else f'with --system "{begun}"'
        raise CommandError(f"--session {path}: it was begun {how}: leave --system out, or give another file", 2)


def stamp(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that took its place; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def write(path: Path, session: Session, loaded: Loaded) -> None:
    """Write a conversation to its file, which is there whole or, until it is, as it was before. Raises OSError."""
    cache, ids = session.cache, session.ids
    held = tokens_held(cache)
    kept = [turn.point for turn in session.turns[-POINTS:] if turn.point is not None]
    file.write(
        os.path.realpath(path),  # a link stays one
        cache.states,
        [ids[:held]] * (cache.rows or 0),
        fingerprint=loaded.fingerprint,
        points=[(0, point) for point in kept],
        session={
            "model": loaded.name,
            "dtype": _dtype(loaded),
            "system": session.system,
            "seed": session.seed,
            "retries": session.retries,
            "unread": ids[held:],
            "turns": [_told(turn, ids, kept) for turn in session.turns],
        },
    )


def _told(turn: Turn, ids: list[int], kept: list[Snapshot]) -> dict[str, Any]:
    """A turn, its tokens told as a beginning of the conversation's, and what more there was."""
    same = next((n for n, pair in enumerate(zip(turn.ids, ids, strict=False)) if pair[0] != pair[1]), None)
    begins = min(len(turn.ids), len(ids)) if same is None else same
    point = next((n for n, point in enumerate(kept) if point is turn.point), None)
    return {"line": turn.line, "begins": begins, "more": turn.ids[begins:], "point": point}


def read(path: Path, described: file.Described, loaded: Loaded, settings: Settings) -> Session:
    """The conversation of a file. Raises CommandError where it is one with another model, FileError if damaged."""
    told = described.session or {}
    try:
        if loaded.fingerprint != described.fingerprint:
            raise CommandError(
                f'--session {path}: it is a conversation with "{told["model"]}" in {told["dtype"]}, and this is '
                f'"{loaded.name}" in {_dtype(loaded)}, with other weights: give --model and --dtype as it was begun'
            )
        cache, ids = new_cache(loaded, settings), list[int]()
        if described.rows:
            cache = sc.StateCache.load(path, loaded.model, slack=slack_of(loaded, settings))
            ids = list(described.rows[0]["tokens"])
        points = [point.on(loaded.model.device) for point in file.read_points(path, described)]
        ids += map(int, told["unread"])
        turns = [_turn(turn, ids, points) for turn in told["turns"]]
        return Session(cache, ids, turns, told["system"], int(told["seed"]), int(told["retries"]))
    except StateCacheError:
        raise
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise FileError(f"{path} is damaged: its conversation makes no sense ({error})") from error
    finally:
        if describe(path) != described:  # then what is said of either is not to be relied on
            raise CommandError(f"--session {path}: another process wrote it while it was read: try again")


def _turn(told: dict[str, Any], ids: list[int], points: list[Snapshot]) -> Turn:
    """What `_told` has told."""
    point = None if told["point"] is None else points[told["point"]]
    return Turn(point, [*ids[: told["begins"]], *map(int, told["more"])], str(told["line"]))


def _dtype(loaded: Loaded) -> str:
    return str(loaded.model.dtype).removeprefix("torch.")
