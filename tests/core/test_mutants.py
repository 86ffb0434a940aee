"""The schedules kill mutants of the core's arithmetic: a test that could not fail would prove nothing."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import oracle
import pytest

import statecache

MODULES = ("errors", "spec", "storage", "storage.dense", "ring", "replay", "clock", "draft", "cache")

# name: (module, what stands there once, what stands there instead)
MUTANTS = {
    "a chunk longer than the ring keeps its first entries": (
        "ring",
        "new.narrow(self.axis, dropped, n) if dropped else new, step.start + dropped",
        "new.narrow(self.axis, 0, n), step.start",
    ),
    "positions below zero read what the slot holds": (
        "ring",
        "torch.where(self._spread(position >= 0)",
        "torch.where(self._spread(position >= -9)",
    ),
    "a row that takes nothing in writes its padding": (
        "ring",
        "step.start[:, None] + t, t >= 0",
        "step.start[:, None] + t, t >= -9",
    ),
    "the past of a window is one entry short": (
        "ring",
        "held = min(step.start, window - 1)",
        "held = min(step.start, window - 2)",
    ),
    "the window begins one too late": (
        "ring",
        "(start - window + 1).clamp(min=0)",
        "(start - window + 2).clamp(min=0)",
    ),
    "the second run of slots starts at one": (
        "ring",
        "slice(0, slot + n - self.capacity)",
        "slice(1, slot + n - self.capacity + 1)",
    ),
    "put happens before the past is read": (
        "ring",
        "            seen = pieces[0] if len(pieces) == 1 else",
        "            self.put(new, step)\n            seen = pieces[0] if len(pieces) == 1 else",
    ),
    "a copy is kept one slot late": ("ring", "Step(1, step.start - 1, taking)", "Step(1, step.start, taking)"),
    "a rollback takes every row's copy": ("ring", "torch.where(moved, before,", "torch.where(moved | True, before,"),
    "a lease is not copied before it changes": (
        "ring",
        "if self.copies is not None and step.tokens:",
        "if self.copies is not None and step.tokens > 1:",
    ),
    "a ring has no slots for its slack": ("spec", "self.window + slack, capacity", "self.window, capacity"),
    "the floor does not rise": (
        "clock",
        "torch.maximum(floor, length - back)",
        "torch.minimum(floor, length - back)",
    ),
    "copies of what was taken back still count": ("clock", "torch.where(kept > start, 0, kept)", "kept"),
    "a rollback may reach one below the floor": ("clock", "target < least:", "target + 1 < least:"),
    "idle rows count as having taken all in": (
        "clock",
        "step.tokens if step.count is None else step.count",
        "step.tokens",
    ),
    "growth forgets the last slot": (
        "storage.dense",
        "wider.narrow(self.axis, 0, self.slots).copy_(self.data)",
        "wider.narrow(self.axis, 0, self.slots - 1).copy_(self.data.narrow(self.axis, 0, self.slots - 1))",
    ),
    "a mark never turns stale": ("cache", "if length < marked and", "if length < 0 and"),
    "a mark turns stale though nothing below it was written": (
        "cache",
        "if length < marked and",
        "if length <= marked and",
    ),
    "a mark turns stale by rows that take nothing in": ("cache", "taken is None or taken[row]", "True"),
    "a mark does not copy the windows": ("ring", "() if self.spec.window is None else (", "() if True else ("),
    "gathering leaves the lengths behind": (
        "clock",
        '("length", "floor", "kept"):\n            setattr(self, name, keep',
        '("floor", "kept"):\n            setattr(self, name, keep',
    ),
    "a reset leaves the leased state": ("ring", "        self.entry.zero_()\n", ""),
    "a log has one slot too few": ("spec", "return min(sizes, default=None)", "return min(sizes) - (self.window == 0)"),
    "rows read again what is folded": (
        "replay",
        "old_gates * ahead[..., None]",
        "old_gates * (ahead | True)[..., None]",
    ),
    "the state is folded from one entry later": (
        "replay",
        "replay.floor + replay.most)",
        "replay.floor + replay.most + 1)",
    ),
    "every row is folded over the most": ("replay", "replay.fold if isinstance(replay.fold, Tensor)", "None if True"),
    "a long pass leaves the state where it was": ("replay", "if states is not None:", "if False:"),
    "the log is not written": ("replay", "        ring.put(new, step)\n", "        pass\n"),
    "counts forget what is read again": ("replay", "count = None if count is None else count + lag", "pass"),
    "folding is not noted": ("cache", "self.clock.folded(replay)", "pass"),
    "the host does not note folding": (
        "clock",
        "self.floors, self._seen = self._bases,",
        "self.floors, self._seen = self.floors,",
    ),
    "the state may move past the tokens before the pass": ("clock", "min(after - slack, length)", "after - slack"),
    "what is kept for good can be taken back": (
        "clock",
        "back = 0 if step.lasting else self.slack\n            floor.copy_",
        "back = self.slack\n            floor.copy_",
    ),
    "a pass kept for good is logged": ("cache", "replay=None if plain else replay", "replay=replay"),
    "a lasting state is folded as far as others": ("clock", "length if lasting else max", "max"),
    "a round keeps all it brought": (
        "cache",
        "        if self._draft is None:\n            self.clock.close",
        "        if True:\n            self.clock.close",
    ),
    "a round keeps one more": ("draft", "keep = [int(n) for", "keep = [int(n) + 1 for"),
    "an open round can be marked": (
        "cache",
        "        if self._draft is not None:\n            return self._refuse_round()\n",
        "",
    ),
    "the device folds too far": ("clock", "torch.minimum(room, step.start)", "torch.minimum(room + 1, step.start)"),
    "tips stay valid where rows went back": (
        "cache",
        "        self._tips = False\n        self._base",
        "        self._base",
    ),
    "tips stay valid where a round kept tokens": (
        "cache",
        'with tokens kept."""\n        self._tips = False',
        'with tokens kept."""',
    ),
    "a round moves the tips": ("cache", "if self._draft is None:  # else they", "if True:  # else they"),
    "a long pass leaves the tips where they were": ("replay", "if step.tip is not None:", "if step.tip is False:"),
    "a step takes an old tip": ("replay", "if step.tip and state.tip", "if state.tip"),
}


