"""The writer of prepared models, which say where a pass begins and ends, and what a layer's mixer sees of the cache.

B rows, T new tokens, C channels, K width of a convolution. Time is axis 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache import kernels
from statecache.clock import capturing
from statecache.errors import LayerError, RaggedError, ShapeError, StepError
from statecache.lease import Lease
from statecache.models.checks import no_gradient
from statecache.models.registry import Registry
from statecache.ops import conv
from statecache.replay import Log, Operators, Parts, Recurrence, run
from statecache.ring import Ring
from statecache.states import States
from statecache.step import Step

AHEAD = 16  # tokens of a round that a kernel runs over one by one


class Prepared:
    """Opens and closes the passes of a prepared model, and takes in the keys and values of its attention."""

    def __init__(self, states: States, fed: bool) -> None:
        self.states, self.registry, self.fed = states, Registry(states), fed
        self.step: Step | None = None  # of the pass that is open
        self.whole = False  # whether nothing stands before that pass, so that gradients need not go through states
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
            before = self.states.clock
            if self.registry.clock_for(like) is not before:
                for layer in self.layers:  # which a pass that was given up may not have come to
                    layer.forget()
        elif len(rows) != len(like):
            raise ShapeError(f"{len(like)} rows came in a pass over rows {list(rows)}")
        self.step = self.states.open(tokens, count, rows, counted=counted, operators=operators)
        return self.step

    def end(self) -> None:
        """Close the pass."""
        step, self.step, self.whole = self.step, None, False
        assert step is not None
        self.states.close(step)
        if not step.tentative:
            self.fed = True

    def give_up(self) -> None:
        """The pass was left by an exception."""
        self.step, self.whole = None, False

    # ---- what layers and transformers call

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateCache.update`."""
        names = self.registry.name(layer, "key"), self.registry.name(layer, "value")
        tokens = key.shape[-2]
        for name, new in zip(names, (key, value), strict=True):
            self.registry.check_heads(name, new, tokens)
        step = self._open(names[0], tokens)
        keys, values = (
            self.registry.extend(name, new, tokens, step) for name, new in zip(names, (key, value), strict=True)
        )
        if self.whole and key.requires_grad:  # as many as the ring shows, for which there is a mask
            more = keys.shape[-2] - tokens
            return F.pad(key, (0, 0, 0, more)), F.pad(value, (0, 0, 0, more))
        return keys, values

    def update_index(self, layer: int, new: Tensor) -> Tensor:
        """See `StateCache.update_indexer`."""
        name, tokens = self.registry.name(layer, "index"), new.shape[1]
        self.registry.check_index(name, new)
        return self.registry.extend(name, new, tokens, self._open(name, tokens))

    def positions(self, layer: int) -> Tensor | None:
        """See `StateCache.positions`. S is the longest row's length, or at a fixed capacity this."""
        clock = self.states.clock
        if clock is None:
            return None
        slots = max(clock.known.lengths) if self.states.capacity is None else self.states.capacity
        return self.registry.positions(layer, slots, None if self.step is None else self.step.rows)

    def take_positions(self, layer: int, positions: Tensor) -> None:
        """See `StateCache.take_positions`."""
        name = self.registry.name(layer, "position")
        if self.step is None:
            raise _foreign(name)
        self.registry.put_positions(layer, positions, self.step)

    def get_conv_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_conv_state`."""
        state, clock = self.states.held.get(self.registry.name(layer, "conv", number)), self.states.clock
        if not self.fed or state is None or clock is None:
            return None
        if isinstance(state, Lease):
            past = state.entry if self.step is None else state.read(self.step)
        else:
            assert state.spec.window is not None
            past = state.past(state.spec.window, self.step or Step(0, clock.lengths))
        return past if state.spec.blank is None else past + state.spec.blank

    def get_recurrent_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_recurrent_state`."""
        state = self.states.held.get(self.registry.name(layer, "recurrent", number))
        return state.entry if self.fed and isinstance(state, Lease) else None

    def update_conv_state(self, layer: int, number: int, new: Tensor, width: int | None) -> Tensor:
        """See `StateCache.update_conv_state`: of a convolution that no mixer has taken over."""
        name = self.registry.name(layer, "conv", number)
        if self.step is None:
            raise _foreign(name)
        spec = self.states.declared[name]
        assert spec.shape is not None and spec.window is not None
        if spec.blank is not None:  # a short beginning comes behind blanks, which are not tokens
            new = new[..., -self.step.tokens :] - spec.blank
        step, held = self._open(name, new.shape[-1]), spec.shape[-1] if spec.leased else spec.window
        self.registry.check(name, (*(spec.shape[:-1] if spec.leased else spec.shape), new.shape[-1]), new)
        step.write()
        state = self.states.held.get(name) or self.registry.allocate_like(name, new, step.tokens)
        past = state.read(step) if isinstance(state, Lease) else state.past(held, step)
        wide = torch.cat([past, new], -1)
        if isinstance(state, Ring):
            state.put(new, step)
        else:
            state.write(_newest(wide, held, step.on(state.device).count), step)
        wide = new if self.whole and new.requires_grad else no_gradient(wide, new)
        return wide if spec.blank is None else wide + spec.blank

    def update_recurrent_state(self, layer: int, number: int, new: Tensor, tokens: int | None) -> Tensor:
        """Refuse, as above."""
        raise _foreign(self.registry.name(layer, "recurrent", number))

    def records(self, layer: int) -> bool:
        """See `StateCache.is_recording_past`."""
        return True

    def has_previous(self, layer: int | None, number: int | None) -> bool:
        """See `StateCache.has_previous_state`."""
        return self.fed

    def query_offset(self) -> int | float | Tensor:
        """See `StateCache.get_query_offset`. NaN in a pass whose rows differ.

        What a model makes of it there is made anew, row by row; where it was not, that cannot go unseen.
        """
        step, clock = self.step, self.states.clock
        if step is not None and clock is not None and (step.rows is not None or clock.known.ragged):
            return math.nan
        return self.registry.query_offset()

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

    def check_mask(self, mask: Tensor) -> None:
        """Raise RaggedError where `mask` (B, n), of all columns fed, hides tokens that a row has taken in.

        `generate` feeds pads behind the end of a row that ends early, and shows them as tokens until its next call.
        """
        clock = self.states.clock
        if clock is None or torch.compiler.is_compiling() or capturing(mask) or mask.shape[1] != clock.known.width:
            return
        if len(mask) != clock.rows:  # of some rows, which the pass names
            return
        if self.states.tentative is None:
            self.states.check_whole()  # what was interrupted has a way out of its own
        for row, (real, held) in enumerate(zip((mask != 0).sum(1).tolist(), clock.known.lengths, strict=True)):
            if real < held:
                raise RaggedError(
                    f"row {row} holds {held} tokens, and the mask shows {real}: pads were fed behind its end, as "
                    f"tokens; forget them with rollback(), given slack, or begin the row anew in another cache"
                )

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
    whole: bool


@dataclass(frozen=True, eq=False)
class Lent:
    """What a kernel needs to take in tokens of each row by itself, and to keep its states in place.

    ring: (B, C, S), the inputs of the convolution, that of position p in slot p % S. state: (B, *D), the recurrence's,
    in the dtype that it is kept in; None where the layer has no recurrence.
    start: (B,) or (1,) long, where rows stand. count: (B,) long, how many of the tokens are theirs; None for all.
    log: of a round, which leaves the state as it is, and the inputs and gates (B, L, W) of position p in slot p % L.
    """

    ring: Tensor
    state: Tensor | None
    start: Tensor
    count: Tensor | None
    log: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class LentKeys:
    """The same of attention: keys and values (B, H, C, D), that of position p in slot p."""

    keys: Tensor
    values: Tensor
    start: Tensor
    count: Tensor | None


def lent_log(log: Log) -> tuple[Tensor, Tensor] | None:
    """A log's inputs and gates (B, L, W) for a kernel; None where their store cannot show them."""
    if not log.inputs.store.shows or not log.gates.store.shows or log.inputs.capacity != log.gates.capacity:
        return None
    inputs, gates = (ring.store.read(slice(0, ring.capacity)) for ring in (log.inputs, log.gates))
    return inputs, gates


