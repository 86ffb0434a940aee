"""Layers on two GPUs give what one GPU gives: growing, fixed, ragged, rolled back, in rounds; prepared and not.

pytest tests/gpu -m gpu -n 6
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from steps import TOLERANCE, error
from torch import Tensor

import statecache as sc
from spread import spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn about what others do
]

NAMES = ["mamba2", "falcon_h1", "qwen3_5", "lfm2"]
SLACK, CAPACITY = 4, 64


def pair(name: str, prepared: bool, first: str, second: str) -> tuple[Any, Any]:
    """The same model on one device, and on two."""
    model = families.build(name)[0].to(first)
    both = (model, copy.deepcopy(model))
    whole, parted = (sc.prepare(m) for m in both) if prepared else both
    return whole, spread(parted, second)


def feed(model: Any, cache: sc.StateCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    given: dict[str, Any] = {families.cache_arg(model): cache, "use_cache": True}
    return model(ids, attention_mask=mask, **given).logits.cpu()


def uniform(model: Any, cache: sc.StateCache, ids: Tensor) -> Iterator[Tensor]:
    """What an unmodified model can do, too: a prompt, steps, a rollback of steps."""
    yield feed(model, cache, ids[:, :9])
    for n in range(9, 13):
        yield feed(model, cache, ids[:, n : n + 1])
    cache.rollback(2)
    mark = cache.checkpoint()
    yield feed(model, cache, ids[:, 13:14])
    cache.restore(mark)
    cache.gather([1, 0])
    yield feed(model, cache.fork(), ids[:, 14:15])


def by_row(model: Any, cache: sc.StateCache, ids: Tensor) -> Iterator[Tensor]:
    """What takes a prepared model: pads, rows that differ, rounds."""
    yield from uniform(model, cache, ids)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=ids.device)
    yield feed(model, cache, ids[:, 15:18], mask)[mask.cpu() != 0]
    cache.rollback(torch.tensor([1, 0]))
    yield feed(model, cache, ids[:, 18:19])
    with cache.speculate(SLACK) as draft:
        yield feed(model, cache, ids[:, 19 : 19 + SLACK])
        draft.commit(torch.tensor([3, 0]))
    yield feed(model, cache, ids[:, 23:25])


@pytest.mark.parametrize("capacity", [None, CAPACITY], ids=["growing", "fixed"])
@pytest.mark.parametrize("prepared", [False, True], ids=["unmodified", "prepared"])
@pytest.mark.parametrize("name", NAMES)
def test_two_devices_give_what_one_gives(name: str, prepared: bool, capacity: int | None) -> None:
    compare(name, prepared, capacity, "cuda:0", "cuda:1")


def compare(name: str, prepared: bool, capacity: int | None, first: str, second: str) -> None:
    ids = torch.randint(1, 90, (2, 25), generator=torch.Generator().manual_seed(5)).to(first)
    course = by_row if prepared else uniform
    models = pair(name, prepared, first, second)
    caches = [sc.StateCache(model.config, capacity=capacity, slack=SLACK) for model in models]
    courses = [course(model, cache, ids) for model, cache in zip(models, caches, strict=True)]
    for n, (want, got) in enumerate(zip(*courses, strict=True)):
        assert error(got, want) < TOLERANCE, f"pass {n}"
    assert {state.buffers()[0].device for state in caches[1].states.values()} == {
        torch.device(first),
        torch.device(second),
    }


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_layers_of_two_devices_give_what_one_gives(name: str) -> None:
    ids = torch.randint(1, 90, (2, 25), generator=torch.Generator().manual_seed(5)).to("cuda:0")
    models = pair(name, True, "cuda:0", "cuda:1")
    courses = [
        by_row(model, sc.StateCache(model.config, slack=SLACK, offload=offload), ids)
        for model, offload in zip(models, (False, True), strict=True)
    ]
    for want, got in zip(*courses, strict=True):
        assert error(got, want) < TOLERANCE
