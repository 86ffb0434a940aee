"""Rows of token ids as the oracle of prepared models, and an interpreter that runs a schedule on both side by side.

The logits of every token have to be those of one full forward of the unprepared model on its row alone, in float64.

B rows, T new tokens, V words.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import families
import tiny_models
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import statecache as sc
from statecache import errors

ROWS, CAPACITY, V = 3, 24, 61
TOLERANCE = 1e-8
JUNK = 7  # the id of every pad: a word like any other
Op = tuple[str, int, tuple[int, ...]]  # what, a number, a number a row: each is brought into range when it is run

SIZE = {"vocab_size": V, "hidden_size": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
MIXED = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {  # one of every operator, and attention through windows
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 4, "num_hidden_layers": 2},
    "qwen3_5": {**HEADS, **MIXED, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "lfm2": {**HEADS, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "minimax": {**HEADS, **MIXED, "experts_implementation": "eager"},  # the others take no float64
    "falcon_h1": {**HEADS, "num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "zamba": {
        **HEADS,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "gemma3_text": {**HEADS, "head_dim": 8, "sliding_window": 5},
}


class Precise(TorchFunctionMode):
    """Compute in float64 also where a model's own code asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@dataclass
class Models:
    """One model as it is, and one that is prepared."""

    plain: Any
    prepared: Any
    cache_name: str

    def __post_init__(self) -> None:
        self.full = lru_cache(4096)(self._full)
        self.layers = next(
            m.layers for m in self.prepared.modules() if isinstance(vars(m)["_modules"].get("layers"), nn.ModuleList)
        )

    def _full(self, ids: tuple[int, ...]) -> Tensor:
        """Logits (T, V) of one forward of one row."""
        with torch.no_grad(), Precise():
            return self.plain(torch.tensor([ids]), use_cache=False).logits[0]

    def feed(self, cache: sc.StateCache, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, T, V) of the prepared model."""
        with torch.no_grad(), Precise():
            return self.prepared(ids, attention_mask=mask, use_cache=True, **{self.cache_name: cache}).logits

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """A pass gives up in front of the last layer."""
        hook = self.layers[-1].register_forward_pre_hook(_interrupt)
        try:
            yield
        finally:
            hook.remove()


@cache
def build(name: str) -> Models:
    """A tiny pair of one family, with weights that make every state matter."""
    if name in families.FAMILIES:
        plain = families.build(name, **SIZE, **MODELS[name])[0]
    else:
        plain = copy.deepcopy(tiny_models.build(name, **SIZE, **MODELS[name]))
    plain = precise(plain)
    return Models(plain, sc.prepare(copy.deepcopy(plain)), families.cache_arg(plain))


def precise(model: Any) -> Any:
    """The model in float64, with what it made in float32 made again."""
    for module in model.double().modules():
        if hasattr(module, "decay_factors"):
            with Precise():
                factors = module.decay_factors(module.slope_rate)
            module.query_decay, module.key_decay, module.diagonal_decay = factors
    return model


class Interruption(Exception):
    pass


def _interrupt(*_: Any) -> None:
    raise Interruption


@dataclass
class Mark:
    mark: Any
    rows: list[list[int]]
    floor: list[int]
    stale: bool = False


@dataclass
class Subject:
    """A cache under test, the ids that its rows hold, and how far each may go back."""

    models: Models
    cache: sc.StateCache
    rows: list[list[int]]
    floor: list[int]
    marks: list[Mark] = field(default_factory=list)
    compiled: bool = False  # feed it in the form of compiled code, where the host knows no length

    @property
    def slack(self) -> int:
        return self.cache.slack

    def empty(self, rows: int) -> None:
        self.rows, self.floor = [[] for _ in range(rows)], [0] * rows

    def stale(self) -> None:
        for mark in self.marks:
            mark.stale = True

    def overflows(self, taken: list[int]) -> bool:
        limit = self.cache.spec.full_at(self.cache.capacity, self.slack)
        return limit is not None and any(len(row) + n > limit for row, n in zip(self.rows, taken, strict=True))

    def opened(self, taken: list[int]) -> None:
        """A pass has begun: states are folded no farther than the ends of their rows, and slots are written over."""
        for b, (row, n) in enumerate(zip(self.rows, taken, strict=True)):
            self.floor[b] = max(self.floor[b], min(len(row) + n - self.slack, len(row)))
        for mark in self.marks:
            mark.stale |= any(len(r) < len(m) and n for r, m, n in zip(self.rows, mark.rows, taken, strict=False))

    def keep(self, new: list[list[int]]) -> None:
        for b, ids in enumerate(new):
            self.rows[b] = self.rows[b] + ids
            self.floor[b] = max(self.floor[b], len(self.rows[b]) - self.slack)

    def feed(self, new: list[list[int]], width: int, rnd: random.Random, side: str) -> None:
        """Feed each row its new ids, at most `width` of them, and compare every logit with the oracle's."""
        at = [_columns(len(ids), width, side, rnd) for ids in new]
        ids, mask = torch.full((len(new), width), JUNK), torch.zeros(len(new), width, dtype=torch.long)
        for b, columns in enumerate(at):
            ids[b, columns], mask[b, columns] = torch.tensor(new[b], dtype=torch.long), 1
        whole = all(len(n) == width for n in new)
        given = None if whole and rnd.random() < 0.7 else mask
        if given is not None and rnd.random() < 0.5:  # as generate has it: a column for what came before, too
            given = torch.cat([torch.ones(len(new), 3, dtype=torch.long), given], 1)
        with _as_compiled(self.compiled and not self.overflows([len(n) for n in new])):
            logits = self.models.feed(self.cache, ids, given)
        for b, (columns, held) in enumerate(zip(at, self.rows, strict=True)):
            if columns:
                want = self.models.full((*held, *new[b]))[len(held) :]
                error = (logits[b, columns] - want).abs().max().item() / max(1.0, want.abs().max().item())
                assert error < TOLERANCE, f"row {b}: {len(new[b])} tokens after {len(held)} are off by {error:.1e}"