def load(name: str, mutant: tuple[str, str, str] | None) -> SimpleNamespace:
    """The core as a package of another name, with one line of it changed."""
    root = Path(statecache.__file__).parent
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = []  # type: ignore[attr-defined]
    for module in MODULES:
        file = root / module.replace(".", "/")
        source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
        if mutant and mutant[0] == module:
            assert source.count(mutant[1]) == 1, f"{mutant[1]!r} stands {source.count(mutant[1])} times in {module}"
            source = source.replace(mutant[1], mutant[2])
        spec = importlib.util.spec_from_loader(f"{name}.{module}", loader=None, is_package=file.is_dir())
        assert spec is not None
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        exec(compile(source.replace("statecache.", f"{name}."), spec.name, "exec"), loaded.__dict__)
    return SimpleNamespace(
        **{m: sys.modules[f"{name}.{m}"] for m in ("cache", "errors", "ring", "spec", "clock", "replay")}
    )


@pytest.fixture
def core(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    name = "mutant"
    yield load(name, request.param)
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]


SELDOM: list[list[oracle.Op]] = (
    [  # what chance seldom strings together: writes below a mark, a chunk where copies stood
        [("step", 9, (0,)), ("checkpoint", 0, (0,)), ("rollback", 0, (2,)), what, ("restore", 0, (0,))]
        for what in (("speculate", 2, (0,)), ("speculate", 5, (0,)), ("ragged", 3, (0,)))
    ]
    + [[("step", 1, (0,))] * 3 + [("rollback", 0, (2,)), ("step", 2, (0,)), ("rollback", 0, (1,))]]
)


def schedules(n: int) -> Iterator[list[oracle.Op]]:
    rnd = random.Random(7)
    what = (
        ["step"] * 5
        + ["ragged"] * 2
        + ["rollback"] * 4
        + ["speculate"] * 3
        + ["lasting"]
        + ["checkpoint", "restore", "restore", "gather", "reset"]
    )
    for _ in range(n):
        length = rnd.randint(4, 25)
        number = [1, 1, 1, 2, 3, rnd.randint(0, 29)]  # mostly steps of a few tokens, within the slack
        yield [
            (rnd.choice(what), rnd.choice(number), tuple(rnd.randint(0, 9) for _ in range(3))) for _ in range(length)
        ]


def survives(core: SimpleNamespace, n: int) -> bool:
    for i, schedule in [*itertools.product(range(8), SELDOM), *enumerate(schedules(n))]:
        try:
            oracle.run(core, schedule, fixed=bool(i & 1), leased=bool(i & 2), on_device=bool(i & 4))
        except Exception:
            return False
    return True


@pytest.mark.parametrize("core", [None], indirect=True)
def test_the_core_itself_survives(core: SimpleNamespace) -> None:
    assert survives(core, 200)


@pytest.mark.parametrize("core", MUTANTS.values(), ids=MUTANTS.keys(), indirect=True)
def test_mutant_is_killed(core: SimpleNamespace) -> None:
    assert not survives(core, 400)
