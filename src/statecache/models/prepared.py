"""The writer of prepared models, which say where a pass begins and ends, and what a layer's mixer sees of the cache.

B rows, T new tokens, C channels, K width of a convolution. Time is axis 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from statecache.errors import LayerError, ShapeError, StepError
from statecache.lease import Lease
from statecache.models.checks import no_gradient
from statecache.models.registry import Registry
from statecache.ops import conv
from statecache.replay import Log, Operators, Parts, Recurrence, run
from statecache.ring import Ring
from statecache.states import States
from statecache.step import Step


class Prepared:
    """Opens and closes the passes of a prepared model, and takes in the keys and values of its attention."""

    def __init__(self, states: States, fed: bool) -> None:
        self.states, self.registry, self.fed = states, Registry(states), fed
        self.step: Step | None = None  # of the pass that is open
        self.layers = [LayerState(self, layer.index) for layer in states.spec.layers]

    # ---- a pass

    def adopt(self, *_: Any) -> Prepared:
        """The writer of a prepared model, which this is."""
        return self

    def begin(
        self,
        like: Tensor,
        tokens: int,
        count: Tensor | Sequence[int] | None,
        rows: Sequence[int] | None,
        counted: Tensor | None,
        operators: Operators,
    ) -> Step:
        """Open a pass over T `tokens` for as many rows as `like` has, on its device. See `States.open`."""
        self.states.check_pass(tokens)
        if rows is None:
            self.registry.clock_for(like)
        elif len(rows) != len(like):
            raise ShapeError(f"{len(like)} rows came in a pass over rows {list(rows)}")
        self.step = self.states.open(tokens, count, rows, counted=counted, operators=operators)
        return self.step

    def end(self) -> None:
        """Close the pass."""
        step, self.step = self.step, None
        assert step is not None
        self.states.close(step)
        if not step.tentative:
            self.fed = True

    def give_up(self) -> None:
        """The pass was left by an exception."""
        self.step = None

    # ---- what layers and transformers call

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateCache.update`."""
        names = self.registry.name(layer, "key"), self.registry.name(layer, "value")
        tokens = key.shape[-2]
        for name, new in zip(names, (key, value), strict=True):
            self.registry.check_heads(name, new, tokens)
        step = self._open(names[0], tokens)
        exact = self.states.capacity is None
        keys, values = (
            no_gradient(self.registry.ring(name, new, tokens).extend(new, step, exact), new)
            for name, new in zip(names, (key, value), strict=True)
        )
        return keys, values

    def get_conv_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_conv_state`."""
        state, clock = self.states.held.get(self.registry.name(layer, "conv", number)), self.states.clock
        if not self.fed or state is None or clock is None:
            return None
        if isinstance(state, Lease):
            return state.entry
        assert state.spec.window is not None
        return state.past(state.spec.window, Step(0, clock.lengths))

    def get_recurrent_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_recurrent_state`."""
        state = self.states.held.get(self.registry.name(layer, "recurrent", number))
        return state.entry if self.fed and isinstance(state, Lease) else None

    def update_conv_state(self, layer: int, number: int, new: Tensor, width: int | None) -> Tensor:
        """Refuse: the mixers of a prepared model do this themselves."""
        raise _foreign(self.registry.name(layer, "conv", number))

    def update_recurrent_state(self, layer: int, number: int, new: Tensor, tokens: int | None) -> Tensor:
        """Refuse, as above."""
        raise _foreign(self.registry.name(layer, "recurrent", number))

    def records(self, layer: int) -> bool:
        """See `StateCache.is_recording_past`."""
        return True

    def has_previous(self, layer: int | None, number: int | None) -> bool:
        """See `StateCache.has_previous_state`."""
        return self.fed

    def seq_length(self) -> int | Tensor:
        """Columns taken in, pads included."""
        clock = self.states.clock
        if clock is None:
            return 0
        known = clock.catch_up()
        return known.width if self.states.capacity is None else clock.columns.clone()

    # ---- from one pass to the next

    def over(self, states: States) -> Prepared:
        """The same for a copy of the states."""
        return Prepared(states, self.fed)

    def holds_pads(self, mask: Tensor) -> bool:
        """Whether pads were fed as tokens: never."""
        return False

    def finish(self, name: str | None = None) -> None:
        """Nothing to find out: passes end where they are said to."""

    def moved(self, dropped: bool = False) -> None:
        """Rows have changed between two passes."""
        clock = self.states.clock
        self.fed = clock is not None and any(clock.known.lengths)
        self.registry.forget()
        for layer in self.layers:
            layer.forget()

    def _open(self, name: str, tokens: int) -> Step:
        """The open step, for a state that T `tokens` came for."""
        if self.step is None:
            raise _foreign(name)
        if self.step.tokens != tokens:
            raise ShapeError(f'state "{name}": {tokens} tokens came in a pass over {self.step.tokens}')
        return self.step


class Writer(Protocol):
    """What a layer's states ask of the writer; without a step they refuse."""

    states: States
    registry: Registry
    step: Step | None


