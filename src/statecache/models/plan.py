"""What a cache takes, before there is one: it is allocated on the meta device, where tensors have shapes and no memory.

So a plan is what the same options allocate, whatever the family and the store: there is no second account of it. Two
allocations serve all rows, since each row takes what the one before it takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from statecache.errors import ConfigError, OptionError
from statecache.models.cache import StateCache
from statecache.models.ready import promised
from statecache.spec import Sizes, as_dtype
from statecache.states import States
from statecache.storage.at_rest import check_code

META = torch.device("meta")
LONG = 1 << 24  # tokens by which a ring with a window has all the slots it needs
MOST = 1 << 40  # rows or tokens that are looked for
UNITS: dict[str, int] = {
    "b": 1,
    **{f"{c}{i}b": (1024 if i else 1000) ** n for n, c in enumerate("kmgt", 1) for i in ("", "i")},
}


@dataclass(frozen=True)
class Plan:
    """What a cache takes, in bytes. `capacity` None: it grows, and `lengths` says how long its longest row was.

    `states`: what is allocated, by kind. `per_row`: what each row adds. `per_token`: what each token of a row adds,
    once every window is full, rounded up. `checkpoint`: one mark, of all rows. `weights`: None where not asked for.
    """

    model: str
    rows: int
    capacity: int | None
    lengths: tuple[int, ...]
    slack: int
    dtype: torch.dtype
    states: Sizes
    per_row: Sizes
    per_token: Sizes
    checkpoint: int
    checkpoints: int = 0
    weights: int | None = None
    budget: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all that was asked for: states, checkpoints, weights."""
        return self.states.total + self.checkpoints * self.checkpoint + (self.weights or 0)

    @property
    def fits(self) -> bool:
        """Whether that is within the budget, if there is one."""
        return self.budget is None or self.total <= self.budget

    def __str__(self) -> str:
        room = f"capacity {self.capacity:,}" if self.capacity else "growing"
        return f"{self.model}, {self.rows:,} row{'s' * (self.rows > 1)}, {room}: {self.states}"


