"""Operations that end early, at any operator: afterwards a cache is as before, or as after, or it refuses to go on.

Which of these it says itself, and it is held to that: by the logits of what is fed next, by how far it may go back, and
by the marks, which give back exactly what they stand for, unless the operation could have written over that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from held import Held

import statecache as sc
from interruption import Cut, ends_early
from statecache import errors

WAY_OUT = re.compile(r"reset\(\), or restore\(\) a mark")


@dataclass
class Attempt:
    """An operation and what comes of it. `run` does it to a cache, a fork of the subject's own too, in named parts."""

    run: Callable[[sc.StateCache, Cut], object]
    after: Held
    given_up: Held  # what rows hold if nothing of it stays, which may cost them what they could have gone back
    touched: list[Any] = field(default_factory=list)  # marks that it may have written over


Planned = Callable[[Any, int, tuple[int, ...], random.Random], Attempt | None]


# ---- the operations


def _feed(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    width = s.width(number, 6)
    counts = [width] * len(s.rows)
    if s.models.prepared and number % 2:
        counts = [each[b % len(each)] % (width + 1) for b in range(len(s.rows))]
    if s.overflows(counts):
        return None
    batch = s.batch(counts, width, rnd, rnd.choice(["left", "right", "inside"]))

    def run(cache: sc.StateCache, cut: Cut) -> None:
        with cut("forward"):
            s.logits(cache, batch)

    return Attempt(run, s.held.fed(batch.new, s.slack), s.held, s.longer_marks(counts))


def _round(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    if not s.slack or not s.models.prepared:
        return None
    width = 1 + number % s.slack
    counts = [each[b % len(each)] % (width + 1) if number % 2 else width for b in range(len(s.rows))]
    if s.overflows(counts):
        return None
    batch = s.batch(counts, width, rnd, rnd.choice(["left", "right", "inside"]))
    accepted = [rnd.randint(0, n) for n in counts]

    def run(cache: sc.StateCache, cut: Cut) -> None:
        with cache.speculate(width) as draft:
            with cut("forward"):
                s.logits(cache, batch)
            with cut("commit"):
                draft.commit(torch.tensor(accepted))

    opened = s.held.opened(counts, s.slack)
    kept = [ids[:n] for ids, n in zip(batch.new, accepted, strict=True)]
    return Attempt(run, opened.fed(kept, s.slack), opened, s.longer_marks(counts))


def _whole(name: str, act: Callable[[sc.StateCache], object]) -> Callable[[sc.StateCache, Cut], None]:
    """An operation of one part."""

    def run(cache: sc.StateCache, cut: Cut) -> None:
        with cut(name):
            act(cache)

    return run


def _rollback(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    most = s.held.most(s.copied)
    forget = [each[b % len(each)] % (n + 1) for b, n in enumerate(most)] if s.models.prepared else most
    if not s.held.may_forget(forget, s.copied):
        return None
    run = _whole("rollback", lambda cache: cache.rollback(torch.tensor(forget)))
    return Attempt(run, s.held.without(forget), s.held)


def _crop(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    tokens = min(s.held.most(s.copied))
    forget = [tokens] * len(s.rows)
    if not s.held.may_forget(forget, s.copied):
        return None
    return Attempt(_whole("crop", lambda cache: cache.crop(-tokens)), s.held.without(forget), s.held)


def _gather(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    room = len(s.rows) if s.cache.capacity is not None else len(s.rows) + 1
    index = [rnd.randrange(len(s.rows)) for _ in range(rnd.randint(1, room))]
    run = _whole("gather", lambda cache: cache.gather(torch.tensor(index)))
    return Attempt(run, s.held.of(index), s.held, s.marks)


def _reset(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    return Attempt(_whole("reset", lambda cache: cache.reset()), Held.nothing(len(s.rows)), s.held, s.marks)


def _checkpoint(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    return Attempt(_whole("checkpoint", lambda cache: cache.checkpoint()), s.held, s.held)


def _fork(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    return Attempt(_whole("fork", lambda cache: cache.fork()), s.held, s.held)


def _restore(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    marks = [mark for mark in s.marks if not mark.doubtful]
    if not marks:
        return None
    mark = rnd.choice(marks)

    def run(cache: sc.StateCache, cut: Cut) -> None:
        own = mark.mark if cache is s.cache else cache.checkpoint()  # a fork has no marks: it counts with another
        with cut("restore"):
            cache.restore(own)

    return Attempt(run, mark.held, s.held)


KINDS: dict[str, Planned] = {
    "feed": _feed,
    "round": _round,
    "rollback": _rollback,
    "crop": _crop,
    "gather": _gather,
    "reset": _reset,
    "checkpoint": _checkpoint,
    "fork": _fork,
    "restore": _restore,
}
BRING_ROWS, NEED_ROWS = ("feed", "round"), ("rollback", "crop", "gather")


# ---- what is left


def interrupted(kind: str) -> Callable[[Any, int, tuple[int, ...], random.Random], None]:
    """The operation of this kind, ended at a point drawn of all its points."""

    def operation(s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
        attempt = plan(kind, s, number, each, rnd)
        if attempt is not None:
            points = count(s, attempt)
            part = rnd.choice(sorted(points))
            s.interruptions += end(s, attempt, part, rnd.randrange(points[part] + 1), rnd)

    return operation


def plan(kind: str, s: Any, number: int, each: tuple[int, ...], rnd: random.Random) -> Attempt | None:
    """An operation of this kind, if the cache can do one now."""
    if kind in BRING_ROWS and s.number_of_rows(number) != len(s.rows):
        s.held = Held.nothing(s.number_of_rows(number))
        for mark in s.marks:
            mark.doubtful = True
    return KINDS[kind](s, number, each, rnd) if s.rows or kind not in NEED_ROWS else None


def count(s: Any, attempt: Attempt) -> dict[str, int]:
    """The points of each part of an operation, counted on a fork."""
    whole = Cut()
    attempt.run(s.cache.fork(), whole)
    return whole.points


def end(s: Any, attempt: Attempt, part: str, point: int, rnd: random.Random) -> bool:
    """Run an operation until a point, and assert what is left; whether it came that far."""
    early = ends_early(lambda cut: attempt.run(s.cache, cut), Cut(part, point))
    try:
        _settle(s, attempt, early, rnd)
    except BaseException as error:
        how = (
            f"its {part} ended at point {point}" if early else f"it came to its end before point {point} of its {part}"
        )
        error.add_note(f"{how}; rows held {s.held.lengths()}, and after it {attempt.after.lengths()}")
        raise
    return early


def _settle(s: Any, attempt: Attempt, early: bool, rnd: random.Random) -> None:
    """Find out what the cache holds, or hold it to its refusal and mend it."""
    for mark in attempt.touched:
        if early:
            mark.doubtful = True
        else:
            mark.overwritten()
    usable = s.cache.capabilities["step"]
    if not early:
        assert usable, f"a whole operation left the cache refusing: {usable}"
        s.held = _which(s, [attempt.after], rnd)
    elif usable:
        s.held = _which(s, [s.held, attempt.given_up, attempt.after], rnd)
        if rnd.random() < 0.5:
            _check_marks(s, rnd)
    else:
        _refuses(s, rnd)
        if not _check_marks(s, rnd):
            s.cache.reset()
            for mark in s.marks:
                mark.overwritten()
            s.held = _which(s, [Held.nothing(len(s.rows))], rnd)


def _which(s: Any, candidates: list[Held], rnd: random.Random) -> Held:
    """The first of these that the cache holds, every row of it."""
    wrong: list[str] = []
    for held in candidates:
        why = wrong_about(s, held, rnd)
        if why is None:  # how many rows an empty cache has is for the cache to say
            return held if any(held.rows) else Held.nothing(len(s.cache.lengths) or len(held.rows))
        wrong.append(why)
    raise AssertionError(f"the cache goes on, and holds nothing that it may: {'; '.join(dict.fromkeys(wrong))}")


def wrong_about(s: Any, held: Held, rnd: random.Random) -> str | None:
    """What is wrong about a cache that should hold this, as forks show that are fed, also after they went back."""
    lengths = s.cache.lengths.tolist()
    if not any(held.rows) and not any(lengths):
        held = Held.nothing(len(lengths) or len(held.rows) or 2)
    elif lengths != held.lengths():
        return f"lengths are {lengths}, not {held.lengths()}"
    for forget in ([0] * len(held.rows), held.most(s.copied)):
        try:
            why = _wrong_without(s, held, forget, rnd)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why is not None:
            return f"{why}, with {forget} forgotten"
    return None


def _wrong_without(s: Any, held: Held, forget: list[int], rnd: random.Random) -> str | None:
    """What is wrong about the logits of one more token a row, in a fork that has forgotten so many."""
    fork, left = s.cache.fork(), held.without(forget)
    if any(forget):
        fork.rollback(torch.tensor(forget))
    if s.overflows([1] * len(left.rows), left):
        return None
    batch = s.batch([1] * len(left.rows), 1, rnd, "right")
    return s.wrong(s.models.feed(fork, batch.ids, batch.mask), batch, left)


def _refuses(s: Any, rnd: random.Random) -> None:
    """Every verb says what to do."""
    batch = s.batch([1] * (len(s.rows) or 1), 1, rnd, "right")
    verbs: dict[str, Callable[[], object]] = {
        "feed": lambda: s.models.feed(s.cache, batch.ids, batch.mask),
        "checkpoint": s.cache.checkpoint,
        "fork": s.cache.fork,
        "rollback": lambda: s.cache.rollback(0),
        "gather": lambda: s.cache.gather([0]),
        "crop": lambda: s.cache.crop(-1),
    }
    if s.slack:
        verbs["speculate"] = lambda: s.cache.speculate(1)
    for name, verb in verbs.items():
        said = _refusal(verb)
        assert said is not None, f"{name} was not refused, though the cache had said that it would not go on"
        assert WAY_OUT.search(said), f"{name} does not say what to do: {said}"


def _refusal(verb: Callable[[], object]) -> str | None:
    try:
        verb()
    except errors.StateCacheError as error:
        return str(error)
    return None


def _check_marks(s: Any, rnd: random.Random) -> bool:
    """Restore marks, in any order, until one is to be gone on from; whether there was one."""
    restored = False
    for mark in rnd.sample(s.marks, len(s.marks)):
        s.come_back(mark)
        if not mark.stale:
            restored = True
            why = wrong_about(s, mark.held, rnd)
            assert why is None, f"a mark at {mark.held.lengths()} was restored, and {why}"
            if rnd.random() < 0.3:
                break
    return restored
