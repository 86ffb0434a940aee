"""The core's schedules with one more operation: ("interrupted", number, each), after which the next one ends early.

Then the cache is as the lists were, or as they are after it, or it refuses everything but `reset` and `restore`.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import oracle
import torch

from interruption import Interruption, Operators

WAY_OUT = re.compile(r"reset\(\), or restore\(\) a mark")
Lists = oracle.Lists


@dataclass
class Plan:
    """An operation on the states, and the lists once it is whole; `spent` if it is given up but its slots are used."""

    run: Callable[[Any, dict[str, Any]], None]
    after: Lists
    spent: Lists
    touches: Callable[[dict[str, Any]], bool]  # whether it may write over what a mark stands for


def run(core: SimpleNamespace, schedule: list[oracle.Op], *, fixed: bool, store: str) -> int:
    """Run a schedule on states that roll back by replay, and assert after every operation; how many ended early."""
    core.ring.FIRST_SLOTS = 3
    subject = _subject(core, states(core, fixed, store), _empty(oracle.ROWS))
    fresh, early, armed = iter(range(1, 10**6)), 0, None
    for what, number, each in schedule:
        if what == "interrupted":
            armed = random.Random(f"{number} {each}")
            continue
        plan = PLANS[what](core, subject, number, each, fresh)
        if plan is None:
            continue
        if armed is None:
            plan.run(subject.states, {})
            subject.lists = plan.after
            _age(subject, plan, "stale")
        else:
            early += _interrupt(core, subject, plan, armed)
            armed = None
        agree(core, subject)
    return early


def _empty(rows: int) -> Lists:
    return Lists([[] for _ in range(rows)], oracle.SLACK)


def _subject(core: SimpleNamespace, rings: Any, lists: Lists) -> Any:
    form = oracle.Form(rings.capacity is not None, leased=False)
    return oracle.Subject(rings, lists, form, _operators(core.replay.Operators))


def states(core: SimpleNamespace, fixed: bool, store: str) -> Any:
    return core.states.States(
        oracle.model(core, oracle.Form(fixed, leased=False)),
        capacity=oracle.CAPACITY if fixed else None,
        slack=oracle.SLACK,
        rows=oracle.ROWS,
        dtype=torch.float32,
        device="cpu",
        store=core.stores[store],
    )


# ---- operations, each planned before it is run: on the states, or on a fork of them that counts operators


@cache
def _operators(kind: type[dict[str, Any]]) -> dict[str, Any]:
    """What steps the recurrence; the states do not keep it alive."""
    return kind({"1.recurrent": oracle.Sum()})


def one_pass(rings: Any, ids: torch.Tensor, count: torch.Tensor | None, recurrence: Any, run_log: Any) -> None:
    """Open, write every state, close."""
    step = rings.open(ids.shape[1], count, operators=recurrence)
    for name in ("key", "short", "key5", "conv", "copies"):
        ring = rings[f"0.{name}"]
        ring.put(oracle._spread(ids, ring), step)
    inputs, log = ids[..., None].double(), rings.logs["1.recurrent"]
    ones = torch.ones_like(inputs)
    run_log(recurrence["1.recurrent"], (inputs, ones), ones, rings["1.recurrent"], step, log)
    rings.close(step)


def _new(fresh: Any, counts: list[int], tokens: int) -> tuple[list[list[float]], torch.Tensor]:
    new = [[float(next(fresh)) for _ in range(n)] for n in counts]
    ids = torch.full((len(counts), tokens), -7.0)
    for row, entries in zip(ids, new, strict=True):
        row[: len(entries)] = torch.tensor(entries)
    return new, ids


def _pass(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any, in_round: bool = False) -> Plan | None:
    tokens = 1 + number % (oracle.SLACK if in_round else 8)
    counts = [each[b % len(each)] % (tokens + 1) if number % 2 else tokens for b in range(len(s.lists.rows))]
    start = s.lists.lengths()
    if s.states.capacity is not None and any(n + t > oracle.CAPACITY for n, t in zip(start, counts, strict=True)):
        return None
    new, ids = _new(fresh, counts, tokens)
    count, recurrence = torch.tensor(counts) if number % 2 else None, _operators(core.replay.Operators)
    accepted = [each[-1 - b % len(each)] % (n + 1) for b, n in enumerate(counts)]

    def run(rings: Any, parts: dict[str, Any]) -> None:
        if not in_round:
            with parts.get("pass", Operators()):
                one_pass(rings, ids, count, recurrence, core.replay.run)
            return
        with core.round.Round(rings, tokens) as round_:
            with parts.get("pass", Operators()):
                one_pass(rings, ids, count, recurrence, core.replay.run)
            with parts.get("commit", Operators()):
                round_.commit(torch.tensor(accepted))

    spent = copy.deepcopy(s.lists)
    if in_round:
        ahead = zip(s.lists.floor, start, counts, strict=True)
        spent.floor = [max(low, min(n + t - oracle.SLACK, n)) for low, n, t in ahead]
    after = copy.deepcopy(spent)
    after.step([entries[:n] for entries, n in zip(new, accepted, strict=True)] if in_round else new, counts)

    def touches(mark: dict[str, Any]) -> bool:
        lengths = zip(start, counts, mark["lists"].lengths(), strict=False)
        return any(n < marked and t for n, t, marked in lengths)

    return Plan(run, after, spent if in_round else s.lists, touches)


def _round(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan | None:
    return _pass(core, s, number, each, fresh, in_round=True)


def _whole(act: Callable[[Any], object], before: Lists, after: Lists, touches: bool = False) -> Plan:
    """An operation of one part."""

    def run(rings: Any, parts: dict[str, Any]) -> None:
        with parts.get("act", Operators()):
            act(rings)

    return Plan(run, after, before, lambda mark: touches)


def _rollback(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan:
    most = [len(row) - low for row, low in zip(s.lists.rows, s.lists.floor, strict=True)]
    forget = [each[b % len(each)] % (n + 1) for b, n in enumerate(most)]
    after = copy.deepcopy(s.lists)
    for b, n in enumerate(forget):
        after.forget(b, n)
    return _whole(lambda rings: rings.rollback(torch.tensor(forget)), s.lists, after)


def _gather(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan:
    rows = len(s.lists.rows)
    index = [n % rows for n in each][: 1 + number % 3]
    after = copy.deepcopy(s.lists)
    after.gather(index)
    return _whole(lambda rings: rings.gather(torch.tensor(index)), s.lists, after, touches=True)


def _reset(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan:
    rows = oracle.ROWS if s.states.capacity is not None else len(s.lists.rows)
    return _whole(lambda rings: rings.reset(), s.lists, _empty(rows), touches=True)


def _checkpoint(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan:
    def act(rings: Any) -> None:
        mark = rings.checkpoint()
        if rings is s.states:
            s.marks.append({"mark": mark, "lists": s.lists, "stale": False, "doubtful": False})

    return _whole(act, s.lists, s.lists)


def _fork(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan:
    return _whole(lambda rings: rings.fork(), s.lists, s.lists)


def _restore(core: Any, s: Any, number: int, each: tuple[int, ...], fresh: Any) -> Plan | None:
    good = [mark for mark in s.marks if not (mark["stale"] or mark["doubtful"])]
    if not good:
        return None
    mark = good[sum(each) % len(good)]

    def run(rings: Any, parts: dict[str, Any]) -> None:
        own = mark["mark"] if rings is s.states else rings.checkpoint()  # a fork counts with a mark of its own
        with parts.get("act", Operators()):
            rings.restore(own)

    return Plan(run, mark["lists"], s.lists, lambda mark: False)


PLANS: dict[str, Any] = {
    "pass": _pass,
    "round": _round,
    "rollback": _rollback,
    "gather": _gather,
    "reset": _reset,
    "checkpoint": _checkpoint,
    "fork": _fork,
    "restore": _restore,
}


# ---- what is left of one that ended early


def _interrupt(core: Any, s: Any, plan: Plan, rnd: random.Random) -> bool:
    counting = {part: Operators() for part in ("pass", "commit", "act")}
    plan.run(s.states.fork(), counting)
    part = rnd.choice([part for part, operators in counting.items() if operators.points])
    point = rnd.randrange(counting[part].points)
    before = s.lists
    try:
        plan.run(s.states, {part: Operators(point)})
    except Interruption:
        early = True
    else:
        early = False
    _age(s, plan, "doubtful" if early else "stale")
    try:
        refusal = _refusal(core, s.states.checkpoint)
        if refusal is None:
            s.lists = _which(core, s, [before, plan.spent, plan.after] if early else [plan.after])
        else:
            _refuses(core, s.states)
            _mend(core, s, rnd)
    except BaseException as error:
        error.add_note(f"it ended at point {point} of {counting[part].points} of its {part}" * early)
        raise
    return early


def _age(s: Any, plan: Plan, how: str) -> None:
    for mark in s.marks:
        mark[how] = mark[how] or plan.touches(mark)


def _which(core: Any, s: Any, candidates: list[Lists]) -> Lists:
    wrong = []
    for lists in candidates:
        try:
            agree(core, _subject(core, s.states, lists))
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")
        else:
            return lists
    raise AssertionError(f"the states go on, and hold nothing that they may: {wrong}")


def agree(core: Any, s: Any) -> None:
    """The entries are those of the lists, also once all is forgotten that may be; a recurrence's by its next output."""
    most = [len(row) - low for row, low in zip(s.lists.rows, s.lists.floor, strict=True)]
    for forget in ([0] * len(most), most):
        rings, lists = s.states.fork(), copy.deepcopy(s.lists)
        rings.rollback(torch.tensor(forget))
        for b, n in enumerate(forget):
            lists.forget(b, n)
        oracle._agree(core, _subject(core, rings, lists))
        assert _next_sums(core, rings) == [oracle.total(row) for row in lists.rows], "recurrent"