def _columns(n: int, width: int, side: str, rnd: random.Random) -> list[int]:
    """Where the n tokens of a row stand among `width` columns."""
    if side == "inside":
        return sorted(rnd.sample(range(width), n))
    return list(range(n)) if side == "right" else list(range(width - n, width))


@contextmanager
def _as_compiled(on: bool) -> Iterator[None]:
    compiling = torch.compiler.is_compiling
    if on:
        torch.compiler.is_compiling = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_compiling = compiling


def run(models: Models, schedule: list[Op], *, slack: int, room: str) -> None:
    """Run a schedule, and assert after every operation that the cache agrees with lists. `room`: a key of ROOMS."""
    fixed = room != "growing"
    rnd = random.Random(0)
    allocated = {"capacity": CAPACITY, "rows": ROWS, "dtype": torch.float64, "device": "cpu"} if fixed else {}
    first = sc.StateCache(models.plain.config, slack=slack, **allocated)
    addresses: list[int] = []
    subjects = [Subject(models, first, [], [], compiled=room == "compiled")]
    subjects[0].empty(ROWS)
    if not fixed:
        schedule = [("feed", 2, (1,)), *schedule]  # rows are unknown before
    for what, number, each in schedule:
        s = subjects[number % len(subjects)]
        per_row = [each[b % len(each)] for b in range(len(s.rows))]
        if what == "fork":
            if len(subjects) < ROWS:
                other = Subject(models, s.cache.fork(), copy.deepcopy(s.rows), list(s.floor), compiled=s.compiled)
                subjects.append(other)
        elif what == "gather":
            most = ROWS if fixed else ROWS + 2
            index = [n % len(s.rows) for n in (*per_row, *per_row)[: 1 + number % most]]
            s.cache.gather(torch.tensor(index))
            s.rows, s.floor = [list(s.rows[i]) for i in index], [s.floor[i] for i in index]
            s.stale()
        else:
            OPERATIONS[what](s, number, per_row, rnd)
        for other in subjects:
            assert other.cache.lengths.tolist() == [len(row) for row in other.rows]
        if not addresses and any(subjects[0].rows):  # once a prepared model has filled it
            addresses = [b.data_ptr() for b in first.buffers()]
    if fixed and addresses:
        assert addresses == [b.data_ptr() for b in first.buffers()], "a fixed buffer moved"


ROOMS = ("growing", "fixed", "compiled")


def _draw(counts: list[int], rnd: random.Random) -> list[list[int]]:
    return [[rnd.randrange(1, V) for _ in range(n)] for n in counts]


