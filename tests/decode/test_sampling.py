"""Drawn tokens have the model's distribution, with drafts as without; a wrong rule fails the same test.

B rows, K drafted tokens, T positions, V tokens of the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import families
import pytest
import torch
from torch import Tensor

import statecache as sc
from statecache.decode.noise import Purpose, exponential
from statecache.decode.request import Request
from statecache.decode.sampling import Drafts, Sampler, accept, agree, race

V = 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampler(*ways: dict) -> Sampler:
    """Of rows that draw in these ways."""
    return Sampler([Request([1], **way) for way in ways])


def surprise(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic over its quantile at 1 - 1e-4 (Wilson and Hilferty 1931): above 1 they differ."""
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    free = len(counts) - 1
    spread = 2 / (9 * free)
    quantile = free * (1 - spread + 3.719 * math.sqrt(spread)) ** 3
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()) / quantile


# ---- the rule, on a table of next tokens


TABLE = torch.rand(V, V, generator=generator(1)).add(0.1)
TABLE /= TABLE.sum(-1, keepdim=True)
GUESS = torch.rand(V, V, generator=generator(2)).add(0.05) ** 2
GUESS /= GUESS.sum(-1, keepdim=True)

Rule = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def draw(p: Tensor, seeds: Tensor, places: Tensor, purpose: Purpose) -> Tensor:
    """From p (B, T, V), in these places (B, T)."""
    return race(p, exponential(seeds, places, purpose, p.shape[-1]))


def right(p: Tensor, q: Tensor | None, tokens: Tensor, counts: Tensor, seeds: Tensor, places: Tensor):
    """As `Sampler.verify` has it."""
    if q is None:
        return agree(draw(p, seeds, places, Purpose.DRAW), tokens, counts)
    return accept(p, q, tokens, counts, seeds, places)


def without_residual(p: Tensor, q: Tensor | None, tokens: Tensor, counts: Tensor, seeds: Tensor, places: Tensor):
    """Wrong: after a refusal it draws from p, which had its chance with the refused token already."""
    kept, _ = right(p, q, tokens, counts, seeds, places)
    after = p.gather(1, kept[:, None, None].expand(-1, 1, V))
    return kept, draw(after, seeds + 1_000_000, places.gather(1, kept[:, None]), Purpose.DRAW)[:, 0]


def without_refusals(p: Tensor, q: Tensor | None, tokens: Tensor, counts: Tensor, seeds: Tensor, places: Tensor):
    """Wrong: it keeps every draft."""
    after = p.gather(1, counts[:, None, None].expand(-1, 1, V))
    return counts, draw(after, seeds, places.gather(1, counts[:, None]), Purpose.DRAW)[:, 0]


def with_one_purpose(p: Tensor, q: Tensor | None, tokens: Tensor, counts: Tensor, seeds: Tensor, places: Tensor):
    """Wrong: what decided which draft was drawn decides on what replaces it, too."""
    kept, following = right(p, q, tokens, counts, seeds, places)
    at = kept.clamp(max=tokens.shape[1] - 1)
    rows = torch.arange(len(p))
    rest = (p[rows, kept] - q[rows, at]).clamp(min=0)
    again = draw(rest[:, None], seeds, places.gather(1, kept[:, None]), Purpose.DRAFT)[:, 0]
    return kept, torch.where(kept < counts, again, following)


def triples(rule: Rule, certain: bool, rows: int = 40_000, most: int = 3) -> Tensor:
    """How often each three tokens follow token 0, when rounds of ragged drafts write them: (V * V * V,)."""
    g = generator(3)
    written = torch.zeros(rows, 1 + 3 + most, dtype=torch.long)
    length = torch.ones(rows, dtype=torch.long)
    every = torch.arange(rows)
    while int(length.min()) < 4:
        last = written[every, length - 1]
        places = length[:, None] + torch.arange(most + 1)
        tokens, chances = [], []
        for ahead in range(most):
            q = GUESS[tokens[-1] if tokens else last]
            drawn = draw(q[:, None], every, places[:, ahead : ahead + 1], Purpose.DRAFT)[:, 0]
            tokens.append(q.argmax(-1) if certain else drawn)
            chances.append(q)
        counts = torch.randint(0, most + 1, (rows,), generator=g)
        drafted = torch.stack(tokens, 1)
        p = TABLE[torch.cat([last[:, None], drafted], 1)]
        kept, following = rule(p, None if certain else torch.stack(chances, 1), drafted, counts, every, places)
        for column in range(most + 1):
            token = following if column == most else torch.where(column < kept, drafted[:, column], following)
            room = (column <= kept) & (length + column < 4)
            at = (length + column).clamp(max=written.shape[1] - 1)
            written[every[room], at[room]] = token[room]
        length = (length + kept + 1).clamp(max=4)
    code = (written[:, 1] * V + written[:, 2]) * V + written[:, 3]
    return torch.bincount(code, minlength=V**3).double()