def _next_sums(core: Any, rings: Any) -> list[float]:
    """The recurrence's state after each row's last token: a round of one token which counts for no row shows it."""
    seen: list[torch.Tensor] = []

    class Seen(oracle.Sum):
        def chunk(self, taken: Any, query: Any, state: Any, count: Any = None, at: Any = None) -> Any:
            given = super().chunk(taken, query, state, count, at)
            seen.append(given[1])
            return given

    rows = rings.rows
    idle, ids = torch.zeros(rows, dtype=torch.long), torch.full((rows, 1), -7.0)
    one_pass(rings, ids, idle, core.replay.Operators({"1.recurrent": Seen()}), core.replay.run)
    return [float(x) for x in seen[-1][:, 0]]


def _refusal(core: Any, verb: Callable[[], object]) -> str | None:
    try:
        verb()
    except core.errors.StateCacheError as error:
        return str(error)
    return None


def _refuses(core: Any, rings: Any) -> None:
    verbs = {
        "open": lambda: rings.open(1),
        "checkpoint": rings.checkpoint,
        "fork": rings.fork,
        "rollback": lambda: rings.rollback(0),
        "gather": lambda: rings.gather([0]),
        "speculate": lambda: core.round.Round(rings, 1),
    }
    for name, verb in verbs.items():
        said = _refusal(core, verb)
        assert said is not None, f"{name} was not refused"
        assert name == "open" or WAY_OUT.search(said), f"{name} does not say what to do: {said}"  # its caller may close


def _mend(core: Any, s: Any, rnd: random.Random) -> None:
    """Restore a mark that is exact, or says that it is stale where it may be; else reset."""
    for mark in rnd.sample(s.marks, len(s.marks)):
        try:
            s.states.restore(mark["mark"])
        except core.errors.StaleMarkError:
            assert mark["stale"] or mark["doubtful"], "a mark is said to be stale, and nothing wrote over it"
            mark["stale"] = True
        else:
            assert not mark["stale"], "a stale mark was restored"
            s.lists = mark["lists"]
            return
    s.states.reset()
    s.lists = _empty(len(s.states.lengths))
    for mark in s.marks:
        mark["stale"] = True
