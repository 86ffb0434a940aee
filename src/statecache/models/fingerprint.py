"""Whose weights: a digest that tells a model from a fine-tune of it, without reading all of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from statecache.errors import ConfigError

PIECES, PIECE = 16, 4096  # bytes of a tensor that are looked at, spread over it: 64 KB
VOLATILE = ("transformers_version", "_name_or_path", "_attn_implementation", "dtype", "torch_dtype", "use_cache")
ADAPTERS = ("active_adapters", "active_adapter", "disable_adapters", "merged")  # which of a layer's adapters count


def fingerprint(model: nn.Module) -> str:
    """A digest of the configuration, the adapters that are on, and 64 KB at least of every tensor.

    The same on every device, and before and after `prepare`. Raises ConfigError where weights are not there to look at.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    told = {name: value for name, value in config.to_dict().items() if name not in VOLATILE}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        on = [f"{what}={getattr(module, what)}" for what in ADAPTERS if hasattr(module, what)]
        if on:
            digest.update(f"{name}: {', '.join(on)}".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ConfigError(f"{name} is offloaded: the model cannot be told from others; say allow_unverified=True")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def versions(model: nn.Module) -> int:
    """What changes when a weight is written to or an adapter is switched: quick, and of this process alone."""
    switched = [str(getattr(m, what, None)) for m in model.modules() for what in ADAPTERS if hasattr(m, what)]
    weights = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters() if not p.is_meta]
    return hash((tuple(switched), tuple(weights)))


def _sample(tensor: Tensor) -> bytes:
    """All of a small tensor, else pieces from its beginning to its end."""
    flat = tensor.detach().contiguous().flatten()
    size = max(1, PIECE // flat.itemsize)
    if len(flat) > PIECES * size:
        starts = [(len(flat) - size) * n // (PIECES - 1) for n in range(PIECES)]
        flat = torch.cat([flat[start : start + size] for start in starts])
    return flat.cpu().view(torch.uint8).numpy().tobytes() if len(flat) else b""