class LayerState:
    """The states of one layer: its convolutions' inputs, its recurrent state, and the log of what that consumed."""

    def __init__(self, writer: Writer, index: int) -> None:
        self.writer, self.index = writer, index
        self.forget()

    def forget(self) -> None:
        """Look up and check everything again."""
        names = [state.name for state in self.writer.states.spec.layers[self.index].states if state.kind == "conv"]
        self._convs: list[Ring | Lease | None] = [None] * max(1, len(names))
        self._convolved: list[Any] = [None] * len(self._convs)  # what each one's last input was, once it was checked
        self._found: tuple[Lease, Log | None] | None = None  # the recurrent state, and its log
        self._consumed: Any = None  # the same of the recurrence

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        number: int = 0,
        heads: conv.Heads | None = None,
    ) -> Tensor:
        """Convolve x (B, T, C) causally with weight (C, K) behind the inputs before it, and keep it: (B, T, C).

        Weights (B, T, C, K) are each token's own. `number`: of the layer's convolutions. `heads`: the weight and bias
        of a second one behind it, over the channels of each head: see `statecache.ops.conv`. Raises StepError outside
        of a pass.
        """
        step = self.writer.step
        if step is None:
            raise _alone(self.index)
        # compiled code is guarded by what it reads
        held = None if torch.compiler.is_compiling() else self._convs[number]
        if held is None or self._convolved[number] != (x.shape, x.dtype, x.device):
            held = self._find_conv(x, number)
        elif self.writer.states.offload:
            self.writer.states.bring(self.index)
        if step.pending is not None:
            step.pending()
        width = weight.shape[-1] if heads is None else conv.span(weight, heads)
        if isinstance(held, Ring):
            past: Tensor | None = held.past(width - 1, step)
        else:
            past = held.shown if step.rows is None else None
            past = held.read(step) if past is None else past
        assert past is not None
        if step.tokens == 1:
            y, wide = conv.step(x, weight, bias, past, silu, heads)
        else:
            y, wide = _convolve(x, weight, bias, past, silu, heads), None
        if isinstance(held, Ring):
            held.put(x.mT if x.dtype == held.dtype else x.mT.to(held.dtype), step)
        elif wide is not None and step.count is None:
            after = wide.detach()[:, 1:].mT
            if past is held.shown:
                past.copy_(after)
            else:
                held.write(after, step)
        else:
            count = step.on(held.device).count
            held.write(conv.window(x.detach(), past, width, count), step)
        return no_gradient(y, x) if x.requires_grad and not self.writer.whole else y

    def recur(self, recurrence: Recurrence, taken: Parts, query: Tensor) -> Tensor:
        """Take the parts (B, T, *shape) of T tokens into the state; the outputs for `query` (B, T, ...)."""
        step = self.writer.step
        if step is None:
            raise _alone(self.index)
        first = taken[0]
        found = None if torch.compiler.is_compiling() else self._found
        if found is None or self._consumed != (first.shape, first.dtype, first.device):
            found = self._find_state(recurrence, taken)
        elif self.writer.states.offload:
            self.writer.states.bring(self.index)
        state, log = found
        if step.pending is not None:
            step.pending()
        log = log if step.tentative or self.writer.states.back else None
        with torch.no_grad():
            if step.plain and log is None and state.shown is not None:
                y = recurrence.step(tuple([part[:, 0] for part in taken]), query[:, 0], state.shown)[:, None]
            else:
                y = run(recurrence, taken, query, state, step, log)
        if self.writer.whole and any(part.requires_grad for part in (*taken, query)):
            return STATELESS.recur(recurrence, taken, query)
        return no_gradient(y, first) if first.requires_grad else y

    def lend(self) -> Lent | None:
        """The states of a mixer for a kernel, which then updates them; None where the pass is none for it.

        That is a pass of one token of all rows in order, or a round over few, with nothing to log, on states that lie
        in one tensor, the convolution's in a ring with a slot to spare for each.
        """
        step, held = self._lending(), self.writer.states.held
        if step is None:
            return None
        conv, state, log = held.get(f"{self.index}.conv"), None, None
        if not isinstance(conv, Ring) or not conv.store.shows or not conv.wraps:
            return None
        if conv.spec.window is None or conv.capacity < conv.spec.window + step.tokens:
            return None
        if f"{self.index}.recurrent" in self.writer.states.declared:
            state = self._lend_state()
            if state is None:
                return None
            if step.tentative:
                rings = self.writer.states.logs[f"{self.index}.recurrent"]
                log = None if rings is None else lent_log(rings)
                if log is None:
                    return None
        step.write()
        here, ring = step.on(conv.device), conv.store.read(slice(0, conv.capacity))
        return Lent(ring, state, here.starts_on(conv.device), here.count, log)

    def _lend_state(self) -> Tensor | None:
        """The recurrent state, if a kernel may keep it in place."""
        states = self.writer.states
        state = states.held.get(f"{self.index}.recurrent")
        if not isinstance(state, Lease) or state.copies is not None or (state.spec.logged and states.back):
            return None
        held = state.store.plain
        return None if held is None else held.squeeze(1)

    def lend_keys(self) -> LentKeys | None:
        """The keys and values for a kernel, which then writes them; None where the pass is none for it, as above.

        They are without a window, so that a position is its slot.
        """
        step, held = self._lending(), self.writer.states.held
        if step is None:
            return None
        key, value = (held.get(f"{self.index}.{name}") for name in ("key", "value"))
        if not isinstance(key, Ring) or not isinstance(value, Ring) or key.wraps or value.wraps:
            return None
        if key.spec.window is not None or not key.store.shows or not value.store.shows:
            return None
        step.write()
        here = step.on(key.device)
        keys, values = (ring.store.read(slice(0, ring.capacity)) for ring in (key, value))
        return LentKeys(keys, values, here.starts_on(key.device), here.count)

    def places(self, x: Tensor) -> Tensor:
        """The position of each of x (B, T, ...) in its row: (B, T), or (1, T) where all rows stand alike."""
        step = self.writer.step
        if step is None:
            raise _alone(self.index)
        return step.places(x.device)

    def _lending(self) -> Step | None:
        """The pass, if it may be one for a kernel."""
        step = self.writer.step
        if step is None or step.rows is not None or torch.is_grad_enabled():
            return None
        return step if step.tokens <= (AHEAD if step.tentative else 1) else None

    def _find_conv(self, x: Tensor, number: int) -> Ring | Lease:
        name, registry = f"{self.index}.conv{number or ''}", self.writer.registry
        spec = self.writer.states.declared.get(name)
        if spec is None or spec.shape is None:
            raise LayerError(f"layer {self.index} of {registry.model} has no convolution {number or ''}".rstrip())
        registry.check(name, (x.shape[1], spec.shape[0]), x, cast=spec.dtype is not None)
        held = self.writer.states.held.get(name) or registry.allocate_like(name, x, x.shape[1])
        if not torch.compiler.is_compiling():  # what was looked up serves the next pass
            self._convs[number], self._convolved[number] = held, (x.shape, x.dtype, x.device)
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
        found = registry.lease(name, first), states.logs[name]
        if not torch.compiler.is_compiling():
            self._found, self._consumed = found, (first.shape, first.dtype, first.device)
        return found


