"""What benchmarks/quality.py measures, in its quick form."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quality
import statecache as sc
from statecache.storage.table import RECURRENT, STORES

AT = [3, 4, 9, 19]


@pytest.fixture(scope="module")
def model() -> Any:
    return sc.prepare(AutoModelForCausalLM.from_pretrained(quality.STORY, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(quality.STORY)


def test_bits_are_those_of_one_full_forward(model: Any, tokenizer: Any) -> None:
    ids = quality.texts(tokenizer, 2, 20)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
        found = quality.bits(quality.expected(model, ids, {}, AT), ids, AT)
    assert torch.allclose(found, losses.double()[:, [at - 1 for at in AT]] / math.log(2), atol=1e-4)


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    logs = [torch.randn(2, 3, 5).log_softmax(-1) for _ in range(2)]
    want = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="sum") / 6 / math.log(2)
    found = quality.divergence(*(-each / math.log(2) for each in logs))
    assert found == pytest.approx(want.item(), rel=1e-4) and quality.divergence(logs[0], logs[0]) == 0


def test_greedy_tokens_are_those_of_generate(model: Any, tokenizer: Any) -> None:
    prompt = quality.texts(tokenizer, 2, 15)
    with torch.no_grad():
        written = quality.likeliest(model, prompt, {}, 6)
        other = written.roll(1, 0)
        behind = quality.likeliest(model, prompt, {}, 6, other)
    assert torch.equal(written, sc.generate(model, prompt, max_new_tokens=6, stop=[])[:, 15:])
    assert torch.equal(behind[:, 0], written[:, 0]) and not torch.equal(behind, written)  # it was fed another text


def test_tokens_are_counted_up_to_the_first_that_differs() -> None:
    alike = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert quality.until(alike) == [2, 0, 4]


def test_a_mark_that_is_restored_is_measured(model: Any, tokenizer: Any) -> None:
    opts = quality.options(["--quick", "--marks"])
    ids = quality.texts(tokenizer, opts.rows, max(opts.contexts) + opts.behind)
    exact, near = (quality.resumed(model, ids, 8, 4, store) for store in (None, "int8"))
    whole = model(ids[:, :11]).logits[:, 7:].log_softmax(-1) / -math.log(2)
    assert torch.allclose(exact, whole, atol=1e-4)
    assert torch.equal(near[:, 0], exact[:, 0])  # it was read before the mark was taken
    assert 0 < (near - exact).abs().max() < 1
    assert quality.marks(model, ids, opts).count("%") == len(opts.contexts)


def test_every_store_is_measured_and_a_bitwise_one_changes_nothing(model: Any, tokenizer: Any) -> None:
    opts = quality.options(["--quick"])
    cells = quality.measure(model, quality.texts(tokenizer, opts.rows, max(opts.contexts) + opts.behind), opts)
    assert [(c.way, c.context) for c in cells] == [(way, n) for way in quality.WAYS for n in opts.contexts]
    for cell in cells:
        way = quality.WAYS[cell.way]
        if STORES[way.get("store", "dense")].exactness == "bitwise" and "recurrent_store" not in way:
            assert (cell.more, cell.divergence, cell.agree, cell.first, cell.same) == (0, 0, 1, opts.new, opts.texts)
        else:
            assert 0 < abs(cell.more) < 0.1 and 0 < cell.divergence < 0.01 and cell.agree > 0.5
    assert set(STORES) == {way.get("store", "dense") for way in quality.WAYS.values()}
    assert {None, *RECURRENT} == {way.get("recurrent_store") for way in quality.WAYS.values()}
    assert "int8" in quality.report(cells, opts) and json.loads(json.dumps(quality.as_json(cells, opts)))["cells"]
