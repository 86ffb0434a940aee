"""What a layer remembers, as data: shapes and windows. No tensors.

B rows, T new tokens, C slots of a ring, *D the shape of one entry.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from statecache.errors import OptionError
from statecache.rotary import Rotary

KINDS = ("attention", "sliding", "conv", "recurrent", "log", "position")


@dataclass(frozen=True)
class StateSpec:
    """One state of one layer: an entry per token position, of which the layer reads the `window` newest.

    attention: None, all of them. Sliding attention over w tokens: w. Convolution of width k: k - 1. Recurrence: 1, its
    entry at position p being the whole state after token p. Log of a recurrence's inputs: 0, nothing but going back
    reads it. Position: 1, how far a row's next token stands from its length.
    """

    name: str  # unique in its layer: key, value, conv, recurrent, conv1, ...
    kind: str  # one of KINDS: what its bytes are counted as
    shape: tuple[int, ...] | None = None  # of one entry; None until the first write declares it
    window: int | None = None
    axis: int = 0  # where time stands among the entry's axes in this state's tensors: 1 is (B, H, T, D)
    dtype: torch.dtype | None = None  # the least precise it is kept in, an integer one as it is; None is the model's
    leased: bool = False  # window 1, and the model overwrites the entry it is handed instead of giving back another
    logged: bool = False  # leased, and rolls back by replaying a log of its inputs instead of by copies
    blank: int | None = None  # what its layer reads before the first token, if not zero: entries are kept less this
    # of a convolution, what its channels are, in order: "heads" or "groups" of heads, how many, and how wide each is
    blocks: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)  # a digest goes without

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'state "{self.name}": kind "{self.kind}" is none of {", ".join(KINDS)}')
        if self.leased and self.window != 1:
            raise ValueError(f'state "{self.name}": a leased entry is the whole state, so its window is 1')
        channels = sum(n * width for _, n, width in self.blocks)
        if self.blocks and self.shape is not None and channels != self.shape[0]:
            raise ValueError(f'state "{self.name}": its blocks have {channels} channels, and an entry {self.shape[0]}')
        if self.logged and not self.leased:
            raise ValueError(f'state "{self.name}": only a leased state is replayed from a log')

    def dtype_for(self, model: torch.dtype) -> torch.dtype:
        """The dtype of the entries in a model that computes in `model`."""
        if self.dtype is None:
            return model
        return torch.promote_types(model, self.dtype) if self.dtype.is_floating_point else self.dtype

    def entry_bytes(self, model: torch.dtype) -> int:
        """Bytes of one entry of one row in a model that computes in `model`."""
        if self.shape is None:
            raise ValueError(f'state "{self.name}": the shape of an entry is not known before the first write')
        return math.prod(self.shape) * self.dtype_for(model).itemsize

    def limit(self, capacity: int | None, slack: int) -> int | None:
        """Slots this state's ring needs at most, where no row is longer than `capacity`; None: no end.

        A log has half the slack more than that: it is read when it is full, not at every token.
        """
        if self.kind == "log":
            needed: int | None = slack + (slack + 1) // 2
        else:
            needed = None if self.window is None else self.window + slack
        sizes = [n for n in (needed, capacity) if n is not None]
        return min(sizes, default=None)

    def holds_all(self, capacity: int | None, slack: int) -> bool:
        """Whether its ring must hold every token of a row: it has no window, or one that `capacity` cuts short."""
        return self.window is None or (capacity is not None and self.window + slack > capacity)


@dataclass(frozen=True)
class LayerSpec:
    """The states of one layer. `open`: more of them may be declared by their first write.

    `log`: what its recurrence consumes of a token, kept only where a prepared model is to go back.
    """

    index: int
    kind: str  # its layer type in the model's configuration
    states: tuple[StateSpec, ...] = ()
    open: bool = False
    log: tuple[StateSpec, ...] = ()

    def with_state(self, state: StateSpec) -> LayerSpec:
        """The same layer with `state` added, or in place of the one of that name."""
        kept = tuple(s for s in self.states if s.name != state.name)
        return replace(self, states=(*kept, state))


@dataclass(frozen=True)
class Sizes:
    """Bytes by kind of state; `clock` is what the rows' lengths take."""

    by_kind: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())

    def __str__(self) -> str:
        parts = [f"{kind} {n:,}" for kind, n in self.by_kind.items() if n]
        return f"{self.total:,} bytes" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class ModelSpec:
    """What a whole model remembers, layer by layer; `own`: what no layer does.

    `order`: the layers as a pass goes through them; () where that is their own order. `rotary`: if its rotary factors
    change with the length.
    """

    layers: tuple[LayerSpec, ...]
    model: str = "a model"
    order: tuple[int, ...] = ()
    own: tuple[StateSpec, ...] = ()
    rotary: Rotary | None = None

    def states(self) -> Iterator[tuple[str, StateSpec]]:
        """Every state with its name in the cache, such as "3.conv"; one that is of no layer, by its own name."""
        for layer in self.layers:
            for state in layer.states:
                yield f"{layer.index}.{state.name}", state
        for state in self.own:
            yield state.name, state

    def in_order(self) -> ModelSpec:
        """The same, with a convolution's inputs as one leased entry in time order, that its model may shift in place.

        That is quicker than a ring, takes as many bytes, and does for a cache without slack, which never goes back.
        """

        def lease(state: StateSpec) -> StateSpec:
            if state.kind != "conv" or state.leased or state.shape is None or state.window is None:
                return state
            shape = (*state.shape[: state.axis], state.window, *state.shape[state.axis :])
            return replace(state, shape=shape, window=1, axis=0, leased=True)

        layers = tuple(replace(n, states=tuple(lease(s) for s in n.states)) for n in self.layers)
        return replace(self, layers=layers)

    def with_logs(self) -> ModelSpec:
        """The same, with recurrences that roll back by replaying their inputs, as prepared models do."""

        def replay(layer: LayerSpec) -> LayerSpec:
            if not layer.log:
                return layer
            states = tuple(replace(s, logged=True) if s.kind == "recurrent" else s for s in layer.states)
            return replace(layer, states=(*states, *layer.log), log=())

        return replace(self, layers=tuple(replay(layer) for layer in self.layers))

    def digest(self) -> str:
        """What tells the layers of this specification from those of another."""
        return hashlib.sha256(repr((self.layers, self.model)).encode()).hexdigest()

    def full_at(self, capacity: int | None, slack: int) -> int | None:
        """The longest a row can get with rings of this `capacity`; None where every ring has the window it needs."""
        bound = any(s.holds_all(capacity, slack) for _, s in self.states())
        return capacity if bound else None


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype as it is, or by its name. Raises OptionError for what is none."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise OptionError(f'dtype={dtype!r}: give a torch.dtype, or the name of one, as "bfloat16"')
    return found