def expected_triples(rows: int = 40_000) -> Tensor:
    p = TABLE.double()
    return rows * (p[0][:, None, None] * p[:, :, None] * p[None]).flatten()


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_rule_gives_the_distribution_of_the_table(certain):
    assert surprise(triples(right, certain), expected_triples()) < 1


@pytest.mark.parametrize(
    ("rule", "certain"),
    [(without_residual, False), (without_residual, True), (without_refusals, False), (with_one_purpose, False)],
)
def test_wrong_rule_is_found(rule, certain):
    rows = 100_000
    assert surprise(triples(rule, certain, rows), expected_triples(rows)) > 2


def test_drafts_of_the_same_distribution_are_all_kept():
    p = TABLE[torch.zeros(1000, 3, dtype=torch.long)]
    seeds, places = torch.arange(1000), torch.arange(3).expand(1000, 3)
    tokens = draw(p[:, :2], seeds, places[:, :2], Purpose.DRAFT)
    kept, _ = accept(p, p[:, :2], tokens, torch.full((1000,), 2), seeds, places)
    assert int(kept.min()) == 2


def verify(sampler: Sampler, logits: Tensor, tokens: Tensor, counts: list[int], q: Tensor | None = None):
    lengths = torch.zeros(len(logits), dtype=torch.long)
    return sampler.verify(logits, Drafts(tokens, counts, q), tokens, torch.tensor(counts), lengths)


def test_drafts_beyond_a_rows_count_are_never_kept():
    p = TABLE[torch.zeros(1000, 3, dtype=torch.long)]
    tokens = torch.full((1000, 2), int(TABLE[0].argmax()))
    counts = [0, 1] * 500
    for temperature in (0.0, 1.0):
        rows = sampler(*[{"temperature": temperature, "seed": row} for row in range(1000)])
        for q in (None, p[:, :2]) if temperature else (None,):
            kept, _ = verify(rows, p.log(), tokens, counts, q)
            assert (kept <= torch.tensor(counts)).all()
            assert int(kept.max()) == 1


def test_greedy_keeps_what_is_the_argmax_and_ties_go_the_same_way():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    for drafted, kept, following in (([1, 0], 2, 0), ([2, 0], 0, 1), ([1, 2], 1, 0)):
        assert sampler({}).draw(logits[:, 0], torch.tensor([0]))[0].item() == 1
        got = verify(sampler({}), logits, torch.tensor([drafted]), [2])
        assert (got[0].item(), got[1].item()) == (kept, following)


# ---- one row beside others

WAYS = [
    {"temperature": 0.7, "seed": 3},
    {},
    {"temperature": 1.3, "seed": 3, "top_k": 5},
    {"temperature": 1.0, "seed": 2**64 - 1, "top_p": 0.8},
    {"temperature": 5e-324, "seed": 1},
    {"temperature": 2.0, "seed": -(2**63), "top_p": 0.5, "top_k": 20, "before": 7},
    {"temperature": 1.0, "top_k": 10**9},
    {"temperature": 1.0, "top_k": 1},
]


def test_a_row_draws_alone_what_it_draws_beside_any_others():
    logits = torch.randn(len(WAYS), 4, 37, generator=generator(5))
    lengths = torch.tensor([3, 3, 9, 0, 2, 5, 1, 1])
    whole = sampler(*WAYS)
    tokens, q = whole.draw(logits[:, 0], lengths)
    p = whole.probabilities(logits)
    drafted = torch.randint(37, (len(WAYS), 3), generator=generator(6))
    guess = torch.rand(len(WAYS), 3, 37, generator=generator(7)).softmax(-1)
    counts = [3, 0, 2, 3, 3, 1, 3, 2]

    def judge(rows: Sampler, at: list[int], q: Tensor | None):
        drafts = Drafts(drafted[at], [counts[n] for n in at], q)
        return rows.verify(logits[at], drafts, drafted[at], torch.tensor(drafts.counts), lengths[at])

    verdicts = [judge(whole, list(range(len(WAYS))), each) for each in (None, guess)]
    for at in [[n] for n in range(len(WAYS))] + [[5, 2], [7, 6, 0], [1, 3]]:
        some = sampler(*[WAYS[n] for n in at])
        got, chances = some.draw(logits[at, 0], lengths[at])
        assert torch.equal(got, tokens[at])
        assert chances is None or torch.equal(chances, q[at])
        assert torch.equal(some.probabilities(logits[at]), p[at])
        for (kept, following), each in zip(verdicts, (None, guess), strict=True):
            assert torch.equal(judge(some, at, None if each is None else each[at])[0], kept[at])
            assert torch.equal(judge(some, at, None if each is None else each[at])[1], following[at])


