"""Requests that join a running batch and leave it: each row's tokens are those that it writes alone."""

from __future__ import annotations

import copy
import itertools
import random

import families
import pytest
import torch

import statecache as sc
from statecache.decode.batch import Batch, Row
from statecache.decode.captured_assistant import CapturedAssistant
from statecache.decode.drafters import Assistant, Lookup
from statecache.decode.request import Request
from statecache.decode.sampling import Drafts
from statecache.errors import RowsError

FAMILIES = ["mamba", "qwen3_next", "lfm2"]


def requests(n: int = 7) -> list[Request]:
    """Of several lengths and ways to draw, greedy too, some alike but for their seeds."""
    luck = random.Random(3)
    ways = [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}]
    made = []
    for row in range(n):
        run = [luck.randrange(1, 90) for _ in range(luck.choice((2, 3, 5)))]
        made.append(Request(run * 2 + run[:1], luck.randint(1, 14), seed=row, **ways[row % 4]))
    return made


def alone(model, request: Request) -> list[int]:
    batch = Batch(model, sc.StateCache(model.config))
    (row,) = batch.join([request])
    while batch.running:
        batch.round()
    return row.tokens


def drafter_of(model, way: str):
    if way == "assistant":
        other, _ = families.build(model.config.model_type, dtype=torch.float64, seed=1)
        other.set_experts_implementation("eager")
        return Assistant(sc.prepare(other), 4, 0.1, torch.device("cpu"))
    return Lookup(2, 4) if way == "lookup" else None


