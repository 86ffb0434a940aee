"""Turn after turn on one cache: what it holds after a call, a closed stream, an end."""

from __future__ import annotations

import gc

import families
import pytest
import torch
from full_forwards import argmax_loop

import statecache as sc
from statecache.models.prepare import is_prepared

ONCE = "Once upon a time"
TWICE = "The cat sat. The dog ran. The cat sat. The dog ran. The cat"


@pytest.fixture(scope="module")
def tiny():
    return families.build("mamba2")[0]


def ids_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "falcon_h1"])
@pytest.mark.parametrize("lookup", [0, 2])
def test_second_turn_goes_on_from_the_cache(family, lookup):
    model, _ = families.build(family)
    first, more = ids_of([5, 6, 7, 5, 6], [8, 9, 10, 8, 9]), ids_of([11, 12], [13, 14])
    cache = sc.StateCache(model.config, slack=5)
    one = sc.generate(model, first, max_new_tokens=6, cache=cache, lookup=lookup)
    assert cache.lengths.tolist() == [10, 10]
    rest = torch.cat([one[:, 10:], more], 1)
    two = sc.generate(model, rest, max_new_tokens=6, cache=cache, lookup=lookup)
    want = argmax_loop(model, torch.cat([one, more], 1), 6)
    assert torch.equal(torch.cat([one[:, :10], two], 1), want)
    assert cache.lengths.tolist() == [18, 18]


def test_rows_that_end_early_stay_in_the_callers_cache(tiny):
    rows = ids_of([5, 6, 7], [8, 9, 10], [11, 12, 13])
    end = int(argmax_loop(tiny, rows, 12)[1, 5])
    for lookup in (0, 2):
        cache = sc.StateCache(tiny.config, capacity=14, slack=4)
        got = sc.generate(tiny, rows, max_new_tokens=12, stop=end, cache=cache, lookup=lookup)
        ends = [row.index(end, 3) + 1 if end in row[3:] else 15 for row in got.tolist()]
        assert len(set(ends)) > 1
        assert cache.lengths.tolist() == [n - 1 for n in ends]
        before = [b.data_ptr() for b in cache.buffers()]
        cache.reset()
        sc.generate(tiny, rows, max_new_tokens=12, cache=cache)
        assert [b.data_ptr() for b in cache.buffers()] == before


def test_second_text_is_new_text_alone(story, tokenizer):
    cache = sc.StateCache(story.config, slack=9)
    one = sc.generate(story, ONCE, tokenizer, max_new_tokens=10, cache=cache, lookup=2)
    assert cache.lengths.tolist() == [len(tokenizer(ONCE)["input_ids"]) + 10]
    two = sc.generate(story, " and then", tokenizer, max_new_tokens=10, cache=cache)
    ids = tokenizer(ONCE)["input_ids"]
    ids = argmax_loop(story, torch.tensor([ids]), 10)[0].tolist() + tokenizer(" and then")["input_ids"]
    assert one + two == tokenizer.decode(argmax_loop(story, torch.tensor([ids]), 10)[0])


@pytest.mark.parametrize("lookup", [0, 2])
def test_cache_holds_every_token_that_the_text_shows(story, tokenizer, lookup):
    free = argmax_loop(story, torch.tensor([tokenizer(ONCE)["input_ids"]]), 10)[0].tolist()
    for stop in (free[-3], tokenizer.decode([free[-3]]), free[-3:], None):
        cache = sc.StateCache(story.config, slack=9)
        text = sc.generate(story, ONCE, tokenizer, max_new_tokens=10, cache=cache, stop=stop, lookup=lookup)
        shown = tokenizer.decode(free[: int(cache.lengths[0])])
        assert text == shown, stop


def test_end_token_of_a_text_stays_out_of_the_cache_and_of_the_text(story, tokenizer, monkeypatch):
    free = argmax_loop(story, torch.tensor([tokenizer(ONCE)["input_ids"]]), 10)[0].tolist()
    before = free[: free.index(free[-3], 4)]
    monkeypatch.setattr(story.generation_config, "eos_token_id", free[-3])
    cache = sc.StateCache(story.config)
    text = sc.generate(story, ONCE, tokenizer, max_new_tokens=10, cache=cache)
    assert cache.lengths.tolist() == [len(before)]
    assert text == tokenizer.decode(before)