class LayerState:
    """The states of one layer: its convolution's inputs, its recurrent state, and the log of what that consumed."""

    def __init__(self, writer: Writer, index: int) -> None:
        self.writer, self.index = writer, index
        self.forget()

    def forget(self) -> None:
        """Look up and check everything again."""
        self._conv: Ring | Lease | None = None
        self._convolved: Any = None  # what the convolution's last input was, once it has been checked
        self._found: tuple[Lease, Log | None] | None = None  # the recurrent state, and its log
        self._consumed: Any = None  # the same of the recurrence

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """Convolve x (B, T, C) causally with weight (C, K) behind the inputs before it, and keep it: (B, T, C).

        Raises StepError outside of a pass.
        """
        step = self.writer.step
        if step is None:
            raise _alone(self.index)
        held = None if torch.compiler.is_compiling() else self._conv  # compiled code is guarded by what it reads
        if held is None or self._convolved != (x.shape, x.dtype, x.device):
            held = self._find_conv(x)
        if step.pending is not None:
            step.pending()
        if isinstance(held, Ring):
            past: Tensor | None = held.past(weight.shape[-1] - 1, step)
        else:
            past = held.shown if step.rows is None else None
            past = held.read(step) if past is None else past
        assert past is not None
        if step.tokens == 1:
            y, wide = conv.step(x, weight, bias, past, silu)
        else:
            y, wide = conv.chunk(x, weight, bias, past, silu), None
        if isinstance(held, Ring):
            held.put(x.mT, step)
        elif wide is not None and step.count is None:
            after = wide.detach()[:, 1:].mT
            if past is held.shown:
                past.copy_(after)
            else:
                held.write(after, step)
        else:
            count = step.on(held.device).count
            held.write(conv.window(x.detach(), past, weight.shape[-1], count), step)
        return no_gradient(y, x) if x.requires_grad else y

    def recur(self, recurrence: Recurrence, taken: Parts, query: Tensor) -> Tensor:
        """Take the parts (B, T, *shape) of T tokens into the state; the outputs for `query` (B, T, ...)."""
        step = self.writer.step
        if step is None:
            raise _alone(self.index)
        first = taken[0]
        found = None if torch.compiler.is_compiling() else self._found
        if found is None or self._consumed != (first.shape, first.dtype, first.device):
            found = self._find_state(recurrence, taken)
        state, log = found
        if step.pending is not None:
            step.pending()
        log = log if step.tentative or self.writer.states.back else None
        with torch.no_grad():
            if step.plain and log is None and state.shown is not None:
                y = recurrence.step(tuple([part[:, 0] for part in taken]), query[:, 0], state.shown)[:, None]
            else:
                y = run(recurrence, taken, query, state, step, log)
        return no_gradient(y, first) if first.requires_grad else y

    def _find_conv(self, x: Tensor) -> Ring | Lease:
        name, registry = f"{self.index}.conv", self.writer.registry
        spec = self.writer.states.declared.get(name)
        if spec is None or spec.shape is None:
            raise LayerError(f"layer {self.index} of {registry.model} has no convolution")
        registry.check(name, (x.shape[1], spec.shape[0]), x)
        held = self.writer.states.held.get(name) or registry.allocate_like(name, x, x.shape[1])
        if not torch.compiler.is_compiling():
            self._conv, self._convolved = held, (x.shape, x.dtype, x.device)
        return held

    def _find_state(self, recurrence: Recurrence, taken: Parts) -> tuple[Lease, Log | None]:
        """Look up the state, and its log where there is one; make room for them at the first write."""
        registry, states, first = self.writer.registry, self.writer.states, taken[0]
        name, tokens = registry.name(self.index, "recurrent"), first.shape[1]
        n = len(recurrence.inputs)
        if states.slack:
            for part, parts in (("inputs", taken[:n]), ("gates", taken[n:])):
                width = sum(each[0, 0].numel() for each in parts)
                like = parts[0].new_empty(()).expand(len(first), tokens, width)
                log = f"{self.index}.{part}"
                if log in states.declared:
                    if part == "inputs":
                        registry.check(log, (tokens, *(states.declared[log].shape or ())), like)
                    registry.ring(log, like, tokens)
        found = registry.lease(name, first), states.log(name)
        if not torch.compiler.is_compiling():
            self._found, self._consumed = found, (first.shape, first.dtype, first.device)
        return found


class Stateless:
    """What a mixer sees of a forward without a cache: nothing before it, nothing kept."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """See `LayerState.convolve`."""
        return conv.chunk(x, weight, bias, None, silu)

    def recur(self, recurrence: Recurrence, taken: Parts, query: Tensor) -> Tensor:
        """See `LayerState.recur`."""
        return recurrence.chunk(taken, query, None)[0]


STATELESS = Stateless()


def _alone(layer: int) -> StepError:
    return StepError(
        f"layer {layer} was called by itself, and a prepared model opens its cache at the whole decoder: call the model"
    )


def _foreign(name: str) -> StepError:
    return StepError(
        f'state "{name}": the cache was filled by a prepared model, and this is none, or a layer of one called by '
        "itself: call the whole model, after statecache.prepare(model)"
    )