def plan(
    config: Any,
    *,
    rows: int | None = None,
    capacity: int | None = None,
    lengths: int | Sequence[int] | None = None,
    slack: int = 0,
    checkpoints: int = 0,
    checkpoint_store: str | None = None,
    budget: int | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    weights: bool = False,
    prepared: bool = False,
    **options: Any,
) -> Plan:
    """What `StateCache(config, rows=, capacity=, slack=, dtype=, ...)` takes. Allocates nothing.

    - `rows`, `capacity`: with a budget, the one that is left out is the largest that fits, and one row of the largest
      capacity where both are. Else `rows` is 1, and a cache without a capacity grows. Where no length is too long for
      the budget, since nothing grows with it, the capacity is `MOST`.
    - `lengths`: of the longest row of a cache that grows, after each pass; a number for one pass. As growing depends on
      the passes, `range(1000, 1201)` is a prompt of 1,000 tokens and 200 more one by one. Without, and where the first
      is 0, it is allocated before its first pass.
    - `budget`: bytes, or as "24GiB", for the states, for so many `checkpoints`, and with `weights` for the model's own.
      Left out with a CUDA `device`: what is free there.
    - `checkpoint_store`: in what checkpoints keep recurrent states, None or "int8".
    - `dtype`: in which the model computes; left out, its configuration's own.
    - `prepared`: of a prepared model, whose recurrences go back by logs and not by copies.
    - `options`: any more that `StateCache` takes. With `offload=True` states are counted wherever they are.

    Raises ConfigError where shapes are not known before the first write, OptionError for options that make no sense or
    a budget that is too small, and what `StateCache` raises.
    """
    check_code(checkpoint_store, "checkpoint_store")
    with promised():  # says what is wrong with them
        StateCache(config, rows=rows, capacity=capacity, slack=slack, device=device, **options)
    grown = _lengths(lengths, capacity)
    if not isinstance(checkpoints, int) or isinstance(checkpoints, bool) or checkpoints < 0:
        raise OptionError(f"checkpoints={checkpoints!r}: give how many marks are held at once")
    cache = _Cache(config, slack, as_dtype(dtype or _own_dtype(config)), prepared, checkpoint_store, options)
    most = _budget(budget, device)
    weigh = weight_bytes(config, cache.dtype) if weights else None

    def total(rows: int, taken: _Taken) -> int:
        return taken.states(rows).total + checkpoints * taken.checkpoint(rows) + (weigh or 0)

    searched = most is not None and rows is None and (capacity is not None or grown)
    if most is not None and (searched or (capacity is None and not grown)) and most < (weigh or 0):
        raise OptionError(f"budget={most}: the weights alone take {weigh:,} bytes: give more")
    beside = [f"{checkpoints} checkpoint{'s' * (checkpoints > 1)}"] * bool(checkpoints) + ["the weights"] * weights
    further = f" and {' and '.join(beside)}" if beside else ""
    if most is not None and capacity is None and not grown:
        n, least = rows or 1, max(1, slack)
        what = f"{n} row{'s' * (n > 1)} of {least} token{'s' * (least > 1)}{further}"
        capacity = _largest(lambda capacity: total(n, cache.take(capacity)), least, most, what)
    taken = cache.take(capacity, grown)
    if most is not None and searched:
        what = f"1 row of {capacity or max(grown):,} tokens{further}"
        rows = _largest(lambda rows: total(rows, taken), 1, most, what)
    rows = rows or 1
    return Plan(
        model=cache.model,
        rows=rows,
        capacity=capacity,
        lengths=grown,
        slack=slack,
        dtype=cache.dtype,
        states=taken.states(rows),
        per_row=taken.each,
        per_token=cache.per_token(),
        checkpoint=taken.checkpoint(rows),
        checkpoints=checkpoints,
        weights=weigh,
        budget=most,
    )


def as_bytes(size: int | str) -> int:
    """Bytes of a number of them, or of a text such as "24GiB", "1.5TB" or "4096". Raises OptionError."""
    found = re.fullmatch(r"\s*(\d+)(\.\d+)?\s*([a-z]*)\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    unit = UNITS.get((found[3] or "b").lower()) if found else None
    if found is not None and unit is not None:
        whole, part = int(found[1]), float(found[2] or 0)
        return whole * unit + int(part * unit)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise OptionError(f'budget={size!r}: give bytes, or a size such as "24GiB" or "24GB" (K, M, G, T)')
    return size


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the parameters and buffers of a model with this configuration, tied ones once, in this dtype.

    Raises OptionError where transformers has no such model, or its weights are quantised.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise OptionError(
            f"weights=True: those of this {config.model_type} model are quantised: add their files' bytes"
        )
    with META:
        model = _model(config)
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)


# ---- inside


@dataclass(frozen=True)
class _Taken:
    """Bytes that the states and a mark of `one` row take, and what `each` further row adds."""

    one: Sizes
    each: Sizes
    marks: tuple[int, int]  # of one row, and of two

    def states(self, rows: int) -> Sizes:
        each = self.each.by_kind
        return Sizes({kind: n + (rows - 1) * each[kind] for kind, n in self.one.by_kind.items()})

    def checkpoint(self, rows: int) -> int:
        one, two = self.marks
        return one + (rows - 1) * (two - one)


