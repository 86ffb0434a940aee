"""Prepared models on a GPU: one graph a step with and without slack, and replays on rows of different lengths.

pytest tests/gpu -m gpu -n 6
"""

from __future__ import annotations

import families
import pytest
import torch
import torch._dynamo as dynamo
from steps import PROMPT, STEPS, TOLERANCE, WARM, build, copied_inputs, decode, error, prefill, skips

import statecache as sc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn about what others do
]

OPERATORS = ["mamba", "mamba2", "falcon_h1", "qwen3_5", "lfm2", "minimax"]  # one family of each


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph_and_no_skip(name: str, slack: int) -> None:
    model, config, ids = build(name)
    want = model(ids, use_cache=False).logits
    sc.prepare(model)
    cache = sc.StateCache(config, capacity=64, slack=slack)
    prefill(model, ids, cache)
    addresses = [b.data_ptr() for b in cache.buffers()]
    step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    got, launches = decode(model, step, ids, cache)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert skips() == 0
    assert launches == STEPS - WARM
    assert 0 < copied_inputs() <= 2
    assert addresses == [b.data_ptr() for b in cache.buffers()]
    assert error(got, want[:, PROMPT:]) < TOLERANCE
    assert cache.lengths.tolist() == [PROMPT + STEPS] * 2
    if slack:
        cache.rollback(torch.tensor([3, 1]))
        last = model(ids[:, -1:], **{families.cache_arg(model): cache}).logits
        for row, forgotten in enumerate((3, 1)):
            alone = torch.cat([ids[row : row + 1, :-forgotten], ids[row : row + 1, -1:]], 1)
            sc.unprepare(model)
            assert error(last[row], model(alone, use_cache=False).logits[0, -1:]) < TOLERANCE


@pytest.mark.parametrize("name", OPERATORS)
def test_a_captured_step_is_replayed_on_rows_of_different_lengths(name: str) -> None:
    model, config, ids = build(name)
    plain, _, _ = build(name)
    sc.prepare(model)
    cache = sc.StateCache(config, capacity=64, slack=3)
    prefill(model, ids, cache)
    mark = cache.checkpoint()
    token, kwargs = ids[:, :1].clone(), {families.cache_arg(model): cache, "use_cache": True}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            model(token, **kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, **kwargs).logits
    cache.restore(mark)
    rows = [ids[:1, :PROMPT], ids[1:, :PROMPT]]
    for n in range(PROMPT, PROMPT + STEPS):
        token.copy_(ids[:, n : n + 1])
        graph.replay()
        for row in range(2):
            rows[row] = torch.cat([rows[row], ids[row : row + 1, n : n + 1]], 1)
            assert error(logits[row], plain(rows[row], use_cache=False).logits[0, -1:]) < TOLERANCE, (n, row)
        forget = (2, 1) if n % 3 == 0 else (0, 1) if n % 3 == 1 else (0, 0)
        cache.rollback(torch.tensor(forget))
        rows = [ids_of[:, : ids_of.shape[1] - k] for ids_of, k in zip(rows, forget, strict=True)]
    assert cache.lengths.tolist() == [row.shape[1] for row in rows]


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_5", "lfm2", "minimax"])
def test_offloaded_states_stay_on_the_host_where_tensors_are_made_on_the_device(name: str) -> None:
    model, config, ids = build(name)
    want = model(ids, use_cache=False).logits
    sc.prepare(model)
    cache = sc.StateCache(config, slack=3, offload=True)
    with torch.device("cuda"):  # for whatever does not say where
        prefill(model, ids, cache)
        got, _ = decode(model, model.forward, ids, cache)
    assert error(got, want[:, PROMPT:]) < TOLERANCE
