"""How many tokens are drafted follows what was accepted, and nothing else."""

from __future__ import annotations

import pytest

from statecache.decode.draft_length import PATIENCE, PROBE, ROUND, WIDTH, DraftLength, Rounds, plain_round


def test_length_is_the_one_with_the_most_tokens_for_the_cost():
    for cost in (0.0, 0.2, 0.6):
        for rate in (0.05, 0.3, 0.6, 0.9, 0.99):
            length = DraftLength(cost, 8, accepted=rate * 100, tried=100)
            costs = [1.0] + [1 + ROUND + WIDTH * k + cost * (k + 1) for k in range(1, 9)]
            speeds = [sum(rate**i for i in range(k + 1)) / costs[k] for k in range(9)]
            assert length.best() == speeds.index(max(speeds))


def test_length_is_one_that_there_are_rounds_of():
    few = Rounds(plain_round, sizes=(1, 4))
    for cost in (0.0, 0.1, 0.2):
        for rate in range(1, 100):
            length = DraftLength(cost, 8, accepted=rate, tried=100, rounds=few)
            best = max((0, 1, 4, 8), key=lambda k: speed(rate / 100, k, cost))
            assert length.best() == best


def speed(rate: float, k: int, cost: float) -> float:
    return sum(rate**i for i in range(k + 1)) / (1 + plain_round(k) + cost * (k + 1) if k else 1.0)


def test_no_draft_is_made_where_it_cannot_pay():
    assert DraftLength(1.0, 8, accepted=3, tried=4).best() == 0
    assert DraftLength(0.0, 0, accepted=1, tried=1).length() == 0


def test_refusals_end_drafting_for_a_while():
    length = DraftLength(0.0, 8, accepted=7, tried=8)
    rounds = 0
    while length.best():
        length.learn(1, 0)
        rounds += 1
    assert rounds <= 5
    assert quiet(length) == min(PROBE * 2**rounds, PATIENCE)


def test_every_refusal_in_a_row_doubles_the_wait():
    length = DraftLength(0.0, 8, accepted=0, tried=8)
    assert quiet(length) == 0
    for wait in (2 * PROBE, PATIENCE, PATIENCE):
        length.learn(1, 0)
        assert quiet(length) == wait


def quiet(length: DraftLength) -> int:
    """Rounds without a draft until one is tried."""
    rounds = 0
    while not (drafts := length.length()):
        rounds += 1
    assert drafts == 1
    return rounds


def test_a_probe_that_is_kept_brings_drafting_back():
    length = DraftLength(0.0, 8, accepted=0, tried=8)
    assert length.best() == 0
    for _ in range(24):
        assert length.length() > 0
        length.learn(1, 1)
    assert length.length() == 8
    assert length.wait == PROBE


def test_rate_counts_what_was_tried():
    length = DraftLength(0.0, 8, accepted=0, tried=0)
    length.learn(4, 3)
    assert length.rate == pytest.approx(3 / 4)
    length.learn(0, 0)
    assert length.rate == pytest.approx(3 / 4)
