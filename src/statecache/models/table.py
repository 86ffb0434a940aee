"""The table of layer kinds: from a transformers configuration to what each layer remembers.

A layer type that a configuration may name is a row of `KINDS`. The shapes of its states in one family are a row of
`SHAPES`, keyed by model type and layer type: without it the first write declares them. How to add either:
docs/adding_a_layer.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from statecache.errors import ConfigError, UnknownLayerError
from statecache.models.factors import rotary
from statecache.models.interface import asks_a_cache, may_encode, may_slide, moves_positions
from statecache.spec import LayerSpec, ModelSpec, StateSpec

Blocks = tuple[tuple[str, int, int], ...]  # of what, how many, how wide: see `StateSpec.blocks`


@dataclass(frozen=True)
class Kind:
    """What a layer type may hold. `window`: the configuration's attribute that cuts attention short; "" for none."""

    attention: bool = False
    window: str = ""
    chunked: bool = False  # whether what is attended to begins anew after every window
    mixer: bool = False  # a convolution, a recurrence, or both
    indexed: bool = False  # an index of the keys chooses those that are attended to


KINDS: dict[str, Kind] = {
    "full_attention": Kind(attention=True),
    "attention": Kind(attention=True),
    "sliding_attention": Kind(attention=True, window="sliding_window"),
    "chunked_attention": Kind(attention=True, window="attention_chunk_size", chunked=True),
    "indexed_attention": Kind(attention=True, indexed=True),
    "linear_attention": Kind(mixer=True),
    "mamba": Kind(mixer=True),
    "conv": Kind(mixer=True),
    "hybrid": Kind(attention=True, mixer=True),
    "hybrid_sliding": Kind(attention=True, window="sliding_window", mixer=True),
    "moe": Kind(),
    "mlp": Kind(),
    "dense": Kind(),
    "sparse": Kind(),
    "dummy": Kind(),
}

# Layer types of transformers that cannot be kept, and why.
_BY_ITSELF = "its keys are compressed, or chosen, by a cache of its own that no other can stand in for"
_INDEXED = "in this transformers the keys by which it chooses what to attend to go another way: take a newer one"
NOT_KEPT: dict[str, str] = {
    "deepseek_sparse_attention": _INDEXED,
    "qwen_sparse_attention": _INDEXED,
    "compressed_sparse_attention": _BY_ITSELF,
    "heavily_compressed_attention": _BY_ITSELF,
    "minimax_m3_sparse": _BY_ITSELF,
    "reference_sliding_attention": "it attends to the first tokens as well as to the last, which no one window holds",
    "window_attention": "it attends within windows of a picture, and keeps nothing",
}

# These shift their convolution's state in place in a one-token step, without asking whether they may, and say nothing:
# the new input is read off the state they were handed, when they write their recurrence.
SHIFTS_IN_PLACE = {"kimi_linear", "bailing_hybrid", "glm5_next_text"}

# Their scan takes no initial state: several tokens on top of others would start the recurrence from zero, silently.
DROPS_STATE = {"mamba", "falcon_mamba", "jamba", "zamba"}


# Their one-token step overwrites its state head by head.
WRITES_BY_HEAD = {"zamba"}


def conv(width: int, channels: int | Blocks, name: str = "conv", dtype: torch.dtype | None = None) -> StateSpec:
    """The last inputs of a causal convolution of this width, in this `dtype` or better.

    channels: how many; or as blocks, where heads or groups of heads have channels of their own.
    """
    blocks = () if isinstance(channels, int) else channels
    count = channels if isinstance(channels, int) else sum(n * size for _, n, size in channels)
    return StateSpec(name, "conv", (count,), width - 1, axis=1, dtype=dtype, blocks=blocks)


def recurrent(*shape: int, name: str = "recurrent", dtype: torch.dtype | None = torch.float32) -> StateSpec:
    """A state that a recurrence overwrites, float32 or better; in the model's own dtype where `dtype` is None."""
    return StateSpec(name, "recurrent", shape, 1, dtype=dtype, leased=True)


def log(inputs: int, gates: int) -> tuple[StateSpec, StateSpec]:
    """What a recurrence consumes of one token, by width: inputs in the model's dtype, gates in the state's."""
    return StateSpec("inputs", "log", (inputs,), 0), StateSpec("gates", "log", (gates,), 0, dtype=torch.float32)


