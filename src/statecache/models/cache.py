"""StateCache: the rings of a model behind the interface that transformers' models and `generate` call.

A step opens at the first write of a pass, with as many tokens as that write brings; `passes` knows where it ends.

B rows, T new tokens, H heads, D head size, K width of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from statecache.cache import Rings, allow
from statecache.clock import Clock, capturing
from statecache.errors import (
    ConfigError,
    LayerError,
    OptionError,
    RowsError,
    ShapeError,
    SlackError,
    StateCacheError,
    StepError,
)
from statecache.models.checks import check, cut
from statecache.models.layers import Layer
from statecache.models.passes import Pass
from statecache.models.table import DROPS_STATE, KINDS, SHIFTS_IN_PLACE, model_spec
from statecache.replay import Fold
from statecache.ring import Lease, Ring, Step, offset
from statecache.spec import LayerSpec, StateSpec


class StateCache(Rings, Cache):
    """The state of every layer of a hybrid model, for `past_key_values=` (or `cache_params=`) of transformers.

    - `capacity`: tokens a row may hold, at addresses that never move, for torch.compile and CUDA graphs; None grows.
    - `slack`: how many of its last tokens each row can forget.
    - `rows`, `dtype`, `device`: allocate at once, where the configuration gives every shape; else at the first forward.

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
        spec = model_spec(config)
        self.made_for = repr(spec)  # what a prepared model compares with its own
        if not slack:
            spec = spec.in_order()
        Rings.__init__(self, spec, capacity=capacity, slack=slack, rows=rows, dtype=dtype, device=device)
        self.layers = [Layer(self, layer.index) for layer in self.spec.layers]
        self.offloading, self.layer_class_to_replicate = False, None

        self._fed = False  # whether any row holds a token: the models ask whether there is a previous state
        self._pass = Pass(self.spec)
        self._passed: dict[str, tuple[Any, ...]] = {}  # what each state's last tensor was, once it has been checked
        self._prepared = False  # whether a prepared model fills it: then a pass is opened and closed by its door
        self._written = False  # whether a layer has, in that pass
        self._expected: tuple[list[int], Tensor | None] | None = None

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
        pair = ((self._name(layer_idx, "key"), key_states), (self._name(layer_idx, "value"), value_states))
        tokens = key_states.shape[-2]
        for name, new in pair:
            self._check_heads(name, new, tokens)
        step = self._begin(pair[0][0], key_states, tokens)
        exact = self.capacity is None
        keys, values = (cut(self._ring(name, new, tokens).extend(new, step, exact), new) for name, new in pair)
        self._wrote(layer_idx, pair[0][0], counts=True)
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The inputs (B, C, window) that the convolution still needs, oldest first; None where there are none yet.

        Without slack they are live: a layer that was told that it may (`is_recording_past`) shifts them in place.
        """
        name = self._name(layer_idx, "conv", state_idx)
        self._finish(name)
        state = self.states.get(name)
        if not self._fed or state is None:
            return None
        if isinstance(state, Lease):
            past = state.entry
        else:
            assert state.spec.window is not None
            past = state.past(state.spec.window, self._step or Step(0, self._start()))
            self._pass.handed[name] = past
        if self.spec.model in SHIFTS_IN_PLACE:  # it will not ask: what it did to the copy is looked at afterwards
            self._pass.handed[name] = past = past.clone()
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
        self._finish(name)
        spec = self._declared.get(name) or _first_conv(name, conv_states, conv_kernel_size, self.slack)
        assert spec.shape is not None and spec.window is not None
        if conv_kernel_size is None:
            return self._update_window(name, spec, conv_states, layer_idx)
        held = spec.shape[-1] if spec.leased else spec.window
        if held not in (conv_kernel_size - 1, conv_kernel_size):
            raise ConfigError(
                f'state "{name}": the layer convolves {conv_kernel_size} inputs, and the cache was made for '
                f"{held + 1}: make it from the configuration of the {self.spec.model} model that uses it"
            )
        tokens = conv_states.shape[-1]
        channels = spec.shape[:-1] if spec.leased else spec.shape
        self._check(name, (*channels, tokens), conv_states)
        if tokens > 1 and self._fed and self.spec.model in DROPS_STATE:
            raise StepError(
                f'state "{name}": {tokens} tokens came on top of others, and the code of a {self.spec.model} model '
                "then starts its recurrence from zero: feed one token at a time"
            )
        step = self._begin(name, conv_states, tokens)
        if name not in self._declared:
            self._declare(name, spec)
        self._keep(layer_idx)
        state = self.states.get(name) or self._allocate_like(name, conv_states, tokens)
        past = self._pass.handed.pop(name, None)
        if past is None and self._fed:
            past = state.entry if isinstance(state, Lease) else state.past(held, step)
        if past is None:
            wide = torch.nn.functional.pad(conv_states, (max(conv_kernel_size - tokens, 0), 0))
        else:
            wide = cut(torch.cat([past, conv_states], -1), conv_states)
        if isinstance(state, Lease):
            state.put(wide.narrow(-1, wide.shape[-1] - held, held))
        else:
            state.put(conv_states, step)
        self._wrote(layer_idx, name, counts=True)
        return wide

    def _update_window(self, name: str, spec: StateSpec, window: Tensor, layer: int) -> Tensor:
        """Take in the window that a layer has cut itself."""
        assert spec.shape is not None
        self._check(name, spec.shape, window)
        if name not in self._declared:
            self._declare(name, spec)
        self._keep(layer)
        self._lease(name, window).put(window)
        self._wrote(layer, name, counts=True)
        return window

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state after the last token (B, *D), to read and to overwrite in place; None where there is none yet."""
        name = self._name(layer_idx, "recurrent", state_idx)
        self._finish(name)
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
        shape = tuple(recurrent_states.shape[1:])
        spec = self._declared.get(name) or StateSpec(name.split(".")[1], "recurrent", shape, 1, leased=True)
        assert spec.shape is not None
        self._check(name, spec.shape, recurrent_states, cast=True)
        self._take_shifted(layer_idx)
        alone = not self._convolves(layer_idx) and not KINDS[self.spec.layers[layer_idx].kind].attention
        if alone:
            tokens = self._step.tokens if tokens is None and self._step is not None else tokens
            if tokens is None:
                raise StepError(
                    f'state "{name}": it is the first of its pass to be written, and a recurrent state does not show '
                    "how many tokens it took in: pass tokens= to update_recurrent_state"
                )
            self._begin(name, recurrent_states, tokens)
        if name not in self._declared:
            self._declare(name, spec)
        lease = self._lease(name, recurrent_states)
        lease.put(recurrent_states)
        self._wrote(layer_idx, name, counts=alone)
        return cut(lease.entry, recurrent_states)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a convolution must hand in its inputs also when it takes one token, instead of shifting its state.

        With slack always. Without, only where a pass begins and ends: there it is checked and counted.
        """
        return self.slack > 0 or layer_idx in self._pass.ends

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the states stand after some token."""
        if layer_idx is not None:
            # zamba asks between its keys and its convolution, inkling between two of its convolutions
            asked = None if state_idx is None else {f"{kind}{state_idx or ''}" for kind in ("conv", "recurrent")}
            for state in self._layer(layer_idx).states:
                if state.kind in ("conv", "recurrent") and (asked is None or state.name in asked):
                    self._finish(f"{layer_idx}.{state.name}")
        return self._fed

    # ---- what masks and generate call

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns taken in, pads included: an int when growing, a 0-d tensor on the device with a fixed capacity.

        Raises RaggedError where rows differ in an unmodified model.
        """
        self._finish()
        if self.clock is None:
            return 0
        if self._prepared:
            self.clock.catch_up()
            return self.clock.width if self.capacity is None else self.clock.columns.clone()
        return self.get_query_offset()

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """The position of a pass's first token."""
        if self.clock is None:
            return 0
        if self.capacity is None:
            return self.clock.uniform()
        if self.clock.ragged:
            self.clock.uniform()
        return self.clock.lengths[0].clone()

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
        """Whether one compiled graph serves every step, and `generate` may make the masks before the forward."""
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

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last n tokens, given as -n; 0 does nothing. See `rollback`."""
        tokens = int(tokens_to_remove)  # in transformers 5.17 a tensor
        if tokens > 0:
            raise OptionError(f"crop({tokens}): give minus the number of tokens to forget")
        if tokens:
            self.rollback(-tokens)

    def activate_past_recording(self) -> None:
        """Make sure that tokens can be forgotten. Raises SlackError where no slots were reserved for that."""
        if not self.slack:
            raise SlackError(
                "the cache cannot forget tokens: make it with slack= the most that a round of assisted decoding drafts"
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

    # ---- the pass of a prepared model

    def begin(
        self, like: Tensor, tokens: int, count: Tensor | None = None, folds: Mapping[str, Fold] | None = None
    ) -> Step:
        """Open a pass over T `tokens` for as many rows as `like` has, on its device. See `Rings.open`.

        From here on recurrences roll back by replay, if there is slack; only prepared models can go on then.
        """
        allow(self._refuse_torn() if self._draft is None else None)
        if self._step is not None and not self._torn():
            self._drop_step()
        clock = self._clock_for(like)
        expected, self._expected, clock.told = self._expected, None, None
        if expected is not None:
            clock.told, counted = expected
            count = torch.tensor(clock.told, device=clock.length.device) if counted is None else counted
        if count is None and capturing(clock.length):  # a graph is replayed when rows differ, too
            count = torch.full_like(clock.lengths, tokens)
        if not self._prepared:
            if self._draft is not None:
                self._draft.check(tokens)
            clock.open(tokens, count)  # which refuses what does not fit, before anything is changed
            clock.drop()
            self._adopt()
        self._writes(False)
        return self.open(tokens, count, folds or {})

    def expect(self, count: Sequence[int], rows: Sequence[int] | None = None, *, counted: Tensor | None = None) -> None:
        """Say that the next pass brings row b its first `count[b]` tokens. `counted`: the same, (B,) on the device."""
        if rows is not None:
            raise NotImplementedError
        self._expected = list(count), counted

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty some rows in place, or all."""
        if rows is None:
            super().reset()
            return
        self._settle()
        assert self.clock is not None
        self.clock.empty(list(rows))
        for state in self.states.values():
            for buffer in state.buffers():
                buffer[list(rows)] = 0
        self._between()

    def end(self, step: Step) -> None:
        """Close the pass."""
        self.close(step)
        if self._draft is None:
            self._fed = True

    def _adopt(self) -> None:
        """Keep logs instead of copies, from the tokens on that are held now."""
        self._prepared = True
        for mark in self._marks:
            if self.slack and any(mark.lengths):  # its copies are no log
                mark.stale = mark.stale or "a prepared model has gone on with the cache since"
        self.spec = self.spec.with_logs() if self.slack else self.spec
        self._declared = dict(self.spec.states())
        for name, state in self.states.items():
            if isinstance(state, Lease) and self._declared[name].logged:
                state.spec, state.copies = self._declared[name], None
        if self.clock is not None:
            self.clock.keep_from_here()
            if self.dtype is not None and self.device is not None:
                for name, spec in self._declared.items():
                    if spec.kind == "log":
                        self._allocate(name, self.dtype, self.device)

    def holds_pads(self, mask: Tensor) -> bool:
        """Whether an unprepared model has fed the tokens held, and `mask` (B, n) says that some of them were pads."""
        if self._prepared or not self._fed or torch.compiler.is_compiling() or capturing(mask):
            return False
        return not bool((mask != 0).all())

    def conv_lease(self, layer: int, new: Tensor) -> Lease | Ring:
        """The inputs of this layer's convolution, which are like `new` (B, T, C)."""
        name = f"{layer}.conv"
        spec = self._declared.get(name)
        if spec is None or spec.shape is None:
            raise LayerError(f"layer {layer} of {self.spec.model} has no convolution")
        self._check(name, (new.shape[1], spec.shape[0]), new)
        self._writes()
        return self.states.get(name) or self._allocate_like(name, new, new.shape[1])

    def recurrence(self, layer: int, like: Tensor) -> Lease:
        """The recurrent state of this layer, in a model that computes in the dtype of `like`."""
        return self._lease(self._name(layer, "recurrent"), like)

    def log(self, layer: int, part: str, new: Tensor) -> Ring:
        """The ring of what the recurrence consumed: "inputs" or "gates", entries like `new` (B, T, W)."""
        name = f"{layer}.{part}"
        self._check(name, tuple(new.shape[1:]), new)
        return self._ring(name, new, new.shape[1])

    # ---- the pass

    def _begin(self, name: str, new: Tensor, tokens: int) -> Step:
        """The open step; a new one, if this is its first write."""
        if self._prepared:
            return self._of_door(name, tokens)
        if not torch.compiler.is_compiling() and name in self._pass.written:
            self._finish()
            if name in self._pass.written:
                raise StepError(
                    f'state "{name}" is written a second time in one pass: the pass before was interrupted, so some '
                    "layers have taken in its tokens and some have not: reset(), or restore() a mark"
                )
        if self._step is not None:
            if self._step.tokens != tokens:
                raise ShapeError(f'state "{name}": {tokens} tokens came in a pass that began with {self._step.tokens}')
            return self._step
        clock = self._clock_for(new)
        if clock.ragged:
            clock.uniform()
        self._pass.begin(int(name.partition(".")[0]))
        return self.open(tokens)

    def _take_shifted(self, layer: int) -> None:
        """Take in the one input of each convolution whose state this layer was handed and has shifted in place."""
        if self.spec.model in SHIFTS_IN_PLACE:
            for name in [n for n in self._pass.handed if n.startswith(f"{layer}.")]:
                shifted = self._pass.handed.pop(name)
                step, state = self._begin(name, shifted, 1), self.states[name]
                self._keep(layer)
                if isinstance(state, Lease):
                    state.put(shifted)
                else:
                    state.put(shifted[..., -1:], step)
                self._wrote(layer, name, counts=True)

    def _of_door(self, name: str, tokens: int) -> Step:
        if self._step is None:
            raise StepError(
                f'state "{name}": the cache was filled by a prepared model, and this is none, or a layer of one called '
                "by itself: call the whole model, after statecache.prepare(model)"
            )
        if self._step.tokens != tokens:
            raise ShapeError(f'state "{name}": {tokens} tokens came in a pass over {self._step.tokens}')
        self._writes()
        return self._step

    def _writes(self, begun: bool = True) -> None:
        """A layer is about to write; or has not yet begun."""
        if not torch.compiler.is_compiling():
            self._written = begun

    def _torn(self) -> bool:
        if self._step is None or torch.compiler.is_compiling():
            return super()._torn()
        # what is compiled does not say whether it wrote
        return self._written or not self._prepared or self._step.end is None

    def _wrote(self, layer: int, name: str, counts: bool) -> None:
        if not self._prepared and self._pass.wrote(layer, name, counts):
            self._end()

    def _end(self) -> None:
        if self._step is None:
            raise StepError(
                f"layer {self._pass.last} ended a pass in which no state showed how many tokens it took in: "
                "see docs/adding_a_layer.md"
            )
        self._pass.end()
        self.close(self._step)
        self._fed = True

    def _finish(self, name: str | None = None) -> None:
        """Close the first pass of a family that is in no table, if this call (about `name`) shows that it is over."""
        if (
            not self._prepared
            and self._pass.due is None
            and (name is None or name in self._pass.written)
            and self._pass.over()
        ):
            self._end()

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
                    state.keep(Step(1, self._start()))

    def _clock_for(self, new: Tensor) -> Clock:
        """The clock, for a batch of as many rows as `new`."""
        rows, device = len(new), self.device or new.device
        if self.clock is not None and self.clock.rows != rows:
            if any(self.clock.sync()):
                raise RowsError(
                    f"the batch has {rows} rows, and the cache holds {self.clock.rows}: select or repeat rows "
                    "with gather()"
                )
            if self.capacity is not None:
                raise RowsError(
                    f"the batch has {rows} rows, and the cache was allocated with {len(self.clock.length)} at fixed "
                    f"addresses: make it with rows={rows}, or without capacity="
                )
            self._invalidate("the number of rows changed since")
            self.clock = None
            self.states.clear()
            self._passed.clear()
        if self.clock is None:
            self._start_clock(rows, device)
        assert self.clock is not None
        return self.clock

    def _drop_step(self) -> None:
        super()._drop_step()
        self._pass.drop()

    def _settle(self, refuse: bool = True) -> None:
        self._finish()
        super()._settle(refuse)

    def _committed(self) -> None:
        super()._committed()
        self._fed = True

    def _between(self) -> None:
        super()._between()
        self._fed = any(self._base)
        self._passed.clear()

    # ---- states

    def _layer(self, layer: int) -> LayerSpec:
        if not isinstance(layer, int) or not 0 <= layer < len(self.spec.layers):
            raise LayerError(
                f"there is no layer {layer!r}: {self.spec.model} has layers 0..{len(self.spec.layers) - 1}"
            )
        return self.spec.layers[layer]

    def _name(self, layer: int, short: str, number: int = 0) -> str:
        """The name of a state that exists, or that an open layer may still declare."""
        short = short if number == 0 else f"{short}{number}"
        name = f"{layer}.{short}"
        if name in self._declared:
            return name
        spec = self._layer(layer)
        if not (spec.open and not short.startswith(("key", "value"))):
            held = ", ".join(s.name for s in spec.states) or "nothing"
            raise LayerError(f'layer {layer} ("{spec.kind}") of {self.spec.model} holds {held}, no "{short}"')
        return name

    def _declare(self, name: str, spec: StateSpec) -> None:
        """Add a state, or what its first write shows of it, to the layer."""
        index = int(name.split(".", maxsplit=1)[0])
        layers = list(self.spec.layers)
        layers[index] = layers[index].with_state(spec)
        self.spec, self._declared[name] = replace(self.spec, layers=tuple(layers)), spec

    def _check(self, name: str, expected: tuple[int, ...], new: Tensor, cast: bool = False) -> None:
        """Whether `new` is (rows, *expected), for the rows there are. `cast`: in any dtype. Changes nothing."""
        came = (new.shape, expected, new.dtype, new.device)
        if not torch.compiler.is_compiling() and self._passed.get(name) == came:
            return
        clock, state = self.clock, self.states.get(name)
        rows = clock.rows if clock is not None and self._step is not None else None
        held = None if state is None else state.buffers()[0]
        check(name, new, expected, model=self.spec.model, rows=rows, held=held, cast=cast)
        if rows is not None and held is not None and not torch.compiler.is_compiling():
            self._passed[name] = came

    def _check_heads(self, name: str, new: Tensor, tokens: int) -> None:
        """Check keys or values; where no table says what they are, their first write does."""
        spec = self._declared[name]
        if spec.shape is None:
            if new.dim() != 4:
                raise ShapeError(f'state "{name}": came {tuple(new.shape)}, expected (rows, heads, tokens, head size)')
            spec = replace(spec, shape=(new.shape[1], new.shape[3]))
            self._declare(name, spec)
        assert spec.shape is not None
        self._check(name, (spec.shape[0], tokens, spec.shape[1]), new)

    def _ring(self, name: str, new: Tensor, tokens: int) -> Ring:
        state = self.states.get(name) or self._allocate_like(name, new, tokens)
        assert isinstance(state, Ring)
        return state

    def _lease(self, name: str, new: Tensor) -> Lease:
        state = self.states.get(name) or self._allocate_like(name, new, 0)
        assert isinstance(state, Lease)
        return state

    def _allocate_like(self, name: str, new: Tensor, tokens: int) -> Ring | Lease:
        self._clock_for(new)
        dtype = self.dtype if self.dtype is not None and new.is_floating_point() else new.dtype
        return self._allocate(name, dtype, new.device, tokens)

    def _attention(self, layer: int) -> StateSpec | None:
        """The keys of this layer; of the first that has keys, where it has none."""
        for spec in (self._layer(layer), *self.spec.layers):
            for state in spec.states:
                if state.name == "key":
                    return state
        return None

    def _convolves(self, layer: int) -> bool:
        return any(state.kind == "conv" for state in self.spec.layers[layer].states)


def _first_conv(name: str, new: Tensor, width: int | None, slack: int) -> StateSpec:
    """How a convolution of a family that is in no table is kept: as many inputs as it says, or the window it cut."""
    short = name.partition(".")[2]
    if width is None:
        return StateSpec(short, "conv", tuple(new.shape[1:]), 1, leased=True)
    shape = tuple(new.shape[1:-1])
    if not slack:
        return StateSpec(short, "conv", (*shape, width), 1, leased=True)
    return StateSpec(short, "conv", shape, width, axis=len(shape))
