"""What statecache stands on in transformers, as tables that `tools/check_next.py` holds beside a newer release."""

from __future__ import annotations

import re
import sys
import warnings
from functools import lru_cache
from pathlib import Path

TESTED = ("5.17", "5.24")  # the oldest and the newest release that every change is tested with

NAMES = ("cache", "past_key_values", "cache_params")  # what a cache is called

# Every name that transformers' models, masks and `generate` ask of a cache, and who does.
CALLS = {
    "update": "attention layers, with keys and values",
    "get_seq_length": "models that make positions; generate",
    "get_mask_sizes": "masking_utils; inkling's layers",
    "get_query_offset": "masking_utils; inkling's layers",
    "get_conv_state": "layers with a convolution",
    "update_conv_state": "layers with a convolution",
    "get_recurrent_state": "layers with a recurrence",
    "update_recurrent_state": "layers with a recurrence",
    "is_recording_past": "layers with a convolution, of one token",
    "has_previous_state": "layers with a convolution, until 5.2x",
    "update_indexer": "indexed attention",
    "layers": "dory, glm5_next, qwen4_exp: what single layers hold",
    "is_sliding": "masking_utils",
    "is_linear": "masking_utils; generate",
    "is_dummy": "masking_utils",
    "is_compileable": "generate, masking_utils",
    "is_initialized": "models of images",
    "is_croppable": "assisted decoding",
    "crop": "assisted decoding",
    "activate_past_recording": "assisted decoding",
    "get_max_length": "bloom",
}

# Names that other objects have where they go by a cache's name: encoder-decoders, models of sound and pictures, LSTMs,
# outputs, tensors; caches of their own class, which a StateCache is refused in place of.
NOT_OURS = {
    *("self_attention_cache", "cross_attention_cache", "is_updated"),
    *("early_initialization", "lazy_initialization", "set_previous_accepted_tokens", "first_attention_layer"),
    *("cache", "hidden_state", "cell_state", "position_ids", "clone", "copy_", "move_to_end", "popitem"),
    *("clear_all", "get_vision_features", "cache_vision_features"),
    *("seqlen_offset", "rnn_state", "rnn_state_initial", "get_linear_cache", "set_linear_cache"),
}

# What is called or stood in for, by its place in transformers, with the parameters that are used by name.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "masking_utils.create_masks_for_generate": ("inputs_embeds", "attention_mask", "is_first_iteration"),
    "generation.utils.GenerationMixin._prepare_cache_for_generation": (
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "generation.utils.GenerationMixin._prepare_position_ids_for_generation": (),
    "generation.utils.GenerationMixin._prefill": (
        "input_ids",
        "generation_config",
        "model_kwargs",
        "is_first_iteration",
    ),
    "generation.utils.GenerationMixin.prepare_inputs_for_generation": ("is_first_iteration",),
    "generation.utils.GenerationMixin.generate": (),
    "generation.utils.GenerationMode.ASSISTED_GENERATION": (),
    "modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface": (),
    "modeling_utils.AttentionInterface.register": (),
    "configuration_utils.PreTrainedConfig.get_text_config": ("decoder",),
}


_CALL = re.compile(rf"(?<![`.\w])({'|'.join(NAMES)})\.({'|'.join(CALLS)})\b")


@lru_cache
def asks_a_cache(module: str) -> bool:
    """Whether models of transformers whose configuration is of this module ask a cache for anything."""
    code = _code(module)
    return not code or _CALL.search(code) is not None


@lru_cache
def may_encode(module: str) -> bool:
    """Whether models of transformers whose configuration is of this module are encoders unless told otherwise."""
    return re.search(r"config\.is_decoder(?! =)", _code(module)) is not None


@lru_cache
def may_slide(module: str) -> bool:
    """Whether models whose configuration is of this module mask what lies before a window, where it names one."""
    code = _code(module)
    return not code or "sliding_window_causal_mask" in code  # moshi's names one, and attends to all


@lru_cache
def moves_positions(config: type) -> bool:
    """Whether transformers has models with this configuration that give pictures positions of their own.

    The tokens behind one then stand where it ends, and not at their number; how far off, such a model keeps to itself.
    """
    return any("rope_deltas" in _code(cls.__module__) for cls in config.__mro__)


def _code(module: str) -> str:
    """The text of the modelling files beside a configuration of transformers, which is read faster than imported."""
    if not module.startswith("transformers.models."):
        return ""  # not ours to read
    folder = Path(getattr(sys.modules.get(module), "__file__", None) or "").parent
    return "".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("modeling_*.py")))


def check_version(version: str) -> None:
    """Warn where nobody has tested with this transformers."""
    number = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    newest = tuple(int(part) for part in TESTED[1].split("."))
    if number > newest:
        warnings.warn(
            f"statecache was tested with transformers {TESTED[0]} to {TESTED[1]}, and this is {version}: what its "
            "models ask of a cache may have changed; look for a newer statecache",
            stacklevel=2,
        )
