"""Rows of token ids as the oracle of a model's cache, and an interpreter that runs a schedule on both side by side.

The logits of every token have to be those of one full forward of the unprepared model on its row alone, in float64. The
model that fills the cache is a prepared one; or the unprepared model itself, as far as its own code goes.

B rows, T new tokens, V words.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import attempts
import families
import tiny_models
import torch
from held import Held
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import statecache as sc
from interruption import Interruption
from statecache import errors

ROWS, CAPACITY, V = 3, 24, 61
TOLERANCE = 1e-8
JUNK = 7  # the id of every pad: a word like any other
Op = tuple[str, int, tuple[int, ...]]  # what, a number, a number a row: each is brought into range when it is run

SIZE = {"vocab_size": V, "hidden_size": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
MIXED = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
INKLING = {
    **HEADS,
    "num_hidden_layers": 2,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "head_dim": 8,
    "sliding_window_size": 5,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "experts_implementation": "eager",
}
MODELS: dict[str, dict[str, Any]] = {  # one of every operator, and attention through windows
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 4, "num_hidden_layers": 2},
    "qwen3_5": {**HEADS, **MIXED, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    "kimi_linear": {
        **HEADS,
        **MIXED,
        "num_key_value_heads": 2,
        "linear_head_dim": 4,
        "linear_num_heads": 2,
        "kv_lora_rank": 6,
        "qk_rope_head_dim": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "experts_implementation": "eager",
    },
    "lfm2": {**HEADS, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "conv_bias": True},
    "lfm3": {
        **HEADS,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "conv", "full_attention"],
        "head_dim": 8,
        "sliding_window": 5,
    },
    "qwen4_exp": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "indexed_attention"],
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "ple_layer_ids": [1],
        "hc_lowrank": 4,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 0]},
        "experts_implementation": "eager",
    },
    "minimax": {**HEADS, **MIXED, "experts_implementation": "eager"},  # the others take no float64
    "falcon_h1": {**HEADS, "num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "zamba": {
        **HEADS,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "recurrent_gemma": {
        **HEADS,
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "attention", "recurrent"],
        "lru_width": 12,
        "attention_window_size": 5,
    },
    "zaya": {
        **{key: value for key, value in HEADS.items() if key != "intermediate_size"},
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "attention_bias": True,
        "experts_implementation": "eager",
    },
    "gemma3_text": {**HEADS, "head_dim": 8, "sliding_window": 5},
    "dory": {**HEADS, "head_dim": 8, "sliding_window": 5},
    "inkling+scaled": {**INKLING, "mlp_layer_types": ["dense", "sparse"]},
    "inkling2": {**{k: v for k, v in INKLING.items() if k != "intermediate_size"}, "unpadded_vocab_size": V},
    "inkling2_loop": {
        **{k: v for k, v in INKLING.items() if k != "intermediate_size"},
        "unpadded_vocab_size": V,
        "num_hidden_layers": 3,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
        "loop_layer_index_end": 2,
    },
}
MODELS = {name: MODELS[name] for name in MODELS if name in families.FAMILIES or name in tiny_models.MODELS}

ROUNDED: dict[str, dict[str, int]] = {  # of those that choose nothing, in sizes that codes have room for
    "qwen3_5": {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "falcon_h1": {"mamba_d_state": 8},
    "mamba2": {"state_size": 8},
    "recurrent_gemma": {},
    "gemma3_text": {},
}

# one of each way to write: minimax takes its own cache, and recurrent_gemma none
UNMODIFIED = tuple(
    name for name in MODELS if name not in ("minimax", "recurrent_gemma", "inkling2", "bailing_hybrid", "lfm3")
)
TOKEN_BY_TOKEN = ("mamba", "zamba")  # what their own code takes on a filled cache


class Precise(TorchFunctionMode):
    """Compute in float64 also where a model's own code asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@dataclass
