"""Drafts change nothing but the number of forward passes: every row gets the argmax of full forwards."""

from __future__ import annotations

import random

import families
import pytest
import torch
from full_forwards import argmax_loop

import statecache as sc
from statecache.decode.batch import Batch
from statecache.decode.drafters import Assistant, Lookup
from statecache.decode.request import Request
from statecache.decode.sampling import Drafts, Sampler

FAMILIES = ["mamba", "mamba2", "qwen3_next", "lfm2", "minimax", "falcon_h1"]


def prompts(rows: int = 3) -> torch.Tensor:
    """Rows (B, 14) whose last tokens have come before."""
    ids = torch.randint(1, 90, (rows, 6), generator=torch.Generator().manual_seed(7))
    return torch.cat([ids, ids, ids[:, :2]], 1)


# ---- greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_are_the_argmax_of_full_forwards(family, always_drafts):
    model, other = (families.build(family, dtype=torch.float64)[0] for _ in range(2))
    for each in (model, other):
        each.set_experts_implementation("eager")  # grouped products know no float64
    with torch.no_grad():
        for p in other.parameters():  # agrees often, not always
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05 * p.abs().mean())
    ids = prompts()
    free = argmax_loop(model, ids, 24)
    ends = (int(free[0, 14 + 5]), int(free[1, 14 + 11]))  # rows end at different times
    want = argmax_loop(model, ids, 24, ends)
    reports = []
    for options in ({}, {"lookup": 3}, {"assistant": other}):
        for cache in (None, sc.StateCache(model.config, slack=6), sc.StateCache(model.config, capacity=40, slack=4)):
            got = sc.generate(model, ids, max_new_tokens=24, stop=ends, cache=cache, report=reports.append, **options)
            assert torch.equal(got, want), (options, cache)
    assert all(r.tokens == reports[0].tokens for r in reports)
    assert not any(r.drafted for r in reports[:3])
    assert all(0 < r.accepted < r.drafted for r in reports[6:])


# ---- drafters that are forced


class Forced:
    """Drafts k tokens of each row, as `what(row)` gives them."""

    def __init__(self, what, most=5):
        self.what, self.most, self.forwards, self.told = what, most, 0, []

    def propose(self, rows, most, sampler):
        drafted = [self.what(row)[: min(self.most, limit)] for row, limit in zip(rows, most, strict=True)]
        return Drafts(drafted, list(map(len, drafted))) if any(drafted) else None

    def learn(self, accepted):
        self.told += accepted

    def keep(self, rows):
        pass


@pytest.fixture
def prepared_story(story):
    yield sc.prepare(story)
    sc.unprepare(story)


LONG = 500


def write(model, drafter, n=LONG, rows=((2529, 828, 259, 522),), cache=None):
    """The rows, and the report."""
    batch = Batch(model, cache or sc.StateCache(model.config, slack=6), drafter)
    written = batch.join([Request(row, n) for row in rows])
    while batch.running:
        batch.round()
    return [row.tokens for row in written], batch.report()


def oracle(texts):
    """What follows a row in the text that it begins."""
    return lambda row: next(text for text in texts if text[: len(row)] == row)[len(row) :]


class Each:
    """Forced drafts by the number of the row, which rows keep when others leave."""

    def __init__(self, kinds, most=5):
        self.kinds, self.most, self.forwards, self.kept = kinds, most, 0, [[] for _ in kinds]
        self.numbers = list(range(len(kinds)))

    def propose(self, rows, most, sampler):
        what = zip(self.numbers, rows, most, strict=True)
        drafted = [self.kinds[n](row)[: min(self.most, limit)] for n, row, limit in what]
        counts = [len(tokens) for tokens in drafted]
        padded = [tokens + [0] * (self.most - len(tokens)) for tokens in drafted]
        return Drafts(torch.tensor(padded), counts)

    def learn(self, accepted):
        for number, n in zip(self.numbers, accepted, strict=True):
            self.kept[number].append(n)

    def keep(self, rows):
        self.numbers = [self.numbers[row] for row in rows]


