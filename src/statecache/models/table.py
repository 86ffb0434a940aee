"""The table of layer kinds: from a transformers configuration to what each layer remembers.

A layer type that a configuration may name is a row of `KINDS`. The shapes of its states in one family are a row of
`SHAPES`, keyed by model type and layer type: without it the first write declares them. How to add either:
docs/adding_a_layer.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from statecache.errors import UnknownLayerError
from statecache.spec import LayerSpec, ModelSpec, StateSpec


@dataclass(frozen=True)
class Kind:
    """What a layer type may hold. `window`: the configuration's attribute that cuts attention short; "" for none."""

    attention: bool = False
    window: str = ""
    mixer: bool = False  # a convolution, a recurrence, or both


KINDS: dict[str, Kind] = {
    "full_attention": Kind(attention=True),
    "attention": Kind(attention=True),
    "sliding_attention": Kind(attention=True, window="sliding_window"),
    "chunked_attention": Kind(attention=True, window="attention_chunk_size"),
    "linear_attention": Kind(mixer=True),
    "mamba": Kind(mixer=True),
    "conv": Kind(mixer=True),
    "hybrid": Kind(attention=True, mixer=True),
    "hybrid_sliding": Kind(attention=True, window="sliding_window", mixer=True),
    "moe": Kind(),
    "mlp": Kind(),
    "dummy": Kind(),
}

# These shift their convolution's state in place in a one-token step, without asking whether they may, and say nothing:
# the new input is read off the state they were handed, when they write their recurrence.
SHIFTS_IN_PLACE = {"kimi_linear", "bailing_hybrid", "glm5_next"}

# Their scan takes no initial state: several tokens on top of others would start the recurrence from zero, silently.
DROPS_STATE = {"mamba", "falcon_mamba", "jamba", "zamba"}


# Their one-token step overwrites its state head by head.
WRITES_BY_HEAD = {"zamba"}


def conv(width: int, channels: int, name: str = "conv") -> StateSpec:
    """The last inputs of a causal convolution of this width."""
    return StateSpec(name, "conv", (channels,), width - 1, axis=1)


def recurrent(*shape: int, name: str = "recurrent") -> StateSpec:
    """A state that a recurrence overwrites, float32 or better."""
    return StateSpec(name, "recurrent", shape, 1, dtype=torch.float32, leased=True)


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
    states = conv(kernel, width + 2 * groups * state), recurrent(heads, head, state)
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
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    state = recurrent(c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
    return conv(c.linear_conv_kernel_dim, 2 * keys + values), state, *log(keys + values, 2 * c.linear_num_value_heads)


def _lfm2(c: Any) -> tuple[StateSpec, ...]:
    return (conv(c.conv_L_cache, c.hidden_size),)


def _lightning(c: Any) -> tuple[StateSpec, ...]:
    """The log is keys and values, and whether there is a token."""
    heads, size = c.num_attention_heads, c.head_dim or c.hidden_size // c.num_attention_heads
    return recurrent(heads, size, size), *log(2 * heads * size, 1)


def _heads(c: Any, window: int | None = None) -> tuple[StateSpec, ...]:
    """Grouped-query attention."""
    size = getattr(c, "attention_head_dim", None) or getattr(c, "head_dim", None)
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return attention(heads, size or c.hidden_size // c.num_attention_heads, window=window)


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
    ("lfm2", "conv"): _lfm2,
    ("lfm2_moe", "conv"): _lfm2,
    ("minimax", "linear_attention"): _lightning,
}

# Their attention layers have `num_key_value_heads` heads, keys and values of one size.
GROUPED_QUERY = {model for model, _ in SHAPES} | {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text")
}


# ---- a whole model


def model_spec(config: Any) -> ModelSpec:
    """What a model with this configuration remembers.

    Raises UnknownLayerError for a layer type without a row.
    """
    config = config.get_text_config(decoder=True)
    kinds, configs = layer_types(config), _per_layer(config)
    return ModelSpec(tuple(_layer(i, kind, configs[i]) for i, kind in enumerate(kinds)), config.model_type)


def layer_types(config: Any) -> list[str]:
    """The type of every layer; "dummy" for one that holds nothing because it reads another's keys."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
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
        known = config.model_type in GROUPED_QUERY
        states += _heads(config, window) if known else _undeclared(attention(0, 0, window=window))
    return LayerSpec(index, name, states, open=kind.mixer and mixer is None, log=logs)


def _undeclared(states: tuple[StateSpec, ...]) -> tuple[StateSpec, ...]:
    return tuple(replace(s, shape=None) for s in states)
