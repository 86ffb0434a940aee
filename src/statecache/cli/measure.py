"""One model with several caches, in rounds of all of them: a ratio stands where the machine is not quiet.

B rows, T new tokens.
"""

import inspect
import platform
import re
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor

import statecache as sc
from statecache.models.names import cache_name, given_cache

WARM = 4  # tokens that the round decodes which is not counted


@dataclass(frozen=True)
class Way:
    """A cache, and whether the model is prepared. `make`: from a configuration; None leaves it to the model."""

    name: str
    prepared: bool
    make: Callable[[Any], Any]


WAYS = (
    Way("transformers' own", False, lambda config: None),
    Way("StateCache", False, sc.StateCache),
    Way("StateCache, prepared", True, sc.StateCache),
)


@dataclass
class Timing:
    """What one way took, in seconds, round by round; `nbytes`: its cache's bytes at the end; `why`: it does not run."""

    way: Way
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    nbytes: int = 0
    why: str | None = None


@dataclass(frozen=True)
class Ratio:
    """The median of paired rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether the middle half of the rounds does not say which of the two is faster."""
        return self.low <= 1 <= self.high


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """How long `ours` took beside `theirs`, round by round; two rounds at least."""
    paired = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(paired, n=4, method="inclusive")
    return Ratio(median, low, high)


def measure(model: Any, ids: Tensor, new: int, rounds: int) -> list[Timing]:
    """Take in all of ids (B, T) but the last `new`, then these one by one, in each way.

    `rounds` times, after one that is not counted. A way that fails is left out of later rounds, and says why. The model
    is as it was afterwards.
    """
    timings, prompt = [Timing(way) for way in WAYS], ids.shape[1] - new
    for turn in range(rounds + 1):
        alive = [timing for timing in timings if timing.why is None]
        first = turn % max(len(alive), 1)  # no way always follows the same one
        for timing in alive[first:] + alive[:first]:
            try:
                if turn:
                    _run(model, timing, ids, prompt)
                else:
                    _run(model, Timing(timing.way), ids[:, : prompt + WARM], prompt)
            except Exception as error:  # the others are still worth measuring
                timing.why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            finally:
                sc.unprepare(model)
    return timings


def _run(model: Any, timing: Timing, ids: Tensor, prompt: int) -> None:
    """One round: the first `prompt` of ids (B, T) at once, then one by one."""
    if timing.way.prepared:
        sc.prepare(model)
    reader = Reader(model, timing.way.make(model.config))
    began = _now(model)
    reader.feed(ids[:, :prompt])
    filled = _now(model)
    for at in range(prompt, ids.shape[1]):
        reader.feed(ids[:, at : at + 1])
    timing.decode.append(_now(model) - filled)
    timing.prefill.append(filled - began)
    timing.nbytes = sum(storages(reader.cache).values())


class Reader:
    """A model and the cache that it fills, its own where none is given."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache, self.at = model, cache, 0
        taken = inspect.signature(model.forward).parameters
        self.name = cache_name(model.forward)
        self.positioned = "position_ids" in taken
        self.always = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})

    @torch.inference_mode()
    def feed(self, ids: Tensor) -> None:
        """Take in the next tokens (B, T)."""
        end = self.at + ids.shape[1]
        given: dict[str, Any] = {} if self.cache is None else {self.name: self.cache}
        if self.positioned:
            given["position_ids"] = torch.arange(self.at, end, device=ids.device).expand(len(ids), -1)
        out = self.model(input_ids=ids, **given, **self.always)
        self.cache, self.at = given_cache(out), end


def _now(model: Any) -> float:
    """Seconds on a clock, once the device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def storages(root: Any) -> dict[int, int]:
    """Address and bytes of every tensor storage that can be reached from an object."""
    found: dict[int, int] = {}
    seen, todo = set[int](), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType | MethodType | weakref.ref | str):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset | weakref.WeakSet):
            todo += list(thing)
        todo += list(getattr(thing, "__dict__", {}).values())
        todo += [getattr(thing, slot, None) for slot in getattr(type(thing), "__slots__", ()) if slot[:2] != "__"]
    return found


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