class Knowing:
    """Drafts what rows will write, with a wrong token now and then."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.luck, self.forwards = texts, random.Random(1), 0

    def propose(self, rows, most, sampler):
        drafted = []
        for row, limit in zip(rows, most, strict=True):
            text = next(text for text in self.texts if text[: len(row)] == row)
            drafted.append([(t + (self.luck.random() < 0.2)) % 101 for t in text[len(row) :][: min(4, limit)]])
        return Drafts(drafted, list(map(len, drafted))) if any(drafted) else None

    def learn(self, accepted): ...

    def keep(self, rows): ...


def build(family: str):
    model, _ = families.build(family, dtype=torch.float64)
    model.set_experts_implementation("eager")  # grouped products know no float64
    return sc.prepare(model)


@pytest.mark.parametrize("rows", [None, 3], ids=["growing", "fixed"])
@pytest.mark.parametrize("way", ["plain", "lookup", "knowing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_late_write_what_each_writes_alone(family, way, rows, always_drafts):
    model = build(family)
    wanted = [alone(model, request) for request in requests()]
    cache = sc.StateCache(model.config, slack=5)
    if rows is not None:
        cache = sc.StateCache(model.config, capacity=40, slack=5, rows=rows, dtype=torch.float64, device="cpu")
    drafter = Knowing(wanted) if way == "knowing" else drafter_of(model, way)
    batch = Batch(model, cache, drafter, keep_rows=rows is not None)
    luck, coming, written = random.Random(5), requests(), []
    while coming or batch.running:
        room = (rows or 4) - len(batch.live) - len(batch.waiting)
        n = min(luck.randint(0, 3), len(coming), room)
        written += batch.join(coming[:n])
        coming = coming[n:]
        if batch.running:
            new = batch.round()
            assert all(new.values())
            assert set(new) <= set(written)
    assert [row.tokens for row in written] == wanted
    assert not batch.live
    assert batch.report().tokens == sum(r.max_new_tokens for r in requests())
    assert (batch.report().drafted > 0) == (way != "plain")
    assert (batch.report().accepted > 10) == (way == "knowing")


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_what_an_assistant_drafts_for_a_row_depends_on_no_other(family):
    model = build(family)

    def write(*groups: list[Request], between: int = 2) -> list[list[int]]:
        batch = Batch(model, sc.StateCache(model.config, slack=5), drafter_of(model, "assistant"))
        written: list[Row] = []
        for group in groups:
            written += batch.join(group)
            for _ in range(between):
                batch.round()
        while batch.running:
            batch.round()
        assert batch.report().drafted
        return [row.tokens for row in written]

    some = [Request([5 + n, 6, 7][: 2 + n % 2], 16, temperature=1.2, seed=n) for n in range(4)]
    each = [write([request])[0] for request in some]
    assert write(some) == each
    assert write(some[2:], some[:1], some[1:2]) == [*each[2:], *each[:2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_of_a_decoder_drafts_what_another_drafts(family):
    """On a CPU its graphs run plainly."""
    model, some = build(family), [Request(each.prompt, 16) for each in requests()[:5]]
    told = []
    for captured in (False, True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).to(weight)
        drafter = Assistant(other, 4, 0.1, torch.device("cpu"))
        if captured:
            fixed = {"rows": 5, "capacity": 60, "dtype": torch.float64, "device": "cpu"}
            cache = sc.StateCache(model.config, slack=5, back=False, **fixed)
            drafter = CapturedAssistant(other, 4, 0.1, torch.device("cpu"), cache)
        batch = Batch(model, sc.StateCache(model.config, slack=5), drafter)
        rows = batch.join(some[:3])
        for turn in range(30):
            if turn == 4:
                rows += batch.join(some[3:])
            if batch.running:
                batch.round()
        assert [row.tokens for row in rows] == [alone(model, each) for each in some]
        report = batch.report()
        told.append((report.drafted, report.accepted))
        batch.close()
    assert told[0] == told[1]
    assert 0 < told[0][1] < told[0][0]


@pytest.mark.parametrize("before", [16, 20])
def test_a_row_joins_after_rounds_without_drafts(before):
    """The other has more to take in then than one pass does, and it has one token."""
    model, wrong = (build("lfm2") for _ in range(2))
    with torch.no_grad():
        for weight in wrong.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    fixed = {"rows": 2, "capacity": 120, "dtype": torch.float64, "device": "cpu"}
    cache = sc.StateCache(model.config, slack=5, back=False, **fixed)
    drafter = CapturedAssistant(wrong, 4, 0.1, torch.device("cpu"), cache)
    batch, some = Batch(model, sc.StateCache(model.config, slack=5), drafter), [Request([3, 4, 5], 60)]
    rows = batch.join(some)
    for _ in range(before):
        batch.round()
    assert len(rows[0].tokens) - drafter.held[0] > 5
    some.append(Request([7, 8, 9, 10], 20))
    rows += batch.join(some[1:])
    while batch.running:
        batch.round()
    assert [row.tokens for row in rows] == [alone(model, each) for each in some]


def test_rows_may_leave_before_their_end(always_drafts):
    model = build("lfm2")
    for drafter, keep_rows in itertools.product(("plain", "lookup", "assistant"), (False, True)):
        batch = Batch(model, sc.StateCache(model.config, slack=5), drafter_of(model, drafter), keep_rows=keep_rows)
        first, second, third = batch.join([Request([5, 6, 7], 9), Request([8, 9, 8], 9), Request([11, 12], 9)])
        batch.leave([third])  # before it was read
        batch.round()
        batch.leave([first])
        (fourth,) = batch.join([Request([13, 14, 15, 16], 9)])
        while batch.running:
            assert not {first, third} & set(batch.round())
        assert len(first.tokens) == 4
        assert third.tokens == [11, 12]
        for row in (second, fourth):
            assert row.tokens == alone(model, row.request)
        batch.leave([first])  # again


def test_more_requests_than_rows_are_refused_and_none_joins():
    model = build("lfm2")
    cache = sc.StateCache(model.config, capacity=20, rows=2, dtype=torch.float64, device="cpu")
    batch = Batch(model, cache, keep_rows=True)
    batch.join([Request([5, 6], 4)])
    batch.round()
    with pytest.raises(RowsError) as refused:
        batch.join([Request([7], 4), Request([8], 4)])
    assert str(refused.value) == (
        "2 requests came, and 1 of the cache's 2 rows are free: let rows end or leave first, or make the cache with "
        "more rows="
    )
    assert not batch.waiting
    batch.join([Request([7], 4)])


def test_a_row_that_joins_finds_nothing_of_the_one_before():
    model = build("qwen3_next")
    cache = sc.StateCache(model.config, capacity=20, rows=2, dtype=torch.float64, device="cpu")
    batch = Batch(model, cache, keep_rows=True)
    batch.join([Request([5, 6, 7, 8], 3), Request([9, 10], 12)])
    while len(batch.live) != 1:
        batch.round()
    for buffer in cache.buffers():
        if buffer.is_floating_point():
            buffer[batch.live[0].place ^ 1] = torch.nan
    (row,) = batch.join([Request([11, 12, 13], 5)])
    while batch.running:
        batch.round()
    assert row.tokens == alone(model, row.request)


def test_draws_count_positions_from_the_start_of_the_row():
    """So a text goes on the same in two calls, on its cache or as a longer prompt, as in one."""
    model = build("mamba2")
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"temperature": 1.0, "top_p": 0.95, "seed": 4}
    whole = sc.generate(model, prompt, max_new_tokens=12, **options)
    first = sc.generate(model, prompt, max_new_tokens=5, **options)
    assert torch.equal(first, whole[:, :8])
    assert torch.equal(sc.generate(model, first, max_new_tokens=7, **options), whole)
    cache = sc.StateCache(model.config)
    sc.generate(model, prompt, max_new_tokens=5, cache=cache, **options)
    assert torch.equal(sc.generate(model, first[:, -1:], max_new_tokens=7, cache=cache, **options), whole[:, 7:])
