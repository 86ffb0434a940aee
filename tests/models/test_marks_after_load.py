"""A mark of what was loaded for a prepared model outlasts that model's first pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny_models import draw
from torch import Tensor

import statecache as sc


def feed(model: Any, cache: sc.StateCache, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, **{families.cache_arg(model): cache}).logits
    return logits


@pytest.mark.parametrize("saves", [sc.prepare, lambda model: model], ids=["prepared", "unmodified"])
@pytest.mark.parametrize("options", [{}, {"capacity": 64}, {"offload": True}, {"back": False}], ids=str)
@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "mamba2"])
@pytest.mark.filterwarnings("ignore:.*does not say whose weights")
@torch.no_grad()
def test_a_mark_right_after_load_is_restored(
    name: str, slack: int, options: dict[str, Any], saves: Callable[[Any], Any], tmp_path: Path
) -> None:
    model, asked = families.build(name)[0], draw(2, 3, seed=1)
    cache = sc.StateCache(model.config, slack=slack)
    feed(saves(model), cache, draw(2, 11))
    cache.save(tmp_path / "rows")
    read = sc.StateCache.load(tmp_path / "rows", sc.prepare(model), slack=slack, **options)
    mark = read.checkpoint()
    first = feed(model, read, asked)
    torch.testing.assert_close(first, feed(model, cache, asked), rtol=1e-4, atol=1e-5)
    read.restore(mark)
    assert read.lengths.tolist() == [11, 11]
    assert torch.equal(feed(model, read, asked), first)
    if slack and "back" not in options:
        read.rollback(3)
        torch.testing.assert_close(feed(model, read, asked), first, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_loaded_for_a_model_as_it_is_a_cache_is_that_models(tmp_path: Path) -> None:
    model, other = (families.build("qwen3_5")[0] for _ in range(2))
    cache = sc.StateCache(model.config, slack=4)
    feed(sc.prepare(model), cache, draw(2, 11))
    cache.save(tmp_path / "rows")
    read = sc.StateCache.load(tmp_path / "rows", other, slack=4)  # while a prepared one of its kind is there
    torch.testing.assert_close(
        feed(other, read, draw(2, 1, seed=1)), feed(model, cache, draw(2, 1, seed=1)), rtol=1e-4, atol=1e-5
    )
