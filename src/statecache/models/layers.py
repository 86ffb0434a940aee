"""The objects in `cache.layers`: what transformers reads of a cache's layers, answered by the cache.

transformers 5.17 reads states through them; 5.23 asks the cache itself. Nothing is stored here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from statecache.spec import ModelSpec


class Answers(Protocol):
    """The cache, as its layers ask it."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def is_compileable(self) -> bool: ...
    @property
    def is_initialized(self) -> bool: ...
    @property
    def is_sliding(self) -> Sequence[bool]: ...
    @property
    def batch_size(self) -> int: ...
    def is_recording_past(self, layer_idx: int) -> bool: ...
    def held(self, layer_idx: int, name: str) -> Tensor | None: ...
    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor: ...
    def under_way(self, layer_idx: int) -> int: ...
    def positions(self, layer_idx: int) -> Tensor | None: ...
    def take_positions(self, layer_idx: int, positions: Tensor) -> None: ...
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int | float | Tensor]: ...
    def get_max_length(self, layer_idx: int | None = None) -> int: ...
    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool: ...
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None: ...
    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None: ...


class Layer:
    """One layer as transformers sees it."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: Answers, index: int) -> None:
        self.cache, self.index = cache, index

    def __repr__(self) -> str:
        spec = self.cache.spec.layers[self.index]
        return f"Layer({self.index}, {spec.kind}: {', '.join(s.name for s in spec.states) or 'nothing'})"

    @property
    def is_compileable(self) -> bool:
        return self.cache.is_compileable

    @property
    def is_initialized(self) -> bool:
        return self.cache.is_initialized

    @property
    def is_sliding(self) -> bool:
        return self.cache.is_sliding[self.index]

    @property
    def max_batch_size(self) -> int:
        return self.cache.batch_size

    batch_size = max_batch_size

    @property
    def record_past(self) -> bool:
        return self.cache.is_recording_past(self.index)

    @record_past.setter
    def record_past(self, value: bool) -> None:
        """Slack is given when the cache is made; there is nothing to switch."""

    # ---- attention

    @property
    def keys(self) -> Tensor | None:
        return self.cache.held(self.index, "key")

    @property
    def values(self) -> Tensor | None:
        return self.cache.held(self.index, "value")

    def get_seq_length(self) -> int | Tensor:
        return self.cache.get_seq_length(self.index) + self.cache.under_way(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | float | Tensor]:
        return self.cache.get_mask_sizes(query_length, self.index)

    def get_max_length(self) -> int:
        return self.cache.get_max_length(self.index)

    get_max_cache_shape = get_max_length

    @property
    def max_cache_len(self) -> int:
        return self.get_max_length()

    @property
    def indexer_position_ids(self) -> Tensor | None:
        return self.cache.positions(self.index)

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor) -> None:
        self.cache.take_positions(self.index, positions)

    # ---- recurrences and convolutions

    @property
    def conv_states(self) -> Mapping[int, Tensor | None]:
        return _States(self.cache, self.index, "conv")

    @property
    def recurrent_states(self) -> Mapping[int, Tensor | None]:
        return _States(self.cache, self.index, "recurrent")

    @property
    def has_previous_state(self) -> Mapping[int, bool]:
        fed = self.cache.has_previous_state(self.index)
        return dict.fromkeys(range(max(len(self.conv_states), len(self.recurrent_states))), fed)


class _States(Mapping[int, "Tensor | None"]):
    """The states of one kind by number; reading one is asking the cache for it."""

    def __init__(self, cache: Answers, index: int, kind: str) -> None:
        self.cache, self.index, self.kind = cache, index, kind

    def __getitem__(self, number: int) -> Tensor | None:
        get = self.cache.get_conv_state if self.kind == "conv" else self.cache.get_recurrent_state
        return get(self.index, number)

    def __len__(self) -> int:
        layer = self.cache.spec.layers[self.index]
        return max(int(layer.open), sum(s.name.startswith(self.kind) for s in layer.states))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))
