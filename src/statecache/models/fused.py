"""Layers run by kernels while a step is captured: which way each one goes, and why.

Two ways. *Whole*: the step owns the layer, see `whole`, from norm to residual, with its linear layers' weights read
where they lie. *In part*: the layer's own modules run, with a kernel for its
mixer, its experts and its norms where there is one, see `parts`. Any other module, and any linear layer that is hooked,
wrapped, quantised or otherwise unusual, goes its own way inside the captured step.

Nothing of a model changes for good: `by_kernels` sets functions on instances, and takes them away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from statecache.models.cache import StateCache
from statecache.models.decoder import decoder_of, layers_of
from statecache.models.parts import angles_of, experts_of, kernel_of, mixers_of, norms_of, unavailable
from statecache.models.prepare import borrowed
from statecache.models.table import KINDS, layer_types
from statecache.models.whole import apart, first_norm, whole


@dataclass(frozen=True)
class Way:
    """How one layer runs in a captured step: "whole", "in part" or "modules"; and why not whole, or what is not."""

    layer: int
    kind: str
    way: str
    why: str = ""

    def __str__(self) -> str:
        return f"layer {self.layer} ({self.kind}): {self.way}" + (f", {self.why}" if self.why else "")


def explain(model: nn.Module, cache: StateCache | None = None) -> list[Way]:
    """Which way each layer of a model runs in a captured step of `sc.Decoder`, and why, where its weights are now.

    `cache`: the one that it would run on; left out, one that suits kernels. Prints well, a line a layer. Raises
    UnknownLayerError where `prepare` does.
    """
    with borrowed(model):
        found = ways(model)
    if cache is None:
        return found
    held = [{state.kind for state in cache.spec.layers[way.layer].states} for way in found]
    refuses = [("conv" in each and not cache.slack) or ("recurrent" in each and cache.states.back) for each in held]
    why = "its cache lends kernels nothing: make it with slack=1, back=False"
    return [replace(way, way="modules", why=why) if no else way for way, no in zip(found, refuses, strict=True)]


def ways(model: nn.Module) -> list[Way]:
    """Which way each layer of a prepared model runs, on the device where its weights are."""
    decoder = decoder_of(model)
    found = []
    for index, (kind, layer) in enumerate(zip(layer_types(decoder.config), layers_of(decoder), strict=True)):
        why = unavailable(layer)
        made = why or ("its keys have a window" if KINDS[kind].window else whole(layer))
        if callable(made):
            found.append(Way(index, kind, "whole", apart(layer)))
            continue
        mixed = (kernel_of(mixer) is not None for mixer in mixers_of(layer))
        part = not why and (any(mixed) or any(experts_of(layer)))
        found.append(Way(index, kind, "in part" if part else "modules", made))
    return found


@contextmanager
def by_kernels(model: nn.Module) -> Iterator[None]:
    """Have the layers of a prepared model run by kernels within, each the way that `ways` says."""
    decoder, put = decoder_of(model), []

    def stand_in(module: nn.Module, name: str, value: Any) -> None:
        put.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    with ExitStack() as stack:
        stack.callback(_take_away, put)
        first = None  # norm of the layer behind, if that runs whole
        for layer in reversed(list(layers_of(decoder))):
            following, first = first, None
            if unavailable(layer):
                continue
            made = whole(layer, following)
            if callable(made):
                stand_in(layer, "forward", made)
                first = first_norm(layer)
            for mixer in mixers_of(layer):
                kernel = kernel_of(mixer)
                if kernel is not None:
                    mixer.kernel = kernel
                    stack.callback(setattr, mixer, "kernel", None)
        for module, forward in (*norms_of(decoder), *experts_of(decoder), *angles_of(decoder)):
            stand_in(module, "forward", forward)
        yield


@contextmanager
def norms_by_kernels(model: nn.Module) -> Iterator[None]:
    """Have the norms of a model run by kernels within: what is worth it for the many tokens of a prompt."""
    put: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, forward in norms_of(model):
            put.append((module, "forward", None))
            module.forward = forward
        yield
    finally:
        _take_away(put)


def _take_away(put: list[tuple[nn.Module, str, Any]]) -> None:
    for module, name, before in reversed(put):
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
