"""The states of a model by layer and name: found, allocated at their first write, and checked against what comes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from statecache.clock import Clock
from statecache.errors import LayerError, ShapeError
from statecache.lease import Lease
from statecache.models.checks import check, no_gradient
from statecache.ring import Ring
from statecache.spec import LayerSpec, StateSpec
from statecache.states import States
from statecache.step import Step


class Registry:
    """What both writers of a cache ask of its states.

    B rows, T new tokens.
    """

    def __init__(self, states: States) -> None:
        self.states = states
        self._passed: dict[str, tuple[Any, ...]] = {}  # what each state's last tensor was, once it has been checked

    @property
    def model(self) -> str:
        return self.states.spec.model

    def layer(self, layer: int) -> LayerSpec:
        """The layer of this index. Raises LayerError."""
        layers = self.states.spec.layers
        if not isinstance(layer, int) or not 0 <= layer < len(layers):
            raise LayerError(f"there is no layer {layer!r}: {self.model} has layers 0..{len(layers) - 1}")
        return layers[layer]

    def name(self, layer: int, short: str, number: int = 0) -> str:
        """The name of a state that exists, or that an open layer may still declare. Raises LayerError."""
        short = short if number == 0 else f"{short}{number}"
        name = f"{layer}.{short}"
        if name in self.states.declared:
            return name
        spec = self.layer(layer)
        if not (spec.open and not short.startswith(("key", "value"))):
            held = ", ".join(s.name for s in spec.states) or "nothing"
            raise LayerError(f'layer {layer} ("{spec.kind}") of {self.model} holds {held}, no "{short}"')
        return name

    def check(self, name: str, expected: tuple[int, ...], new: Tensor, cast: bool = False) -> None:
        """Whether `new` is (rows, *expected), for the rows there are. `cast`: in any dtype. Changes nothing."""
        came = (new.shape, expected, new.dtype, new.device)
        if not torch.compiler.is_compiling() and self._passed.get(name) == came:
            return
        states, rows = self.states, None
        state, step = states.held.get(name), states.step
        if states.clock is not None and step is not None:
            rows = states.clock.rows if step.rows is None else len(step.rows)
        check(name, new, expected, model=self.model, rows=rows, state=state, cast=cast)
        if rows is not None and state is not None and not torch.compiler.is_compiling():
            self._passed[name] = came

    def check_heads(self, name: str, new: Tensor, tokens: int) -> None:
        """Check keys or values; where no table says what they are, their first write does."""
        spec = self.states.declared[name]
        if spec.shape is None:
            if new.dim() != 4:
                raise ShapeError(f'state "{name}": came {tuple(new.shape)}, expected (rows, heads, tokens, head size)')
            spec = replace(spec, shape=(new.shape[1], new.shape[3]))
            self.states.declare(name, spec)
        assert spec.shape is not None
        self.check(name, (spec.shape[0], tokens, spec.shape[1]), new)

    def check_index(self, name: str, new: Tensor) -> None:
        """Check index keys (B, T, D)."""
        shape = self.states.declared[name].shape
        assert shape is not None
        self.check(name, (new.shape[1], *shape), new)

    def positions(self, layer: int, slots: int, rows: Tensor | None = None) -> Tensor | None:
        """Where the tokens in the first `slots` of this layer's ring stand, (3, B, S); None where there are none.

        `rows` (R,): of these alone.
        """
        state = self.states.held.get(self.name(layer, "position"))
        if not slots or not isinstance(state, Ring):
            return None
        seen = state.store.read(slice(0, slots))
        return (seen if rows is None else seen.index_select(0, rows)).transpose(0, 1)

    def put_positions(self, layer: int, given: Tensor, step: Step) -> None:
        """Write where the T tokens of this step stand: the last of `given` (3, B or 1, S + T)."""
        name, clock = self.name(layer, "position"), self.states.clock
        assert clock is not None
        rows = clock.rows if step.rows is None else len(step.rows)
        new = given[..., -step.tokens :].transpose(0, 1).expand(rows, -1, -1)
        self.check(name, (len(given), step.tokens), new)
        self.ring(name, new, step.tokens).put(new, step)

    def forget(self) -> None:
        """Check again what comes: rows have changed."""
        self._passed.clear()

    def clock_for(self, like: Tensor) -> Clock:
        """The clock, for a batch of as many rows as `like`."""
        before, clock = self.states.clock, self.states.clock_for(len(like), like.device)
        if clock is not before:
            self.forget()
        return clock

    def query_offset(self) -> int | Tensor:
        """The position of the next pass's first token, the same for all rows. Raises RaggedError where rows differ."""
        clock = self.states.clock
        if clock is None:
            return 0
        if self.states.capacity is None:
            return clock.uniform()
        if clock.known.ragged:
            clock.uniform()
        return clock.lengths[0].clone()

    def ring(self, name: str, new: Tensor, tokens: int) -> Ring:
        """The ring of this name, for entries like `new`."""
        state = self.states.held.get(name) or self.allocate_like(name, new, tokens)
        assert isinstance(state, Ring)
        return state

    def extend(self, name: str, new: Tensor, tokens: int, step: Step) -> Tensor:
        """Take T tokens' entries into the ring of this name; what they may attend to, see `Ring.extend`."""
        return no_gradient(self.ring(name, new, tokens).extend(new, step, exact=self.states.capacity is None), new)

    def lease(self, name: str, new: Tensor) -> Lease:
        """The lease of this name, in a model that computes in the dtype of `new`."""
        state = self.states.held.get(name) or self.allocate_like(name, new, 0)
        assert isinstance(state, Lease)
        return state

    def allocate_like(self, name: str, new: Tensor, tokens: int) -> Ring | Lease:
        """Make room for a state of entries like `new`, T tokens of them at first."""
        states = self.states
        dtype = states.dtype if states.dtype is not None and new.is_floating_point() else new.dtype
        return states.allocate(name, dtype, new.device, tokens)

    def attention(self, layer: int) -> StateSpec | None:
        """The keys of this layer; of the first that has keys, where it has none."""
        for spec in (self.layer(layer), *self.states.spec.layers):
            for state in spec.states:
                if state.name == "key":
                    return state
        return None