def attention(heads: int, key: int, value: int | None = None, window: int | None = None) -> tuple[StateSpec, StateSpec]:
    """Keys and values of an attention layer over all tokens, or over the last `window`."""
    kind = "attention" if window is None else "sliding"
    shapes = {"key": (heads, key), "value": (heads, key if value is None else value)}
    return (
        StateSpec("key", kind, shapes["key"], window, axis=1),
        StateSpec("value", kind, shapes["value"], window, axis=1),
    )


# ---- mixers, by family


def _scan(kernel: int, width: int, state: int) -> tuple[StateSpec, ...]:
    """Mamba-1; its log: x and B, dt."""
    return conv(kernel, width), recurrent(width, state), *log(width + state, width)


def _mamba(c: Any) -> tuple[StateSpec, ...]:
    return _scan(c.conv_kernel, c.intermediate_size, c.state_size)


def _jamba(c: Any) -> tuple[StateSpec, ...]:
    return _scan(c.mamba_d_conv, c.mamba_expand * c.hidden_size, c.mamba_d_state)


def _zamba(c: Any) -> tuple[StateSpec, ...]:
    width = c.mamba_expand * c.hidden_size
    state = recurrent(c.n_mamba_heads, width // c.n_mamba_heads, c.mamba_d_state)
    return conv(c.mamba_d_conv, width), state, *log(width + c.n_mamba_heads * c.mamba_d_state, width)


def _ssd(
    kernel: int, heads: int, head: int, groups: int, state: int, width: int | None = None
) -> tuple[StateSpec, ...]:
    """Mamba-2: the convolution sees x, B and C; the log is x and B, dt."""
    width = width or heads * head
    shared = ("groups", groups, state)
    states = conv(kernel, (("heads", heads, width // heads), shared, shared)), recurrent(heads, head, state)
    return *states, *log(width + groups * state, heads)


def _mamba2(c: Any) -> tuple[StateSpec, ...]:
    return _ssd(c.conv_kernel, c.num_heads, c.head_dim, c.n_groups, c.state_size)


def _bamba(c: Any) -> tuple[StateSpec, ...]:
    width = c.mamba_expand * c.hidden_size
    return _ssd(c.mamba_d_conv, c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, width)


def _falcon_h1(c: Any) -> tuple[StateSpec, ...]:
    width = c.mamba_expand * c.hidden_size if c.mamba_d_ssm is None else c.mamba_d_ssm
    return _ssd(c.mamba_d_conv, c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, width)


def _nemotron_h(c: Any) -> tuple[StateSpec, ...]:
    return _ssd(c.conv_kernel, c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size)


def _zamba2(c: Any) -> tuple[StateSpec, ...]:
    width = c.mamba_expand * c.hidden_size
    return _ssd(c.mamba_d_conv, c.n_mamba_heads, c.mamba_headdim, c.mamba_ngroups, c.mamba_d_state, width)


def _gated_delta(c: Any) -> tuple[StateSpec, ...]:
    """The convolution sees queries, keys and values; the log is keys and values, decay and strength."""
    shared = ("groups", c.linear_num_key_heads, c.linear_key_head_dim)
    heads, size = c.linear_num_value_heads, c.linear_value_head_dim
    inputs = conv(c.linear_conv_kernel_dim, (shared, shared, ("heads", heads, size)))
    state = recurrent(heads, c.linear_key_head_dim, size)
    return inputs, state, *log(math.prod(shared[1:]) + heads * size, 2 * heads)


def _kda(c: Any) -> tuple[StateSpec, ...]:
    """The convolution sees queries, keys and values; the log is keys and values, a decay a channel and a strength."""
    heads, size = c.linear_num_heads, c.linear_head_dim
    width = heads * size
    state = recurrent(heads, size, size)
    return conv(c.linear_conv_kernel_dim, 3 * (("heads", heads, size),)), state, *log(2 * width, width + heads)


def _lfm2(c: Any) -> tuple[StateSpec, ...]:
    return (conv(c.conv_L_cache, c.hidden_size),)


def _inkling(c: Any, sliding: bool = False) -> tuple[StateSpec, ...]:
    """Convolutions of the keys, the values, what attention gives, and what the MLP gives."""
    heads, size = _grouped(c, sliding)
    each: Blocks = (("heads", heads, size),)
    channels: dict[str, int | Blocks] = {"conv": each, "conv1": each, "conv2": c.hidden_size, "conv3": c.hidden_size}
    return tuple(conv(c.conv_kernel_size, width, name, torch.float32) for name, width in channels.items())


def _lightning(c: Any) -> tuple[StateSpec, ...]:
    """The log is keys and values, and whether there is a token."""
    heads, size = c.num_attention_heads, c.head_dim or c.hidden_size // c.num_attention_heads
    return recurrent(heads, size, size), *log(2 * heads * size, 1)


def _rg_lru(c: Any) -> tuple[StateSpec, ...]:
    """The log is inputs and decays."""
    return conv(c.conv1d_width, c.lru_width), recurrent(c.lru_width), *log(c.lru_width, c.lru_width)


def _cca(c: Any) -> tuple[StateSpec, ...]:
    """Two convolutions see queries and keys, the second the first's outputs; of the token before, half of its values.

    The log is that half, and whether there is a token.
    """
    keys, half = c.num_key_value_heads * c.head_dim, c.num_key_value_heads * c.head_dim // 2
    inputs = conv(c.cca_time0 + c.cca_time1 - 1, c.num_attention_heads * c.head_dim + keys)
    return inputs, recurrent(half, dtype=None), *log(half, 1)


def _heads(c: Any, window: int | None = None) -> tuple[StateSpec, ...]:
    """Grouped-query attention; that of sliding layers may be of another size."""
    return attention(*_grouped(c, window is not None), window=window)


def _grouped(c: Any, sliding: bool) -> tuple[int, int]:
    """Heads of keys and values, and their size."""
    if sliding and hasattr(c, "swa_head_dim"):
        return c.swa_num_key_value_heads, c.swa_head_dim
    size = getattr(c, "attention_head_dim", None) or getattr(c, "head_dim", None)
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return heads, size or c.hidden_size // c.num_attention_heads


def _latent(c: Any, window: int | None = None) -> tuple[StateSpec, ...]:
    """Latent attention: for all heads one latent, kept as the key, and one key with positions, kept as the value."""
    return attention(1, c.kv_lora_rank, c.qk_rope_head_dim, window)


Shape = Callable[[Any], tuple[StateSpec, ...]]

SHAPES: dict[tuple[str, str], Shape] = {
    ("mamba", "linear_attention"): _mamba,
    ("falcon_mamba", "linear_attention"): _mamba,
    ("mamba2", "linear_attention"): _mamba2,
    ("jamba", "linear_attention"): _jamba,
    ("bamba", "linear_attention"): _bamba,
    ("falcon_h1", "hybrid"): _falcon_h1,
    ("granitemoehybrid", "linear_attention"): _bamba,
    ("nemotron_h", "linear_attention"): _nemotron_h,
    ("zamba", "linear_attention"): _zamba,
    ("zamba", "hybrid"): _zamba,
    ("zamba2", "linear_attention"): _zamba2,
    ("zamba2", "hybrid"): _zamba2,
    ("qwen3_next", "linear_attention"): _gated_delta,
    ("qwen3_5_text", "linear_attention"): _gated_delta,
    ("qwen3_5_moe_text", "linear_attention"): _gated_delta,
    ("olmo_hybrid", "linear_attention"): _gated_delta,
    ("lara_mini", "linear_attention"): _gated_delta,
    ("qwen4_exp_text", "linear_attention"): _gated_delta,
    ("kimi_linear", "linear_attention"): _kda,
    ("bailing_hybrid", "linear_attention"): _kda,
    ("glm5_next_text", "linear_attention"): _kda,
    ("lfm2", "conv"): _lfm2,
    ("lfm2_moe", "conv"): _lfm2,
    ("lfm3", "conv"): _lfm2,
    ("inkling_text", "hybrid"): _inkling,
    ("inkling_text", "hybrid_sliding"): partial(_inkling, sliding=True),
    ("inkling2_text", "hybrid"): _inkling,
    ("inkling2_text", "hybrid_sliding"): partial(_inkling, sliding=True),
    ("inkling2_loop_text", "hybrid"): _inkling,
    ("inkling2_loop_text", "hybrid_sliding"): partial(_inkling, sliding=True),
    ("minimax", "linear_attention"): _lightning,
    ("recurrent_gemma", "linear_attention"): _rg_lru,
    ("zaya", "hybrid"): _cca,
    ("zaya", "hybrid_sliding"): _cca,
}

# Their attention layers have one latent for all heads.
LATENT = {"kimi_linear", "bailing_hybrid", "glm5_next_text"}

# Unless they are prepared, their recurrent states are attributes of their modules.
ON_MODULES = {"recurrent_gemma"}

# Their attention layers have `num_key_value_heads` heads, keys and values of one size.
GROUPED_QUERY = ({model for model, _ in SHAPES} - LATENT) | {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text", "dory")
}


def _pooled_index(c: Any, layer: int) -> tuple[StateSpec, ...]:
    """A key, what weighs it in its pool, and whether there is a token; none where a layer takes another's choice."""
    shared = c.indexer_types[layer] == "shared"
    return () if shared else (StateSpec("index", "attention", (2 * c.index_head_dim + 1,)),)


def _block_index(c: Any, layer: int) -> tuple[StateSpec, ...]:
    """A key; the first such layer keeps for all of them where tokens stand: in the text, in height and in width."""
    index = StateSpec("index", "attention", (c.indexer_head_dim,))
    if layer != c.layer_types.index("indexed_attention"):
        return (index,)
    return index, StateSpec("position", "attention", (3,), axis=1, dtype=torch.int64)


def _ngrams(c: Any, layer: int) -> tuple[StateSpec, ...]:
    """Some layers convolve what they know of n-grams, n tokens apart, and look back at the ids that these begin with.

    A text begins behind the id that ends one.
    """
    if layer + 1 not in c.ple_layer_ids:
        return ()
    end = c.eos_token_id[0] if isinstance(c.eos_token_id, list) else c.eos_token_id
    reach = (c.ple_conv_kernel_size - 1) * c.ngram_size
    ids = StateSpec("conv2", "conv", (), c.ngram_size - 1, dtype=torch.int64, blank=end)
    return conv(reach + 1, c.hc_count * c.hidden_size, "conv1"), ids


# By model type, from the configuration and a layer's index: what an indexed layer keeps beside keys and values, and
# what single layers keep beside those of their kind.
INDEXED: dict[str, Callable[[Any, int], tuple[StateSpec, ...]]] = {
    "glm5_next_text": _pooled_index,
    "qwen4_exp_text": _block_index,
}
BESIDE: dict[str, Callable[[Any, int], tuple[StateSpec, ...]]] = {"qwen4_exp_text": _ngrams}


# ---- layers that run several times in a pass

# What loops in a family: the first layer, the one behind the last, and how often they run. What each time but the first
# remembers is a layer of the cache behind those of the model.
Loop = tuple[int, int, int]


def _dory(c: Any) -> Loop:
    """With one cache for all times ("last_loop"), only the last writes."""
    end = c.n_input_layers + c.n_recurrent_layers
    return c.n_input_layers, end, 1 if c.recurrent_kv_cache_mode == "last_loop" else c.n_recurrent_loops


def _inkling2_loop(c: Any) -> Loop:
    return c.loop_layer_index_start, c.loop_layer_index_end, c.loop_num_passes


LOOPS: dict[str, Callable[[Any], Loop]] = {"dory": _dory, "inkling2_loop_text": _inkling2_loop}


def shares_last(config: Any) -> bool:
    """Whether all times but the last of a loop read off `cache.layers` what the last has kept, and keep nothing."""
    return getattr(config.get_text_config(decoder=True), "recurrent_kv_cache_mode", None) == "last_loop"


# ---- a whole model

# How far a row's next token stands from its length, once pictures have moved it; zero where there was none.
POSITION = StateSpec("position", "position", (1,), 1, dtype=torch.long)


def model_spec(config: Any) -> ModelSpec:
    """What a model with this configuration remembers.

    Raises ConfigError where such a model keeps nothing in a cache, UnknownLayerError for a layer type without a row.
    """
    whole, config = config, _decoding(config)
    kinds, configs = layer_types(config), _per_layer(config)
    layers = [_layer(i, kind, configs[i]) for i, kind in enumerate(kinds)]
    order: list[int] = []
    if config.model_type in LOOPS:
        start, end, times = LOOPS[config.model_type](config)
        again = [replace(layer, index=len(layers) + i) for i, layer in enumerate(layers[start:end] * (times - 1))]
        order = [*range(end), *(layer.index for layer in again), *range(end, len(layers))]
        layers += again
    own = (POSITION,) if whole is not config and moves_positions(whole.__class__) else ()
    return ModelSpec(tuple(layers), config.model_type, tuple(order), own, rotary(config))


def _decoding(config: Any) -> Any:
    """The part of a configuration that describes a decoder."""
    text = config.get_text_config(decoder=True)
    instead = None
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        instead = "it has an encoder, whose keys a decoder attends to as well: use transformers' EncoderDecoderCache"
    elif getattr(text, "is_decoder", True) is False and may_encode(type(text).__module__):
        instead = "it is an encoder, which remembers nothing: set is_decoder=True if it is to decode"
    elif text.model_type in ON_MODULES and getattr(text, "layer_types", None) is None:
        instead = "in this transformers its configuration does not name the types of its layers: take a newer one"
    elif not asks_a_cache(type(text).__module__):
        instead = "no model of that type asks a cache for anything: it keeps its states by itself, or none"
    elif getattr(text, "num_hidden_layers", None) is None:
        instead = "it counts no layers: give the configuration of the part that writes text"
    if instead is not None:
        raise ConfigError(f"there is no cache for a {text.model_type} model: {instead}")
    return text


def layer_types(config: Any) -> list[str]:
    """The type of every layer; "dummy" for one that holds nothing because it reads another's keys."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None and may_slide(type(config).__module__):
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    kinds = list(kinds)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is not None:
        return ["dummy" if mode == "reuse" else kind for kind, mode in zip(kinds, modes, strict=True)]
    return kinds[: len(kinds) - shared] + ["dummy"] * shared


def _per_layer(config: Any) -> list[Any]:
    configs = getattr(config, "per_layer_config", None)
    return [config] * config.num_hidden_layers if configs is None else list(configs)


def _layer(index: int, name: str, config: Any) -> LayerSpec:
    kind = KINDS.get(name)
    if name in NOT_KEPT:
        raise UnknownLayerError(
            f'layer {index} of a "{config.model_type}" model is a "{name}", which cannot be kept exactly: '
            f"{NOT_KEPT[name]}; use the cache that the model makes itself"
        )
    if kind is not None and kind.indexed and config.model_type not in INDEXED:
        raise UnknownLayerError(
            f'layer {index} of a "{config.model_type}" model is an "{name}", and the table does not know what its '
            "index keeps (statecache.models.table.INDEXED); use the cache that the model makes itself"
        )
    if kind is None:
        raise UnknownLayerError(
            f'layer {index} of a "{config.model_type}" model is a "{name}", and the table knows only '
            f'{", ".join(KINDS)}: add statecache.models.table.KINDS["{name}"] (docs/adding_a_layer.md)'
        )
    states: tuple[StateSpec, ...] = ()
    logs: tuple[StateSpec, ...] = ()
    mixer = SHAPES.get((config.model_type, name))
    if kind.mixer and mixer is not None:
        declared = mixer(config)
        states, logs = (tuple(s for s in declared if (s.kind == "log") is logged) for logged in (False, True))
    if kind.attention:
        window = getattr(config, kind.window) if kind.window else None
        if config.model_type in LATENT:
            states += _latent(config, window)
        elif config.model_type in GROUPED_QUERY:
            states += _heads(config, window)
        else:
            states += _undeclared(attention(0, 0, window=window))
    if kind.indexed:
        states += INDEXED[config.model_type](config, index)
    if config.model_type in BESIDE:
        states += BESIDE[config.model_type](config, index)
    return LayerSpec(index, name, states, open=kind.mixer and mixer is None, log=logs)


def _undeclared(states: tuple[StateSpec, ...]) -> tuple[StateSpec, ...]:
    return tuple(replace(s, shape=None) for s in states)
