"""Marks that are older than what they stand beside: of the empty cache, or of a state that was first written later."""

from __future__ import annotations

import families
import prepared_oracle as oracle
import pytest
import tiny_models
import torch

import statecache as sc
from statecache.errors import StaleMarkError

FEED, LATER = ("feed", 2, (1,)), ("feed", 8, (1,))  # three tokens a row, then nine
MARK, EMPTY, FIRST, SECOND = ("checkpoint", 0, (0,)), ("restore", 0, (0,)), ("restore", 0, (1,)), ("restore", 0, (2,))
SCHEDULES = {
    "a later mark is good after the empty one": [MARK, FEED, MARK, EMPTY, FIRST, LATER],
    "each of three in any order": [MARK, FEED, MARK, LATER, MARK, EMPTY, SECOND, FIRST, SECOND, EMPTY, SECOND, LATER],
    "the empty one, then another course": [MARK, FEED, MARK, EMPTY, LATER, EMPTY, FEED],
    "a mark written over is stale, the empty one is not": [MARK, LATER, MARK, EMPTY, FEED, FIRST, EMPTY, FEED],
}
SUBJECTS = [(name, True) for name in oracle.MODELS] + [(name, False) for name in oracle.UNMODIFIED]
UNLISTED = ["lfm2", "zaya", *(name for name in ("inkling",) if name in families.FAMILIES)]


@pytest.mark.parametrize("room", oracle.ROOMS)
@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize(("name", "prepared"), SUBJECTS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_marks_of_an_empty_cache(name: str, prepared: bool, schedule: list[oracle.Op], slack: int, room: str) -> None:
    if room == "compiled" and not prepared:
        pytest.skip("the form of compiled code is the prepared model's")
    models = oracle.build(name) if prepared else oracle.build_unmodified(name)
    if models.token_by_token:
        schedule = [(what, 0 if what == "feed" else number, each) for what, number, each in schedule]
    oracle.run(models, schedule, slack=slack, room=room)


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("name", UNLISTED)
def test_a_mark_older_than_a_states_first_write_leaves_later_marks_good(name: str, slack: int) -> None:
    model, ids = tiny_models.build(name), tiny_models.draw(2, 12)
    config = tiny_models.renamed(model.config)
    cache = sc.StateCache(config, slack=slack, rows=2, dtype=torch.float32, device="cpu")
    early = cache.checkpoint()
    tiny_models.feed(model, cache, ids[:, :9], 0)
    later = cache.checkpoint()
    cache.restore(early)
    cache.restore(later)
    got = tiny_models.feed(model, cache, ids[:, 9:], 9)
    tiny_models.assert_same(got, tiny_models.full(model, ids)[:, 9:])


@pytest.mark.parametrize("name", ["lfm2", "gemma3_text"])
def test_a_mark_that_new_tokens_wrote_over_after_an_early_restore_says_so(name: str) -> None:
    model, ids = tiny_models.build(name), tiny_models.draw(2, 12)
    cache = sc.StateCache(model.config)
    empty = cache.checkpoint()
    tiny_models.feed(model, cache, ids[:, :9], 0)
    later = cache.checkpoint()
    cache.restore(empty)
    tiny_models.feed(model, cache, ids[:, :2], 0)
    with pytest.raises(StaleMarkError, match="9 tokens"):
        cache.restore(later)
