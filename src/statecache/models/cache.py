"""StateCache: the rings of a model behind the interface that transformers' models and `generate` call.

transformers never says where a forward pass begins or ends. A step opens at the first write, with as many tokens as that
write brings, and closes at the last write that the last layer with a state makes. The order inside that layer differs
from family to family, so its writes are counted.

B rows, T new tokens, H heads, D head size, K width of a convolution.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from statecache.cache import Rings
from statecache.clock import capturing
from statecache.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    LayerError,
    OptionError,
    RaggedError,
    RowsError,
    ShapeError,
    SlackError,
    StateCacheError,
    StepError,
)
from statecache.models.layers import Layer
from statecache.models.table import KINDS, SHIFTS_IN_PLACE, model_spec
from statecache.ring import Lease, Ring, Step, offset
from statecache.spec import LayerSpec, StateSpec


class StateCache(Rings, Cache):
    """The state of every layer of a hybrid model, for `past_key_values=` (or `cache_params=`) of transformers.

    capacity: tokens a row may hold, at addresses that never move, for torch.compile and CUDA graphs; None grows.
    slack: how many of its last tokens each row can forget.
    rows, dtype, device: allocate at once, where the configuration gives every shape; else at the first forward.

    It is a `Cache` for `isinstance` alone: nothing of that class is used.
    Raises OptionError for options that make no sense, UnknownLayerError for a layer type that the table does not know.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        slack: int = 0,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise OptionError(
                f"StateCache takes a model's configuration, not a {type(config).__name__}: give model.config"
            )
        Rings.__init__(self, model_spec(config), capacity=capacity, slack=slack, rows=rows, dtype=dtype, device=device)
        self.layers = [Layer(self, layer.index) for layer in self.spec.layers]
        self.offloading, self.layer_class_to_replicate = False, None

        self._fed = False  # whether any row holds a token: the models ask whether there is a previous state
        self._last = max((n.index for n in self.spec.layers if n.states or n.open), default=-1)
        self._due = self._writes_due()  # writes that the last layer makes in a step; None until one has been seen
        self._left = 0  # of them, in the open step
        self._written: set[str] = set()  # states written in the open step
        self._handed: dict[str, Tensor] = {}  # inputs before the open step, as given to the convolution that asked

    def __repr__(self) -> str:
        held = "empty" if self.clock is None else f"{self.clock.rows} rows, {self.nbytes()}"
        room = "growing" if self.capacity is None else f"capacity {self.capacity}"
        return f"StateCache({self.spec.model}, {len(self)} layers, {room}, slack {self.slack}: {held})"

    def __len__(self) -> int:
        return len(self.layers)

    # ---- what layers call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values (B, H, T, D); return what the step's tokens may attend to, in order of position."""
        tokens = key_states.shape[-2]
        keys = self._state(layer_idx, "key", key_states, tokens)
        values = self._state(layer_idx, "value", value_states, tokens)
        step = self._begin(layer_idx, "key", key_states, tokens)
        exact = self.capacity is None
        seen = [
            _cut(self._ring(name, new, tokens).extend(new, step, exact), new)
            for name, new in ((keys, key_states), (values, value_states))
        ]
        self._wrote(layer_idx, "key", counts=True)
        return seen[0], seen[1]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The inputs (B, C, window) that the convolution still needs, oldest first; None where there are none yet."""
        name = self._name(layer_idx, "conv", state_idx)
        self._new_pass(name)
        state = self.states.get(name)
        if not self._fed or state is None or self.spec.model in SHIFTS_IN_PLACE:
            return None
        if isinstance(state, Lease):
            return state.entry
        assert state.spec.window is not None
        past = state.past(state.spec.window, Step(0, self._start()))
        self._handed[name] = past
        return past

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Take in a convolution's inputs (B, C, T); return them behind the ones before: (B, C, window + T).

        Before the first token there are none: then (B, C, T), padded with zeros on the left to K. A layer that gives no
        K has cut the window itself: (B, C, window) is then the whole state after the last token.
        """
        name = self._name(layer_idx, "conv", state_idx)
        self._new_pass(name)
        if name not in self._declared:
            self._declare(layer_idx, name, _first_conv(name.split(".")[1], conv_states, conv_kernel_size))
        spec = self._declared[name]
        if conv_kernel_size is not None and spec.window not in (conv_kernel_size - 1, conv_kernel_size):
            raise ConfigError(
                f'state "{name}": the layer convolves {conv_kernel_size} inputs, and the configuration of this cache says '
                f"{(spec.window or 0) + 1}: make it from the configuration of the model that uses it"
            )
        self._state(layer_idx, name.split(".")[1], conv_states, tokens := conv_states.shape[-1])
        if spec.leased:
            self._keep(layer_idx)
            lease = self._lease(name, conv_states)
            lease.put(conv_states)
            self._wrote(layer_idx, name.split(".")[1], counts=True)
            return conv_states
        step = self._begin(layer_idx, name.split(".")[1], conv_states, tokens)
        self._keep(layer_idx)
        ring = self._ring(name, conv_states, tokens)
        past = self._handed.pop(name, None)
        if past is None and self._fed:
            assert spec.window is not None
            past = ring.past(spec.window, step)
        if past is None:
            wide = torch.nn.functional.pad(conv_states, (max((conv_kernel_size or 0) - tokens, 0), 0))
        else:
            wide = torch.cat([past, conv_states], -1)
        ring.put(conv_states, step)
        self._wrote(layer_idx, name.split(".")[1], counts=True)
        return wide

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state after the last token (B, *D), to read and to overwrite in place; None where there is none yet."""
        name = self._name(layer_idx, "recurrent", state_idx)
        self._new_pass(name)
        state = self.states.get(name)
        if not self._fed or state is None:
            return None
        assert isinstance(state, Lease)
        if not self._convolves(layer_idx):  # else the copies are made when the convolution is written
            self._keep(layer_idx)
        return state.entry

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, tokens: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Take in the state after the step's last token (B, *D); return it as it is kept.

        tokens: T, from a layer that has no other state and may be the first of its pass.
        """
        name = self._name(layer_idx, "recurrent", state_idx)
        if name not in self._declared:
            shape = tuple(recurrent_states.shape[1:])
            self._declare(layer_idx, name, StateSpec(name.split(".")[1], "recurrent", shape, 1, leased=True))
        self._state(layer_idx, name.split(".")[1], recurrent_states, 0)
        alone = not self._convolves(layer_idx) and not KINDS[self.spec.layers[layer_idx].kind].attention
        if alone:
            if self._step is None and tokens is None:
                raise StepError(
                    f'state "{name}": it is the first of its pass to be written, and a recurrent state does not show how many '
                    "tokens it took in: pass tokens= to update_recurrent_state"
                )
            known = self._step.tokens if tokens is None and self._step else tokens
            assert known is not None
            self._begin(layer_idx, name.split(".")[1], recurrent_states, known)
        lease = self._lease(name, recurrent_states)
        lease.put(recurrent_states)
        self._wrote(layer_idx, name.split(".")[1], counts=alone)
        return _cut(lease.entry, recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Always: so a model hands in a convolution's inputs at every step and never shifts the state it was given."""
        return True

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the states stand after some token."""
        if layer_idx is not None:
            self._check_layer(layer_idx)
            if any(f"{layer_idx}.{s.name}" in self._written for s in self.spec.layers[layer_idx].states):
                self._finish()
        return self._fed

    # ---- what masks and generate call

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns taken in, pads included: an int when growing, a 0-d tensor on the device with a fixed capacity.

        Raises RaggedError where rows differ.
        """
        self._finish()
        if self.clock is None:
            return 0
        if self.capacity is None:
            return self.clock.uniform()
        if self.clock.ragged:
            self.clock.uniform()
        return self.clock.lengths[0].clone()

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """The position of a pass's first token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int | Tensor]:
        """How many keys `update` will return to T = `query_length` tokens, and the position of the first."""
        self._finish()
        spec = self._attention(layer_idx)
        window = None if spec is None else spec.window
        if self.capacity is not None:
            if spec is None or window is None or spec.holds_all(self.capacity, self.slack):
                return self.capacity, 0
            if self.clock is None:
                return window - 1 + query_length, 0
            return window - 1 + query_length, offset(self.clock.lengths[0], window)
        length = 0 if self.clock is None else self.clock.uniform()
        past = length if window is None else min(length, window - 1)
        return past + query_length, length - past

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row may hold; -1 for no end."""
        limit = self.spec.full_at(self.capacity, self.slack)
        return -1 if limit is None else limit

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> int:
        return self.get_max_length()

    @property
    def batch_size(self) -> int:
        """Rows in use; -1 before the first forward."""
        return -1 if self.clock is None else self.clock.rows

    max_batch_size = batch_size

    @property
    def is_compileable(self) -> bool:
        """Whether one compiled graph serves every step."""
        return self.capacity is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [any(s.kind == "sliding" for s in layer.states) for layer in self.spec.layers]

    @property
    def is_linear(self) -> list[bool]:
        kinds = [KINDS[layer.kind] for layer in self.spec.layers]
        return [kind.mixer and not kind.attention for kind in kinds]

    @property
    def is_dummy(self) -> list[bool]:
        kinds = [KINDS[layer.kind] for layer in self.spec.layers]
        return [not kind.mixer and not kind.attention for kind in kinds]

    @property
    def is_initialized(self) -> bool:
        return self.clock is not None

    @property
    def is_croppable(self) -> bool:
        """Whether any tokens within the slack can be cropped, chunks too: not with a recurrence."""
        return self.slack > 0 and not any(s.leased for s in self._declared.values())

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last n tokens, given as -n; 0 does nothing. See `rollback`."""
        if tokens_to_remove > 0:
            raise OptionError(f"crop({tokens_to_remove}): give minus the number of tokens to forget")
        if tokens_to_remove:
            self.rollback(-tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Make sure that tokens can be forgotten. Raises SlackError where no slots were reserved for that."""
        if not self.slack:
            raise SlackError(
                "the cache cannot forget tokens: make it with slack= the most tokens that a round of assisted decoding drafts"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute rows, as beam search asks. See `gather`."""
        self.gather(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows. See `gather`."""
        if self.clock is not None and indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(1)
        self.gather(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row. See `gather`."""
        self.gather(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate every state whose shape the configuration gives."""
        if self.clock is None:
            self._start_clock(batch_size, torch.device(device))
            for name, spec in self._declared.items():
                if spec.shape is not None:
                    self._allocate(name, self.dtype or dtype, torch.device(device))

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        raise LayerError(
            f"layer {layer_idx} has no index of keys: sparse attention is not in the table of layer kinds yet"
        )

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise StateCacheError("nothing to prefetch: this cache keeps its states on the model's devices")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise StateCacheError("nothing to offload: this cache keeps its states on the model's devices")

    def held(self, layer_idx: int, name: str) -> Tensor | None:
        """The entries of one state as they lie: without a window in order of position, up to the length if growing."""
        self._finish()
        state = self.states.get(f"{layer_idx}.{name}")
        if state is None or self.clock is None:
            return None
        if isinstance(state, Lease):
            return state.entry
        if self.capacity is None and not state.wraps:
            return state.store.read(slice(0, max(self.clock.sync())))
        return state.store.all()

    # ---- the step

    def _begin(self, layer: int, name: str, new: Tensor, tokens: int) -> Step:
        """The open step; a new one, if this is its first write."""
        compiling = torch.compiler.is_compiling()
        if not compiling and f"{layer}.{name}" in self._written:
            self._finish()
            if f"{layer}.{name}" in self._written:
                raise StepError(
                    f'state "{layer}.{name}" is written a second time in one pass: the pass before was interrupted, so some '
                    "layers have taken in its tokens and some have not: reset(), or restore() a mark"
                )
        if self._step is None:
            if self.clock is None:
                self._start_clock(len(new), self.device or new.device)
            elif self.clock.rows != len(new):
                self._change_rows(len(new))
            if self.clock is not None and self.clock.ragged:
                self.clock.uniform()
            step = self.open(tokens)
            self._left = self._due or 0
            return step
        if self._step.tokens != tokens:
            raise ShapeError(
                f'state "{layer}.{name}": the pass began with {self._step.tokens} tokens, and here come {tokens}'
            )
        return self._step

    def _wrote(self, layer: int, name: str, counts: bool) -> None:
        """Take note of a write; close the step if it was the pass's last. `counts`: among those the last layer makes."""
        if not torch.compiler.is_compiling():
            self._written.add(f"{layer}.{name}")
        if layer == self._last and counts and self._due is not None:
            self._left -= 1
            if self._left == 0:
                self._close_pass()

    def _close_pass(self) -> None:
        if self._step is None:
            raise StepError(
                f"layer {self._last} ended a pass in which no state showed how many tokens it took in: "
                "see docs/adding_a_layer.md"
            )
        if not torch.compiler.is_compiling():
            if self._handed:
                raise StepError(
                    f'state "{next(iter(self._handed))}" was read and not written: a "{self.spec.model}" model seems to shift '
                    "it in place, which no ring can see: add the model to statecache.models.table.SHIFTS_IN_PLACE"
                )
            self._written.clear()
        self.close(self._step)
        self._fed = True

    def _finish(self) -> None:
        """Close the first pass of a family that is in no table: only the next call shows that it has ended."""
        if self._due is None and self._step is not None and not torch.compiler.is_compiling():
            names = {n.split(".")[1] for n in self._written if n.startswith(f"{self._last}.")}
            counted = {n for n in names if not n.startswith("recurrent")} or names
            if counted:
                self._due = len(counted)
                self._close_pass()

    def _new_pass(self, name: str) -> None:
        """A state that was written already is read or written again: the pass before, if it was a first one, has ended."""
        if self._due is None and name in self._written:
            self._finish()

    def _writes_due(self) -> int | None:
        if self._last < 0 or self.spec.layers[self._last].open:
            return None
        states = self.spec.layers[self._last].states
        attention = any(s.name == "key" for s in states)
        return attention + sum(s.kind == "conv" for s in states) or len(states)

    def _start(self) -> int | Tensor:
        """Where the pass that is open, or about to open, starts."""
        assert self.clock is not None
        if self._step is not None:
            return self._step.start
        if self.capacity is not None and (torch.compiler.is_compiling() or capturing(self.clock.length)):
            return self.clock.lengths[:1].clone()
        return self.clock.uniform()

    def _keep(self, layer: int) -> None:
        """Before anything overwrites this layer's leased states, copy them for a rollback to the step's start."""
        if self.slack and self._fed:
            for spec in self.spec.layers[layer].states:
                state = self.states.get(f"{layer}.{spec.name}")
                if isinstance(state, Lease):
                    state.keep(self._start())

    def _convolves(self, layer: int) -> bool:
        return any(s.kind == "conv" for s in self.spec.layers[layer].states)

    def _change_rows(self, rows: int) -> None:
        assert self.clock is not None
        if self.capacity is not None or any(self.clock.sync()):
            raise RowsError(
                f"the batch has {rows} rows, and the cache holds {self.clock.rows}: select or repeat rows with gather()"
                if any(self.clock.sync())
                else f"the batch has {rows} rows, and the cache was allocated with {self.clock.rows} at fixed addresses: "
                f"make it with rows={rows}, or without capacity="
            )
        self.states.clear()
        self._room = 0
        self._start_clock(rows, self.clock.length.device)

    def _drop_step(self) -> None:
        super()._drop_step()
        self._written.clear()
        self._handed.clear()
        self._left = 0

    def _settle(self) -> None:
        self._finish()
        super()._settle()

    def _between(self) -> None:
        super()._between()
        self._fed = any(self._base)

    # ---- states

    def _check_layer(self, layer: int) -> LayerSpec:
        if not isinstance(layer, int) or not 0 <= layer < len(self.spec.layers):
            raise LayerError(
                f"there is no layer {layer!r}: this {self.spec.model} cache has layers 0..{len(self.spec.layers) - 1}"
            )
        return self.spec.layers[layer]

    def _name(self, layer: int, kind: str, number: int) -> str:
        """The name of a convolution's or recurrence's state, which exists or may still be declared."""
        spec = self._check_layer(layer)
        name = kind if number == 0 else f"{kind}{number}"
        if not spec.open and all(s.name != name for s in spec.states):
            held = ", ".join(s.name for s in spec.states) or "nothing"
            raise LayerError(f'layer {layer} ("{spec.kind}") of this {self.spec.model} cache holds {held}, no "{name}"')
        return f"{layer}.{name}"

    def _declare(self, layer: int, name: str, spec: StateSpec) -> None:
        self._declared[name] = spec
        layers = list(self.spec.layers)
        layers[layer] = layers[layer].with_state(spec)
        self.spec = replace(self.spec, layers=tuple(layers))

    def _state(self, layer: int, short: str, new: Tensor, tokens: int) -> str:
        """The name of the state that `new` belongs to, after checking that it does. Nothing is changed."""
        layers = self._check_layer(layer)
        name = f"{layer}.{short}"
        spec = self._declared.get(name)
        if spec is None:
            held = ", ".join(s.name for s in layers.states) or "nothing"
            raise LayerError(
                f'layer {layer} ("{layers.kind}") of this {self.spec.model} cache holds {held}, no "{short}"'
            )
        shape = tuple(new.shape[1:])
        if not spec.leased:
            shape = shape[: spec.axis] + shape[spec.axis + 1 :]
        if spec.shape is None:
            if new.dim() != 4:
                raise ShapeError(f'state "{name}": came {tuple(new.shape)}, expected (rows, heads, tokens, head size)')
            self._declare(layer, name, replace(spec, shape=shape))
        elif shape != spec.shape or new.dim() != len(spec.shape) + (1 if spec.leased else 2):
            raise ShapeError(
                f'state "{name}": came {tuple(new.shape)}, so an entry is {shape}, and the cache was made for {spec.shape} of '
                f'layer {layer} ("{layers.kind}"): make it from the configuration of the model that uses it'
            )
        if self._step is not None and self.clock is not None and len(new) != self.clock.rows:
            raise RowsError(f'state "{name}": {len(new)} rows came in a pass of {self.clock.rows}')
        if tokens and not spec.leased and new.shape[1 + spec.axis] != tokens:
            raise ShapeError(f'state "{name}": {new.shape[1 + spec.axis]} tokens came in a pass of {tokens}')
        state = self.states.get(name)
        if state is not None:
            held = state.buffers()[0]
            if new.device != held.device:
                raise DeviceError(f'state "{name}": came on {new.device}, and the cache holds it on {held.device}')
            if new.dtype != held.dtype and not spec.leased:
                raise DtypeError(
                    f'state "{name}": came in {new.dtype}, and the cache holds {held.dtype}: make it with dtype={new.dtype}, or '
                    "leave dtype= out"
                )
        return name

    def _ring(self, name: str, new: Tensor, tokens: int) -> Ring:
        state = self.states.get(name) or self._first(name, new, tokens)
        assert isinstance(state, Ring)
        return state

    def _lease(self, name: str, new: Tensor) -> Lease:
        state = self.states.get(name) or self._first(name, new, 0)
        assert isinstance(state, Lease)
        return state

    def _first(self, name: str, new: Tensor, tokens: int) -> Ring | Lease:
        if self.clock is None:
            self._start_clock(len(new), self.device or new.device)
        floating = new.dtype.is_floating_point
        return self._allocate(name, self.dtype if self.dtype and floating else new.dtype, new.device, tokens)

    def _attention(self, layer: int) -> StateSpec | None:
        """The keys of this layer; of the first that has keys, where it has none."""
        for spec in (self._check_layer(layer), *self.spec.layers):
            for state in spec.states:
                if state.name == "key":
                    return state
        return None


def _first_conv(name: str, new: Tensor, width: int | None) -> StateSpec:
    """How a convolution of a family that is in no table is kept: as many inputs as it says; or the window it cut."""
    if width is None:
        return StateSpec(name, "conv", tuple(new.shape[1:]), 1, leased=True)
    shape = tuple(new.shape[1:-1])
    return StateSpec(name, "conv", shape, width, axis=len(shape))


class _NoGradient(torch.autograd.Function):
    """Identity that raises in the backward pass, since entries carry no gradient: wrong ones would be silent."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, new: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise StateCacheError("a StateCache carries no gradient: train with use_cache=False")


def _cut(seen: Tensor, new: Tensor) -> Tensor:
    if new.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NoGradient.apply(seen, new)  # type: ignore[no-any-return, no-untyped-call]
    return seen
