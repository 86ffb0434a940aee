"""How many tokens are drafted follows what was accepted, and nothing else."""

from __future__ import annotations

import pytest

from statecache.decode.pace import PATIENCE, PROBE, ROUND, WIDTH, Pace


def test_length_is_the_one_with_the_most_tokens_for_the_cost():
    for cost in (0.0, 0.2, 0.6):
        for rate in (0.05, 0.3, 0.6, 0.9, 0.99):
            pace = Pace(cost, 8, accepted=rate * 100, tried=100)
            costs = [1.0] + [1 + ROUND + WIDTH * k + cost * (k + 1) for k in range(1, 9)]
            speeds = [sum(rate**i for i in range(k + 1)) / costs[k] for k in range(9)]
            assert pace.best() == speeds.index(max(speeds))


def test_no_draft_is_made_where_it_cannot_pay():
    assert Pace(1.0, 8, accepted=3, tried=4).best() == 0
    assert Pace(0.0, 0, accepted=1, tried=1).length() == 0


def test_refusals_end_drafting_for_a_while():
    pace = Pace(0.0, 8, accepted=7, tried=8)
    rounds = 0
    while pace.best():
        pace.learn(1, 0)
        rounds += 1
    assert rounds <= 5
    assert quiet(pace) == min(PROBE * 2**rounds, PATIENCE)


def test_every_refusal_in_a_row_doubles_the_wait():
    pace = Pace(0.0, 8, accepted=0, tried=8)
    assert quiet(pace) == 0
    for wait in (2 * PROBE, PATIENCE, PATIENCE):
        pace.learn(1, 0)
        assert quiet(pace) == wait


def quiet(pace: Pace) -> int:
    """Rounds without a draft until one is tried."""
    rounds = 0
    while not (drafts := pace.length()):
        rounds += 1
    assert drafts == 1
    return rounds


def test_a_probe_that_is_kept_brings_drafting_back():
    pace = Pace(0.0, 8, accepted=0, tried=8)
    assert pace.best() == 0
    for _ in range(24):
        assert pace.length() > 0
        pace.learn(1, 1)
    assert pace.length() == 8
    assert pace.wait == PROBE


def test_rate_counts_what_was_tried():
    pace = Pace(0.0, 8, accepted=0, tried=0)
    pace.learn(4, 3)
    assert pace.rate == pytest.approx(3 / 4)
    pace.learn(0, 0)
    assert pace.rate == pytest.approx(3 / 4)