class Stateless:
    """What a mixer sees of a forward without a cache: nothing before it, nothing kept."""

    def convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        silu: bool,
        number: int = 0,
        heads: conv.Heads | None = None,
    ) -> Tensor:
        """See `LayerState.convolve`."""
        return _convolve(x, weight, bias, None, silu, heads)

    def recur(self, recurrence: Recurrence, taken: Parts, query: Tensor) -> Tensor:
        """See `LayerState.recur`."""
        return recurrence.chunk(taken, query, None)[0]

    def lend(self) -> None:
        """See `LayerState.lend`."""

    def places(self, x: Tensor) -> Tensor:
        """See `LayerState.places`."""
        return torch.arange(x.shape[1], device=x.device)[None]


STATELESS = Stateless()


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, silu: bool, heads: conv.Heads | None
) -> Tensor:
    """See `statecache.ops.conv.chunk`; by the kernel where it can."""
    if heads is None and weight.dim() == 2 and x.shape[1] and kernels.serves("conv_chunk", x, weight, bias, past):
        from statecache.kernels import conv_chunk

        return conv_chunk.chunk(x, weight, bias, past, silu)
    return conv.chunk(x, weight, bias, past, silu, heads)


def _newest(wide: Tensor, held: int, count: Tensor | None) -> Tensor:
    """The last of `held` inputs and T new ones behind them (B, ..., held + T), after `count` (B,) of these, or all."""
    if count is None:
        return wide[..., -held:]
    index = count[:, None] + torch.arange(held, device=wide.device)
    return wide.take_along_dim(index.view(len(index), *[1] * (wide.dim() - 2), held), -1)


def _alone(layer: int) -> StepError:
    return StepError(
        f"layer {layer} was called by itself, and a prepared model opens its cache at the whole decoder: call the model"
    )


def _foreign(name: str) -> StepError:
    return StepError(
        f'state "{name}": the cache was filled by a prepared model, and this is none, or a layer of one called by '
        "itself: call the whole model, after statecache.prepare(model)"
    )
