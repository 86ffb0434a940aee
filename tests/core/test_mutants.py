"""The schedules kill mutants of the core's arithmetic: a test that could not fail would prove nothing."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace

import one_pass_oracle
import oracle
import paged_oracle
import pytest
import rotary_oracle
from mutants import BESIDE, MUTANTS
from oracle import Form, Op

import statecache

MODULES = (  # in the order in which they import each other
    *("errors", "rotary", "spec", "mask", "storage", "storage.changes", "storage.store", "storage.dense"),
    *(
        "storage.pool",
        "storage.paged",
        "storage.coded",
        "storage.rounded",
        "storage.at_rest",
        "storage.table",
        "step",
        "ring",
        "lease",
        "clock",
        "replay",
        "logs",
        "offload",
    ),
    *("snapshot", "one_pass", "states", "round"),
)

PAGES = ("storage.pool", "storage.paged")  # whose mutants stores alone kill
NAME = "mutant"  # the package that a mutant is loaded as


@functools.cache
def compiled(module: str) -> tuple[str, CodeType]:
    """The source of a module of the core, and its code as a module of a mutant."""
    file = Path(statecache.__file__).parent / module.replace(".", "/")
    source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
    return source, code(module, source)


def code(module: str, source: str) -> CodeType:
    return compile(source.replace("statecache.", f"{NAME}."), f"{NAME}.{module}", "exec")


def load(mutated: str | None = None, change: tuple[str, ...] = ()) -> SimpleNamespace:
    """The core as a package of another name, with a line of one module changed: what was there, what is, and so on."""
    sys.modules[NAME] = ModuleType(NAME)
    sys.modules[NAME].__path__ = []  # type: ignore[attr-defined]
    for module in MODULES:
        source, ready = compiled(module)
        if module == mutated:
            for was, becomes in zip(change[::2], change[1::2], strict=True):
                assert source.count(was) == 1, f"{was!r} stands {source.count(was)} times in {module}"
                source = source.replace(was, becomes)
            ready = code(module, source)
        spec = importlib.util.spec_from_loader(f"{NAME}.{module}", loader=None, is_package=module == "storage")
        assert spec is not None
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        exec(ready, loaded.__dict__)
    return oracle.core(NAME)


@pytest.fixture(autouse=True)
def unload() -> Iterator[None]:
    yield
    for module in [m for m in sys.modules if m == NAME or m.startswith(f"{NAME}.")]:
        del sys.modules[module]


ONE = ("step", 1, (0,))
MARK, RESTORE = ("checkpoint", 0, (0,)), ("restore", 0, (0,))
SELDOM: list[list[Op]] = [  # what chance seldom strings together
    # a mark that rows went back behind, and what is written then
    *(
        [("step", 9, (0,)), MARK, ("rollback", 0, back), what, RESTORE]
        for back, what in (
            ((2,), ("speculate", 2, (0,))),
            ((2,), ("speculate", 5, (0,))),
            ((2,), ("ragged", 3, (0,))),
            ((2,), ("interrupt", 0, (0,))),
            ((2,), ONE),
            ((2, 0, 0), ONE),
            ((2, 0, 0), ("rows", 2, (1,))),
        )
    ),
    [("step", 4, (0,)), MARK, ("step", 5, (0,)), MARK, ("rollback", 0, (2,)), ONE, ("restore", 0, (1,))],
    # a mark that no row went back behind, and what makes it stale all the same; one with what goes back from it
    *(
        [("step", 9, (0,)), MARK, what, RESTORE]
        for what in (("admit", 0, (0, 1, 1)), ("reset_rows", 0, (0,)), ("reset", 0, (0,)), ("gather", 0, (0,)))
    ),
    [ONE, ONE, ONE, ONE, MARK, ONE, ONE, ONE, RESTORE, ("rollback", 0, (2,))],
    # a log that is first written in a row admitted to a cache where nothing was
    [("step", 4, (0,)), ("admit", 0, (0, 0, 1)), *[("step", 1, (0,))] * 4, ("rollback", 1, (0, 2, 0))],
    # rows that trade places, in a ring, two by two, and in a row
    [("step", 9, (0,)), *[("gather", 2, rows) for rows in ((1, 2, 0), (2, 1, 0), (1, 2, 2), (0, 0, 1))], ONE],
    # a compiled step past the capacity, which a mark from before comes back from
    *([("step", 9, (0,)), MARK, ("step", 9, (0,)), *[(what, 5, (9,))] * 2, ONE] for what in ("step", "ragged")),
    # an empty mark, with a log begun since
    [MARK, *[ONE] * 9, RESTORE, ONE, ONE, ("rollback", 0, (1,))],
    # bases that moved over the log, of rows that are alike and that are not
    *(
        [first, *[ONE] * 4, ("rollback", 0, (n,))]
        for first in (("step", 9, (0,)), ("ragged", 9, (9, 8, 7)))
        for n in (1, 2)
    ),
    *([("ragged", 9, (9, 8, 7)), *[ONE] * n, ("ragged", 9, (9, 1, 0)), ("rollback", 0, (1,))] for n in (1, 2, 3)),
    [("ragged", 9, (9, 6, 6)), ("rollback", 0, (3, 0, 0)), *[ONE] * 3, ("rollback", 0, (1,))],
    # a chunk where copies stood, of rows that went back, were reset, or became another
    [ONE, ONE, ONE, ("rollback", 0, (2,)), ("step", 2, (0,)), ("rollback", 0, (1,))],
    *(
        [ONE, ONE, ONE, ("reset_rows", 0, (1,)), what, ("ragged", 3, (3, 0, 0)), ("rollback", 0, (1, 0, 0))]
        for what in (("reset_rows", 0, (0,)), ("admit", 0, (1, 0, 3)))
    ),
    # a copy that went back before anybody told it what steps its states
    *(
        [ONE, ONE, ONE, ("fork", 0, (0,)), ("rollback", 1, (2,)), *[(what, 1, (0,)) for what in then], ONE]
        for then in (("reset_rows",), ("checkpoint", "restore"), ("admit",), ("gather",))
    ),
    # a row that goes back to a point, and on from there; one whose pass ran past the capacity
    *(
        [first, ("point", tokens, (1,)), *[ONE] * 3, ("rollback", 0, (1,)), ("point", 1, (0,))]
        for first in (("step", 5, (0,)), ("ragged", 9, (9, 8, 7)), ("step", 0, (0,)))
        for tokens in (2, 9)
    ),
    [("step", 9, (0,)), ("step", 9, (0,)), ("point", 9, (0,)), ONE],
    # the oldest copy, after a pass that the row took nothing of, and after passes of all forms
    [ONE, ONE, ONE, ONE, ("ragged", 1, (0,)), ("rollback", 0, (3,))],
    [ONE, ONE, ONE, ("ragged", 1, (1, 0, 1)), ("rollback", 0, (3, 0, 0))],
    [ONE, ("ragged", 1, (1, 0, 0)), ("ragged", 1, (0, 1, 1)), ONE, ONE, ("rollback", 0, (3, 0, 0))],
]
FORKED: list[list[Op]] = [  # a fork, and what it was made of, in passes longer than some rings, of rows that differ
    [("step", 4, (0,)), ("fork", 1, (0,)), ("ragged", n, (9, 6, 7)), ("ragged", 17 - n, (8, 9, 6)), ONE] for n in (9, 8)
]
TELLING = (46, 55, 57, 66, 79, 87, 93, 94)  # of those by chance, which kill what takes longest to be killed by others
STEPS = ((False, False), (True, False), (True, True))  # fixed, on_device


def by_chance(rnd: random.Random, i: int) -> tuple[list[Op], Form]:
    fixed, on_device = STEPS[i % len(STEPS)]
    leased, lazy, store = rnd.random() < 0.5, rnd.random() < 0.3, rnd.choice(("dense", "paged"))
    store = "coded" if i % 5 == 4 else "offload" if not fixed and i % 2 else store
    form = Form(fixed, leased, on_device, rnd.random() < 0.8, lazy, store, rnd.choice((None, None, 23, 0)))
    number = [1, 1, 1, 2, 3, rnd.randint(0, 29)]  # mostly steps of a few tokens, within the slack
    operations = range(rnd.randint(4, 25))
    each = [tuple(rnd.randint(0, 9) for _ in range(rnd.choice((1, 3)))) for _ in operations]
    return [(rnd.choice(oracle.WHAT), rnd.choice(number), each[o]) for o in operations], form


def schedules(n: int) -> Iterator[tuple[list[Op], Form]]:
    """Those that chance seldom strings together, between a few and the rest of n that it does."""
    rnd = random.Random(7)
    chance = [by_chance(rnd, i) for i in range(n)]
    first = [*range(30), *TELLING]
    yield from (chance[i] for i in first)
    yield from ((schedule, Form(False, leased, store="paged")) for leased in (True, False) for schedule in FORKED)
    for leased, (fixed, on_device), schedule in itertools.product((True, False), STEPS, SELDOM):
        yield schedule, Form(fixed, leased, on_device, lazy=True)
    yield from (chance[i] for i in range(n) if i not in first)


def survives(core: SimpleNamespace, n: int) -> bool:
    for schedule, form in schedules(n):
        try:
            oracle.run(core, schedule, form)
        except Exception:
            return False
    return True


def pages_survive(core: SimpleNamespace) -> bool:
    for seed in range(200):
        try:
            paged_oracle.run(core, seed)
        except Exception:
            return False
    return True


def passes_survive(core: SimpleNamespace) -> bool:
    try:
        for kind in rotary_oracle.KINDS:
            rotary_oracle.run(core, kind)
        for seed in range(60):
            one_pass_oracle.run(core, seed)
    except Exception:
        return False
    except pytest.fail.Exception:  # nothing was raised where something had to be
        return False
    return True


def test_the_core_itself_survives() -> None:
    core = load()
    assert survives(core, 200) and pages_survive(core) and passes_survive(core)


@pytest.mark.parametrize(
    ("module", "what"), [pytest.param(m, what, id=f"{m}: {what}") for m in MUTANTS for what in MUTANTS[m]]
)
def test_mutant_is_killed(module: str, what: str) -> None:
    core = load(module, MUTANTS[module][what])
    assert not (pages_survive(core) if module in PAGES else survives(core, 400))


@pytest.mark.parametrize(
    ("module", "what"), [pytest.param(m, what, id=f"{m}: {what}") for m in BESIDE for what in BESIDE[m]]
)
def test_mutant_of_what_schedules_do_not_come_by_is_killed(module: str, what: str) -> None:
    assert not passes_survive(load(module, BESIDE[module][what]))