class _Cache:
    """A cache of which rows and tokens are left open."""

    def __init__(
        self,
        config: Any,
        slack: int,
        dtype: torch.dtype,
        prepared: bool,
        mark_store: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self.config, self.slack, self.dtype = config, slack, dtype
        self.prepared, self.mark_store = prepared, mark_store
        self.options = {**options, "offload": False}  # wherever states are, they take as many bytes
        spec = self._states(1, None).spec
        self.model = spec.model
        for layer in spec.layers:
            if layer.open or any(state.shape is None for state in layer.states):
                raise ConfigError(
                    f'layer {layer.index} of {spec.model} ("{layer.kind}"): the table does not know the shapes of its '
                    "states, so nobody knows their bytes before the first write: add them (docs/adding_a_layer.md), or "
                    "feed a StateCache and ask its nbytes()"
                )

    def take(self, capacity: int | None, lengths: Sequence[int] = ()) -> _Taken:
        """What such a cache takes, at this capacity, or grown to these lengths."""
        try:
            one, two = (self._states(rows, capacity, lengths) for rows in (1, 2))
        except RuntimeError as error:  # torch counts in 64 bits
            raise OptionError(f"capacity={capacity}, lengths={lengths}: more bytes than can be counted") from error
        one_mark, two_marks = (states.checkpoint(self.mark_store).nbytes for states in (one, two))
        return _Taken(one.nbytes(), _difference(two, one), (one_mark, two_marks))

    def per_token(self) -> Sizes:
        """What each token of a row adds, once every window is full."""
        return _difference(self._states(1, None, (0, 2 * LONG)), self._states(1, None, (0, LONG)), LONG)

    def _states(self, rows: int, capacity: int | None, lengths: Sequence[int] = ()) -> States:
        at_once: dict[str, Any] = (
            {"rows": rows, "dtype": self.dtype, "device": META} if not lengths or lengths[0] == 0 else {}
        )
        with promised():
            states = StateCache(self.config, capacity=capacity, slack=self.slack, **at_once, **self.options).states
        if self.prepared:
            states.keep_logs()
        if not at_once:
            states.start(rows, META)
            for name in states.declared:
                states.allocate(name, self.dtype, META, tokens=lengths[0])
        for length in lengths:
            states.reserve(length)
        return states


def _model(config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)(config)
    for make in (transformers.AutoModelForCausalLM, transformers.AutoModelForMultimodalLM):
        with suppress(ValueError):
            return make.from_config(config)
    raise OptionError(f"weights=True: transformers makes no model that writes of a {config.model_type} configuration")


def _own_dtype(config: Any) -> torch.dtype:
    text = config.get_text_config(decoder=True)
    return getattr(text, "dtype", None) or getattr(config, "dtype", None) or torch.float32


def _lengths(lengths: int | Sequence[int] | None, capacity: int | None) -> tuple[int, ...]:
    """The lengths of the longest row after each pass."""
    if lengths is None:
        return ()
    after = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    if not after or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in after) or max(after) == 0:
        raise OptionError(f"lengths={lengths!r}: give how many tokens the longest row holds after each pass")
    if capacity is not None:
        raise OptionError(f"lengths={lengths!r} with capacity={capacity}: a fixed cache does not grow: leave one out")
    return after


def _budget(budget: int | str | None, device: torch.device | str | None) -> int | None:
    """Bytes that there are; None for no end."""
    if budget is not None:
        return as_bytes(budget)
    where = None if device is None else torch.device(device)
    if where is None or where.type != "cuda":
        return None
    if not torch.cuda.is_available():
        raise OptionError(f"device={str(device)!r}: there is none here that could say what is free: give budget=")
    return torch.cuda.mem_get_info(where)[0]


def _difference(more: States, less: States, by: int = 1) -> Sizes:
    sizes = less.nbytes().by_kind
    return Sizes({kind: -((sizes[kind] - n) // by) for kind, n in more.nbytes().by_kind.items()})


def _largest(total: Callable[[int], int], least: int, most: int, what: str) -> int:
    """The largest number from `least` to `MOST` that takes at most so many bytes; a larger one never takes less."""
    if total(least) > most:
        raise OptionError(f"budget={most}: {what} need {total(least):,} bytes: give more, or ask for less")
    if total(MOST) <= most:
        return MOST
    fits, over = least, 2 * least
    while total(over) <= most:
        fits, over = over, 2 * over
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if total(middle) <= most else (fits, middle)
    return fits