def _feed(s: Subject, number: int, per_row: list[int], rnd: random.Random, ragged: bool = False) -> None:
    width = 1 + number % 12
    if not any(s.rows) and s.cache.capacity is None and number % 3 == 0:
        rows = 1 + number % 4  # an empty cache that grows takes any number of rows
        if rows != len(s.rows):
            s.stale()
        s.empty(rows)
        per_row = (per_row * rows)[:rows]
    taken = [min(n, width) if ragged else width for n in per_row]
    new, side = _draw(taken, rnd), ("left", "right", "inside")[number // 12 % 3]
    if s.overflows(taken):
        refused(errors.CapacityError, s.feed, new, width, rnd, side)
        return
    s.feed(new, width, rnd, side)
    s.opened(taken)
    s.keep(new)


def _ragged(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    _feed(s, number, per_row, rnd, ragged=True)


def _speculate(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    if not s.slack:
        refused(errors.SlackError, s.cache.speculate, 1)
        return
    width = 1 + number % s.slack
    taken = [min(n, width) if number % 2 else width for n in per_row]
    new, side = _draw(taken, rnd), rnd.choice(["left", "right", "inside"])
    accepted = [rnd.randint(0, n) for n in taken]
    ending = rnd.choice(["commit", "commit", "commit", "nothing", "before", "inside", "after"])
    if s.overflows(taken):
        with s.cache.speculate(width):
            refused(errors.CapacityError, s.feed, new, width, rnd, side)
        return
    try:
        with s.cache.speculate(s.slack if number % 3 else width) as draft:
            if ending == "before":
                raise Interruption
            if ending == "inside":
                with s.models.interrupted():
                    s.feed(new, width, rnd, side)
            s.feed(new, width, rnd, side)
            refused(errors.StepError, s.cache.checkpoint)
            refused(errors.RowsError, draft.commit, torch.tensor([n + 1 for n in taken]))
            if ending == "after":
                raise Interruption
            if ending == "commit":
                draft.commit(torch.tensor(accepted))
    except Interruption:
        pass
    if ending != "before":
        s.opened(taken)
    if ending == "commit":
        s.keep([ids[:n] for ids, n in zip(new, accepted, strict=True)])


def _rollback(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    forget = [min(n % (s.slack + 2), len(row)) for n, row in zip(per_row, s.rows, strict=True)]
    left = [len(row) - n for n, row in zip(forget, s.rows, strict=True)]
    if all(not n or (s.slack and to >= least) for n, to, least in zip(forget, left, s.floor, strict=True)):
        s.cache.rollback(torch.tensor(forget))
        s.rows = [row[:to] for row, to in zip(s.rows, left, strict=True)]
    else:
        refused(errors.RollbackError, s.cache.rollback, torch.tensor(forget))


def _checkpoint(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    s.marks.append(Mark(s.cache.checkpoint(), list(s.rows), list(s.floor)))


def _restore(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    if not s.marks:
        return
    mark = s.marks[sum(per_row) % len(s.marks)]
    if mark.stale:
        refused(errors.StaleMarkError, s.cache.restore, mark.mark)
    else:
        s.cache.restore(mark.mark)
        s.rows, s.floor = list(mark.rows), list(mark.floor)


def _reset(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    s.cache.reset()
    s.empty(len(s.rows) if s.cache.capacity is None else ROWS)
    s.stale()


def _interrupted(s: Subject, number: int, per_row: list[int], rnd: random.Random) -> None:
    """A pass that gives up half-way: nothing goes on but a restore or a reset."""
    width = 1 + number % 4
    new = _draw([width] * len(s.rows), rnd)
    if s.overflows([width] * len(s.rows)):
        return
    with s.models.interrupted():
        refused(Interruption, s.feed, new, width, rnd, "right")
    s.opened([width] * len(s.rows))
    refused(errors.StepError, s.feed, new, width, rnd, "right")
    for operation in (s.cache.checkpoint, s.cache.fork):
        refused(errors.StepError, operation)
    refused(errors.StepError, s.cache.rollback, 0)
    mark = s.marks[sum(per_row) % len(s.marks)] if s.marks else None
    _restore(s, number, per_row, rnd)
    if mark is None or mark.stale:
        _reset(s, number, per_row, rnd)


OPERATIONS = {
    "feed": _feed,
    "ragged": _ragged,
    "speculate": _speculate,
    "rollback": _rollback,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "reset": _reset,
    "interrupted": _interrupted,
}


def refused(error: type[Exception], call: Any, *args: Any) -> None:
    try:
        call(*args)
    except error:
        return
    raise AssertionError(f"{call.__name__} was not refused")
