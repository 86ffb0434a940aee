"""What changes logits: as transformers does it, at every drafted position, and never beside the row that asked."""

from __future__ import annotations

from collections import Counter

import families
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as known

import statecache as sc
from statecache.decode.request import Request
from statecache.decode.sampling import Sampler

CATS = "The cat sat. The dog ran. The cat sat. The dog ran. The cat"


@pytest.fixture(scope="module")
def tiny():
    return families.build("mamba2")[0]


def no_twice(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Bans the token before, in place."""
    scores[:, ids[0, -1]] = float("-inf")
    return scores


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [455, 14]},
        {"min_new_tokens": 14, "bad_words_ids": [[259, 522], [818]]},
        {"min_length": 30, "sequence_bias": {(455,): -4.0, (259,): 2.0}, "begin_suppress_tokens": [850]},
    ],
)
def test_what_a_checkpoint_asks_for_is_done_as_transformers_does_it(
    story, draft, tokenizer, monkeypatch, always_drafts, asked
):
    ids = torch.tensor([tokenizer(CATS)["input_ids"]])
    plain = sc.generate(story, ids, max_new_tokens=16)
    config = GenerationConfig(**asked, eos_token_id=int(plain[0, -4]), pad_token_id=0)
    monkeypatch.setattr(story, "generation_config", config)
    want = story.generate(ids, max_new_tokens=16, do_sample=False)
    ignored = sc.generate(story, ids, max_new_tokens=16, processors=[])
    assert torch.equal(ignored, plain[:, : ignored.shape[1]])
    assert not torch.equal(want, ignored)
    for options in ({}, {"lookup": 2}, {"assistant": draft}):
        reports = []
        got = sc.generate(story, ids, max_new_tokens=16, report=reports.append, **options)
        assert torch.equal(got, want)
        assert (reports[0].drafted > 0) == bool(options)


def cyclic(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Likes what was there five tokens ago, so that a lookup is often right."""
    out = scores.clone()
    out[:, ids[0, -5:][:1]] += 9.0
    return out


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_processors_see_what_comes_before_and_drafts_change_no_token(story, tokenizer, always_drafts, temperature):
    prompts, reports = [CATS, "The king and the king and the", "Once"], []
    how = {"max_new_tokens": 16, "processors": [cyclic, no_twice], "temperature": temperature}
    got = sc.generate(story, prompts, tokenizer, seed=[3, 4, 5], lookup=2, report=reports.append, **how)
    assert 0 < reports[0].accepted < reports[0].drafted
    for row, prompt in enumerate(prompts):
        assert sc.generate(story, prompt, tokenizer, seed=3 + row, **how) == got[row]
    ids = sc.generate(story, torch.tensor(tokenizer(CATS)["input_ids"]), seed=3, lookup=2, **how)
    assert (ids[-16:] != ids[-17:-1]).all()


def test_assistant_leaves_the_distribution_that_processors_make(tiny, always_drafts):
    """Three tokens of an alphabet of three, none twice in a row: all twelve texts come as often as they should."""
    letters, other, rows = torch.tensor([7, 20, 41]), families.build("mamba2", seed=1)[0], 1500

    def spelled(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(scores, float("-inf"))
        out[:, letters] = scores[:, letters] * 0.2
        return no_twice(ids, out)

    prompt, want = [5, 6, 7], {(): 1.0}
    for _ in range(3):
        longer = {}
        for text, chance in want.items():
            ids = torch.tensor([[*prompt, *text]])
            with torch.no_grad():
                p = spelled(ids, tiny(ids, use_cache=False).logits[:, -1].float()).softmax(-1)[0]
            longer |= {(*text, n): chance * float(p[n]) for n in letters.tolist() if p[n] > 0}
        want = longer
    assert len(want) == 8  # the prompt ends with a letter
    got = sc.generate(
        tiny,
        torch.tensor([prompt]).expand(rows, -1),
        max_new_tokens=3,
        temperature=1.0,
        seed=1,
        processors=[spelled],
        assistant=other,
        report=assert_drafted,
    )
    counts = Counter(map(tuple, got[:, 3:].tolist()))
    assert counts.keys() <= want.keys()
    chi_squared = sum((counts[text] - rows * p) ** 2 / (rows * p) for text, p in want.items())
    assert chi_squared < 24.3  # of 7 degrees of freedom, one seed in a thousand is beyond


def assert_drafted(report) -> None:
    assert 0 < report.accepted < report.drafted


def test_penalty_counts_what_the_cache_holds(story, tokenizer):
    cache, how = sc.StateCache(story.config), {"max_new_tokens": 8, "repetition_penalty": 1.5}
    one = sc.generate(story, CATS, tokenizer, cache=cache, **how)
    two = sc.generate(story, " The cat", tokenizer, cache=cache, **how)
    assert one + two == sc.generate(story, one + " The cat", tokenizer, **how)
    cache.reset()
    assert sc.generate(story, " The cat", tokenizer, cache=cache, **how) != two


def test_rows_without_a_least_probability_are_not_touched_by_that_of_others():
    logits = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0)) * 3
    options = [{}, {"min_p": 0.2}, {"min_p": 0.05, "top_k": 9, "top_p": 0.8}]
    requests = [Request([1], temperature=0.7, **each) for each in options]
    got = Sampler(requests).probabilities(logits)
    for row, each in enumerate(options):
        scores = logits[row] / 0.7
        for name, kind in (
            ("top_k", known.TopKLogitsWarper),
            ("top_p", known.TopPLogitsWarper),
            ("min_p", known.MinPLogitsWarper),
        ):
            scores = kind(each[name])(None, scores) if name in each else scores
        torch.testing.assert_close(got[row], scores.softmax(-1))
    assert torch.equal(got[0], Sampler(requests[:1]).probabilities(logits[:1])[0])


