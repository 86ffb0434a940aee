"""Whose weights: a digest that tells a model from a fine-tune of it, without reading all of it."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from statecache.errors import ConfigError

PIECES, PIECE = 16, 4096  # bytes of a tensor that are looked at, spread over it: 64 KB
VOLATILE = ("transformers_version", "_name_or_path", "_attn_implementation", "dtype", "torch_dtype", "use_cache")
ADAPTERS = {"active_adapters", "active_adapter", "disable_adapters", "merged"}  # which of a layer's adapters count
SWITCHES: dict[type, list[str]] = {}  # which of these a class has


def fingerprint(model: nn.Module) -> str:
    """A digest of the configuration, the adapters that are on, and 64 KB at least of every tensor.

    The same on every device, and before and after `prepare`. Raises ConfigError where weights are not there to look at.
    """
    digest = hashlib.sha256()
    config: Any = model.config
    told = {name: value for name, value in config.to_dict().items() if name not in VOLATILE}
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        if on := _switches(module):
            digest.update(f"{name}: {', '.join(on)}".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ConfigError(f"{name} is offloaded: the model cannot be told from others; say allow_unverified=True")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


class Weights:
    """Whose weights filled a cache: those of a file that was verified, or of one decoder that has not changed since."""

    def __init__(self, known: str | None = None, unknown: bool = False) -> None:
        """`unknown`: nobody knows whose weights filled it, nor ever will."""
        self.known, self.unknown = known, unknown
        self._decoder: weakref.ref[nn.Module] | None = None
        self._versions = 0

    def filled_by(self, decoder: nn.Module) -> None:
        """Look at this decoder, when somebody asks. Does not keep it alive."""
        if self._decoder is not None and self._decoder() is decoder:
            return
        if self._decoder is not None or self.known is not None:  # another one, which may have the same weights
            self.known = self.fingerprint()
            self.unknown = self.unknown or self.known is None or self.known != _if_there(decoder)
        self._decoder, self._versions = weakref.ref(decoder), _versions(decoder)

    def fingerprint(self) -> str | None:
        """A digest of the weights; None where nobody knows them, or they are not there to look at."""
        if self.unknown:
            return None
        decoder = None if self._decoder is None else self._decoder()
        if decoder is None:
            return self.known
        return _if_there(decoder) if _versions(decoder) == self._versions else None


def _if_there(decoder: nn.Module) -> str | None:
    """The fingerprint of weights, if none is offloaded: no pass, no copy and no file waits for it."""
    try:
        return fingerprint(decoder)
    except ConfigError:
        return None


def _versions(model: nn.Module) -> int:
    """What changes when a weight is written to or an adapter is switched: quick, and of this process alone."""
    found: list[object] = []
    left: list[nn.Module | None] = [model]
    while left:  # every new cache asks: torch's own iterators, over names, would take several times as long
        module = left.pop()
        if module is None:
            continue
        left += module._modules.values()
        weights = [p for p in module._parameters.values() if p is not None and not p.is_meta]
        found += [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights]
        found += _switches(module)
    return hash(tuple(found))


def _switches(module: nn.Module) -> list[str]:
    """Which of a layer's adapters count: "name=value"."""
    kind = type(module)
    of_class = SWITCHES.get(kind)
    if of_class is None:  # transformers' models have methods of these names, which say nothing
        of_class = SWITCHES[kind] = [what for what in ADAPTERS if not callable(getattr(kind, what, print))]
    if not of_class and ADAPTERS.isdisjoint(vars(module)):
        return []
    return [f"{what}={getattr(module, what)}" for what in sorted({*of_class, *(ADAPTERS & vars(module).keys())})]


def _sample(tensor: Tensor) -> bytes:
    """All of a small tensor, else pieces from its beginning to its end."""
    flat = tensor.detach().contiguous().flatten()
    size = max(1, PIECE // flat.itemsize)
    if len(flat) > PIECES * size:
        starts = [(len(flat) - size) * n // (PIECES - 1) for n in range(PIECES)]
        flat = torch.cat([flat[start : start + size] for start in starts])
    return flat.cpu().view(torch.uint8).numpy().tobytes() if len(flat) else b""