def test_special_token_that_stops_a_text_stays_out_of_the_cache(story, tokenizer, marked):
    free = argmax_loop(story, torch.tensor([tokenizer(ONCE)["input_ids"]]), 10)[0].tolist()
    at = free.index(marked.all_special_ids[0], 4)
    for stop in (marked.all_special_ids[0], "<|the|>"):
        cache = sc.StateCache(story.config)
        text = sc.generate(story, ONCE, marked, max_new_tokens=10, cache=cache, stop=stop)
        assert cache.lengths.tolist() == [at]
        assert text == tokenizer.decode(free[:at])


@pytest.mark.parametrize("lookup", [0, 2])
def test_stream_of_text_closed_half_way_leaves_the_cache_with_all_that_was_shown(story, tokenizer, lookup):
    cache = sc.StateCache(story.config, slack=9)
    stream = sc.generate(story, TWICE, tokenizer, max_new_tokens=30, cache=cache, stream=True, lookup=lookup)
    text = TWICE + "".join(next(stream) for _ in range(4))
    stream.close()
    free = argmax_loop(story, torch.tensor([tokenizer(TWICE)["input_ids"]]), 30)[0].tolist()
    assert text == tokenizer.decode(free[: int(cache.lengths[0])])


@pytest.mark.parametrize("lookup", [0, 2])
@pytest.mark.parametrize("kind", ["text", "ids", "row of ids"])
def test_dropped_stream_runs_nothing_and_leaves_all_but_the_last_token(story, tokenizer, monkeypatch, kind, lookup):
    ids = torch.tensor([tokenizer(TWICE)["input_ids"]])
    prompt = {"text": TWICE, "ids": ids, "row of ids": ids[0]}[kind]
    cache, reports = sc.StateCache(story.config, slack=9), []
    options = {"max_new_tokens": 30, "cache": cache, "lookup": lookup, "report": reports.append}
    stream = sc.generate(story, prompt, tokenizer, stream=True, **options)
    got = [next(stream) for _ in range(4)]
    assert is_prepared(story)
    with monkeypatch.context() as patch:
        patch.setattr(type(story), "forward", None)  # whoever calls it fails
        del stream
        gc.collect()
    assert not is_prepared(story)
    assert not reports
    free = argmax_loop(story, ids, 30)[0].tolist()
    held = int(cache.lengths[0])
    if kind == "text":
        assert TWICE + "".join(got) == tokenizer.decode(free[: held + 1])
    else:
        assert ids.shape[1] + sum(len(new if kind == "row of ids" else new[0]) for new in got) == held + 1
    rest = sc.generate(story, torch.tensor(free[held : held + 1]), max_new_tokens=5, cache=cache)
    assert rest.tolist() == free[held : held + 6]


def test_stream_is_a_context_that_closes_it(story, tokenizer):
    cache = sc.StateCache(story.config)
    with sc.generate(story, ONCE, tokenizer, max_new_tokens=30, cache=cache, stream=True) as stream:
        text = ONCE + next(stream) + next(stream)
    assert text == tokenizer.decode(
        argmax_loop(story, torch.tensor([tokenizer(ONCE)["input_ids"]]), 30)[0].tolist()[:6]
    )
    assert cache.lengths.tolist() == [6]
    assert not is_prepared(story)
    assert list(stream) == []
    stream.close()
    assert cache.lengths.tolist() == [6]


def test_stream_that_was_never_begun_does_nothing(story, tokenizer):
    cache, reports = sc.StateCache(story.config), []
    options = {"max_new_tokens": 9, "cache": cache, "stream": True, "report": reports.append}
    stream = sc.generate(story, ONCE, tokenizer, **options)
    assert not is_prepared(story)
    stream.close()
    assert (list(stream), cache.lengths.tolist(), reports) == ([], [], [])


def test_failed_stream_takes_nothing_more_in(story, tokenizer, monkeypatch):
    cache = sc.StateCache(story.config)
    stream = sc.generate(story, ONCE, tokenizer, max_new_tokens=9, cache=cache, stream=True)
    next(stream)
    held = cache.lengths.tolist()

    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("statecache.decode.batch.Batch.round", fail)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    assert cache.lengths.tolist() == held


def test_fixed_cache_needs_room_for_all_tokens_but_the_last():
    rows = ids_of([5, 6, 5], [8, 9, 8])
    model, _ = families.build("lfm2")
    for lookup in (0, 2):
        cache = sc.StateCache(model.config, capacity=12, slack=6)
        got = sc.generate(model, rows, max_new_tokens=10, cache=cache, lookup=lookup)
        assert torch.equal(got, argmax_loop(model, rows, 10))