def test_certain_drafts_change_no_token_that_is_drawn():
    logits = torch.randn(len(WAYS), 1, 37, generator=generator(5)).expand(-1, 4, -1)
    rows, none = sampler(*WAYS), torch.zeros(len(WAYS), dtype=torch.long)
    drawn = torch.stack([rows.draw(logits[:, 0], none + ahead)[0] for ahead in range(4)], 1)
    for wrong in range(4):
        tokens = drawn[:, :3].clone()
        tokens[:, wrong:] ^= 1
        kept, following = verify(rows, logits, tokens, [3] * len(WAYS))
        assert kept.tolist() == [min(wrong, 3)] * len(WAYS)
        assert torch.equal(following, drawn[:, min(wrong, 3)])


# ---- end to end, on a real model of few tokens


SIZE = 8
ROWS = 3000


def exact_triples(model, prompt: Tensor, way: dict) -> Tensor:
    """The probability of each three tokens after the prompt, by full forwards over all of them."""
    every = torch.tensor(list(itertools.product(range(SIZE), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(every), -1), every], 1), use_cache=False).logits
    p = sampler(*[way] * len(every)).probabilities(logits[:, -4:-1])
    return p.gather(-1, every[..., None]).double().prod(1)[:, 0]


@pytest.mark.parametrize("family", ["qwen3_next", "mamba"])
@pytest.mark.parametrize("way", ["plain", "lookup", "assistant"])
def test_sampled_text_has_the_models_distribution(family, way, always_drafts):
    model, _ = families.build(family, vocab_size=SIZE)
    other, _ = families.build(family, seed=1, vocab_size=SIZE)
    options = {"plain": {}, "lookup": {"lookup": 2}, "assistant": {"assistant": other}}[way]
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    how = {"temperature": 1.5, "top_p": 0.95, "top_k": 7}
    exact = exact_triples(model, prompt, how) * ROWS
    reports = []
    ids = sc.generate(
        model, prompt.expand(ROWS, -1), max_new_tokens=3, seed=1, report=reports.append, **how, **options
    )[:, -3:]
    counts = torch.bincount((ids * torch.tensor([SIZE**2, SIZE, 1])).sum(1), minlength=SIZE**3).double()
    assert surprise(counts, exact) < 1
    assert (reports[0].drafted > 0) == (way != "plain")
    assert counts[exact == 0].sum() == 0
    wrong = exact_triples(other, prompt, how) * ROWS  # the same test tells the two models apart
    assert surprise(counts, wrong) > 2


# ---- temperature, top_k, top_p


def chances(logits: Tensor, **way: float) -> Tensor:
    """Of logits (B, V), every row drawing in one way."""
    return sampler(*[way] * len(logits)).probabilities(logits[:, None])[:, 0]


def test_temperature_sharpens_and_zero_is_the_argmax():
    logits = torch.tensor([[2.0, 1.0, 0.5, 2.0]])
    torch.testing.assert_close(chances(logits, temperature=0.5), (logits / 0.5).softmax(-1))
    assert chances(logits).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert chances(logits, temperature=1e-30).tolist() == [[0.5, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-46, 5e-324])
def test_temperature_next_to_nothing_is_the_argmax(temperature):
    logits = torch.tensor([[2.0, 1.0, -30.0, 1.5], [0.0, -torch.inf, 1e-3, 2e-3]])
    for more in ({}, {"top_p": 0.9, "top_k": 3}):
        got = chances(logits, temperature=temperature, **more)
        assert got.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


def test_top_k_keeps_the_likeliest_tokens():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    p = chances(logits, temperature=1.0, top_k=2)
    torch.testing.assert_close(p, torch.tensor([[0.0, 3.0, -torch.inf, 2.0]]).where(p > 0, -torch.inf).softmax(-1))
    assert (p > 0).tolist() == [[False, True, False, True]]
    assert chances(logits, temperature=1.0, top_k=9).gt(0).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.96, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    got = chances(p.log(), temperature=1.0, top_p=top_p)
    want = torch.zeros_like(p)
    want[0, kept] = p[0, kept] / p[0, kept].sum()
    torch.testing.assert_close(got, want)


def test_options_of_a_row_are_its_own():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(4, -1)
    ways = [{}, {"temperature": 1.0, "top_k": 2}, {"temperature": 2.0}, {"temperature": 1.0, "top_p": 0.9}]
    got = sampler(*ways).probabilities(logits[:, None])[:, 0]
    for row, way in enumerate(ways):
        assert torch.equal(got[row : row + 1], chances(logits[:1], **way))
    assert (got > 0).sum(-1).tolist() == [1, 2, 4, 3]
