"""Text of models whose rotary factors change with the length: each token as by a forward over its row alone."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor

import statecache as sc
from statecache.errors import RotaryError
from statecache.models import prepare as loans

FIRST = 8  # tokens, the longest row before factors change
DENSE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **families.NOEOS,
}
FACTORS: dict[str, dict[str, Any]] = {
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 2 * j for j in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": FIRST,
    },
    "dynamic": {"factor": 4.0},
}
KINDS = list(FACTORS)


def build(name: str, kind: str) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **FACTORS[kind]}
    changes: dict[str, Any] = {"rope_parameters": parameters}
    changes["max_position_embeddings"] = FIRST if kind == "dynamic" else 64
    if name == "phi3":
        changes["original_max_position_embeddings"] = FIRST
    if name in families.FAMILIES:
        return families.build(name, **changes)[0].double()
    classes = {"llama": "LlamaConfig LlamaForCausalLM", "phi3": "Phi3Config Phi3ForCausalLM"}[name].split()
    configuration, model = (getattr(transformers, each) for each in classes)
    return families._reinit(model(configuration(**DENSE, **changes)), 0).double().eval()


def draw(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids (B, T), none of them the pad's."""
    return torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def longhand(model: Any, row: Tensor, n: int) -> list[int]:
    """A row (T,) and n tokens more. Each forward is of a model that has seen nothing before."""
    ids = row.tolist()
    for _ in range(n):
        fresh = copy.deepcopy(model)
        ids.append(int(fresh(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


CASES = [("llama", kind) for kind in KINDS] + [("phi3", "longrope"), ("lfm2", "longrope"), ("falcon_h1", "dynamic")]
DRAFTS = ["none", "lookup", "assistant"]


def drafter(kind: str, name: str, factors: str) -> dict[str, Any]:
    return {"none": {}, "lookup": {"lookup": 3}, "assistant": {"assistant": build(name, factors)}}[kind]


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_text_goes_on_across_the_change(name: str, kind: str, drafts: str) -> None:
    model, ids = build(name, kind), draw(3, 5)
    ids[:, 3:] = ids[:, :2]  # something to look up
    want = [longhand(model, row, 10) for row in ids]
    assert sc.generate(model, ids, max_new_tokens=10, **drafter(drafts, name, kind)).tolist() == want


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("lengths", [(3, 12, 6), (5, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_assistant_may_change_factors_where_its_model_does_not(kind: str, lengths: tuple[int, ...]) -> None:
    model, rows = build("llama", kind), [draw(1, n, n)[0] for n in lengths]
    plain = copy.deepcopy(model.config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    other = families._reinit(transformers.LlamaForCausalLM(plain), 0).double().eval()
    want = [longhand(other, row, 9) for row in rows]
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    got = sc.generate(other, texts, Words(), max_new_tokens=9, assistant=model)
    assert got == [" ".join(map(str, row)) for row in want]


class Words:
    """A tokenizer of numbers."""

    all_special_tokens, all_special_ids = (), ()

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {n}" for n in ids)


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_all_lengths_go_on_side_by_side(kind: str, drafts: str) -> None:
    model, rows = build("llama", kind), [draw(1, n, n)[0] for n in (12, 3, FIRST, 11, 6)]
    texts = [" ".join(map(str, row.tolist())) for row in rows]
    want = [" ".join(map(str, longhand(model, row, 7))) for row in rows]
    got = sc.generate(model, texts, Words(), max_new_tokens=7, **drafter(drafts, "llama", kind))
    assert got == want


@pytest.mark.usefixtures("always_drafts")
@pytest.mark.parametrize("options", [{}, {"capacity": 32}], ids=["growing", "fixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on_where_its_text_is_known(kind: str, options: dict[str, Any]) -> None:
    model, row = build("lfm2", kind), draw(1, 4)[0]
    cache = sc.StateCache(model.config, slack=4, **options)
    text = " ".join(map(str, row.tolist()))
    for more in (3, 2, 4):  # to 7 tokens, to 9, to 13 and more
        want = " ".join(map(str, longhand(model, torch.tensor([int(n) for n in text.split()]), more)))
        new = text if cache.rows is None else " 7 9"
        if cache.rows is not None:
            given = torch.tensor([int(n) for n in (text + new).split()])
            want = " ".join(map(str, longhand(model, given, more)))
        got = sc.generate(model, new, Words(), max_new_tokens=more, cache=cache, lookup=2)
        assert got == (want if new == text else want[len(text) :])
        text = want
        assert cache.lengths.tolist() == [len(text.split())]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_unknown_text_is_refused_before_anything_is_written(kind: str) -> None:
    model = sc.prepare(build("llama", kind))
    cache = sc.StateCache(model.config)
    with torch.no_grad():
        model(draw(2, 4), **{families.cache_arg(model): cache})
    told = rf"row 0: its cache holds 4 tokens.*prompt brings 2 and 3 more.*\({kind}\).*smaller max_new_tokens="
    with pytest.raises(RotaryError, match=told):
        sc.generate(model, draw(2, 2), max_new_tokens=4, cache=cache)
    assert cache.lengths.tolist() == [4, 4]
    assert sc.generate(model, draw(2, 2), max_new_tokens=3, cache=cache).shape == (2, 5)


def test_a_stream_that_is_closed_leaves_the_whole_text() -> None:
    model, row = build("llama", "longrope"), draw(1, 5)[0]
    cache = sc.StateCache(model.config)
    with sc.generate(model, " ".join(map(str, row.tolist())), Words(), max_new_tokens=9, cache=cache, stream=True) as s:
        for _, _piece in zip(range(FIRST - 5 + 1), s, strict=False):
            pass
    assert cache.lengths.tolist() == [FIRST + 1]  # the last token was fed, for which the row was read again
    with torch.no_grad(), loans.borrowed(model):
        got = model(torch.tensor([[7]]), **{families.cache_arg(model): cache}).logits[0, -1]
    ids = [*longhand(build("llama", "longrope"), row, FIRST - 5 + 1), 7]
    with torch.no_grad():
        want = build("llama", "longrope")(torch.tensor([ids]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
