"""Turn after turn on one cache: what it holds after a call, a closed stream, an end."""

from __future__ import annotations

import copy
import gc

import families
import pytest
import torch
from full_forwards import argmax_loop
from tokenizers.processors import TemplateProcessing

import statecache as sc
from statecache.decode.prompt import tokens_of
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


def test_prompt_that_repeats_what_the_cache_holds_is_refused(story, tokenizer):
    cache = sc.StateCache(story.config, slack=9)
    one = sc.generate(story, ONCE, tokenizer, max_new_tokens=6, cache=cache)
    two = sc.generate(story, " The next day", tokenizer, max_new_tokens=6, cache=cache)
    held = cache.lengths.tolist()
    ids = torch.tensor(tokenizer(one + two + " and")["input_ids"])
    for prompt in (one + two + " and", one + two, ids):
        with pytest.raises(sc.errors.OptionError) as error:
            sc.generate(story, prompt, tokenizer, cache=cache)
        assert str(error.value).startswith(f"row 0: the cache holds {held[0]} tokens, and the prompt begins with these")
        assert str(error.value).endswith("reset() the cache for a new text")
    assert cache.lengths.tolist() == held
    cache.rollback(2)  # what is left is known, too
    with pytest.raises(sc.errors.OptionError, match=f"the cache holds {held[0] - 2} tokens"):
        sc.generate(story, ids, cache=cache)
    cache.reset()
    assert sc.generate(story, one, tokenizer, max_new_tokens=6, cache=cache).startswith(one)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
def test_prompt_shorter_than_what_the_cache_holds_is_told_so_by_the_models_own_generate(family, prepared):
    model = families.build(family)[0]
    if prepared:
        sc.prepare(model)
    cache = sc.StateCache(model.config)
    model.generate(ids_of([5, 6, 7, 8], [8, 9, 10, 11]), **{families.cache_arg(model): cache}, max_new_tokens=3)
    with pytest.raises(sc.errors.ShapeError) as error:
        model.generate(ids_of([5, 6], [7, 8]), **{families.cache_arg(model): cache}, max_new_tokens=3)
    assert "The cache holds 6 and 6 tokens: to go on" in str(error.value)
    assert str(error.value).endswith("for another text reset() the cache")
    assert cache.lengths.tolist() == [6, 6]
    cache.reset()
    assert model.generate(ids_of([5, 6], [7, 8]), **{families.cache_arg(model): cache}, max_new_tokens=3).shape == (
        2,
        5,
    )


# ---- messages


@pytest.fixture
def speaking(tokenizer):
    """The same tokenizer as a chat model has it: texts begin with a token, and so does what its template makes."""
    chat = copy.deepcopy(tokenizer)
    begin = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    chat.backend_tokenizer.post_processor = begin
    chat.chat_template = (
        "<|endoftext|>{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return chat


def test_text_that_begins_as_the_tokenizer_begins_texts_gets_no_second_beginning(story, tokenizer, speaking):
    reports = []
    for text in (ONCE, "<|endoftext|>" + ONCE):
        assert speaking(text)["input_ids"][0] == 0
        sc.generate(story, text, speaking, max_new_tokens=2, report=reports.append)
    assert [report.prompt for report in reports] == [5, 5]
    assert tokens_of("<|endoftext|>", speaking) == [0]
    assert tokens_of(ONCE, speaking, first=False) == tokenizer(ONCE)["input_ids"]


def test_messages_give_the_answer_alone(story, speaking):
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who was the king?"}]
    whole = "<|endoftext|>[system]Be kind.\n[user]Who was the king?\n[assistant]"
    ids = torch.tensor([speaking(whole, add_special_tokens=False)["input_ids"]])
    want = speaking.decode(argmax_loop(story, ids, 9)[0, ids.shape[1] :], skip_special_tokens=True)
    assert sc.generate(story, talk, speaking, max_new_tokens=9) == want
    assert sc.generate(story, [talk, talk[1:]], speaking, max_new_tokens=9)[0] == want
    assert "".join(sc.generate(story, talk, speaking, max_new_tokens=9, stream=True)) == want


def test_messages_are_read_from_where_the_cache_stands(story, speaking):
    cache, reports, talk = sc.StateCache(story.config), [], [{"role": "user", "content": "Who was the king?"}]
    options = {"max_new_tokens": 9, "stop": ".", "report": reports.append}
    answer = sc.generate(story, talk, speaking, cache=cache, **options)
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And the queen?"}]
    held = int(cache.lengths[0])
    again = sc.generate(story, talk, speaking, cache=cache, **options)
    assert again == sc.generate(story, talk, speaking, **options)
    assert reports[2].prompt == held + reports[1].prompt
    before = cache.lengths.tolist()
    for other in (talk, [{"role": "user", "content": "Who?"}]):
        with pytest.raises(sc.errors.OptionError, match="row 0: the messages do not begin with what the cache holds"):
            sc.generate(story, other, speaking, cache=cache)
    assert cache.lengths.tolist() == before


@pytest.mark.parametrize(
    ("talk", "template", "told"),
    [
        ([{"role": "user"}], True, "prompt: {'role': 'user'} is no message: give {\"role\""),
        ([[{"role": "user", "content": "a"}, "b"]], True, "prompt: 'b' is no message: give"),
        ([{"role": "robot", "content": "a"}], True, "the chat template refuses these messages: no robots"),
        ([{"role": "user", "content": "a"}], False, "messages take a chat template, which the tokenizer lacks: give"),
        ([{"role": "user", "content": "a"}], None, "messages take a tokenizer: give tokenizer= of a chat model"),
    ],
)
def test_messages_that_cannot_be_told_to_the_model_are_refused(story, tokenizer, speaking, talk, template, told):
    with pytest.raises(sc.errors.OptionError) as error:
        sc.generate(story, talk, None if template is None else speaking if template else tokenizer)
    assert str(error.value).startswith(told)
