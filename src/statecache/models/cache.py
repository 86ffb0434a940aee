"""StateCache: a model's states behind the interface that transformers' models and `generate` call.

It has a container and one writer at a time: `Unmodified`, which reads off the calls of a model what it does, until a
prepared model takes the cache over, and then `Prepared`, which is told.

B rows, T new tokens, H heads, D head size, K width of a convolution.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from transformers import Cache

from statecache.errors import (
    FileError,
    OptionError,
    RowsError,
    SlackError,
    StateCacheError,
    StepError,
    UnverifiedWeights,
)
from statecache.lease import Lease
from statecache.models import file
from statecache.models.checks import no_token
from statecache.models.decoder import decoder_of
from statecache.models.fingerprint import Weights, fingerprint
from statecache.models.interface import check_version
from statecache.models.layers import Layer
from statecache.models.prepared import Prepared
from statecache.models.ready import check_kept, check_rounds, is_ready
from statecache.models.table import KINDS, model_spec, shares_last
from statecache.models.unmodified import Unmodified
from statecache.replay import Operators
from statecache.round import Round
from statecache.snapshot import Mark, Snapshot
from statecache.spec import ModelSpec, Sizes
from statecache.states import Capability, States
from statecache.step import Step, offset
from statecache.storage.at_rest import check_code
from statecache.storage.table import Stores

check_version(transformers.__version__)


@dataclass(frozen=True)
class Expected:
    """What the next pass of a prepared model is: which rows it is over, and how many tokens each takes in."""

    count: Tensor | Sequence[int]
    rows: Sequence[int] | None
    counted: Tensor | None


class StateCache(Cache):
    """The state of every layer of a hybrid model, for `cache=` of transformers (`past_key_values=` before 5.24).

    - `capacity`: tokens a row may hold, at addresses that never move, for torch.compile and CUDA graphs; None grows.
    - `slack`: how many of its last tokens each row can forget.
    - `rows`, `dtype`, `device`: allocate at once, where the configuration gives every shape; else at the first forward.
    - `back`: False where rows go back only by dropping a speculative round: prepared models then pay less for slack.
    - `offload`: keep states in host memory, and on the device those of the layer that runs and of the next one.
    - `store`: where keys and values live: "dense", "paged", "int8" or "fp8". The last two are lossy.
    - `recurrent_store`: "bfloat16" keeps recurrent states in that, rounded once a step, for prepared models. Lossy.

    It is a `Cache` for `isinstance` alone: nothing of that class is used.
    Raises OptionError for options that make no sense, ConfigError for a model that keeps nothing in a cache,
    UnknownLayerError for a layer type that the table does not know, or that cannot be kept.
    """

    def __init__(
        self,
        config: Any,
        *,
        capacity: int | None = None,
        slack: int = 0,
        rows: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        back: bool = True,
        offload: bool = False,
        store: str = "dense",
        recurrent_store: str | None = None,
    ) -> None:
        if not hasattr(config, "get_text_config"):
            raise OptionError(
                f"StateCache takes a model's configuration, not a {type(config).__name__}: give model.config"
            )
        spec = model_spec(config)
        made_for = spec.digest()  # what a prepared model compares with its own
        check_kept(spec.model, made_for)
        if capacity is not None and shares_last(config):
            raise OptionError(
                f"capacity={capacity}: the loops of this {spec.model} model read keys off cache.layers, and its masks "
                'have no room for slots that are empty: leave capacity= out, or set recurrent_kv_cache_mode="per_loop"'
            )
        stores = Stores(store, recurrent_store)
        if recurrent_store is not None:
            if not any(state.kind == "recurrent" for _, state in spec.states()):
                raise OptionError(
                    f"recurrent_store={recurrent_store!r}: this {spec.model} model has no recurrent state: leave it out"
                )
            check_rounds(spec.model, made_for, recurrent_store)
        self.states = States(
            spec if slack else spec.in_order(),
            capacity=capacity,
            slack=slack,
            rows=rows,
            dtype=dtype,
            device=device,
            back=back,
            offload=offload,
            store=stores,
            made_for=made_for,
        )
        self.writer: Unmodified | Prepared = Unmodified(self.states)
        self.expected: Expected | None = None
        self.weights = Weights()
        self.layers = [Layer(self, layer.index) for layer in spec.layers]
        self.offloading, self.layer_class_to_replicate = False, None

    def __repr__(self) -> str:
        held = "empty" if self.rows is None else f"lengths {self.lengths.tolist()}, {self.nbytes()}"
        room = "growing" if self.capacity is None else f"capacity {self.capacity}"
        return f"StateCache({self.spec.model}, {len(self)} layers, {room}, slack {self.slack}: {held})"

    def __len__(self) -> int:
        return len(self.layers)

    def __getstate__(self) -> dict[str, Any]:
        self.writer.finish()
        known = self.weights.fingerprint()
        return {**self.__dict__, "weights": Weights(known, unknown=known is None and bool(self.rows))}

    # ---- what it holds

    @property
    def spec(self) -> ModelSpec:
        """What the model remembers, in the form in which it is kept."""
        return self.states.spec

    @property
    def made_for(self) -> str:
        """A digest of what the model remembers."""
        return self.states.made_for

    @property
    def capacity(self) -> int | None:
        """Tokens a row may hold; None for no end."""
        return self.states.capacity

    @property
    def slack(self) -> int:
        """Tokens of each row that can be forgotten."""
        return self.states.slack

    @property
    def rows(self) -> int | None:
        """Rows in use; None before the first forward."""
        return self.states.rows

    @property
    def lengths(self) -> Tensor:
        """Tokens each row has taken in: (B,) long, a copy on the cache's device."""
        self.writer.finish()
        return self.states.lengths

    def buffers(self) -> list[Tensor]:
        """The tensors that the cache holds. With a fixed capacity none of them ever moves."""
        return self.states.buffers()

    def nbytes(self) -> Sizes:
        """Bytes allocated, by kind of state."""
        return self.states.nbytes()

    @property
    def capabilities(self) -> Mapping[str, Capability]:
        """What this cache can do now, and why not: each answer is the error that the method itself would raise.

        May wait for the device.
        """
        self.writer.finish()
        return self.states.capabilities

    def held(self, layer_idx: int, name: str) -> Tensor | None:
        """The entries of one state in order of position, None before its first write.

        Of a window those that the next token attends to, zeros before the first; without one as many as columns were
        fed if growing, zeros behind the longest row; else all slots.
        """
        self.writer.finish()
        state, clock = self.states.held.get(f"{layer_idx}.{name}"), self.states.clock
        if state is None or clock is None:
            return None
        if isinstance(state, Lease):
            return state.entry
        known = clock.sync()
        columns, longest = known.width, max(known.lengths)
        if state.wraps and state.spec.window is not None:
            return state.past(min(columns, state.spec.window - 1), Step(0, clock.lengths))
        if self.capacity is not None:
            return state.store.read(slice(0, state.capacity))
        seen = state.store.read(slice(0, longest + self.under_way(layer_idx)))
        if columns <= longest:
            return seen
        shape = list(seen.shape)
        shape[state.axis] = columns - longest
        return torch.cat([seen, seen.new_zeros(shape)], state.axis)

    def under_way(self, layer_idx: int) -> int:
        """Tokens of a pass that is open, of which an indexed layer asks after it has written its keys; else 0."""
        step = self.states.step
        return step.tokens if step is not None and KINDS[self.spec.layers[layer_idx].kind].indexed else 0

    # ---- between passes

    @contextmanager
    def _between(self, dropped: bool = False) -> Iterator[None]:
        """Something that changes rows. `dropped`: also those that an interrupted pass has left."""
        self.writer.finish()
        yield
        self.writer.moved(dropped)

    def checkpoint(self, recurrent_store: str | None = None) -> Mark:
        """Mark this point for `restore`. Copies windowed and recurrent entries; for others the lengths do.

        `recurrent_store="int8"`: copies of recurrent states in a byte a number, which a restore brings back near what
        they were; exact where it is left out. Raises OptionError for another name.
        """
        self.writer.finish()
        return self.states.checkpoint(recurrent_store)

    def restore(self, mark: Mark) -> None:
        """Come back to a mark, in place. A mark can be restored more than once.

        Raises MarkError for a mark of another cache, StaleMarkError where something written since overwrote it.
        """
        with self._between(dropped=True):
            self.states.restore(mark)

    def rollback(self, tokens: int | Tensor | Sequence[int]) -> None:
        """Forget the last `tokens` (int, or (B,) long) of each row. No entry moves. May wait for the device once.

        Raises RollbackError where a row would go below what its states still hold; nothing is changed then.
        """
        with self._between():
            self.states.rollback(tokens)

    def gather(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows, (n,) long, in this order: select, repeat, permute or drop.

        With a fixed capacity in place, at the same addresses, for n up to the rows allocated; else it reallocates, or
        with `store="paged"` has rows that are repeated share what they hold.
        Raises RowsError for a row that does not exist, or more rows than a fixed cache has.
        """
        with self._between():
            self.states.gather(rows)

    @contextmanager
    def narrowed(self, rows: int) -> Iterator[None]:
        """Have the first `rows` alone in use within, at the same addresses. See `States.narrowed`."""
        with self._between(), self.states.narrowed(rows):
            self.writer.moved()
            yield

    def fork(self) -> Self:
        """An independent copy. With `store="paged"` a growing cache shares keys and values with it until either writes.

        A deep copy, and a pickle, shares nothing.
        """
        self.writer.finish()
        other = type(self).__new__(type(self))
        other.states = self.states.fork()
        other.writer = self.writer.over(other.states)
        other.expected, other.weights = None, copy.copy(self.weights)
        other.layers = [Layer(other, layer.index) for layer in self.layers]
        other.offloading, other.layer_class_to_replicate = False, None
        return other

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty these rows, or all, in place; what was allocated stays, and without a choice all its rows are in use.

        Raises RowsError for a row that does not exist.
        """
        self.expected = None
        with self._between(dropped=rows is None):
            self.states.reset(rows)

    def speculate(self, max_tokens: int, *, unseen: bool = False) -> Round:
        """Begin a speculative round, as a context: one forward pass of T <= `max_tokens`, of which `commit` keeps some.

        Nothing is kept without a commit. `unseen`, at a fixed capacity: the host looks at no number, so that a CUDA
        graph can hold the round. What `expect` and `commit` are given are tensors (B,) on the cache's device then; a
        row takes no more than there is room for, and where that was too little the next pass raises CapacityError.
        Raises SlackError for more tokens than the slack, StepError in another round.
        """
        self.writer.finish()
        return Round(self.states, max_tokens, self._committed, unseen=unseen)

    def _committed(self) -> None:
        self.writer.moved()

    def snapshot(self, row: int, tokens: Sequence[int] | None = None, *, point: bool = False) -> Snapshot:
        """One row's states as a value, for `admit`. `tokens`: the ids that it holds, if the caller has them.

        `point`: without keys and values of all tokens, for the row to go back to: no more bytes than a mark of it has.
        Raises RowsError for a row that does not exist, or another number of tokens.
        """
        self.writer.finish()
        return self.states.snapshot(row, tokens, point=point)

    def admit(self, row: int, snapshot: Snapshot) -> None:
        """Have this row hold what a snapshot does. It cannot go back before that. Other rows stay as they are.

        To a point the row goes back, if it still begins with those tokens, which nobody checks.
        Raises ConfigError for one of another model, CapacityError for one that is too long, RowsError for a row that
        does not exist, or does not reach a point, RotaryError for one with other rotary factors, StepError.
        """
        with self._between():
            self.states.admit(row, snapshot)

    # ---- files

    def save(
        self,
        path: str | os.PathLike[str],
        tokens: Sequence[Sequence[int]] | None = None,
        *,
        keep_tokens: bool = True,
        recurrent_store: str | None = None,
    ) -> None:
        """Write what the rows hold to a file, which is there whole or not at all. Marks stay behind.

        `tokens`: the ids that each row holds, to be kept with it, or without `keep_tokens` a digest of them.
        `recurrent_store="int8"`: recurrent states in a byte a number, near what they are; exact where it is left out.
        Waits for the device. See docs/format.md.
        Raises StepError in a round or after an interruption, RowsError for other numbers of tokens, OptionError for
        `keep_tokens=False` without tokens or another name of a store, OSError.
        """
        check_code(recurrent_store)
        self.writer.finish()
        if tokens is None and not keep_tokens:
            raise OptionError("keep_tokens=False: the digest is of the ids that rows hold: give them as tokens=")
        file.write(
            path,
            self.states,
            tokens,
            fingerprint=self.weights.fingerprint(),
            keep_tokens=keep_tokens,
            recurrent_store=recurrent_store,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        tokens: Sequence[Sequence[int]] | None = None,
        allow_unverified: bool = False,
        **options: Any,
    ) -> Self:
        """A new cache with the rows that `save` wrote, for this model, or configuration; with options of a cache.

        Of any capacity, slack and dtype that hold them, on the model's device if `device=` says none. With a
        configuration alone nobody knows whose weights filled the rows: UnverifiedWeights, unless it is allowed.
        `tokens`: of each row the ids that it is to hold in the end, which have to begin with those that it holds.
        Raises FileError for a file that is damaged, of another model, of other weights or other tokens, RowsError for
        fewer `rows=`, and what the constructor raises.
        """
        whole = isinstance(model, torch.nn.Module)
        described = file.describe(path)
        if tokens is not None:
            described.check_begins(path, tokens)
        made = cls(model.config if whole else model, **options)
        if described.made_for != made.made_for:
            raise FileError(
                f"{path} holds the states of a {described.model} model of another configuration than this "
                f"{made.spec.model} model's: load the model that filled it"
            )
        there = fingerprint(decoder_of(model)) if whole and described.fingerprint is not None else None
        if not allow_unverified:
            _verify(path, described.fingerprint, there, whole)
        device = made.states.device or (next(model.parameters()).device if whole else torch.device("cpu"))
        lengths = described.lengths
        if lengths and made.rows is None:
            made.states.clock_for(len(lengths), device)
        if (made.rows or 0) < len(lengths):
            raise RowsError(f"{path} holds {len(lengths)} rows, and rows={made.rows}: make room for all of them")
        for name, spec in described.specs().items():
            if name not in made.states.declared:
                made.states.declare(name, spec)
        places: list[Mapping[str, Tensor]] = [{}] * len(lengths)
        longest = max(range(len(lengths)), key=lengths.__getitem__, default=0)
        for row in [longest, *range(len(lengths))] if lengths else []:  # what has grown for the longest stays in place
            places[row] = made.states.places(row, lengths[row], described.dtypes(row), device)
        for row, snapshot in enumerate(file.read(path, described, places)):
            made.states.admit(row, snapshot.on(device), fresh=True)
        made.writer.moved()
        if whole and is_ready(decoder_of(model)):  # so that marks taken now outlast its first pass
            made.states.keep_logs()
            made.writer = Prepared(made.states, made.writer.fed)
        made.weights = Weights(there, unknown=there is None or there != described.fingerprint)
        return made

    def filled_by(self, decoder: torch.nn.Module) -> None:
        """Say which decoder fills the cache, for its files: weights are looked at when one is written."""
        self.weights.filled_by(decoder)

    # ---- where rotary factors change with the length of a row

    def turned(self, row: int, tokens: int) -> bool:
        """Whether the keys that this row holds would have to be rotated anew for it to take in `tokens` more.

        A pass that brings them is refused: `reset` the row, and feed its whole text. May wait for the device.
        """
        rotary, clock = self.spec.rotary, self.states.clock
        if rotary is None or clock is None:
            return False
        known = clock.sync()
        length = known.lengths[row]
        return length > 0 and tokens > 0 and rotary.shortest(length + tokens) != known.rotated[row]

    def alike(self, count: Sequence[int], rows: Sequence[int] | None = None) -> list[list[int]]:
        """Which rows may share a pass that brings them so many tokens: the indices of `count`, in groups.

        `rows`: of the cache, that the pass is over; None for all. May wait for the device.
        """
        rotary, clock = self.spec.rotary, self.states.clock
        if rotary is None:
            return [list(range(len(count)))]
        lengths = [0] * len(count) if clock is None else clock.sync().lengths
        groups: dict[int, list[int]] = {}
        for n, (row, tokens) in enumerate(zip(range(len(count)) if rows is None else rows, count, strict=True)):
            groups.setdefault(rotary.shortest(lengths[row] + tokens), []).append(n)
        return list(groups.values())

    # ---- the pass of a prepared model

    def expect(
        self, count: Tensor | Sequence[int], rows: Sequence[int] | None = None, *, counted: Tensor | None = None
    ) -> None:
        """Say what the next forward of a prepared model brings: the b-th row takes in its first `count[b]` tokens.

        Without an attention mask then. `rows`: of the cache, that the forward is over; None for all. `counted`: the
        count (R,) long on the model's device, if it is there already. Said once, it holds for one forward. In a
        captured pass `count` is itself such a tensor, which replays read.
        """
        self.expected = Expected(count, rows, counted)

    def begin(
        self,
        like: Tensor,
        tokens: int,
        count: Tensor | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        *,
        counted: Tensor | None = None,
        operators: Operators,
    ) -> Prepared:
        """Open a pass over T `tokens` for as many rows as `like` has, on its device: see `States.open`. Its writer.

        From here on recurrences roll back by replay, if there is slack; only prepared models can go on then.
        """
        writer = self.writer = self.writer.adopt(like, tokens, count, rows)
        writer.begin(like, tokens, count, rows, counted, operators)
        return writer

    def take_expected(self, rows: int, mask: Tensor | None) -> Expected | None:
        """What `expect` said of a forward over this many rows, once. Raises RowsError, StepError if it does not fit."""
        expected, self.expected = self.expected, None
        if expected is None:
            return None
        if mask is not None:
            raise StepError(
                "expect() said how many tokens rows take in, and an attention_mask came too: give one of them"
            )
        if len(expected.count) != rows:
            raise RowsError(f"expect() was told of {len(expected.count)} rows, and a batch of {rows} came")
        return expected

    def check_mask(self, mask: Tensor) -> None:
        """Raise RaggedError where `mask` (B, n), of the columns held, hides what the cache has taken in as tokens."""
        self.writer.check_mask(mask)

    # ---- what layers call

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values (B, H, T, D); return what the step's tokens may attend to, in order of position."""
        return self.writer.update(layer_idx, key_states, value_states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The inputs (B, C, window) that the convolution still needs, oldest first; None where there are none yet.

        Without slack they are live: a layer that was told that it may (`is_recording_past`) shifts them in place.
        """
        return self.writer.get_conv_state(layer_idx, state_idx)

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
        return self.writer.update_conv_state(layer_idx, state_idx, conv_states, conv_kernel_size)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state after the last token (B, *D), to read and to overwrite in place; None where there is none yet."""
        return self.writer.get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, tokens: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Take in the state after the step's last token (B, *D); return it as it is kept.

        tokens: T, from a layer that has no other state and may be the first of its pass.
        """
        return self.writer.update_recurrent_state(layer_idx, state_idx, recurrent_states, tokens)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether a convolution must hand in its inputs also when it takes one token, instead of shifting its state.

        With slack always. Without, only where a pass begins and ends: there it is checked and counted.
        """
        return self.writer.records(layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the states stand after some token."""
        return self.writer.has_previous(layer_idx, state_idx)

    # ---- what masks and generate call

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns taken in, pads included: an int when growing, a 0-d tensor on the device with a fixed capacity.

        After compiled steps it waits for the device. Raises RaggedError where rows differ in an unmodified model.
        """
        self.writer.finish()
        return self.writer.seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> int | float | Tensor:
        """The position of a pass's first token. Raises RaggedError where rows differ; in a prepared pass it is NaN."""
        self.writer.finish()
        return self.writer.query_offset()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int | float | Tensor]:
        """How many keys `update` will return to T = `query_length` tokens, and the position of the first.

        In a prepared model's pass over rows that differ no two numbers say that: they are T, and NaN.
        """
        self.writer.finish()
        if not query_length:
            raise no_token(self.lengths.tolist())
        clock, spec = self.states.clock, self.writer.registry.attention(layer_idx)
        window = None if spec is None else spec.window
        if self.capacity is not None:
            if spec is None or window is None or spec.holds_all(self.capacity, self.slack):
                return self.capacity, 0
            if clock is None:
                return window - 1 + query_length, 0
            return window - 1 + query_length, offset(clock.lengths[0], window)
        length = self.get_query_offset()
        if isinstance(length, float):
            return query_length, length
        assert isinstance(length, int)
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
        return -1 if self.rows is None else self.rows

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
        return self.states.clock is not None

    @property
    def is_croppable(self) -> bool:
        """Whether any tokens within the slack can be cropped, chunks too: not with a recurrence."""
        return self.slack > 0 and not any(s.leased for s in self.states.declared.values())

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
        if self.rows is not None and indices.dtype == torch.bool:
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
        states = self.states
        if states.clock is None:
            states.allocate_all(batch_size, states.dtype or dtype, torch.device(device))

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Take in index keys (B, T, D), after the keys; return the index of all keys that `update` returned."""
        return self.writer.update_index(layer_idx, indexer_key_states)

    def positions(self, layer_idx: int) -> Tensor | None:
        """Where the tokens stand that an index chooses from, (3, B, S), in the layer that keeps it; None before any.

        In a pass of a prepared model what lies beyond a row's end is junk.
        """
        self.writer.finish()
        return self.writer.positions(layer_idx)

    def take_positions(self, layer_idx: int, positions: Tensor) -> None:
        """Take in where the tokens of a pass stand, before its layers: the last of `positions` (3, B, S + T)."""
        self.writer.take_positions(layer_idx, positions)

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise StateCacheError("nothing to prefetch: this cache keeps its states on the model's devices")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise StateCacheError("nothing to offload: this cache keeps its states on the model's devices")


def _verify(path: object, written: str | None, there: str | None, whole: bool) -> None:
    """Raise UnverifiedWeights or FileError where weights are not known to be those that filled a file."""
    if not whole:
        raise UnverifiedWeights(
            f"{path}: a configuration does not say whose weights go on with these states: give the model, or say "
            "allow_unverified=True"
        )
    if written is None:
        warnings.warn(
            f"{path} does not say whose weights filled it: an unprepared model did, and went unseen", stacklevel=3
        )
    elif written != there:
        raise FileError(
            f"{path} was filled by other weights than this model's: load the model that filled it, with its adapters "
            "as they were, or say allow_unverified=True"
        )