def test_least_probability_of_a_checkpoint_holds_where_tokens_are_drawn(tiny, monkeypatch):
    rows = torch.tensor([[5, 6, 7]])
    greedy = sc.generate(tiny, rows, max_new_tokens=9)
    monkeypatch.setattr(tiny.generation_config, "min_p", 1.0)
    how = {"max_new_tokens": 9, "temperature": 1.5, "seed": 1}
    assert torch.equal(sc.generate(tiny, rows, **how), greedy)
    assert not torch.equal(sc.generate(tiny, rows, min_p=0.0, **how), greedy)
    assert not torch.equal(sc.generate(tiny, rows, processors=[], **how), greedy)


def test_nonsense_is_refused(tiny, monkeypatch):
    rows = torch.tensor([[5, 6, 7]])
    for message, options in (
        ("repetition_penalty=0: give 1 for none", {"repetition_penalty": 0}),
        ("min_p=1.5: give a part of the likeliest", {"min_p": 1.5}),
        ("processors: came a int, expected functions", {"processors": [3]}),
        ("processor no_logits: it gave a NoneType, expected logits (1, 101)", {"processors": [no_logits]}),
        ("processor <lambda>: it gave (101,), expected logits", {"processors": [lambda ids, scores: scores[0]]}),
    ):
        with pytest.raises(sc.errors.OptionError) as error:
            sc.generate(tiny, rows, **options)
        assert str(error.value).startswith(message)
    monkeypatch.setattr(tiny.generation_config, "guidance_scale", 2.0)
    with pytest.raises(sc.errors.OptionError, match="generation_config sets guidance_scale, which statecache does not"):
        sc.generate(tiny, rows)
    assert sc.generate(tiny, rows, max_new_tokens=2, processors=[]).shape == (1, 5)


def no_logits(ids: torch.Tensor, scores: torch.Tensor) -> None: ...


@pytest.mark.parametrize("lookup", [0, 2])
def test_report_says_why_each_row_ended(story, tokenizer, monkeypatch, lookup):
    free = [sc.generate(story, text, tokenizer, max_new_tokens=12) for text in (CATS, "Once upon a time")]
    ids = tokenizer(free[0])["input_ids"]
    monkeypatch.setattr(story.generation_config, "eos_token_id", next(n for n in ids[-10:] if n not in ids[:-12]))
    reports, options = [], {"max_new_tokens": 12, "lookup": lookup}
    texts = [CATS, "Once upon a time", "The king"]
    sc.generate(story, texts, tokenizer, stop=free[1][-4:], report=reports.append, **options)
    assert reports[0].reasons == ("end", "stop", "length")
    stream = sc.generate(story, "The king", tokenizer, stream=True, report=reports.append, **options)
    next(stream)
    stream.close()
    assert reports[1].reasons == ("closed",)
