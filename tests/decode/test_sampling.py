"""Drawn tokens have the model's distribution, with drafts as without; a wrong rule fails the same test.

B rows, K drafted tokens, V words.
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
from statecache.decode.sampling import Drafts, Sampler, accept, race
from statecache.errors import OptionError

V = 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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

Rule = Callable[[Tensor, Drafts, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def without_residual(p: Tensor, drafts: Drafts, counts: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Wrong: after a refusal it draws from p, which had its chance with the refused token already."""
    kept, _ = accept(p, drafts, counts, g)
    return kept, race(p[torch.arange(len(p)), kept], g)


def without_refusals(p: Tensor, drafts: Drafts, counts: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Wrong: it keeps every draft."""
    return counts, race(p[torch.arange(len(p)), counts], g)


def triples(rule: Rule, certain: bool, rows: int = 40_000, most: int = 3) -> Tensor:
    """How often each three tokens follow token 0, when rounds of ragged drafts write them: (V * V * V,)."""
    g = generator(3)
    written = torch.zeros(rows, 1 + 3 + most, dtype=torch.long)
    length = torch.ones(rows, dtype=torch.long)
    every = torch.arange(rows)
    while int(length.min()) < 4:
        last = written[every, length - 1]
        tokens, chances = [], []
        for _ in range(most):
            q = GUESS[tokens[-1] if tokens else last]
            tokens.append(q.argmax(-1) if certain else race(q, g))
            chances.append(q)
        counts = torch.randint(0, most + 1, (rows,), generator=g)
        drafts = Drafts(torch.stack(tokens, 1), counts.tolist(), None if certain else torch.stack(chances, 1))
        p = TABLE[torch.cat([last[:, None], drafts.tokens], 1)]
        kept, following = rule(p, drafts, counts, g)
        for column in range(most + 1):
            token = following if column == most else torch.where(column < kept, drafts.tokens[:, column], following)
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
    assert surprise(triples(accept, certain), expected_triples()) < 1


@pytest.mark.parametrize(
    ("rule", "certain"), [(without_residual, False), (without_residual, True), (without_refusals, False)]
)
def test_wrong_rule_is_found(rule, certain):
    assert surprise(triples(rule, certain), expected_triples()) > 2


def test_drafts_of_the_same_distribution_are_all_kept():
    p = TABLE[torch.zeros(1000, 3, dtype=torch.long)]
    tokens = torch.stack([race(p[:, 0], generator(4)), race(p[:, 1], generator(5))], 1)
    kept, _ = accept(p, Drafts(tokens, [2] * 1000, p[:, :2]), torch.full((1000,), 2), generator(6))
    assert int(kept.min()) == 2


def test_drafts_beyond_a_rows_count_are_never_kept():
    p = TABLE[torch.zeros(1000, 3, dtype=torch.long)]
    tokens = torch.full((1000, 2), int(TABLE[0].argmax()))
    counts = [0, 1] * 500
    for sampler in (Sampler(1.0, generator=generator(1)), Sampler()):
        kept, _ = sampler.verify(p.log(), Drafts(tokens, counts))
        assert (kept <= torch.tensor(counts)).all()
        assert int(kept.max()) == 1


def test_greedy_keeps_what_is_the_argmax_and_ties_go_the_same_way():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]])
    for drafted, kept, following in (([1, 0], 2, 0), ([2, 0], 0, 1), ([1, 2], 1, 0)):
        assert Sampler().draw(logits[:, 0])[0].item() == 1
        got = Sampler().verify(logits, Drafts(torch.tensor([drafted]), [2]))
        assert (got[0].item(), got[1].item()) == (kept, following)


# ---- end to end, on a real model of few words


WORDS = 8
ROWS = 3000


def exact_triples(model, prompt: Tensor, sampler: Sampler) -> Tensor:
    """The probability of each three tokens after the prompt, by full forwards over all of them."""
    every = torch.tensor(list(itertools.product(range(WORDS), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(every), -1), every], 1), use_cache=False).logits
    p = sampler.probabilities(logits[:, -4:-1])
    return p.gather(-1, every[..., None]).double().prod(1)[:, 0]


@pytest.mark.parametrize("family", ["qwen3_next", "mamba"])
@pytest.mark.parametrize("way", ["plain", "lookup", "assistant"])
def test_sampled_text_has_the_models_distribution(family, way, always_drafts):
    model, _ = families.build(family, vocab_size=WORDS)
    other, _ = families.build(family, seed=1, vocab_size=WORDS)
    options = {"plain": {}, "lookup": {"lookup": 2}, "assistant": {"assistant": other}}[way]
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    how = {"temperature": 1.5, "top_p": 0.95, "top_k": 7}
    exact = exact_triples(model, prompt, Sampler(**how)) * ROWS
    reports = []
    ids = sc.generate(
        model, prompt.expand(ROWS, -1), max_new_tokens=3, seed=1, report=reports.append, **how, **options
    )[:, -3:]
    counts = torch.bincount((ids * torch.tensor([WORDS**2, WORDS, 1])).sum(1), minlength=WORDS**3).double()
    assert surprise(counts, exact) < 1
    assert (reports[0].drafted > 0) == (way != "plain")
    assert counts[exact == 0].sum() == 0
    wrong = exact_triples(other, prompt, Sampler(**how)) * ROWS  # the same test tells the two models apart
    assert surprise(counts, wrong) > 2


# ---- temperature, top_k, top_p


def test_temperature_sharpens_and_zero_is_the_argmax():
    logits = torch.tensor([[2.0, 1.0, 0.5, 2.0]])
    torch.testing.assert_close(Sampler(0.5).probabilities(logits), (logits / 0.5).softmax(-1))
    assert Sampler().probabilities(logits).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert Sampler(1e-30).probabilities(logits).tolist() == [[0.5, 0.0, 0.0, 0.5]]


@pytest.mark.parametrize("temperature", [1e-30, 1e-39, 1e-46, 5e-324])
def test_temperature_next_to_nothing_is_the_argmax(temperature):
    logits = torch.tensor([[2.0, 1.0, -30.0, 1.5], [0.0, -torch.inf, 1e-3, 2e-3]])
    for sampler in (Sampler(temperature), Sampler(temperature, top_p=0.9, top_k=3)):
        assert sampler.probabilities(logits).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]


def test_top_k_keeps_the_likeliest_words():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    p = Sampler(1.0, top_k=2).probabilities(logits)
    torch.testing.assert_close(p, torch.tensor([[0.0, 3.0, -torch.inf, 2.0]]).where(p > 0, -torch.inf).softmax(-1))
    assert (p > 0).tolist() == [[False, True, False, True]]
    assert Sampler(1.0, top_k=9).probabilities(logits).gt(0).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (0.96, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_words_that_reach_it(top_p, kept):
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    got = Sampler(1.0, top_p=top_p).probabilities(p.log())
    want = torch.zeros_like(p)
    want[0, kept] = p[0, kept] / p[0, kept].sum()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1: give 0 for the likeliest token, or more to draw"),
        ({"temperature": float("nan")}, "temperature=nan: give 0"),
        ({"temperature": "1"}, "temperature='1': give 0"),
        ({"temperature": True}, "temperature=True: give 0"),
        ({"top_p": None}, "top_p=None: give a probability above 0"),
        ({"top_p": 0.0}, "top_p=0.0: give a probability above 0, up to 1 for all words"),
        ({"top_p": 1.5}, "top_p=1.5: give a probability"),
        ({"top_k": -1}, "top_k=-1: give the number of words to draw from, or 0 for all of them"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(OptionError) as refused:
        Sampler(**options)
    assert str(refused.value).startswith(message)
