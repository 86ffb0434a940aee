"""What a decoded token costs, in counts: Python calls, kernels, reads and uploads, each beside the number asked of it.

    python benchmarks/counts.py

Tiny prepared models on the CPU. Counts are the same on every run; only the one of a time, marked so, is not. The exit
status says whether every number is what is asked.

B rows, T new tokens. A kernel is an operator that torch dispatches, views apart. A read waits for the device (`tolist`,
`item`, `bool`); an upload copies a list of the host's to it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import statecache as sc
from shapes import table
from statecache.decode.report import Report

sys.path.append(str(Path(__file__).parents[1] / "tests" / "conformance"))
import families

HOME = Path(sc.__file__).parent
THEIRS = Path(transformers.__file__).parent
VIEWS = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "permute", "expand"}
VIEWS |= {"split", "split_with_sizes", "unbind", "detach", "alias"}
READS = ("tolist", "item", "__bool__", "__int__", "__index__", "__float__")
SLACK, CAPACITY, WARM = 8, 128, 12
ROWS, MARKS = 256, 100


@dataclass(frozen=True)
class Measure:
    """A number, what is asked of it, and whether it is that."""

    what: str
    value: float
    asked: str
    met: bool

    def row(self) -> list[str]:
        return [self.what, f"{self.value:,.4g}", self.asked, "PASS" if self.met else "FAIL"]


def below(what: str, value: float, limit: float) -> Measure:
    return Measure(what, value, f"under {limit:g}", value < limit)


def at_most(what: str, value: float, best: float, limit: float) -> Measure:
    asked = f"{best:g}" if best == limit else f"{best:g}, at most {limit:g}"
    return Measure(what, value, asked, value <= limit)


# ---- what is counted


def owner(depth: int) -> str | None:
    """The file of the innermost caller that is ours, below statecache; or "transformers"; or nobody's."""
    frame: Any = sys._getframe(depth)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(HOME):
            return file.relative_to(HOME).as_posix()
        if file.is_relative_to(THEIRS):
            return "transformers"
        frame = frame.f_back
    return None