class Models:
    """One model as it is, and the one that fills the cache."""

    plain: Any
    filling: Any
    cache_name: str
    prepared: bool = True  # else all rows are fed, and go back, alike
    token_by_token: bool = False  # on a filled cache
    dtype: torch.dtype = torch.float64  # of the one that fills it

    def __post_init__(self) -> None:
        self.full = lru_cache(4096)(self._full)
        self.layers = next(
            m.layers for m in self.filling.modules() if isinstance(vars(m)["_modules"].get("layers"), nn.ModuleList)
        )

    def _full(self, ids: tuple[int, ...]) -> Tensor:
        """Logits (T, V) of one forward of one row."""
        with torch.no_grad(), Precise():
            return self.plain(torch.tensor([ids]), use_cache=False).logits[0]

    def feed(self, cache: sc.StateCache, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Logits (B, T, V) of the model that fills the cache."""
        with torch.no_grad(), Precise() if self.dtype == torch.float64 else nullcontext():
            return self.filling(ids, attention_mask=mask, use_cache=True, **{self.cache_name: cache}).logits

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
    plain = precise(_drawn(name))
    return Models(plain, sc.prepare(copy.deepcopy(plain)), families.cache_arg(plain))


def _off(logits: Tensor, want: Tensor) -> float:
    """How far logits are off, by the largest."""
    return (logits - want).abs().max().item() / max(1.0, want.abs().max().item())


@cache
def build_rounding(name: str) -> Models:
    """The same with a prepared model in float32, as stores that round are made for."""
    plain = precise(_drawn(name, **ROUNDED[name]))
    return Models(plain, sc.prepare(_drawn(name, **ROUNDED[name])), families.cache_arg(plain), dtype=torch.float32)


def _drawn(name: str, **sizes: int) -> Any:
    """A model in float32, the same each time."""
    if name in families.FAMILIES:
        return families.build(name, **{**SIZE, **MODELS[name], **sizes})[0]
    return copy.deepcopy(tiny_models.build(name, **{**SIZE, **MODELS[name], **sizes}))


@cache
def build_unmodified(name: str) -> Models:
    """The same with the unprepared model on both sides."""
    plain = build(name).plain
    return Models(plain, plain, families.cache_arg(plain), prepared=False, token_by_token=name in TOKEN_BY_TOKEN)


def precise(model: Any) -> Any:
    """The model in float64, with what it made in float32 made again."""
    for module in model.double().modules():
        if hasattr(module, "decay_factors"):
            with Precise():
                factors = module.decay_factors(module.slope_rate)
            module.query_decay, module.key_decay, module.diagonal_decay = factors
    return model


def _interrupt(*_: Any) -> None:
    raise Interruption


@dataclass
class Mark:
    """A mark, and what was held when it was taken."""

    mark: Any
    held: Held
    stale: bool = False
    doubtful: bool = False  # whether it may be refused as stale, if what it gives back is exact where it is not

    def overwritten(self) -> None:
        """What it stands for is gone; of an empty cache nothing was there."""
        if any(self.held.rows):
            self.stale = True
        self.doubtful = True


@dataclass(frozen=True)
class Batch:
    """New ids of each row, and where they stand among pads: `columns` by row, ids (B, T), and the mask or None."""

    new: list[list[int]]
    columns: list[list[int]]
    ids: Tensor
    mask: Tensor | None

    @property
    def taken(self) -> list[int]:
        return [len(ids) for ids in self.new]


@dataclass
class Subject:
    """A cache under test, what it should hold, and the marks taken of it."""

    models: Models
    cache: sc.StateCache
    held: Held
    marks: list[Mark] = field(default_factory=list)
    compiled: bool = False  # feed it in the form of compiled code, where the host knows no length
    interruptions: int = 0  # operations that ended early
    loaded: bool = False  # from a file, and no pass has begun since: the first of a prepared model makes marks stale
    tolerance: float = TOLERANCE
    stores: dict[str, str] = field(default_factory=dict)  # those of its room that round

    @property
    def slack(self) -> int:
        return self.cache.slack

    @property
    def rows(self) -> list[list[int]]:
        return self.held.rows

    @property
    def copied(self) -> bool:
        """Whether it goes back only to where a recurrence was copied."""
        return not self.models.prepared and not self.cache.is_croppable

    def overflows(self, taken: list[int], held: Held | None = None) -> bool:
        limit = self.cache.spec.full_at(self.cache.capacity, self.slack)
        lengths = (held or self.held).lengths()
        return limit is not None and any(n + t > limit for n, t in zip(lengths, taken, strict=True))

    def longer_marks(self, taken: list[int]) -> list[Mark]:
        """Marks of more tokens than rows hold which now take some in: what they stand for is written over."""
        lengths = self.held.lengths()
        return [
            mark
            for mark in self.marks
            if any(n < m and t for n, m, t in zip(lengths, mark.held.lengths(), taken, strict=False))
        ]

    def opened(self, taken: list[int]) -> None:
        """A pass has begun."""
        for mark in self.marks if self.loaded else ():
            mark.doubtful = True
        self.loaded = False
        for mark in self.longer_marks(taken):
            mark.overwritten()
        self.held = self.held.opened(taken, self.slack)

    def overwrite_marks(self) -> None:
        for mark in self.marks:
            mark.overwritten()

    def number_of_rows(self, number: int) -> int:
        """How many rows a pass is to bring: an empty cache that grows takes any number."""
        if any(self.rows) or self.cache.capacity is not None:
            return len(self.rows)
        return 1 + number % 4 if number % 3 == 0 else len(self.rows) or ROWS

    def take_rows(self, rows: int) -> None:
        """A pass brings that many rows to an empty cache."""
        if rows != len(self.rows):
            self.overwrite_marks()
            self.held = Held.nothing(rows)

    def width(self, number: int, most: int) -> int:
        """How many tokens a pass is to bring."""
        return 1 if self.models.token_by_token and any(self.rows) else 1 + number % most

    def batch(self, counts: list[int], width: int, rnd: random.Random, side: str) -> Batch:
        """Draw so many ids for each row, among `width` columns."""
        new = [[rnd.randrange(1, V) for _ in range(n)] for n in counts]
        columns = [_columns(n, width, side, rnd) for n in counts]
        ids, mask = torch.full((len(new), width), JUNK), torch.zeros(len(new), width, dtype=torch.long)
        for b, at in enumerate(columns):
            ids[b, at], mask[b, at] = torch.tensor(new[b], dtype=torch.long), 1
        if not self.models.prepared or (all(n == width for n in counts) and rnd.random() < 0.7):
            return Batch(new, columns, ids, None)
        if rnd.random() < 0.5:  # as generate has it: a column for what came before, too
            mask = torch.cat([torch.ones(len(new), 3, dtype=torch.long), mask], 1)
        return Batch(new, columns, ids, mask)

    def logits(self, cache: sc.StateCache, batch: Batch) -> Tensor:
        """Feed a batch to this cache, or to a fork of it, in the form of compiled code if it is to be: (B, T, V)."""
        with _as_compiled(self.compiled):
            return self.models.feed(cache, batch.ids, batch.mask)

    def wrong(self, logits: Tensor, batch: Batch, held: Held) -> str | None:
        """Which logits of the batch are not the oracle's, on top of what is `held`."""
        for b, (columns, row) in enumerate(zip(batch.columns, held.rows, strict=True)):
            if columns:
                want = self.models.full((*row, *batch.new[b]))[len(row) :]
                error = _off(logits[b, columns], want)
                if not error < self.tolerance and not error < 2 * self._by_itself(row, batch.new[b], want):
                    return f"row {b}: {len(columns)} tokens after {len(row)} are off by {error:.1e}"
        return None

    def _by_itself(self, row: Sequence[int], new: Sequence[int], want: Tensor) -> float:
        """How far a new cache of the same stores is off, if these round: some logits hang by that little."""
        if not self.stores:
            return 0.0
        cache = sc.StateCache(self.models.plain.config, **self.stores)
        for tokens in filter(None, (row, new)):
            logits = self.models.feed(cache, torch.tensor([list(tokens)]), None)
        return _off(logits[0], want)

    def feed(self, batch: Batch) -> None:
        """Feed a batch and compare every logit."""
        wrong = self.wrong(self.logits(self.cache, batch), batch, self.held)
        assert wrong is None, wrong

    def agree(self) -> None:
        """Assert that the lengths do. How many rows an empty cache has that grows is for the cache to say."""
        lengths = self.cache.lengths.tolist()
        if self.cache.capacity is None and not any(self.rows) and not any(lengths):
            self.held = Held.nothing(len(lengths))
        assert lengths == self.held.lengths(), f"lengths {lengths} are not {self.held.lengths()}"

    def come_back(self, mark: Mark) -> None:
        """Restore a mark; one that may be stale must be exact or say so."""
        if mark.stale:
            refused(errors.StaleMarkError, self.cache.restore, mark.mark)
            return
        try:
            self.cache.restore(mark.mark)
        except errors.StaleMarkError:
            assert mark.doubtful, f"a mark at {mark.held.lengths()} is said to be stale, and nothing wrote over it"
            mark.stale = True
        else:
            self.held = mark.held if mark.held.rows else Held.nothing(len(self.cache.lengths))


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


def run(models: Models, schedule: list[Op], *, slack: int, room: str, seed: int = 0) -> int:
    """Run a schedule, and assert after every operation that the cache agrees with lists. `room`: one of ROOMS.

    How many operations ended early.
    """
    subjects = [begun(models, slack=slack, room=room)]
    first, rnd = subjects[0].cache, random.Random(seed)
    addresses: list[int] = []
    for done, (what, number, each) in enumerate(schedule):
        s = subjects[number % len(subjects)]
        try:
            if what == "fork":
                if len(subjects) < ROWS:
                    subjects.append(replace(s, cache=s.cache.fork(), marks=[], interruptions=0))
            else:
                OPERATIONS[what](s, number, each, rnd)
            for other in subjects:
                other.agree()
        except BaseException as error:
            error.add_note(f"slack={slack}, room={room!r}, seed={seed}, in operation {done} of {schedule!r}")
            raise
        if not addresses and any(subjects[0].rows):  # once a model has filled it
            addresses = [b.data_ptr() for b in first.buffers()]
    if first.capacity is not None and addresses:
        assert addresses == [b.data_ptr() for b in first.buffers()], "a fixed buffer moved"
    return sum(s.interruptions for s in subjects)


def begun(models: Models, *, slack: int, room: str) -> Subject:
    """An empty cache."""
    stores = LOSSY.get(room, {})
    fixed = room in ("fixed", "compiled")
    allocated = {"capacity": CAPACITY, "rows": ROWS, "dtype": models.dtype, "device": "cpu"} if fixed else {}
    options = stores or {"store": "paged" if room == "paged" else "dense"}
    made = sc.StateCache(models.plain.config, slack=slack, offload=room == "offloaded", **options, **allocated)
    tolerance = NEAR if stores else TOLERANCE
    held = Held.nothing(ROWS) if fixed else Held()
    return Subject(models, made, held, compiled=room == "compiled", tolerance=tolerance, stores=stores)


def started(models: Models, schedule: list[Op], *, slack: int, room: str) -> Subject:
    """A cache after a schedule without forks."""
    s, rnd = begun(models, slack=slack, room=room), random.Random(0)
    for what, number, each in schedule:
        OPERATIONS[what](s, number, each, rnd)
    return s


ROOMS = ("growing", "fixed", "compiled")
LOSSY: dict[str, dict[str, str]] = {  # rooms with stores that round, where marks and files may be at rest in codes
    "int8": {"store": "int8"},
    "fp8": {"store": "fp8"},
    "bfloat16": {"recurrent_store": "bfloat16"},
    "both": {"store": "int8", "recurrent_store": "bfloat16"},
}
NEAR = 0.4  # of the largest logit; mostly it is 0.01, and 0.1 behind states that were at rest
SIDES = ("left", "right", "inside")


def per_row(s: Subject, each: tuple[int, ...]) -> list[int]:
    """A number a row; the same for all of an unmodified model."""
    return [each[b % len(each) if s.models.prepared else 0] for b in range(len(s.rows))]


def _feed(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random, ragged: bool = False) -> None:
    width = s.width(number, 12)
    s.take_rows(s.number_of_rows(number))
    ragged &= s.models.prepared
    batch = s.batch([min(n, width) if ragged else width for n in per_row(s, each)], width, rnd, SIDES[number // 12 % 3])
    if s.overflows(batch.taken):
        with _as_host(s):
            refused(errors.CapacityError, s.feed, batch)
        return
    s.feed(batch)
    s.opened(batch.taken)
    s.held = s.held.fed(batch.new, s.slack)


@contextmanager
def _as_host(s: Subject) -> Iterator[None]:
    """What compiled code drops without a word is refused where the host knows."""
    compiled, s.compiled = s.compiled, False
    try:
        yield
    finally:
        s.compiled = compiled


def _ragged(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    _feed(s, number, each, rnd, ragged=True)


def _speculate(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    if not s.models.prepared:
        return
    if not s.slack:
        refused(errors.SlackError, s.cache.speculate, 1)
        return
    width = 1 + number % s.slack
    s.take_rows(s.number_of_rows(number))
    counts = [min(n, width) if number % 2 else width for n in per_row(s, each)]
    batch = s.batch(counts, width, rnd, rnd.choice(SIDES))
    accepted = [rnd.randint(0, n) for n in counts]
    ending = rnd.choice(["commit", "commit", "commit", "nothing", "before", "inside", "after"])
    if s.overflows(counts):
        with s.cache.speculate(width), _as_host(s):
            refused(errors.CapacityError, s.feed, batch)
        return
    try:
        with s.cache.speculate(s.slack if number % 3 else width) as draft:
            if ending == "before":
                raise Interruption
            if ending == "inside":
                with s.models.interrupted():
                    s.feed(batch)
            s.feed(batch)
            refused(errors.StepError, s.cache.checkpoint)
            refused(errors.RowsError, draft.commit, torch.tensor([n + 1 for n in counts]))
            if ending == "after":
                raise Interruption
            if ending == "commit":
                draft.commit(torch.tensor(accepted))
    except Interruption:
        pass
    if ending != "before":
        s.opened(counts)
    if ending == "commit":
        s.held = s.held.fed([ids[:n] for ids, n in zip(batch.new, accepted, strict=True)], s.slack)


def _rollback(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    if not s.rows:
        refused(errors.RowsError, s.cache.rollback, 1)
        return
    forget = [min(n % (s.slack + 2), len(row)) for n, row in zip(per_row(s, each), s.rows, strict=True)]
    if s.held.may_forget(forget, s.copied):
        s.cache.rollback(torch.tensor(forget))
        s.held = s.held.without(forget)
    else:
        refused(errors.RollbackError, s.cache.rollback, torch.tensor(forget))


def _gather(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    if not s.rows:
        refused(errors.RowsError, s.cache.gather, [0])
        return
    index = rows_to_keep(s, number, each)
    s.cache.gather(torch.tensor(index))
    s.held = s.held.of(index)
    s.overwrite_marks()


def rows_to_keep(s: Subject, number: int, each: tuple[int, ...]) -> list[int]:
    most = ROWS if s.cache.capacity is not None else ROWS + 2
    return [each[b % len(each)] % len(s.rows) for b in range(1 + number % most)]


def _checkpoint(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    s.marks.append(Mark(s.cache.checkpoint("int8" if s.stores and number % 2 else None), s.held))


def _restore(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    if s.marks:
        s.come_back(s.marks[sum(each) % len(s.marks)])


def _reset(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    s.cache.reset()
    s.held = Held.nothing(len(s.rows) if s.cache.capacity is None else ROWS)
    s.overwrite_marks()


def _given_up(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    """A pass that gives up in front of the last layer: nothing goes on but a restore or a reset."""
    width = s.width(number, 4)
    s.take_rows(s.number_of_rows(number))
    batch = s.batch([width] * len(s.rows), width, rnd, "right")
    if s.overflows(batch.taken):
        return
    with s.models.interrupted():
        refused(Interruption, s.feed, batch)
    s.opened(batch.taken)
    refused(errors.StepError, s.feed, batch)
    for operation in (s.cache.checkpoint, s.cache.fork):
        refused(errors.StepError, operation)
    refused(errors.StepError, s.cache.rollback, 0)
    mark = s.marks[sum(each) % len(s.marks)] if s.marks else None
    _restore(s, number, each, rnd)
    if mark is None or mark.stale:
        _reset(s, number, each, rnd)


def _saved(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    """Go on from a file, in a cache of another form. Rows go back no farther than to where they were written."""
    if not any(s.rows):  # nobody has filled it, so nobody's weights would be known ever after
        return
    slack = rnd.randrange(6)
    forms: list[dict[str, Any]] = [{"capacity": CAPACITY, "rows": ROWS, "dtype": s.models.dtype, "device": "cpu"}]
    if not s.compiled:
        forms += [{}, {"offload": True}]
    stores = {"store": rnd.choice(["dense", "paged"])}
    form = forms[number % len(forms)] | {"slack": slack} | (rnd.choice([stores, s.stores]) if s.stores else stores)
    if form.get("capacity") and (max(s.held.lengths()) > CAPACITY or len(s.rows) > ROWS):
        if s.compiled:
            return
        form = {key: form[key] for key in form if key in ("slack", "store", "recurrent_store")}
    seen = s.models.prepared and not s.compiled  # who filled it
    whose = {} if seen else {"allow_unverified": True}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        s.cache.save(path, recurrent_store="int8" if s.stores and rnd.random() < 0.5 else None)
        s.cache = sc.StateCache.load(path, s.models.filling, **whose, **form)
    rows = s.held.rows + [[] for _ in range((s.cache.rows or 0) - len(s.rows))]
    lengths = [len(row) for row in rows]
    s.held, s.marks, s.loaded = Held(rows, lengths, [frozenset({n}) for n in lengths]), [], True


def _moved(s: Subject, number: int, each: tuple[int, ...], rnd: random.Random) -> None:
    """Put a row as a value into another one, of a model whose rows may differ; else into itself."""
    if not s.rows:
        return
    row, place = each[0] % len(s.rows), number % len(s.rows)
    row = row if s.models.prepared else place
    s.cache.admit(place, s.cache.snapshot(row))
    n = len(s.rows[row])
    parts = (s.rows[row], n, frozenset({n}))
    s.held = Held(
        *([*of[:place], part, *of[place + 1 :]] for of, part in zip(vars(s.held).values(), parts, strict=True))
    )
    s.overwrite_marks()


OPERATIONS = {
    "feed": _feed,
    "ragged": _ragged,
    "speculate": _speculate,
    "rollback": _rollback,
    "gather": _gather,
    "checkpoint": _checkpoint,
    "restore": _restore,
    "reset": _reset,
    "given up": _given_up,
    "saved": _saved,
    "moved": _moved,
} | {f"interrupted {kind}": attempts.interrupted(kind) for kind in attempts.KINDS}


def refused(error: type[BaseException], call: Any, *args: Any) -> None:
    try:
        call(*args)
    except error:
        return
    raise AssertionError(f"{call.__name__} was not refused")
