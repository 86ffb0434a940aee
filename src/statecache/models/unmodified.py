"""The writer of models as they are, which never say where a forward pass begins or ends: it is read off their calls.

A pass opens at its first write, with as many tokens as that brings, and ends with the last write of the last layer that
holds a state. The order in a layer differs from family to family (zamba attends first, falcon_h1 last), so writes are
counted. How many there are follows from the table; for a family that is in none, from its first pass, which only the
next call shows to be over.

B rows, T new tokens, K width of a convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from statecache.clock import capturing
from statecache.errors import ConfigError, RaggedError, ShapeError, StepError
from statecache.lease import Lease
from statecache.models.checks import no_gradient
from statecache.models.prepared import LayerState, Prepared
from statecache.models.ready import needs_prepared, not_kept
from statecache.models.registry import Registry
from statecache.models.table import DROPS_STATE, KINDS, ON_MODULES, SHIFTS_IN_PLACE, WRITES_BY_HEAD
from statecache.spec import ModelSpec, StateSpec
from statecache.states import WAY_OUT, States
from statecache.step import Step
from statecache.storage.table import Stores


class Unmodified:
    """Takes in what the layers of an unmodified model hand to the cache, and says what they ask."""

    def __init__(self, states: States) -> None:
        self.states, self.registry = states, Registry(states)
        self.step: Step | None = None  # of a prepared model: none
        self.whole = False
        self.fed = False  # whether any row holds a token: the models ask whether there is a previous state
        self.boundaries = Boundaries(states.spec)
        self._owed: dict[
            str, int | None
        ] = {}  # states that the last layer has yet to overwrite, and the version each then has
        self._early: dict[str, Tensor] = {}  # what was written before anything showed how many tokens it is of
        self._positions: Tensor | None = None  # of the pass that begins, (3, B, S + T)

    @property
    def ran(self) -> bool:
        """Whether any pass of a model has gone through it."""
        return self.boundaries.first is not None

    @property
    def layers(self) -> list[LayerState]:
        """What the mixers of a prepared model find, where its decoder has not opened a pass: they refuse."""
        return [LayerState(self, layer.index) for layer in self.states.spec.layers]

    # ---- what layers call

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `StateCache.update`."""
        names = self.registry.name(layer, "key"), self.registry.name(layer, "value")
        tokens = key.shape[-2]
        for name, new in zip(names, (key, value), strict=True):
            self.registry.check_heads(name, new, tokens)
        step = self._begin(names[0], key, tokens)
        keys, values = (
            self.registry.extend(name, new, tokens, step) for name, new in zip(names, (key, value), strict=True)
        )
        self._wrote(layer, names[0], counts=True)
        return keys, values

    def update_index(self, layer: int, new: Tensor) -> Tensor:
        """See `StateCache.update_indexer`."""
        name, tokens = self.registry.name(layer, "index"), new.shape[1]
        self.registry.check_index(name, new)
        positioned = f"{layer}.position" in self.states.declared
        positions = self._positions if positioned else None
        if positioned and positions is None:
            raise StepError(f'state "{layer}.position": keys of the index came before the positions: call the model')
        step = self._begin(name, new, tokens)
        index = self.registry.extend(name, new, tokens, step)
        if positions is not None:
            self.registry.put_positions(layer, positions, step)
            self._positions = None
        self._wrote(layer, name, counts=True)
        return index

    def positions(self, layer: int) -> Tensor | None:
        """See `StateCache.positions`."""
        clock = self.states.clock
        return None if clock is None else self.registry.positions(layer, clock.uniform())

    def take_positions(self, layer: int, positions: Tensor) -> None:
        """See `StateCache.take_positions`. They are written with the index, since no pass is open yet."""
        self.registry.name(layer, "position")
        self._positions = positions

    def get_conv_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_conv_state`."""
        name = self.registry.name(layer, "conv", number)
        self.finish(name)
        state = self.states.held.get(name)
        if not self.fed or state is None:
            return None
        if isinstance(state, Lease):
            past = state.entry
        else:
            assert state.spec.window is not None
            past = state.past(state.spec.window, self.states.step or Step(0, self._start()))
            self.boundaries.handed[name] = past
        if self.registry.model in SHIFTS_IN_PLACE:  # it will not ask: what it did to the copy is looked at afterwards
            self.boundaries.handed[name] = past = past.clone()
        return past if state.spec.blank is None else past + state.spec.blank

    def update_conv_state(self, layer: int, number: int, new: Tensor, width: int | None) -> Tensor:
        """See `StateCache.update_conv_state`."""
        name = self.registry.name(layer, "conv", number)
        self.finish(name)
        spec = self.states.declared.get(name) or _first_conv(name, new, width, self.states.slack)
        assert spec.shape is not None and spec.window is not None
        if width is None:
            return self._update_window(name, spec, new, layer)
        if spec.blank is not None:
            step = self.states.step
            if not self.fed and step is None:
                early, held = new - spec.blank, spec.shape[-1] if spec.leased else 0
                if held:  # the window that it keeps
                    early = torch.nn.functional.pad(early, (max(held - new.shape[-1], 0), 0))[..., -held:]
                self._early[name] = early
                return new
            # a short beginning comes behind blanks, which are not tokens
            new = (new if self.fed or step is None else new[..., -step.tokens :]) - spec.blank
        held, tokens = spec.shape[-1] if spec.leased else spec.window, new.shape[-1]
        self._check_inputs(name, spec, new, held, width)
        step = self._begin(name, new, tokens)
        self._declare(name, spec)
        self._keep(layer)
        state = self.states.held.get(name) or self.registry.allocate_like(name, new, tokens)
        past = self.boundaries.handed.pop(name, None)
        if past is None and self.fed:
            past = state.entry if isinstance(state, Lease) else state.past(held, step)
        if past is None:
            wide = torch.nn.functional.pad(new, (max(width - tokens, 0), 0))
        else:
            wide = no_gradient(torch.cat([past, new], -1), new)
        if isinstance(state, Lease):
            state.put(wide.narrow(-1, wide.shape[-1] - held, held))
        else:
            state.put(new.to(state.dtype), step)
        self._wrote(layer, name, counts=True)
        return wide if spec.blank is None else wide + spec.blank

    def _check_inputs(self, name: str, spec: StateSpec, new: Tensor, held: int, width: int) -> None:
        """Whether a convolution of K = `width` may hand in these inputs (B, C, T), of which the cache has `held`."""
        model, tokens = self.registry.model, new.shape[-1]
        if held not in (width - 1, width):
            raise ConfigError(
                f'state "{name}": the layer convolves {width} inputs, and the cache was made for {held + 1}: make it '
                f"from the configuration of the {model} model that uses it"
            )
        assert spec.shape is not None
        shape = (*(spec.shape[:-1] if spec.leased else spec.shape), tokens)
        self.registry.check(name, shape, new, cast=spec.dtype is not None)
        if tokens > 1 and self.fed and model in DROPS_STATE:
            raise StepError(
                f'state "{name}": {tokens} tokens came on top of others, and the code of a {model} model then starts '
                "its recurrence from zero: feed one token at a time"
            )

    def _update_window(self, name: str, spec: StateSpec, window: Tensor, layer: int) -> Tensor:
        """Take in the window that a layer has cut itself; before its first write, which shows its tokens, later."""
        assert spec.shape is not None and spec.window is not None
        self.registry.check(name, spec.shape if spec.leased else (*spec.shape, spec.window), window)
        if self.states.step is None and layer == self.boundaries.last and not self.boundaries.attends:
            raise StepError(
                f'state "{name}": it is the last of its pass, in which no state showed how many tokens it took in: see '
                "docs/adding_a_layer.md"
            )
        self._declare(name, spec)
        self.boundaries.handed.pop(name, None)
        if self.states.step is None:
            self._early[name] = window
        else:
            self._put_window(name, window, layer, self._begin(name, window, self.states.step.tokens))
        return window

    def _put_window(self, name: str, window: Tensor, layer: int, step: Step) -> None:
        """Of a window (B, C, n), n inputs up to the pass's last, a ring takes those that came in the pass."""
        self._keep(layer)
        state = self.states.held.get(name) or self.registry.allocate_like(name, window, window.shape[-1])
        if isinstance(state, Lease):
            state.put(window)
        else:
            new = min(step.tokens, window.shape[-1])
            last = Step(new, step.start + (step.tokens - new), end=step.end)
            state.put(window[..., window.shape[-1] - new :], last)
        self._wrote(layer, name, counts=True)

    def get_recurrent_state(self, layer: int, number: int) -> Tensor | None:
        """See `StateCache.get_recurrent_state`."""
        name = self.registry.name(layer, "recurrent", number)
        self.finish(name)
        state = self.states.held.get(name)
        if not self.fed or state is None:
            return None
        assert isinstance(state, Lease)
        if not self._convolves(layer):  # else the copies are made when the convolution is written
            self._keep(layer)
        return state.entry

    def update_recurrent_state(self, layer: int, number: int, new: Tensor, tokens: int | None) -> Tensor:
        """See `StateCache.update_recurrent_state`."""
        name, states = self.registry.name(layer, "recurrent", number), self.states
        spec = states.declared.get(name)
        if spec is None:
            spec = StateSpec(name.split(".")[1], "recurrent", tuple(new.shape[1:]), 1, leased=True)
        assert spec.shape is not None
        self.registry.check(name, spec.shape, new, cast=True)
        self._take_shifted(layer)
        if self._early:  # as the convolution before it
            self._declare(name, spec)
            self._early[name] = new
            return new
        alone = not self._convolves(layer) and not KINDS[states.spec.layers[layer].kind].attention
        if alone:
            tokens = states.step.tokens if tokens is None and states.step is not None else tokens
            if tokens is None:
                raise StepError(
                    f'state "{name}": it is the first of its pass to be written, and a recurrent state does not show '
                    "how many tokens it took in: pass tokens= to update_recurrent_state"
                )
            self._begin(name, new, tokens)
        self._declare(name, spec)
        return no_gradient(self._overwrite(name, new, layer, counts=alone), new)

    def _overwrite(self, name: str, new: Tensor, layer: int, counts: bool) -> Tensor:
        """Have a state (B, *D) be `new`; the state as it is kept."""
        self.registry.clock_for(new)
        lease = self.registry.lease(name, new)
        lease.put(new)
        self._wrote(layer, name, counts)
        return lease.entry

    def records(self, layer: int) -> bool:
        """See `StateCache.is_recording_past`."""
        return self.states.slack > 0 or layer in self.boundaries.ends

    def has_previous(self, layer: int | None, number: int | None) -> bool:
        """See `StateCache.has_previous_state`."""
        if layer is not None:
            # zamba asks between its keys and its convolution, inkling between two of its convolutions
            asked = None if number is None else {f"{kind}{number or ''}" for kind in ("conv", "recurrent")}
            for state in self.registry.layer(layer).states:
                if state.kind in ("conv", "recurrent") and (asked is None or state.name in asked):
                    self.finish(f"{layer}.{state.name}")
        return self.fed

    def query_offset(self) -> int | float | Tensor:
        """See `StateCache.get_query_offset`."""
        return self.registry.query_offset()

    def seq_length(self) -> int | Tensor:
        """Columns taken in, pads included. Raises RaggedError where rows differ."""
        return self.registry.query_offset()

    # ---- from one pass to the next

    def adopt(
        self, like: Tensor, tokens: int, count: Tensor | Sequence[int] | None, rows: Sequence[int] | None
    ) -> Prepared:
        """The writer of a prepared model that goes on with the cache, if this pass of its can be."""
        self.finish()
        states = self.states
        states.check_pass(tokens)
        clock = self.registry.clock_for(like) if rows is None else states.clock
        if clock is None:
            raise StepError("a pass over some rows needs rows to choose from: make the cache with rows=")
        clock.open(tokens, count, rows)  # which refuses what does not fit, before anything is changed
        states.keep_logs()
        return Prepared(states, self.fed)

    def over(self, states: States) -> Unmodified:
        """The same for a copy of the states."""
        other = Unmodified(states)
        other.fed, other.boundaries = self.fed, copy.deepcopy(self.boundaries)
        return other

    def check_mask(self, mask: Tensor) -> None:
        """Raise RaggedError where `mask` (B, n) says that pads are among what was fed, all of it as tokens."""
        if self.fed and not torch.compiler.is_compiling() and not capturing(mask) and not bool((mask != 0).all()):
            raise RaggedError(
                "the mask shows pads among the tokens that an unprepared model fed to this cache, as tokens: begin "
                "with a new cache, or prepare the model before the first turn"
            )

    def finish(self, name: str | None = None) -> None:
        """Close the first pass of a family that is in no table, if this call (about `name`) shows that it is over."""
        if name is None:
            self._collect()
        if self.boundaries.due is None and (name is None or name in self.boundaries.written) and self.boundaries.over():
            self._end()

    def moved(self, dropped: bool = False) -> None:
        """Rows have changed between two passes. `dropped`: a pass that was interrupted is forgotten."""
        clock = self.states.clock
        self.fed = clock is not None and any(clock.known.lengths)
        self.registry.forget()
        self._owed.clear()
        self._early.clear()  # of a pass that was interrupted, as is what was shown
        self._positions = None
        self.boundaries.handed.clear()
        if dropped:
            self.boundaries.drop()

    # ---- the pass

    def _begin(self, name: str, new: Tensor, tokens: int) -> Step:
        """The open step; a new one, if this is its first write."""
        if self.registry.model in ON_MODULES:
            raise not_kept(self.registry.model)
        if isinstance(self.states.store, Stores) and self.states.store.recurrent is not None:
            raise needs_prepared(self.registry.model, self.states.store.recurrent)
        if not torch.compiler.is_compiling():
            if name in self.boundaries.written:
                self.finish()
            if name in self.boundaries.written or self.boundaries.busy is not None:
                raise StepError(
                    f'state "{name}" is written a second time in one pass: the pass before was interrupted, so some '
                    f"layers have taken in its tokens and some have not: {WAY_OUT}"
                )
        step = self.states.step
        if step is not None and (self.boundaries.written or torch.compiler.is_compiling()):
            self.boundaries.busy = name
            if step.tokens != tokens:
                raise ShapeError(f'state "{name}": {tokens} tokens came in a pass that began with {step.tokens}')
            return step
        self._collect()
        self.states.check_pass(tokens)
        clock = self.registry.clock_for(new)
        if clock.known.ragged:
            clock.uniform()
        self.boundaries.begin(int(name.partition(".")[0]))
        step = self.states.open(tokens)
        self.boundaries.busy = name  # what follows may be interrupted
        step.write()
        if step.end is not None and not torch.compiler.is_compiling():
            last = self.states.spec.layers[self.boundaries.last]
            owed = [f"{last.index}.{state.name}" for state in last.states if state.kind == "recurrent" and state.leased]
            self._owed = {name: self._version(name, ahead=True) for name in owed}
        self._take_early(step)
        self.boundaries.busy = name
        return step

    def _take_early(self, step: Step) -> None:
        """Take in what was written before the pass was open."""
        for name in list(self._early):
            new, layer = self._early.pop(name), int(name.partition(".")[0])
            if self.states.declared[name].kind == "conv":
                self._put_window(name, new, layer, step)
            else:
                self._overwrite(name, new, layer, counts=False)

    def _wrote(self, layer: int, name: str, counts: bool) -> None:
        self.boundaries.busy = None
        if not torch.compiler.is_compiling():
            self._owed.pop(name, None)
        if self.boundaries.wrote(layer, name, counts):
            self._end()

    def _end(self) -> None:
        step = self.states.step
        assert step is not None
        self.boundaries.end()
        self.states.close(step)
        self.fed = True
        # some layers end their pass, as it is counted, before they overwrite their state
        self._owed = {name: least for name, least in self._owed.items() if not self._reached(name, least)}

    def _collect(self) -> None:
        """Whether the last layer has overwritten the states that it owed: if not, it was interrupted."""
        if not all(self._reached(name, least) for name, least in self._owed.items()):
            self.states.broken = "the last forward pass"
        self._owed.clear()

    def _version(self, name: str, ahead: bool = False) -> int | None:
        """How often a state was written to; None before there is one. `ahead`: once its model has overwritten it."""
        state = dict.get(self.states.held, name)  # wherever it is
        if not isinstance(state, Lease):
            return None
        writes = state.entry.shape[1] if self.registry.model in WRITES_BY_HEAD else 1
        return state.entry._version + writes * ahead

    def _reached(self, name: str, least: int | None) -> bool:
        """Whether a state was written to that often; one that was not there has to be handed in."""
        version = self._version(name)
        return version is not None and least is not None and version >= least

    def _take_shifted(self, layer: int) -> None:
        """Take in the one input of each convolution whose state this layer was handed and has shifted in place."""
        if self.registry.model in SHIFTS_IN_PLACE:
            for name in [n for n in self.boundaries.handed if n.startswith(f"{layer}.")]:
                shifted = self.boundaries.handed.pop(name)
                step, state = self._begin(name, shifted, 1), self.states[name]
                self._keep(layer)
                if isinstance(state, Lease):
                    state.put(shifted)
                else:
                    state.put(shifted[..., -1:], step)
                self._wrote(layer, name, counts=True)

    def _start(self) -> int | Tensor:
        """Where the pass that is open, or about to open, starts."""
        states, clock = self.states, self.states.clock
        assert clock is not None
        if states.step is not None:
            return states.step.start
        if states.capacity is not None and (torch.compiler.is_compiling() or capturing(clock.lengths)):
            return clock.lengths[:1].clone()
        return clock.uniform()

    def _keep(self, layer: int) -> None:
        """Before anything overwrites this layer's leased states, copy them for a rollback to the step's start."""
        if self.states.slack and self.fed:
            for spec in self.states.spec.layers[layer].states:
                state = self.states.held.get(f"{layer}.{spec.name}")
                if isinstance(state, Lease):
                    state.keep(Step(1, self._start(), end=0))

    # ---- states

    def _declare(self, name: str, spec: StateSpec) -> None:
        if name not in self.states.declared:
            self.states.declare(name, spec)

    def _convolves(self, layer: int) -> bool:
        return any(state.kind == "conv" for state in self.states.spec.layers[layer].states)


class Boundaries:
    """What the layers have written since a pass began, and so where it ends."""

    def __init__(self, spec: ModelSpec) -> None:
        self.model = spec.model
        passed = [spec.layers[index] for index in spec.order] or spec.layers
        holding = [layer.index for layer in passed if layer.states or layer.open] or [-1]
        self.last = holding[-1]
        self.ends = {holding[0], holding[-1]}  # the layers where a pass begins and ends
        self.attends = self.last >= 0 and any(state.name == "key" for state in spec.layers[self.last].states)
        kind = spec.layers[self.last].kind if self.last >= 0 else ""
        self.like = [n.index for n in passed if n.kind == kind and n.index != self.last]
        self.first: int | None = None  # the layer that begins a pass
        self.due = _due(spec, self.last)  # writes that the last layer makes; None until they have been seen
        self.left = 0  # of them, in this pass
        self.written: set[str] = set()
        self.busy: str | None = None  # the state that is being written
        self.handed: dict[str, Tensor] = {}  # what a convolution was shown, until it writes

    def begin(self, layer: int) -> None:
        """Start counting. Raises StepError where the pass before has ended too early."""
        self.left = self.due or 0
        if self.first is None:
            self.first = layer
        elif layer == self.last != self.first:
            raise StepError(
                f"layer {layer} writes more states than the layers of its kind before it, so that its pass was thought "
                "to be over: add its states to statecache.models.table.SHAPES (docs/adding_a_layer.md)"
            )

    def wrote(self, layer: int, name: str, counts: bool) -> bool:
        """Take note of a write; whether it was the pass's last. `counts`: if it is one of those that end a pass."""
        if not torch.compiler.is_compiling():
            self.written.add(name)
        if layer != self.last or not counts:
            return False
        if self.due is None:  # a first pass: as many as the layers of its kind before it
            written = len(self._counted(layer))
            if not written or not self.like or written != len(self._counted(self.like[-1])):
                return False
            self.due = self.left = written
            return True
        self.left -= 1
        return self.left == 0

    def _counted(self, layer: int) -> set[str]:
        """The writes of a layer in this pass that are counted."""
        names = {name.split(".")[1] for name in self.written if name.startswith(f"{layer}.")}
        return {name for name in names if not name.startswith("recurrent")} or names

    def over(self) -> bool:
        """Whether a first pass of unknown end, now that another call comes, has ended."""
        if self.due is not None or torch.compiler.is_compiling():
            return False
        counted = self._counted(self.last)
        if self.attends and "key" not in counted:
            return False  # inkling asks for mask sizes inside its layers, between its convolutions and its keys
        self.due = len(counted) or None
        return self.due is not None

    def end(self) -> None:
        """Start afresh. Raises StepError where a layer read its inputs and never wrote."""
        if torch.compiler.is_compiling():
            return
        if self.handed:
            raise StepError(
                f'state "{next(iter(self.handed))}" was read and not written: a "{self.model}" model seems to shift it '
                "in place, which no ring can see: add the model to statecache.models.table.SHIFTS_IN_PLACE"
            )
        self.written.clear()

    def drop(self) -> None:
        """Forget a pass that was interrupted."""
        self.left, self.busy = 0, None
        self.written.clear()
        self.handed.clear()


def _due(spec: ModelSpec, last: int) -> int | None:
    if last < 0 or spec.layers[last].open:
        return None
    states = spec.layers[last].states
    attending = sum(state.name in ("key", "index") for state in states)
    return attending + sum(state.kind == "conv" for state in states) or len(states)


def _first_conv(name: str, new: Tensor, width: int | None, slack: int) -> StateSpec:
    """How a convolution of a family that is in no table is kept: as many inputs as it says, or the window it cut."""
    short = name.partition(".")[2]
    if width is None:
        return StateSpec(short, "conv", tuple(new.shape[1:]), 1, leased=True)
    shape = tuple(new.shape[1:-1])
    if not slack:
        return StateSpec(short, "conv", (*shape, width), 1, leased=True)
    return StateSpec(short, "conv", shape, width, axis=len(shape))
