"""Layers on another device than the tokens: every tensor goes where the state is that it is used with.

The last layers of a tiny model lie on the meta device, which has shapes and no numbers; `tests/gpu` compares numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import families
import prepared_oracle as oracle
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import statecache as sc

ROWS, CAPACITY, SLACK = 2, 24, 4
NAMES = ["qwen3_5", "lfm2", "falcon_h1", "gemma3_text", "mamba2"]
MOVE = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}  # a GPU takes indices of the CPU, too


class OneDevice(TorchDispatchMode):
    """Raises where an operator meets tensors of two devices, as a GPU would; meta forgives some."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and func.overloadpacket.__name__ not in MOVE:
            raise AssertionError(f"{func} of tensors on {' and '.join(sorted(devices))}")
        return func(*args, **(kwargs or {}))


def spread(model: Any, other: str) -> Any:
    """Move all layers but the first to another device, and what a layer is given after it, as accelerate does."""
    decoder = next(m for m in model.modules() if isinstance(vars(m)["_modules"].get("layers"), nn.ModuleList))

    def bring(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(other), (args, kwargs))

    last = [m for name, m in decoder.named_children() if name.startswith(("norm", "final_layernorm", "embedding_norm"))]
    for module in [*decoder.layers[1:], *last, model.get_output_embeddings()]:
        module.to(other).register_forward_pre_hook(bring, with_kwargs=True)
    return model


@cache
def build(name: str, prepared: bool) -> Any:
    """Shared between tests: leave it as it is."""
    size = {**oracle.SIZE, **oracle.MODELS[name], "tie_word_embeddings": False}  # or the head lies with the first
    if name in families.FAMILIES:
        model = families.build(name, **size)[0]
    else:
        model = copy.deepcopy(tiny_models.build(name, **size))
    return spread(sc.prepare(model) if prepared else model, "meta")


def steps(model: Any, cache: sc.StateCache, sizes: list[int], mask: Tensor | None = None) -> None:
    """Feed so many tokens each time."""
    with torch.no_grad(), OneDevice():
        for size in sizes:
            ids = torch.ones(cache.rows or ROWS, size, dtype=torch.long)
            given = {} if mask is None else {"attention_mask": mask}
            model(ids, use_cache=True, **{families.cache_arg(model): cache}, **given)


def _decode(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6, 1, 1])


def _ragged(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6, 1])
    steps(model, cache, [3], torch.tensor([[1, 0, 1], [1, 1, 1]]))
    steps(model, cache, [1, 2])


def _rolled_back_by_row(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6, 1, 1])
    with OneDevice():
        cache.rollback(torch.tensor([2, 0]))
    steps(model, cache, [1, 3])


def _rolled_back(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6, 1, 1])
    with OneDevice():
        cache.rollback(2)
    steps(model, cache, [1, 3])


def _round(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6])
    with cache.speculate(SLACK) as draft:
        steps(model, cache, [SLACK])
        draft.commit(torch.tensor([3, 0]))
    steps(model, cache, [1, 2])


def _verbs(model: Any, cache: sc.StateCache) -> None:
    steps(model, cache, [6])
    with OneDevice():
        mark = cache.checkpoint()
    steps(model, cache, [1])
    with OneDevice():
        cache.restore(mark)
        cache.gather([1, 0])
        other = cache.fork()
        cache.reset()
    for one in (other, cache):
        steps(model, one, [2, 1])


PREPARED = {f.__name__.strip("_"): f for f in (_decode, _ragged, _rolled_back, _rolled_back_by_row, _round, _verbs)}
UNMODIFIED = {f.__name__.strip("_"): f for f in (_decode, _rolled_back, _verbs)}


def serves(use: Callable[[Any, sc.StateCache], None], name: str, prepared: bool, **options: Any) -> None:
    model = build(name, prepared)
    cache = sc.StateCache(model.config, **options)
    use(model, cache)
    held = {state.buffers()[0].device.type for state in cache.states.values()}
    assert held == {"cpu", "meta"}, "the states lie with their layers"
    assert cache.lengths.device.type == "cpu"


@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use", PREPARED)
def test_a_prepared_model_on_two_devices(use: str, name: str, capacity: int | None) -> None:
    serves(PREPARED[use], name, True, capacity=capacity, slack=SLACK)


@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["growing", "fixed"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use", UNMODIFIED)
def test_an_unmodified_model_on_two_devices(use: str, name: str, capacity: int | None) -> None:
    serves(UNMODIFIED[use], name, False, capacity=capacity, slack=SLACK)


@pytest.mark.parametrize("slack", [0, SLACK])
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_on_two_devices(name: str, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form of compiled code, where positions are tensors on the tokens' device."""
    model = build(name, True)
    cache = sc.StateCache(model.config, capacity=CAPACITY, slack=slack)
    steps(model, cache, [6])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    steps(model, cache, [1, 1])


def test_two_devices_in_one_operator_are_found() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="cpu and meta"):
        torch.zeros(3, device="meta").index_select(0, torch.tensor([1]))
