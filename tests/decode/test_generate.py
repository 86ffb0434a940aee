"""What goes into `generate` and what comes out: text and ids, ends, streams, models, reports."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import families
import pytest
import torch
from full_forwards import argmax_loop
from transformers import AddedToken

import statecache as sc
from statecache.decode.limits import MOST_DRAFTS
from statecache.decode.request import row_seed
from statecache.decode.text import Text, special_tokens
from statecache.models.prepare import is_prepared

ONCE = "Once upon a time"
TWICE = "The cat sat. The dog ran. The cat sat. The dog ran. The cat"


@pytest.fixture(scope="module")
def tiny():
    return families.build("mamba2")[0]


@pytest.fixture(scope="module")
def other():
    return families.build("mamba2", seed=1)[0]


def ids_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# ---- text


def test_text_is_the_prompt_and_what_the_model_makes_of_it(story, tokenizer):
    ids = torch.tensor([tokenizer(ONCE)["input_ids"]])
    want = tokenizer.decode(argmax_loop(story, ids, 24)[0])
    assert sc.generate(story, ONCE, tokenizer, max_new_tokens=24) == want
    assert want.startswith(ONCE)


@pytest.mark.parametrize("way", ["plain", "lookup", "assistant"])
def test_texts_of_different_lengths_are_as_each_alone(story, draft, tokenizer, way):
    options = {"plain": {}, "lookup": {"lookup": 2}, "assistant": {"assistant": draft}}[way]
    prompts = [ONCE, "The", "There was a fox who had no home, and the fox"]
    alone = [sc.generate(story, prompt, tokenizer, max_new_tokens=16) for prompt in prompts]
    assert sc.generate(story, prompts, tokenizer, max_new_tokens=16, **options) == alone


def test_special_tokens_are_those_that_texts_leave_out(tokenizer, marked):
    more = copy.deepcopy(tokenizer)
    more.add_tokens([AddedToken("<|hidden|>", special=True), AddedToken("<|shown|>", special=False)])
    special = special_tokens(more)
    assert special == {"<|endoftext|>": 0, "<|hidden|>": len(tokenizer)}
    for name in (*special, "<|shown|>"):
        text = more.decode(more.convert_tokens_to_ids([name]), skip_special_tokens=True)
        assert (text == "") == (name in special)
    assert special_tokens(marked) == {"<|the|>": 816}
    assert special_tokens(None) == {}


@pytest.mark.parametrize("way", ["plain", "lookup"])
def test_pieces_join_to_the_text(story, tokenizer, way):
    options = {"max_new_tokens": 40, "lookup": 2 if way == "lookup" else 0}
    prompt = "The cat sat. The cat sat. The \N{FOX FACE}"
    whole = sc.generate(story, prompt, tokenizer, **options)
    pieces = list(sc.generate(story, prompt, tokenizer, stream=True, **options))
    assert prompt + "".join(pieces) == whole
    assert len(pieces) > 3
    assert all(pieces)


def test_list_of_one_text_streams_as_the_text(story, tokenizer):
    whole = sc.generate(story, ONCE, tokenizer, max_new_tokens=12)
    assert ONCE + "".join(sc.generate(story, [ONCE], tokenizer, max_new_tokens=12, stream=True)) == whole
    assert sc.generate(story, (text for text in [ONCE]), tokenizer, max_new_tokens=12) == [whole]


def test_characters_come_whole(tokenizer):
    ids = [t for c in "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{FOX FACE}" for t in tokenizer(c)["input_ids"]]
    assert len(ids) > 6  # the fox takes several
    text, pieces = Text(tokenizer, tokenizer("a")["input_ids"]), []
    for token in ids:
        text.push(token)
        pieces.append(text.take())
    assert [piece for piece in pieces if piece] == list("caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{FOX FACE}")
    text.push(ids[-2])
    assert text.take() == ""
    text.end()
    assert text.take() == "\N{REPLACEMENT CHARACTER}"


def test_only_the_first_text_of_a_cache_gets_the_tokens_that_begin_a_text(story, tokenizer):
    class Beginning:
        decode = tokenizer.decode

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0] * add_special_tokens + tokenizer(text)["input_ids"]}

    cache, held = sc.StateCache(story.config), []
    for text in (ONCE, " and then"):
        sc.generate(story, text, Beginning(), max_new_tokens=2, cache=cache)
        held.append(int(cache.lengths[0]))
    assert held == [1 + 4 + 2, 1 + 4 + 2 + len(tokenizer(" and then")["input_ids"]) + 2]


# ---- ids


def test_one_row_of_ids_stays_one_row(tiny):
    rows = ids_of([5, 6, 7])
    both = sc.generate(tiny, rows, max_new_tokens=4)
    assert both.shape == (1, 7)
    assert both.dtype == torch.long
    assert torch.equal(sc.generate(tiny, rows[0], max_new_tokens=4), both[0])


@pytest.mark.parametrize("lookup", [0, 2])
def test_stream_of_ids_gives_what_each_round_adds(tiny, lookup):
    rows = ids_of([5, 6, 5], [8, 9, 8])
    free = sc.generate(tiny, rows, max_new_tokens=12)
    stop = int(free[0, 7])
    want = sc.generate(tiny, rows, max_new_tokens=12, stop=stop)
    got = [[], []]
    for new in sc.generate(tiny, rows, max_new_tokens=12, stop=stop, stream=True, lookup=lookup):
        got = [row + more for row, more in zip(got, new, strict=True)]
    for row, full in zip(got, want[:, 3:].tolist(), strict=True):
        assert full[: len(row)] == row
        assert set(full[len(row) :]) <= {0}
    alone = [t for new in sc.generate(tiny, rows[0], max_new_tokens=4, stream=True) for t in new]
    assert alone == free[0, 3:7].tolist()


@pytest.mark.parametrize(
    ("eos", "pad", "fill"), [(None, None, 0), (None, 3, 3), ("end", None, "end"), (["end", 1], 3, 3)]
)
def test_rows_end_at_the_end_token_and_are_filled_up(monkeypatch, tiny, eos, pad, fill):
    rows = ids_of([5, 6, 7], [8, 9, 10])
    free = argmax_loop(tiny, rows, 12)
    end = int(free[0, 6])
    config = tiny.generation_config
    ends = [end if e == "end" else e for e in eos] if isinstance(eos, list) else end if eos == "end" else eos
    monkeypatch.setattr(config, "eos_token_id", ends)
    monkeypatch.setattr(config, "pad_token_id", pad)
    got = sc.generate(tiny, rows, max_new_tokens=12, stop=end)
    also = (1,) if isinstance(eos, list) else ()
    assert torch.equal(got, argmax_loop(tiny, rows, 12, (end, *also), pad=end if fill == "end" else fill))


def test_longest_round_fits_the_cache_made_for_it(tiny, always_drafts):
    reports = []
    sc.generate(tiny, ids_of([5, 6, 7]), max_new_tokens=20, assistant=tiny, report=reports.append)
    assert reports[0].drafted > MOST_DRAFTS  # by itself, as many as there is room for
    assert reports[0].forwards == 1 + -(-19 // (MOST_DRAFTS + 1))
    assert reports[0].tokens_per_forward == 20 / reports[0].forwards


def test_same_seed_draws_the_same_and_leaves_the_common_generator_alone(tiny, other):
    rows = ids_of([5, 6, 7], [8, 9, 10])
    state = torch.random.get_rng_state()
    for options in ({}, {"lookup": 2}, {"assistant": other}):
        drawn = [sc.generate(tiny, rows, max_new_tokens=9, temperature=1.0, seed=s, **options) for s in (1, 1, 2)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    once = sc.generate(tiny, rows, max_new_tokens=9, temperature=1.0)
    torch.manual_seed(4)
    assert torch.equal(sc.generate(tiny, rows, max_new_tokens=9, temperature=1.0), once)


def test_one_seed_gives_each_row_its_own(tiny):
    rows, options = ids_of([5, 6, 7]).expand(3, -1), {"max_new_tokens": 12, "temperature": 1.5}
    got = sc.generate(tiny, rows, seed=9, **options)
    assert len({tuple(row) for row in got.tolist()}) == 3
    seeds = [row_seed(9, row) for row in range(3)]
    assert torch.equal(sc.generate(tiny, rows, seed=seeds, **options), got)
    for row in range(3):
        assert torch.equal(sc.generate(tiny, rows[0], seed=seeds[row], **options), got[row])
    assert torch.equal(sc.generate(tiny, rows[:2], seed=9, **options), got[:2])


def test_every_row_may_draw_in_its_own_way(tiny):
    rows = ids_of([5, 6, 7], [8, 9, 10], [5, 6, 7], [11, 12, 13])
    ways = {
        "temperature": [0.0, 1.0, 1.5, 2.0],
        "top_p": (1.0, 0.9, 0.5, 1.0),
        "top_k": [0, 0, 30, 4],
        "seed": [1, 2, 3, 4],
    }
    got = sc.generate(tiny, rows, max_new_tokens=12, **ways)
    for row in range(4):
        alone = {name: values[row] for name, values in ways.items()}
        assert torch.equal(sc.generate(tiny, rows[row], max_new_tokens=12, **alone), got[row])


def test_lookup_changes_no_token_that_is_drawn(story, tokenizer, always_drafts):
    options = {"max_new_tokens": 40, "temperature": 0.8, "top_p": 0.95, "seed": 3}
    plain, reports = sc.generate(story, [ONCE, TWICE], tokenizer, **options), []
    assert sc.generate(story, [ONCE, TWICE], tokenizer, lookup=2, report=reports.append, **options) == plain
    assert 0 < reports[0].accepted < reports[0].drafted


def test_greedy_rows_leave_the_common_generator_alone(tiny):
    state = torch.random.get_rng_state()
    sc.generate(tiny, ids_of([5, 6, 7]), max_new_tokens=3)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- stops


@pytest.mark.parametrize("lookup", [0, 2])
def test_text_is_cut_at_a_stop_string(story, tokenizer, lookup):
    free = sc.generate(story, ONCE, tokenizer, max_new_tokens=60)
    for stop in ("the man", "\n", [" sit", "he man was"], "place where the"):
        found = [free.index(s, len(ONCE)) + len(s) for s in ([stop] if isinstance(stop, str) else stop)]
        options = {"max_new_tokens": 60, "stop": stop, "lookup": lookup}
        want = free[: min(found)]
        assert sc.generate(story, ONCE, tokenizer, **options) == want
        assert ONCE + "".join(sc.generate(story, ONCE, tokenizer, stream=True, **options)) == want


def test_ids_end_with_the_token_that_completes_a_stop_string(story, tokenizer):
    ids = torch.tensor(tokenizer(ONCE)["input_ids"])
    free = sc.generate(story, ids, max_new_tokens=60)
    got = sc.generate(story, ids, tokenizer, max_new_tokens=60, stop="the man")
    assert torch.equal(got, free[: len(got)])
    assert "the man" in tokenizer.decode(got)
    assert "the man" not in tokenizer.decode(got[:-1])


def test_stop_string_of_the_prompt_stops_nothing(story, tokenizer):
    assert len(sc.generate(story, ONCE, tokenizer, max_new_tokens=8, stop="upon")) > len(ONCE)


def test_stop_string_that_is_a_special_token_stands_for_its_id(story, tokenizer, marked):
    ids, special = torch.tensor(tokenizer(ONCE)["input_ids"]), marked.all_special_ids[0]
    free = sc.generate(story, ids, max_new_tokens=10)
    at = free.tolist().index(special, 4)
    assert torch.equal(sc.generate(story, ids, marked, max_new_tokens=10, stop="<|the|>"), free[: at + 1])
    got = sc.generate(story, ONCE, marked, max_new_tokens=10, stop=["<|the|>", "never"])
    assert got == tokenizer.decode(free[:at])


# ---- models


@pytest.mark.parametrize("way", ["done", "closed", "failed", "stream failed"])
def test_models_come_back_as_they_were(tiny, other, monkeypatch, way):
    before = [dict(vars(m)) for model in (tiny, other) for m in model.modules()]
    rows = ids_of([5, 6, 7])
    if way == "done":
        sc.generate(tiny, rows, max_new_tokens=3, assistant=other)
    elif way == "closed":
        stream = sc.generate(tiny, rows, max_new_tokens=9, assistant=other, stream=True)
        next(stream)
        assert is_prepared(tiny) and is_prepared(other)
        assert torch.is_grad_enabled()
        stream.close()
    else:

        def fail(*_):
            raise ZeroDivisionError

        monkeypatch.setattr("statecache.decode.sampling.Sampler.draw", fail)
        with pytest.raises(ZeroDivisionError):
            list(sc.generate(tiny, rows, max_new_tokens=3, assistant=other, stream="stream" in way))
    assert [dict(vars(m)) for model in (tiny, other) for m in model.modules()] == before


@pytest.mark.parametrize("stream", [False, True])
def test_model_comes_back_where_its_assistant_cannot_be_prepared(tiny, stream):
    other, reports = families.build("mamba2", seed=1)[0], []
    other.backbone.layers[1].mixer = torch.nn.Identity()
    options = {"max_new_tokens": 3, "assistant": other, "stream": stream, "report": reports.append}
    with pytest.raises(sc.errors.UnknownLayerError):
        list(sc.generate(tiny, ids_of([5, 6, 7]), **options))
    assert not is_prepared(tiny)
    assert not reports


def test_prepared_model_stays_prepared(tiny):
    sc.prepare(tiny)
    sc.generate(tiny, ids_of([5, 6, 7]), max_new_tokens=3)
    assert is_prepared(tiny)
    sc.unprepare(tiny)


def test_dropout_is_off_while_it_writes(story, tokenizer):
    model, rows = copy.deepcopy(story), torch.tensor([tokenizer(ONCE)["input_ids"]])
    want = sc.generate(model, rows, max_new_tokens=8)
    first = next(module for module in model.modules() if hasattr(module, "attention_dropout"))
    first.attention_dropout = 0.9
    model.train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    streams = [sc.generate(model, rows[0], max_new_tokens=8, assistant=model, stream=True) for _ in range(2)]
    got = [next(stream) for stream in streams]
    got[1] += [t for new in streams[1] for t in new]
    assert not any(module.training for module in model.modules())
    got[0] += [t for new in streams[0] for t in new]
    assert got == [want[0, len(rows[0]) :].tolist()] * 2
    assert [module.training for module in model.modules()] == before


def test_streams_over_one_model_may_overlap(tiny):
    rows = ids_of([5, 6, 7])
    want = sc.generate(tiny, rows, max_new_tokens=6)[0, 3:].tolist()
    first, second = (sc.generate(tiny, rows[0], max_new_tokens=6, stream=True) for _ in range(2))
    got = [next(first), next(second)]
    got[0] += [t for new in first for t in new]
    assert is_prepared(tiny)
    got[1] += [t for new in second for t in new]
    assert got == [want, want]
    assert not is_prepared(tiny)


@pytest.mark.parametrize("several", [False, True])
def test_ids_go_where_an_offloaded_embedding_is_brought(tiny, several):
    model, rows = copy.deepcopy(tiny), ids_of([5, 6, 7, 5, 6])
    want = sc.generate(model, rows, max_new_tokens=5)
    embedding = model.get_input_embeddings()
    weight, own, away = embedding.weight, embedding.forward, torch.nn.Parameter(embedding.weight.to("meta"))

    def forward(ids: torch.Tensor) -> torch.Tensor:  # as accelerate has it
        embedding.weight = weight
        out = own(ids)
        embedding.weight = away
        return out

    hook = SimpleNamespace(execution_device="cpu")
    embedding._hf_hook = SimpleNamespace(hooks=[object(), hook]) if several else hook
    embedding.forward, embedding.weight = forward, away
    assert next(model.parameters()).is_meta
    for options in ({}, {"lookup": 2}, {"assistant": model}):
        assert torch.equal(sc.generate(model, rows, max_new_tokens=5, **options), want)


# ---- reports


def test_report_counts_passes_and_drafts(story, draft, tokenizer):
    reports = []
    for options in ({}, {"lookup": 3}, {"assistant": draft}):
        sc.generate(story, [ONCE, TWICE], tokenizer, max_new_tokens=30, report=reports.append, **options)
    plain, lookup, assisted = reports
    assert (plain.prompt, plain.tokens, plain.forwards, plain.turns) == (
        4 + len(tokenizer(TWICE)["input_ids"]),
        60,
        30,
        60,
    )
    assert (plain.tokens_per_forward, plain.accepted_per_round, plain.acceptance) == (1.0, 0.0, 0.0)
    assert str(plain) == "60 tokens in 30 forward passes, 1.00 each"
    for report in (lookup, assisted):
        assert report.tokens == 60 == report.turns + report.accepted
        assert report.forwards < 30
        assert 1 < report.tokens_per_forward == 60 / report.turns
        assert report.acceptance == report.accepted / report.drafted
        assert report.accepted_per_round == report.accepted / report.rounds
    assert assisted.assistant_forwards > 0 == lookup.assistant_forwards
    assert str(assisted).endswith(f" a round; {assisted.assistant_forwards} draft passes")
    assert "draft passes" not in str(lookup)


def test_report_of_a_stream_comes_when_it_is_closed(tiny):
    for prompt in (ids_of([5, 6, 7]), ids_of([5, 6, 7])[0]):
        reports = []
        stream = sc.generate(tiny, prompt, max_new_tokens=9, stream=True, report=reports.append)
        next(stream), next(stream)
        assert not reports
        stream.close()
        assert reports[0].tokens == 2
