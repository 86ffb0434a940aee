"""On a GPU: no CUDA graph is skipped, replays hold, and the host catches up with steps that it did not see.

pytest tests/gpu -m gpu -n 6    # -n needs pytest-xdist; compiling sixteen models takes a while without
"""

from __future__ import annotations

import families
import pytest
import torch
import torch._dynamo as dynamo
from steps import PROMPT, STEPS, TOLERANCE, WARM, arguments, build, copied_inputs, decode, error, prefill, skips

import statecache as sc
from declared_bytes import declared_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn about what others do
]

FAMILIES = [name for name in families.FAMILIES if "+" not in name and name not in ("minimax", "recurrent_gemma")]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_graph_and_no_skip(name: str) -> None:
    model, config, ids = build(name)
    cache = sc.StateCache(config, capacity=64)
    prefill(model, ids, cache)
    addresses = [b.data_ptr() for b in cache.buffers()]
    step = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    got, launches = decode(model, step, ids, cache)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert skips() == 0
    assert launches == STEPS - WARM
    assert 0 < copied_inputs() <= 2
    assert addresses == [b.data_ptr() for b in cache.buffers()]
    assert error(got, model(ids, use_cache=False).logits[:, PROMPT:]) < TOLERANCE
    assert cache.lengths.tolist() == [PROMPT + STEPS] * 2


def test_launches_are_counted_for_real() -> None:
    model, config, ids = build("lfm2")
    cache = sc.StateCache(config, capacity=64)
    prefill(model, ids, cache)
    _, launches = decode(model, torch.compile(model.forward, fullgraph=True), ids, cache)
    assert launches == 0


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "qwen3_5", "lfm2", "jamba"])
def test_a_captured_eager_step_is_replayed_and_rolled_back(name: str) -> None:
    model, config, ids = build(name)
    cache = sc.StateCache(config, capacity=64, slack=3)
    prefill(model, ids, cache)
    mark = cache.checkpoint()
    token, position = ids[:, :1].clone(), torch.full((2, 1), PROMPT, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            model(token, **arguments(model, cache, position))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, **arguments(model, cache, position)).logits
    cache.restore(mark)
    out = []
    for n in range(PROMPT, PROMPT + STEPS):
        token.copy_(ids[:, n : n + 1])
        position.fill_(n)
        graph.replay()
        out.append(logits.clone())
    want = model(ids, use_cache=False).logits
    assert error(torch.cat(out, 1), want[:, PROMPT:]) < TOLERANCE
    assert cache.lengths.tolist() == [PROMPT + STEPS] * 2
    cache.rollback(2)
    position.fill_(PROMPT + STEPS - 2)
    eager = model(ids[:, -2:-1], **arguments(model, cache, position)).logits
    assert error(eager, want[:, -2:-1]) < TOLERANCE


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid", "lfm2"])
def test_generate_compiles_by_itself_and_is_right(name: str) -> None:
    model, config, ids = build(name)
    kwargs = {"max_new_tokens": STEPS, "do_sample": False}
    want = model.generate(ids[:, :PROMPT], use_cache=False, **kwargs)
    cache = sc.StateCache(config, capacity=64)
    got = model.generate(ids[:, :PROMPT], **{families.cache_arg(model): cache}, **kwargs)
    assert torch.equal(got, want)
    assert dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert skips() == 0


def test_recurrent_states_stay_float32_in_a_bfloat16_model() -> None:
    model, config, ids = build("bamba", dtype=torch.bfloat16)
    cache = sc.StateCache(config, capacity=64)
    prefill(model, ids, cache)
    assert cache.states["0.recurrent"].buffers()[0].dtype == torch.float32
    assert cache.states["0.conv"].buffers()[0].dtype == torch.bfloat16
    assert cache.nbytes() == declared_bytes(cache.spec, 2, 64, torch.bfloat16)