class Kernels(TorchDispatchMode):
    """Counts the operators of its block that are no views, by the file that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.by: Counter[str | None] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.by[owner(2)] += 1
        return func(*args, **(kwargs or {}))


class Crossings:
    """Counts what goes between host and device in its block, on behalf of statecache or the model."""

    def __init__(self) -> None:
        self.reads = self.uploads = 0
        self._inside = False  # one that is made of others counts once

    @contextmanager
    def counting(self) -> Iterator[None]:
        own = {(Tensor, name): getattr(Tensor, name) for name in READS}
        own |= {(torch, name): getattr(torch, name) for name in ("tensor", "as_tensor")}
        for (where, name), call in own.items():
            setattr(where, name, self._counted(call, upload=where is torch))
        try:
            yield
        finally:
            for (where, name), call in own.items():
                setattr(where, name, call)

    def _counted(self, call: Any, upload: bool) -> Any:
        def counted(first: Any, *args: Any, **kwargs: Any) -> Any:
            crosses = not (self._inside or (upload and isinstance(first, Tensor))) and owner(2) is not None
            self.reads += crosses and not upload
            self.uploads += crosses and upload
            before, self._inside = self._inside, True
            try:
                return call(first, *args, **kwargs)
            finally:
                self._inside = before

        return counted


@cache
def model(name: str) -> Any:
    return sc.prepare(families.build(name)[0])


def decoding(name: str, rows: int, ragged: bool = False, **options: Any) -> Callable[[], object]:
    """A step of one token, after a prompt and some steps; the last row is idle if they are to be ragged."""
    filling, made = model(name), sc.StateCache(model(name).config, **options)
    given = {families.cache_arg(filling): made, "use_cache": True}
    ids = torch.ones(rows, 32, dtype=torch.long)
    filling(ids, **given)
    for _ in range(WARM):
        filling(ids[:, :1], **given)
    mask = torch.tensor([[1]] * (rows - 1) + [[0]]) if ragged else None

    def step() -> object:
        return filling(ids[:, :1], attention_mask=mask, **given)

    step()
    return step


def kernels(name: str, rows: int = 1, ragged: bool = False, **options: Any) -> Counter[str | None]:
    step = decoding(name, rows, ragged, **options)
    with Kernels() as seen:
        step()
    return seen.by


# ---- the measures


def walk() -> list[Measure]:
    """Our functions that one Mamba-2 layer enters for one token, and how often the next one is in another file."""
    step, files = decoding("mamba2", 1), []
    mixer = model("mamba2").backbone.layers[1].mixer

    def entered(frame: Any, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(HOME):
            files.append(file)

    hooks = [
        mixer.register_forward_pre_hook(lambda *_: sys.setprofile(entered)),
        mixer.register_forward_hook(lambda *_: sys.setprofile(None)),
    ]
    try:
        step()
    finally:
        sys.setprofile(None)
        for hook in hooks:
            hook.remove()
    moves = sum(a != b for a, b in pairwise(files))
    return [
        below("a Mamba-2 layer, one token: Python calls", len(files), 20),
        below("the same: moves between files", moves, 8),
    ]


def ragged() -> list[Measure]:
    total = kernels("mamba2", 2, ragged=True, slack=SLACK).total()
    return [below(f"a ragged mamba2 step, slack {SLACK}: kernels", total, 260)]


def clock() -> list[Measure]:
    return [
        at_most(f"a mamba2 step, slack {SLACK}: the clock's kernels", kernels("mamba2", slack=SLACK)["clock.py"], 3, 3)
    ]


def lookup() -> list[Measure]:
    """Crossings of a round that looks up what followed, over four rows that repeat themselves: every draft is right."""
    prompts = torch.arange(1, 33).view(4, 8).repeat(1, 4)
    reports: list[Report] = []
    crossings, repeating = Crossings(), model("qwen3_5").register_forward_hook(_repeats, with_kwargs=True)
    try:
        with crossings.counting():
            sc.generate(model("qwen3_5"), prompts, max_new_tokens=241, lookup=3, report=reports.append)
    finally:
        repeating.remove()
    rounds = reports[0].forwards - 1
    return [
        at_most("a lookup round of four rows: reads", crossings.reads / rounds, 1, 2),
        at_most("the same: uploads", crossings.uploads / rounds, 1, 2),
    ]


def _repeats(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Have a model say that 1 to 8 come one after the other, and 9 to 16, and so on."""
    ids = kwargs["input_ids"] if not args else args[0]
    following = (ids - 1) // 8 * 8 + ids % 8 + 1
    out.logits = torch.nn.functional.one_hot(following[:, -out.logits.shape[1] :], out.logits.shape[-1]).float()
    return out


def marks() -> list[Measure]:
    """Time of an open and a close with many marks alive; the best of several, on this machine."""
    from statecache.spec import LayerSpec, ModelSpec, StateSpec
    from statecache.states import States

    spec = ModelSpec((LayerSpec(0, "test", (StateSpec("key", "attention", (1, 1), None, axis=1),)),))
    states = States(spec, slack=0, rows=ROWS, dtype=torch.float32, device="cpu")
    states.close(states.open(4))
    alive = [states.checkpoint() for _ in range(MARKS)]
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(10):
            states.close(states.open(1))
        best = min(best, (time.perf_counter() - began) / 10)
    return [below(f"open and close, {ROWS} rows, {len(alive)} marks: milliseconds (a time)", best * 1e3, 0.1)]


def fixed() -> list[Measure]:
    """How many kernels a fixed cache with slack takes, over those of one that grows."""
    found = []
    for name in ("qwen3_5", "mamba2"):
        dear = kernels(name, capacity=CAPACITY, slack=SLACK).total()
        for beside, options in ((f"growing, slack {SLACK}", {"slack": SLACK}), ("growing, no slack", {})):
            ratio = dear / kernels(name, **options).total()
            found.append(at_most(f"{name}, fixed, slack {SLACK}: kernels over those of {beside}", ratio, 1.15, 1.15))
    return found


MEASURES = {f.__name__: f for f in (walk, ragged, clock, lookup, marks, fixed)}


def measured(name: str) -> list[Measure]:
    """A measure; or why there is none."""
    try:
        return MEASURES[name]()
    except ImportError as error:
        return [Measure(f"{name}: {error}", float("nan"), "to be measured", False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="this measure; may be given again")
    opts = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    gc.disable()
    found = [measure for name in opts.only or MEASURES for measure in measured(name)]
    print(table(["measure", "value", "asked", ""], [measure.row() for measure in found]))
    sys.exit(not all(measure.met for measure in found))


if __name__ == "__main__":
    main()
