"""How many tokens are drafted follows what was accepted, and nothing else."""

from __future__ import annotations

import pytest

from statecache.decode.pace import PROBE, ROUND, WIDTH, Pace


def test_length_is_the_one_with_the_most_tokens_for_the_cost():
    for cost in (0.03, 0.2, 0.6):
        for rate in (0.05, 0.3, 0.6, 0.9, 0.99):
            pace = Pace(cost, 8, accepted=rate * 100, tried=100)
            speeds = [1.0] + [sum(rate**i for i in range(k + 1)) / (1 + ROUND + k * cost) for k in range(1, 9)]
            assert pace.best() == speeds.index(max(speeds))


def test_no_draft_is_made_where_it_cannot_pay():
    assert Pace(1.0, 8, accepted=3, tried=4).best() == 0
    assert Pace(WIDTH, 0, accepted=1, tried=1).length() == 0


def test_refusals_end_drafting_and_a_probe_that_is_kept_brings_it_back():
    pace = Pace(WIDTH, 8, accepted=1, tried=2)
    rounds = 0
    while pace.length():
        pace.learn(1, 0)
        rounds += 1
    assert rounds <= 3
    assert [pace.length() for _ in range(PROBE)] == [0] * (PROBE - 1) + [1]
    pace.learn(1, 0)
    assert [pace.length() for _ in range(PROBE + 1)] == [0] * PROBE + [1]
    for _ in range(12):
        pace.learn(1, 1)
        assert pace.length() > 0
    assert pace.length() == 8


def test_rate_counts_what_was_tried():
    pace = Pace(WIDTH, 8, accepted=0, tried=0)
    pace.learn(4, 3)
    assert pace.rate == pytest.approx(3 / 4)
    pace.learn(0, 0)
    assert pace.rate == pytest.approx(3 / 4)
