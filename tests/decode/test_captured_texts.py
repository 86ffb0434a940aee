"""Where a step is captured, `generate` writes what it writes elsewhere, and goes on where capturing fails.

There is nothing to capture on a CPU: a decoder's steps run plainly here, all else is as on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import statecache as sc
from statecache import errors
from statecache.decode import capturing
from statecache.decode import generate as generating
from statecache.decode.decoder import Decoder
from statecache.models.prepare import is_prepared

RAGGED = ["Once upon a time", "The fox", "A girl and her dog went"]
IDS = torch.tensor([[5, 9, 33, 70], [8, 8, 90, 3]])
DRAWN = {"temperature": 0.9, "top_k": 20, "seed": 5}
WAYS: list[tuple[Any, dict[str, Any]]] = [
    (IDS, {}),
    (IDS, DRAWN),
    (IDS[0], {"temperature": 1.0, "top_p": 0.8, "seed": 2**64 - 1}),
    (IDS, {"temperature": [0.0, 1.2], "seed": [1, 2]}),
    ("Once upon a time", {"stop": " the"}),
    (RAGGED, {"min_p": 0.1, **DRAWN}),
    (RAGGED, {"stop": ["."]}),
]


class Taken:
    """The decoders that calls have made."""

    def __init__(self) -> None:
        self.made: list[Decoder] = []


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """Have steps captured wherever a GPU would have them captured, however few."""
    seen, make = Taken(), Decoder.__init__

    def noted(decoder: Decoder, *args: Any, **options: Any) -> None:
        make(decoder, *args, **options)
        seen.made.append(decoder)

    def fixed(model: Any, rows: int, longest: int, new: int, drafts: int) -> sc.StateCache:
        return cache_for(model, rows, longest + new + drafts, slack=1 + drafts)

    monkeypatch.setattr(Decoder, "__init__", noted)
    monkeypatch.setattr(generating, "worth_capturing", lambda model, new, drafts: True)
    monkeypatch.setattr(generating, "fixed_cache", fixed)
    return seen


def cache_for(model: Any, rows: int, capacity: int, **options: Any) -> sc.StateCache:
    given = {"slack": 1, "back": False, **options}
    return sc.StateCache(model.config, rows=rows, capacity=capacity, dtype=torch.float32, device="cpu", **given)


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(("prompt", "way"), WAYS)
def test_it_writes_what_it_writes_elsewhere(story: Any, tokenizer: Any, prompt: Any, way: Any, taken: Taken) -> None:
    reports: list[sc.Report] = []

    def write(**more: Any) -> Any:
        return sc.generate(story, prompt, tokenizer, max_new_tokens=16, report=reports.append, **way, **more)

    got = write()
    (decoder,) = taken.made
    assert decoder.counts.plain == reports[0].forwards - 1
    want = write(processors=[lambda ids, logits: logits])  # which no decoder applies
    assert equal(got, want)
    assert len(taken.made) == 1
    assert reports[0] == reports[1]


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
@pytest.mark.parametrize(("prompt", "way"), WAYS)
def test_drafts_are_checked_by_rounds_of_the_decoder(
    story: Any, draft: Any, tokenizer: Any, prompt: Any, way: Any, drafts: str, taken: Taken, always_drafts: None
) -> None:
    reports: list[sc.Report] = []
    given: dict[str, Any] = {"lookup": 2} if drafts == "lookup" else {"assistant": draft}

    def write(**more: Any) -> Any:
        return sc.generate(story, prompt, tokenizer, max_new_tokens=24, report=reports.append, **given, **way, **more)

    got = write()
    if drafts == "assistant" and "temperature" in way:  # whose drafts are drawn, and accepted by their probabilities
        assert not taken.made
        return
    decoders = {made.model: made for made in taken.made}
    assert decoders[story].counts.plain == reports[0].forwards - 1
    if drafts == "assistant":  # prompts of other lengths are read in passes of their own
        assert reports[0].assistant_forwards >= decoders[draft].counts.plain > 0
    assert equal(got, write(processors=[lambda ids, logits: logits]))  # which no decoder applies
    assert len(taken.made) == len(decoders) == (2 if drafts == "assistant" else 1)
    assert not (is_prepared(story) or is_prepared(draft))
    alike = [replace(report, assistant_forwards=0) for report in reports]
    assert alike[0] == alike[1] and alike[0].drafted


def test_a_row_that_ends_within_a_round_is_cut_there(story: Any, taken: Taken, always_drafts: None) -> None:
    ids = torch.tensor([[5, 9, 33, 5, 9, 33, 5, 9, 33, 5, 9]])
    whole = sc.generate(story, ids, max_new_tokens=24, processors=[], lookup=2, stop=[])[0, 11:].tolist()
    for end in set(whole[3:12]):
        reports: list[sc.Report] = []
        given: dict[str, Any] = {"max_new_tokens": 24, "lookup": 2, "stop": [end, 2], "report": reports.append}
        got = sc.generate(story, ids, **given)[0, 11:].tolist()
        assert got == whole[: whole.index(end) + 1]
        sc.generate(story, ids, **given, processors=[lambda ids, logits: logits])  # which no decoder applies
        assert reports[0] == reports[1]


def test_it_goes_on_with_a_cache_that_is_given(story: Any, tokenizer: Any, taken: Taken) -> None:
    way: dict[str, Any] = {"temperature": 0.8, "seed": 4, "max_new_tokens": 9}
    growing, fixed = sc.StateCache(story.config), cache_for(story, 1, 64, slack=0)
    for prompt in ("Once upon a time", " The cat", " Then"):
        assert sc.generate(story, prompt, tokenizer, cache=growing, **way) == sc.generate(
            story, prompt, tokenizer, cache=fixed, **way
        )
        assert fixed.lengths.tolist() == growing.lengths.tolist()
    assert len(taken.made) == 3  # none for the cache that grows


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
@pytest.mark.parametrize("back", [True, False])
def test_rounds_on_a_cache_that_is_given_leave_in_it_what_was_written(
    story: Any, draft: Any, drafts: str, back: bool, taken: Taken, always_drafts: None
) -> None:
    ids = torch.tensor([[5, 9, 33, 5, 9, 33, 5, 9, 33, 5, 9], [8, 3, 90, 61, 8, 3, 90, 61, 8, 3, 90]])
    given: dict[str, Any] = {"lookup": 2} if drafts == "lookup" else {"assistant": draft}
    whole = sc.generate(story, ids, max_new_tokens=20, processors=[], stop=[])[:, 11:].tolist()
    ends = [*dict.fromkeys(whole[0][4:9]), 4095]
    for end in ends:
        fixed = cache_for(story, 2, 11 + 19 + 2 + 7, slack=5, back=back)
        growing = sc.StateCache(story.config, slack=5)
        turns: list[list[Any]] = [[], []]
        for cache, seen in zip((fixed, growing), turns, strict=True):
            seen.append(sc.generate(story, ids, cache=cache, max_new_tokens=20, stop=[end], **given).tolist())
            seen.append(cache.lengths.tolist())
            more = torch.tensor([[7, 9], [11, 12]])
            seen.append(sc.generate(story, more, cache=cache, max_new_tokens=7, stop=[end], **given).tolist())
            seen.append(cache.lengths.tolist())
        assert turns[0] == turns[1]
    assert len(taken.made) == 1 + 2 * len(ends) * (2 if drafts == "assistant" else 1)


def test_strings_that_end_texts_have_rounds_run_where_they_are_looked_for(
    story: Any, tokenizer: Any, taken: Taken, always_drafts: None
) -> None:
    fixed, growing = cache_for(story, 1, 64, slack=5), sc.StateCache(story.config, slack=5)
    for prompt in ("Once upon a time there was a cat. Once upon a", " The cat"):
        written = [
            sc.generate(story, prompt, tokenizer, cache=cache, max_new_tokens=20, lookup=2, stop=" the")
            for cache in (fixed, growing)
        ]
        assert written[0] == written[1]
        assert fixed.lengths.tolist() == growing.lengths.tolist()
    assert not taken.made


def test_a_stream_gives_its_model_back_when_it_is_closed_or_dropped(story: Any, taken: Taken) -> None:
    for end in ("close", "drop"):
        stream = sc.generate(story, IDS, max_new_tokens=9, stream=True)
        next(stream), next(stream), next(stream)
        assert is_prepared(story)
        if end == "close":
            stream.close()
        del stream
        assert not is_prepared(story)
        with pytest.raises(errors.StepError, match="closed"):
            taken.made[-1].step()


@pytest.mark.parametrize("slack", [0, 1])
def test_what_cannot_be_captured_is_run_plainly_with_a_warning(
    story: Any, taken: Taken, monkeypatch: pytest.MonkeyPatch, slack: int
) -> None:
    def fail(decoder: Decoder, drafts: int, ahead: int) -> None:
        decoder.captures = False  # as on a CPU
        decoder.step()  # leaves something behind
        raise RuntimeError("operation not permitted")

    def as_on_a_gpu(decoder: Decoder, *what: Any) -> bool:
        decoder.captures = True
        return tried(decoder, *what)

    tried = Decoder.try_capture

    want = sc.generate(story, IDS, max_new_tokens=9, **DRAWN)
    monkeypatch.setattr(Decoder, "capture", fail)
    monkeypatch.setattr(Decoder, "try_capture", as_on_a_gpu)
    cache = cache_for(story, 2, 64, slack=slack)
    with pytest.warns(UserWarning, match=r"could not be captured, and is run plainly: operation not permitted"):
        got = sc.generate(story, IDS, max_new_tokens=9, cache=cache, **DRAWN)
    assert torch.equal(got, want)
    assert not is_prepared(story)


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_so_are_rounds_and_drafts_that_cannot_be(
    story: Any, draft: Any, taken: Taken, monkeypatch: pytest.MonkeyPatch, drafts: str
) -> None:
    failing = "this model's round" if drafts == "lookup" else "the assistant's draft"

    def fail(decoder: Decoder, *what: int) -> None:
        decoder.captures = False  # as on a CPU
        decoder.check(torch.ones(2, 1, dtype=torch.long))  # leaves something behind
        raise RuntimeError("operation not permitted")

    def as_on_a_gpu(decoder: Decoder, whose: str, *what: int) -> bool:
        decoder.captures = whose == failing and not tries
        tries.extend([whose] * decoder.captures)
        return tried(decoder, whose, *what)

    tries: list[str] = []
    tried, ids = Decoder.try_capture, torch.tensor([[5, 9, 33, 70] * 3, [8, 8, 90, 3] * 3])
    given: dict[str, Any] = {"lookup": 2} if drafts == "lookup" else {"assistant": draft}
    want = sc.generate(story, ids, max_new_tokens=40, processors=[])
    monkeypatch.setattr(Decoder, "capture", fail)
    monkeypatch.setattr(Decoder, "try_capture", as_on_a_gpu)
    reports: list[sc.Report] = []
    with pytest.warns(UserWarning, match=f"{failing} could not be captured, and is run plainly: operation not permi"):
        got = sc.generate(story, ids, max_new_tokens=40, report=reports.append, **given)
    assert torch.equal(got, want) and reports[0].drafted


def test_it_pays_on_a_device_that_has_all_of_the_model_alone(story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not capturing.worth_capturing(story, 1000)  # on a CPU
    assert capturing.fixed_cache(story, 1, 10, 1000) is None
    monkeypatch.setattr(capturing, "input_device", lambda model: torch.device("cuda", 0))
    monkeypatch.setattr(capturing.kernels, "available", lambda device: True)
    assert not capturing.worth_capturing(story, 1000)  # whose other weights are on a CPU


def test_caches_that_move_or_turn_are_not_for_decoders(story: Any) -> None:
    assert capturing.takes(cache_for(story, 1, 8))
    assert not capturing.takes(sc.StateCache(story.config))
    assert not capturing.takes(sc.StateCache(story.config, capacity=8))
