"""A decoder writes what `generate` writes, on any rows, whatever comes and goes beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import statecache as sc
from statecache.decode.request import Request
from statecache.errors import CapacityError, ConfigError, OptionError, RowsError, ShapeError, SlackError, StepError

PROMPTS = [[5, 9, 33, 70], [8, 8, 90], [41, 7, 7, 2, 61]]
NEW = 9
WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": [0.0, 1.1, 0.7], "top_p": [1.0, 0.8, 1.0], "top_k": [0, 0, 6], "seed": [1, 2, 2**64 - 3]},
    {"temperature": 1.3, "min_p": [0.0, 0.2, 0.0], "seed": 11},
]


def cache_for(model: Any, rows: int = 3, capacity: int = 64, **options: Any) -> sc.StateCache:
    given = {"slack": 1, "back": False, **options}
    return sc.StateCache(model.config, capacity=capacity, rows=rows, dtype=torch.float32, device="cpu", **given)


def alone(model: Any, row: int, way: dict[str, Any], new: int = NEW) -> list[int]:
    """What `generate` writes for one of the prompts, given all of them as rows of ids of their own length."""
    from statecache.decode.request import row_seed

    own = {name: value[row] if isinstance(value, list) else value for name, value in way.items()}
    if isinstance(way.get("seed"), int):
        own["seed"] = [row_seed(way["seed"], row)]
    elif "seed" in own:
        own["seed"] = [own["seed"]]
    prompt = torch.tensor([PROMPTS[row]])
    return sc.generate(model, prompt, max_new_tokens=new, processors=[], **own)[0, prompt.shape[1] :].tolist()


def write(decoder: sc.Decoder, first: torch.Tensor, steps: int) -> list[list[int]]:
    """The tokens of all rows, each with its first."""
    out = [first.clone()]
    out += [decoder.step().clone() for _ in range(steps)]
    return torch.stack(out, 1).tolist()


@pytest.mark.parametrize(("way", "slack"), [(0, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 1), (2, 3)])
def test_it_writes_what_generate_writes(story: Any, way: int, slack: int) -> None:
    with sc.Decoder(story, cache_for(story, slack=slack)) as decoder:
        got = write(decoder, decoder.prefill(PROMPTS, **WAYS[way]), NEW - 1)
        assert decoder.counts.plain == NEW - 1
        assert decoder.lengths == decoder.cache.lengths.tolist() == [len(p) + NEW - 1 for p in PROMPTS]
    for row in range(3):
        want = alone(story, row, WAYS[way])  # may end before, with an end token
        assert got[row][: len(want)] == want
        assert len(want) > 1


def test_rows_come_and_go(story: Any) -> None:
    way = WAYS[2]
    want = [alone(story, row, way) for row in range(3)]

    def options(row: int) -> dict[str, Any]:
        return {name: [value[row]] for name, value in way.items()}

    with sc.Decoder(story, cache_for(story)) as decoder:
        got: dict[int, list[int]] = {0: decoder.prefill(PROMPTS[:1], [2], **options(0)).tolist()}
        place = {0: 2}

        def step() -> None:
            tokens = decoder.step().tolist()
            for row, written in got.items():
                if place[row] in decoder.writing:
                    written.append(tokens[place[row]])

        step()
        got[1], place[1] = decoder.prefill(PROMPTS[1:2], **options(1)).tolist(), 0
        step()
        step()
        decoder.leave([2])
        before = decoder.tokens[2].item()
        step()
        assert decoder.tokens[2].item() == before
        assert decoder.writing == [0]
        decoder.reset([2])
        got[2], place[2] = decoder.prefill(PROMPTS[2:], [2], **options(2)).tolist(), 2
        place[0] = 1
        step()
        for row in range(3):
            assert got[row] == want[row][: len(got[row])]
        assert list(map(len, got.values())) == [4, 5, 2]
        assert decoder.cache.lengths.tolist() == decoder.lengths == [len(PROMPTS[1]) + 4, 0, len(PROMPTS[2]) + 1]


def test_another_cache_is_copied_in(story: Any) -> None:
    other = sc.StateCache(story.config, slack=4)
    ids = torch.tensor([[5, 9, 33, 70, 3], [8, 8, 90, 1, 4]])
    sc.generate(story, ids, cache=other, max_new_tokens=3, processors=[])
    want = sc.generate(story, torch.tensor([[12], [13]]), cache=other.fork(), max_new_tokens=5, processors=[])
    with sc.Decoder(story, cache_for(story)) as decoder:
        decoder.bind(other, [2, 0])
        assert decoder.lengths == [7, 0, 7]
        assert not decoder.writing
        tokens = write(decoder, decoder.prefill([[12], [13]], [2, 0])[[1, 1, 0]], 4)
        assert [tokens[2], tokens[0]] == want[:, 1:].tolist()
        assert other.lengths.tolist() == [7, 7]


def drafts_of(texts: list[list[int]], lengths: list[int], most: int, wrong: torch.Generator) -> torch.Tensor:
    """What follows the last token in these texts, of which a third is replaced."""
    rows = [[*text[n : n + most], *[0] * most][:most] for text, n in zip(texts, lengths, strict=True)]
    right = torch.rand(len(texts), most, generator=wrong) < 2 / 3
    return torch.where(right, torch.tensor(rows), torch.tensor(7))


@pytest.mark.parametrize(("way", "slack", "back"), [(0, 5, False), (0, 5, True), (1, 4, False), (2, 8, False)])
def test_rounds_write_what_steps_write(story: Any, way: int, slack: int, back: bool) -> None:
    new, most = 24, slack - 1
    with sc.Decoder(story, cache_for(story, slack=slack, back=back)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS, **WAYS[way]), new + 2 * slack)
    wrong, kept = torch.Generator().manual_seed(slack), set()
    with sc.Decoder(story, cache_for(story, slack=slack, back=back)) as decoder:
        got = [[n] for n in decoder.prefill(PROMPTS, **WAYS[way]).tolist()]

        def step() -> None:
            for row, token in enumerate(decoder.step().tolist()):
                got[row].append(token)

        while max(map(len, got)) < new:
            drafts = drafts_of(want, list(map(len, got)), most, wrong)
            counts = torch.randint(0, most + 1, (3,), generator=wrong)
            agreed = decoder.check(drafts, counts if len(got[0]) % 2 else None).tolist()
            kept |= set(agreed)
            for row, (n, token) in enumerate(zip(agreed, decoder.tokens.tolist(), strict=True)):
                got[row] += [*drafts[row, :n].tolist(), token]
            assert decoder.lengths == [len(p) + len(g) - 1 for p, g in zip(PROMPTS, got, strict=True)]
            if len(got[0]) % 3 == 0:
                step()
        step()
        step()
        assert decoder.lengths == decoder.cache.lengths.tolist()
    assert got == [text[: len(written)] for text, written in zip(want, got, strict=True)]
    assert len(kept) > 2


def test_tokens_that_are_known_are_taken_in_as_steps_take_them(story: Any) -> None:
    with sc.Decoder(story, cache_for(story, slack=5)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS, **WAYS[1]), 14)
    with sc.Decoder(story, cache_for(story, slack=5)) as decoder:
        decoder.prefill(PROMPTS, **WAYS[1])
        decoder.leave([1])
        mark, held = decoder.cache.checkpoint(), decoder.lengths
        for _ in range(2):
            at = [0, 0, 0]
            for counts in ([3, 0, 5], [1, 9, 1], [5, 1, 2]):
                rows = [text[n : n + 5] for text, n in zip(want, at, strict=True)]
                got = decoder.take(torch.tensor(rows)[:, : max(counts[0], counts[2])], counts).tolist()
                at = [n + counts[row] if row != 1 else 0 for row, n in enumerate(at)]
                assert got == [text[n] for text, n in zip(want, at, strict=True)]
                assert decoder.lengths == [n + more for n, more in zip(held, at, strict=True)]
            assert decoder.step().tolist() == [want[0][at[0] + 1], want[1][0], want[2][at[2] + 1]]
            decoder.restore(mark)
            assert decoder.lengths == held == decoder.cache.lengths.tolist()
        for tokens, counts in (([[1, 2]] * 3, [0, 1, 1]), ([[1, 2]] * 3, [1, 1, 3]), ([[1]] * 2, [1, 1, 1])):
            with pytest.raises(ShapeError, match=r"give \(3, T\), and of each row that writes 1 to T"):
                decoder.take(torch.tensor(tokens), counts)
        with pytest.raises(SlackError, match="a token and 5 drafts"):
            decoder.take(torch.ones(3, 6, dtype=torch.long), [6, 6, 6])


@pytest.mark.parametrize("way", [0, 1])
def test_what_is_looked_at_ahead_becomes_no_part_of_rows(story: Any, way: int) -> None:
    with sc.Decoder(story, cache_for(story, slack=5)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS, **WAYS[way]), 14)
    with sc.Decoder(story, cache_for(story, slack=5, capacity=17)) as decoder:
        decoder.prefill(PROMPTS, **WAYS[way])
        decoder.leave([1])
        held, at = decoder.lengths, [0, 0, 0]
        for counts, n in (([3, 0, 5], 4), ([1, 9, 1], 1), ([2, 0, 2], 3)):
            rows = torch.tensor([text[begin : begin + 5] for text, begin in zip(want, at, strict=True)])
            got = decoder.draft(rows, counts, n).tolist()
            at = [0 if row == 1 else begin + counts[row] for row, begin in enumerate(at)]
            for row in (0, 2):
                assert got[row] == want[row][at[row] : at[row] + n]
            assert decoder.tokens.tolist() == [want[row][at[row]] for row in range(3)]
            assert decoder.lengths == [n + more for n, more in zip(held, at, strict=True)]
            assert decoder.lengths == decoder.cache.lengths.tolist()
        assert decoder.step().tolist()[::2] == [want[row][at[row] + 1] for row in (0, 2)]
        with pytest.raises(ShapeError, match="two columns and one token ahead at least"):
            decoder.draft(rows[:, :1], [1, 0, 1], 2)
        room = 17 - decoder.lengths[2]
        with pytest.raises(CapacityError, match=f"row 2 has room for {room} tokens of {room + 1}"):
            decoder.draft(rows, [1, 0, 1], room + 1)
        assert decoder.draft(rows, [1, 0, 1], room).shape == (3, room)


def test_a_look_ahead_that_is_interrupted_is_no_part_of_rows(story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with sc.Decoder(story, cache_for(story, slack=5)) as decoder:
        want = decoder.prefill(PROMPTS).clone()
        mark, choose, chosen = decoder.cache.checkpoint(), decoder._choose, 0

        def interrupted(*args: Any) -> None:
            nonlocal chosen
            chosen += 1
            if chosen == 3:
                raise KeyboardInterrupt
            choose(*args)

        monkeypatch.setattr(decoder, "_choose", interrupted)
        tokens = torch.stack([want, want], 1)
        with pytest.raises(KeyboardInterrupt):
            decoder.draft(tokens, [1, 1, 1], 6)
        with pytest.raises(StepError, match="a look ahead was interrupted"):
            decoder.step()
        decoder.restore(mark)
        first = decoder.draft(tokens, [1, 1, 1], 4).clone()
        decoder.restore(mark)
        assert torch.equal(decoder.draft(tokens, [1, 1, 1], 4), first)


def test_idle_rows_take_no_part_in_rounds(story: Any) -> None:
    with sc.Decoder(story, cache_for(story, slack=4)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS), 6)
    with sc.Decoder(story, cache_for(story, slack=4)) as decoder:
        decoder.prefill(PROMPTS)
        decoder.leave([1])
        held = decoder.cache.snapshot(1)
        kept = decoder.check(torch.tensor([text[1:4] for text in want]))
        assert kept.tolist() == [3, 0, 3]
        assert decoder.tokens.tolist() == [want[0][4], want[1][0], want[2][4]]
        assert decoder.lengths == [len(PROMPTS[0]) + 4, len(PROMPTS[1]), len(PROMPTS[2]) + 4]
        after = decoder.cache.snapshot(1)
        assert all(torch.equal(held.entries[name], after.entries[name]) for name in held.entries)
        assert decoder.step().tolist() == [want[0][5], want[1][0], want[2][5]]


def test_a_round_that_cannot_be_is_refused_and_changes_nothing(story: Any) -> None:
    drafts = torch.tensor([[1, 2, 3]] * 3)
    with sc.Decoder(story, cache_for(story, slack=4, capacity=9)) as decoder:
        with pytest.raises(StepError, match="no row writes"):
            decoder.check(drafts)
        decoder.prefill(PROMPTS)
        with pytest.raises(SlackError, match=r"a token and 4 drafts.*slack=4; make it with slack=5"):
            decoder.check(torch.ones(3, 4, dtype=torch.long))
        with pytest.raises(ShapeError, match=r"drafts \(2, 3\): give \(3, K\), at least one for each row"):
            decoder.check(drafts[:2])
        decoder.check(drafts, torch.tensor([0, 0, 0]))
        with pytest.raises(CapacityError, match="row 2 has room for 3 tokens of 4, at capacity=9"):
            decoder.check(drafts)
        assert decoder.lengths == decoder.cache.lengths.tolist() == [5, 4, 6]
        assert decoder.check(drafts[:, :2], torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]
        for counts in ([1, 2], [0, 0, -1], [4, 0, 0]):
            with pytest.raises(ShapeError, match=r"give 3, of 0 to 3 drafts, one for each row of the cache"):
                decoder.check(drafts, counts)


def test_rows_need_room_for_the_drafts_that_the_host_knows_of(story: Any) -> None:
    with sc.Decoder(story, cache_for(story, slack=4)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS), 8)
    drafts = torch.tensor([text[1:4] for text in want])
    with sc.Decoder(story, cache_for(story, slack=4, capacity=max(map(len, PROMPTS)) + 2)) as decoder:
        decoder.prefill(PROMPTS)
        with pytest.raises(CapacityError, match="row 0 has room for 3 tokens of 4"):
            decoder.check(drafts, torch.tensor([2, 3, 1]))
        assert decoder.check(drafts, [2, 3, 1]).tolist() == [2, 3, 1]
        assert decoder.tokens.tolist() == [want[0][3], want[1][4], want[2][2]]
        assert decoder.lengths == decoder.cache.lengths.tolist() == [7, 7, 7]
        with pytest.raises(CapacityError, match="row 0 is full"):
            decoder.check(drafts, [0, 0, 0])
        decoder.reset([1])
        decoder.prefill([PROMPTS[1]])
        decoder.leave([0, 2])
        assert decoder.check(drafts, [3, 2, 3]).tolist() == [0, 2, 0]  # idle rows need none
        assert decoder.tokens.tolist()[1] == want[1][3]


def test_a_round_takes_in_nothing_from_an_end_token_on(story: Any) -> None:
    with sc.Decoder(story, cache_for(story, slack=6)) as decoder:
        want = write(decoder, decoder.prefill(PROMPTS), 8)
    drafts = torch.tensor([text[1:6] for text in want])
    ends = [{want[0][3]}, {7, 8, 9} - set(want[1][1:6]), {want[2][6]}]
    first = [next((n for n, t in enumerate(text[1:6]) if t in end), 5) for text, end in zip(want, ends, strict=True)]
    with sc.Decoder(story, cache_for(story, slack=6)) as decoder:
        tokens = decoder.prefill(PROMPTS)
        requests = [Request([1], ends=frozenset(end)) for end in ends]
        decoder.begin([0, 1, 2], requests, tokens, list(map(len, PROMPTS)))
        kept = decoder.check(drafts).tolist()
        assert kept == first and first[0] < first[1] == 5
        assert decoder.tokens.tolist() == [text[n + 1] for text, n in zip(want, kept, strict=True)]
        assert decoder.lengths == [len(prompt) + n + 1 for prompt, n in zip(PROMPTS, kept, strict=True)]
        assert decoder.cache.lengths.tolist() == decoder.lengths


def test_what_is_wrong_is_refused_and_changes_nothing(story: Any, draft: Any) -> None:
    with pytest.raises(OptionError, match="never moves"):
        sc.Decoder(story, sc.StateCache(story.config))
    with pytest.raises(OptionError, match=r"buckets=\[0\]: give numbers of rows, from 1 to the cache's 3"):
        sc.Decoder(story, cache_for(story), buckets=[0])
    decoder = sc.Decoder(story, cache_for(story, capacity=6))
    with pytest.raises(StepError, match="no row writes"):
        decoder.step()
    with pytest.raises(CapacityError, match="row 0 holds 0 tokens and its prompt brings 7"):
        decoder.prefill([[1] * 7])
    with pytest.raises(RowsError, match="4 prompts came for 3 rows"):
        decoder.prefill([[1]] * 4)
    with pytest.raises(OptionError, match="top_p=7"):
        decoder.prefill([[1]], top_p=7)
    decoder.prefill([[1, 2, 3, 4, 5]], [1])
    with pytest.raises(RowsError, match=r"rows \[1\] still write"):
        decoder.prefill([[1]], [1])
    with pytest.raises(RowsError, match=r"rows \[3\] of 3"):
        decoder.leave([3])
    decoder.step()
    with pytest.raises(CapacityError, match="row 1 is full, at capacity=6"):
        decoder.step()
    long = sc.StateCache(story.config, slack=1)
    sc.generate(story, torch.ones(1, 9, dtype=torch.long), cache=long, max_new_tokens=1)
    with pytest.raises(CapacityError, match="a row of 9 tokens"):
        decoder.bind(long, [0])
    foreign = sc.StateCache(draft.config, slack=1)
    sc.generate(draft, torch.ones(1, 2, dtype=torch.long), cache=foreign, max_new_tokens=1)
    with pytest.raises(ConfigError, match="another model"):
        decoder.bind(foreign, [0])
    assert decoder.lengths == decoder.cache.lengths.tolist() == [0, 6, 0]
    decoder.close()
    with pytest.raises(StepError, match="closed"):
        decoder.step()


def test_the_model_is_given_back(story: Any) -> None:
    from statecache.models.prepare import is_prepared

    story.train()
    decoder = sc.Decoder(story, cache_for(story))
    assert is_prepared(story)
    assert not story.training
    decoder.close()
    assert not is_prepared(story)
    assert story.training
    story.eval()


def test_buckets() -> None:
    from statecache.decode.decoder import _buckets

    assert _buckets(None, 1) == [1]
    assert _buckets(None, 6) == [1, 2, 4, 6]
    assert _buckets(None, 8) == [1, 2, 4, 8]
    assert _buckets([3], 8) == [3, 8]


def test_a_narrowed_cache_keeps_its_other_rows(story: Any) -> None:
    with sc.Decoder(story, cache_for(story)) as decoder:
        decoder.prefill(PROMPTS)
        decoder.step()
        cache, lengths = decoder.cache, decoder.lengths
        held = [buffer.clone() for buffer in cache.buffers()]
        mark = cache.checkpoint()
        with cache.narrowed(2):
            assert cache.rows == 2
            assert cache.lengths.tolist() == lengths[:2]
        assert cache.lengths.tolist() == lengths
        assert all(map(torch.equal, held, cache.buffers()))
        with pytest.raises(sc.errors.StaleMarkError, match="a graph over fewer rows"):
            cache.restore(mark)
        with cache.narrowed(2), torch.no_grad():
            story(torch.tensor([[4], [5]]), past_key_values=cache)
        assert cache.lengths.tolist() == [lengths[0] + 1, lengths[1] + 1, lengths[2]]


def test_every_layer_says_which_way_it_runs(story: Any) -> None:
    ways = sc.explain(story)
    assert len(ways) == story.config.num_hidden_layers
    assert str(ways[0]).startswith("layer 0 (")
    assert {way.way for way in ways} == {"modules"}
    assert "no kernels on cpu" in ways[0].why
