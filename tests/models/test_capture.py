"""Under a CUDA graph capture no length may be baked in: a cache that grows is refused. Pretended on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import statecache as sc
from statecache.errors import StateCacheError

NAMES = ["mamba2", "qwen3_5", "lfm2", "falcon_h1"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pretend(patched: pytest.MonkeyPatch) -> None:
    """Have every module of statecache think that a graph is being captured."""
    asking = [m for name, m in sys.modules.items() if name.startswith("statecache") and hasattr(m, "capturing")]
    assert asking, "no module asks whether a graph is being captured"
    for module in asking:
        patched.setattr(module, "capturing", lambda tensor: True)


def feed(model: Any, cache: sc.StateCache, ids: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
    given: dict[str, Any] = {families.cache_arg(model): cache, "use_cache": True}
    if "mamba" not in type(model).__name__.lower():
        given["position_ids"] = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    return model(ids, attention_mask=mask, **given).logits


def filled(name: str, prepared: bool, **options: Any) -> tuple[Any, sc.StateCache, Tensor, Tensor]:
    """A model, a cache of 16 tokens a row, the ids, and the logits of a full forward."""
    model, config = families.build(name)
    ids = torch.randint(1, 90, (2, 18), generator=torch.Generator().manual_seed(0))
    want = model(ids, use_cache=False).logits
    if prepared:
        sc.prepare(model)
    cache = sc.StateCache(config, **options)
    feed(model, cache, ids[:, :16], 0)
    return model, cache, ids, want


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("prepared", [False, True], ids=["unmodified", "prepared"])
@pytest.mark.parametrize("name", NAMES)
def test_a_growing_cache_is_refused_and_goes_on_outside(
    name: str, prepared: bool, slack: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked and not prepared:
        pytest.skip("unmodified models read their masks themselves")
    model, cache, ids, want = filled(name, prepared, slack=slack)
    mask = torch.ones(2, 1, dtype=torch.long) if masked else None
    with monkeypatch.context() as patched:
        pretend(patched)
        with pytest.raises(StateCacheError, match="capacity="):
            feed(model, cache, ids[:, 16:17], 16, mask)
    assert cache.lengths.tolist() == [16, 16]
    got = torch.cat([feed(model, cache, ids[:, n : n + 1], n) for n in (16, 17)], 1)
    assert (got - want[:, 16:]).abs().max() / want.abs().max() < 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_cache_is_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache, ids, want = filled(name, True, capacity=32)
    with monkeypatch.context() as patched:
        pretend(patched)
        got = feed(model, cache, ids[:, 16:17], 16)
    assert (got - want[:, 16:17]).abs().max() / want.abs().max() < 2e-4
    assert cache.lengths.tolist() == [17, 17]
