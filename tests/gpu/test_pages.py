"""Forks and repeated rows that share pages, on a GPU: bitwise those of a dense cache, and no step waits for the device.

pytest tests/gpu -m gpu -n 6
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import build

import statecache as sc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn about what others do
]

NAMES = ("qwen3_5", "falcon_h1", "lfm2")
STORES = ("dense", "paged")


def written(model: Any, store: str, *, waits: str = "default") -> tuple[list[torch.Tensor], list[sc.StateCache]]:
    """Logits of forks and of repeated rows, each going its own way; and their caches."""
    cache = sc.StateCache(model.config, store=store)
    draw = torch.Generator().manual_seed(4)
    ids = [torch.randint(1, 90, (n, 1), generator=draw).cuda() for n in (1, 1, 3) * 20]
    out = [model(torch.randint(1, 90, (1, 70), generator=draw).cuda(), past_key_values=cache).logits]
    forks = [cache, cache.fork(), cache.fork()]
    forks[2].gather([0, 0, 0])
    torch.cuda.synchronize()
    for n, one in enumerate(ids):
        if n == 6:  # what is made once has been made
            torch.cuda.set_sync_debug_mode(waits)
        try:
            out.append(model(one, past_key_values=forks[n % 3]).logits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return out, forks


@pytest.mark.parametrize("name", NAMES)
def test_forks_and_repeated_rows_are_bitwise_those_of_dense(name: str) -> None:
    model = sc.prepare(build(name)[0])
    (dense, _), (paged, forks) = (written(model, store) for store in STORES)
    assert all(torch.equal(a, b) for a, b in zip(dense, paged, strict=True))
    held = [state for state in forks[1].states.values() if state.spec.kind == "attention"]
    shared = {id(b) for state in forks[0].states.values() for b in state.buffers()}
    assert any(id(buffer) in shared for state in held for buffer in state.buffers())


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name: str, store: str) -> None:
    written(sc.prepare(build(name)[0]), store, waits="error")
