"""The parts of a transformers model: the decoder, which runs the layers and so is handed the cache, and its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from statecache.errors import UnknownLayerError


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that runs the layers of the part of `model` that writes text. Raises UnknownLayerError."""
    whole: Any = getattr(model, "config", None)
    text = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else None
    for module in model.modules():
        config = getattr(module, "config", None)
        # not a vision tower
        if getattr(config, "model_type", None) == getattr(text, "model_type", "") and _layers(module) is not None:
            return module
    raise UnknownLayerError(
        f"{type(model).__name__} has no list of decoder layers that its configuration counts, and that know their "
        "index in a cache (layer_idx): prepare() takes a transformers model that keeps one, or its decoder; it was "
        "left as it is"
    )


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The layers of a decoder, in order."""
    found = _layers(decoder)
    assert found is not None
    return found


def _layers(module: nn.Module) -> nn.ModuleList | None:
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    lists = {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    }
    if "layers" in lists:
        return lists["layers"]
    # gpt2 calls them h
    return next((found for found in lists.values() if any(hasattr(m, "layer_idx") for m in found.modules())), None)