def test_whatever_is_drafted_a_text_of_500_tokens_is_the_same(prepared_story):
    (text,), _ = write(prepared_story, None)
    luck, right = random.Random(1), oracle([text])
    kinds = {
        "right": right,
        "wrong": lambda row: [token ^ 1 for token in right(row)],
        "sometimes right": lambda row: [token ^ (luck.random() < 0.2) for token in right(row)][: luck.randint(0, 5)],
        "random": lambda row: [luck.randrange(4096) for _ in range(luck.randint(0, 5))],
        "empty": lambda row: [],
    }
    drafter = Each(list(kinds.values()))
    rows, report = write(prepared_story, drafter, rows=[text[:4]] * len(kinds))
    for kind, row in zip(kinds, rows, strict=True):
        assert row == text, kind
    kept = dict(zip(kinds, drafter.kept, strict=True))
    # the prompt gives one token, every round six, the last one what is left
    assert len(kept["right"]) == -(-(LONG - 1) // 6)
    assert set(kept["right"][:-1]) == {5}
    assert set(kept["wrong"]) == set(kept["empty"]) == {0}
    assert set(kept["sometimes right"]) == set(range(6))
    assert len(kept["wrong"]) == len(kept["empty"]) == LONG - 1
    assert report.tokens == LONG * len(kinds)
    assert report.forwards == LONG
    assert report.accepted == sum(map(sum, drafter.kept))


def test_rows_at_their_own_pace_write_what_each_writes_alone(prepared_story):
    starts = [[2529, 828, 259, 522], [300, 301, 302], [828, 259, 522, 17, 45, 90, 1000]]
    alone = [write(prepared_story, None, 40, [row])[0][0] for row in starts]
    right = oracle(alone)
    # row 0 has good drafts, row 1 bad ones, row 2 none
    pick = {tuple(starts[0][:2]): right, tuple(starts[1][:2]): lambda row: [t ^ 1 for t in right(row)]}
    drafter = Forced(lambda row: pick.get(tuple(row[:2]), lambda row: [])(row))
    rows, report = write(prepared_story, drafter, 40, starts)
    assert rows == alone
    assert report.turns < 3 * report.forwards  # the first row was done before the others, and left
    assert report.forwards == 40


def test_commit_keeps_all_tokens_but_the_last(prepared_story):
    for drafter in (None, Lookup(2, 5), Forced(lambda row: [1, 2, 3])):
        cache = sc.StateCache(prepared_story.config, slack=6)
        rows, _ = write(prepared_story, drafter, 30, cache=cache)
        assert cache.lengths.tolist() == [len(rows[0]) - 1]


# ---- drafters


def greedy(rows):
    return Sampler([Request(row) for row in rows])


def follow(lookup, *rows, most=5):
    drafts = lookup.propose([list(row) for row in rows], [most] * len(rows), greedy(rows))
    if drafts is None:
        return [[] for _ in rows]
    assert drafts.counts == list(map(len, drafts.tokens))
    return drafts.tokens


def test_lookup_drafts_what_followed_the_longest_run(always_drafts):
    def new():
        return Lookup(3, 4)

    assert follow(new(), [1, 2, 3, 9, 5, 3, 8, 7, 1, 2, 3]) == [[9, 5, 3, 8]]  # 1 2 3, though 3 alone came later
    assert follow(new(), [3, 9, 3, 8, 4, 3]) == [[8, 4, 3, 8]]  # the newest 3, and beyond the end what repeats
    assert follow(new(), [1, 2, 3, 4], [7, 7], [5]) == [[], [7, 7, 7, 7], []]
    assert follow(new(), [1, 2, 3, 4]) == [[]]


def test_lookup_learns_rows_as_they_grow_and_leave(always_drafts):
    lookup = Lookup(2, 2)
    assert follow(lookup, [1, 2], [3, 4]) == [[], []]
    lookup.keep([1])
    assert follow(lookup, [3, 4, 9, 3, 4]) == [[9, 3]]
    lookup.learn([2])
    assert follow(lookup, [3, 4, 9, 3, 4, 9, 3, 6, 4]) == [[9, 3]]


def test_assistant_drafts_what_it_would_write_itself(story, draft, always_drafts):
    sc.prepare(draft)
    starts = [[2529, 828, 259, 522], [300, 301, 302]]
    alone = write(draft, None, 30, starts)[0]
    helper = Assistant(draft, 4, 0.1, torch.device("cpu"))
    with torch.no_grad():
        for accepted in ([0, 0], [4, 1], [3, 4], [2, 0]):
            for row, text in zip(starts, alone, strict=True):
                assert text[: len(row)] == row
            drafts = helper.propose(starts, [4, 4], greedy(starts))
            assert drafts.tokens.tolist() == [text[len(row) :][:4] for row, text in zip(starts, alone, strict=True)]
            helper.learn(accepted)
            starts = [t[: len(row) + n + 1] for t, row, n in zip(alone, starts, accepted, strict=True)]
        helper.keep([1])
        drafts = helper.propose(starts[1:], [2], greedy(starts[1:]))
        assert drafts.counts == [2]
        assert drafts.tokens[0, :2].tolist() == alone[1][len(starts[1]) :][:2]
    sc.unprepare(draft)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_may_begin_before_the_tokens_of_the_one_before_are_known(prepared_story, monkeypatch, ahead):
    model, prompt = prepared_story, [2529, 828, 259, 522]
    (whole,), _ = write(model, None, 40, [prompt])
    monkeypatch.setattr(Batch, "_may_run_ahead", property(lambda batch: batch.runs_ahead))
    cache = sc.StateCache(model.config, capacity=44, rows=3, slack=1, back=False, dtype=torch.float32, device="cpu")
    batch = Batch(model, cache, keep_rows=True, captured=True, runs_ahead=ahead)
    ends = frozenset([whole[20]])
    rows = batch.join([Request(prompt, 40), Request(prompt, 40, ends), Request(prompt, 9)])
    rounds = 0
    while batch.running:
        new = batch.round()
        rounds += 1
        assert all(len(each) == 1 for each in new.values())
        if rounds == 3:
            at_once = batch._coming is not None
    batch.close()
    assert at_once is ahead
    assert [row.tokens for row in rows] == [whole, whole[: 1 + whole.index(whole[20], 4)], whole[:13]]
    assert rounds == 40 and batch.report().compiled == 0
    assert cache.lengths.tolist()[0] == 43  # its last step was not begun


def test_a_step_that_nobody_waits_for_is_dropped(prepared_story, monkeypatch):
    model, prompt = prepared_story, [2529, 828, 259, 522]
    (whole,), _ = write(model, None, 12, [prompt])
    monkeypatch.setattr(Batch, "_may_run_ahead", property(lambda batch: batch.runs_ahead))
    cache = sc.StateCache(model.config, capacity=44, rows=2, slack=1, back=False, dtype=torch.float32, device="cpu")
    batch = Batch(model, cache, keep_rows=True, captured=True, runs_ahead=True)
    (first,) = batch.join([Request(prompt, 40, frozenset([whole[9]]))])
    while batch.running:
        batch.round()
    (second,) = batch.join([Request(prompt, 12)])
    while batch.running:
        assert set(batch.round()) == {second}
    batch.close()
    assert [first.tokens, second.tokens] == [whole[: 1 + whole.index(whole[9], 4)], whole]
    assert batch.report().forwards == len(first.tokens) + len(second.tokens) - 8
