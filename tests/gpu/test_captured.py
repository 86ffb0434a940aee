"""A decoder on a GPU: two graphs a bucket, no waiting in a step, and the tokens of the plain form in float32.

pytest tests/gpu -m gpu -n 6
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from typing import Any

import families
import pytest
import torch
from steps import build

import statecache as sc
from statecache.decode.draft_length import Rounds, plain_round
from statecache.decode.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn about what others do
]

DENSE = {"granitemoehybrid": {"num_local_experts": 0, "num_experts_per_tok": 0}}
FAMILIES = [name for name in families.FAMILIES if "+" not in name and name not in ("minimax", "recurrent_gemma")]
NEW = 200
PLAIN = [lambda ids, logits: logits]  # which no captured step applies


def decoder_for(name: str, rows: int, slack: int = 1, **options: Any) -> sc.Decoder:
    model, config, _ = build(name, **DENSE.get(name, {}))
    cache = sc.StateCache(config, capacity=256, rows=rows, dtype=torch.float32, device="cuda", slack=slack, back=False)
    return sc.Decoder(model, cache, **options)


def prompts(rows: int, width: int = 11) -> list[list[int]]:
    ids = torch.randint(1, 90, (rows, width), generator=torch.Generator().manual_seed(3))
    return [row[: width - n % 3].tolist() for n, row in enumerate(ids)]


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have as many tokens drafted for captured rounds as for others, which cost more."""
    monkeypatch.setattr(Rounds, "captured", lambda rows: Rounds(plain_round))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_200_steps_are_those_of_the_plain_form(name: str) -> None:
    with decoder_for(name, 2) as decoder:
        given = prompts(2)
        out = [decoder.prefill(given).clone()]
        decoder.step()
        out.append(decoder.tokens.clone())
        graphs = decoder.counts.graphs
        out += [decoder.step().clone() for _ in range(NEW - 2)]
        assert graphs == decoder.counts.graphs == 2
        assert decoder.counts.replayed == NEW - 1
        assert decoder.counts.plain == 0
        got = torch.stack(out, 1).tolist()
        assert decoder.cache.lengths.tolist() == decoder.lengths
        for row, text in enumerate(given):
            alone = torch.tensor([text], device="cuda")
            want = sc.generate(decoder.model, alone, max_new_tokens=NEW, processors=PLAIN)[0, len(text) :].tolist()
            assert got[row] == want


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "lfm2", "mamba"])
def test_kernels_are_compiled_on_threads_and_rounds_of_any_length_are_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    by_main: list[bool] = []

    def listen(**_: Any) -> None:
        by_main.append(threading.current_thread() is threading.main_thread())

    with decoder_for(name, 2, slack=18) as decoder:
        given = prompts(2)
        monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
        want = [decoder.prefill(given).clone()]
        by_main.clear()
        want += [decoder.step().clone() for _ in range(19)]
        assert by_main and not any(by_main)
        steps = torch.stack(want, 1)
        for drafts in (1, 4, 6, 9, 13, 15):  # taken at once, in parts, and one after the other
            decoder.reset([0, 1])
            decoder.prefill(given)
            by_main.clear()
            kept = decoder.check(steps[:, 1 : 1 + drafts])
            assert not any(by_main)
            assert kept.tolist() == [drafts, drafts]
            assert torch.equal(decoder.tokens, steps[:, 1 + drafts])


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "granitemoehybrid", "jamba"])
def test_no_step_waits_and_rows_come_and_go(name: str) -> None:
    ways = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "seed": 9}]
    with decoder_for(name, 6) as decoder:
        assert decoder.buckets == [1, 2, 4, 6]
        given = prompts(6)
        order = [0, 3, 1, 5, 2, 4]
        got: dict[int, list[int]] = {}
        for n, place in enumerate(order):
            first = decoder.prefill([given[n]], [place], **ways[n % 3])
            got[place] = first.tolist()
            for _ in range(2):
                tokens = decoder.step().tolist()
                for row, written in got.items():
                    written.append(tokens[row])
        graphs = decoder.counts.graphs
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            waiting = [decoder.step().clone() for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert decoder.counts.graphs == graphs
        for tokens in waiting:
            for row, written in got.items():
                written.append(tokens[row].item())
        decoder.leave([5, 4])
        for _ in range(2):  # in a smaller bucket
            tokens = decoder.step().tolist()
            for row in decoder.writing:
                got[row].append(tokens[row])
        assert decoder.cache.lengths.tolist() == decoder.lengths
        for n, place in enumerate(order):
            alone, new = torch.tensor([given[n]], device="cuda"), len(got[place])
            way = {"seed": [ways[n % 3].get("seed", 0)]}
            want = sc.generate(decoder.model, alone, max_new_tokens=new, processors=PLAIN, **{**ways[n % 3], **way})
            assert got[place] == want[0, len(given[n]) :].tolist(), (n, place)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_rounds_are_those_of_steps(name: str) -> None:
    new, most = 60, 4
    with decoder_for(name, 2, slack=1 + most) as decoder:
        given = prompts(2)
        out = [decoder.prefill(given).clone()]
        out += [decoder.step().clone() for _ in range(new + 2 * most)]
        want = torch.stack(out, 1).tolist()
        decoder.reset([0, 1])
        got = [[n] for n in decoder.prefill(given).tolist()]
        wrong, kept, rounds = torch.Generator().manual_seed(1), set(), 0
        while max(map(len, got)) < new:
            ahead = [text[len(seen) : len(seen) + most] for text, seen in zip(want, got, strict=True)]
            right = torch.rand(2, most, generator=wrong) < 0.7
            drafts = torch.where(right, torch.tensor(ahead), torch.tensor(1)).cuda()
            if rounds == 1:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                agreed = decoder.check(drafts)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for row, (n, token) in enumerate(zip(agreed.tolist(), decoder.tokens.tolist(), strict=True)):
                got[row] += [*drafts[row, :n].tolist(), token]
                kept.add(n)
            rounds += 1
        for row, token in enumerate(decoder.step().tolist()):
            got[row].append(token)
        assert decoder.lengths == [len(text) + len(new) - 1 for text, new in zip(given, got, strict=True)]
        assert got == [text[: len(seen)] for text, seen in zip(want, got, strict=True)]
        assert len(kept) > 2
        assert decoder.counts.graphs == 3
        assert decoder.counts.plain == 0


def test_kernels_ran() -> None:
    found = {}
    for fused in (True, False):
        with decoder_for("mamba2", 1, fused=fused) as decoder:
            decoder.prefill(prompts(1))
            decoder.step()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                decoder.step()
                torch.cuda.synchronize()
            found[fused] = sum(event.count for event in seen.key_averages() if event.self_device_time_total)
    assert found[True] * 3 < found[False]


def test_memory_that_a_step_leaves_is_the_cache() -> None:
    with decoder_for("qwen3_5", 2) as decoder:
        decoder.prefill(prompts(2))
        decoder.step()
        addresses = [buffer.data_ptr() for buffer in decoder.cache.buffers()]
        held = torch.cuda.memory_allocated()
        for _ in range(5):
            decoder.step()
        assert torch.cuda.memory_allocated() == held
        assert addresses == [buffer.data_ptr() for buffer in decoder.cache.buffers()]


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_captures_by_itself_and_writes_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = build(name, **DENSE.get(name, {}))
    steps, step = [], sc.Decoder.step
    monkeypatch.setattr(sc.Decoder, "step", lambda decoder: steps.append(0) or step(decoder))
    ids = torch.tensor([each[:9] for each in prompts(2)], device="cuda")
    way: dict[str, Any] = {"max_new_tokens": 70, "temperature": [0.0, 0.8], "seed": 3}
    got = sc.generate(model, ids, **way)
    assert steps or "qwen4" in name
    assert torch.equal(got, sc.generate(model, ids, processors=PLAIN, **way))


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "granitemoehybrid", "lfm2"])
def test_generate_checks_drafts_by_captured_rounds(name: str) -> None:
    model, _, _ = build(name, **DENSE.get(name, {}))
    ids, reports = torch.tensor([[5, 9, 33, 7] * 4, [8, 3, 90, 61] * 4], device="cuda"), []
    for way in ({}, {"temperature": [0.0, 0.7], "seed": 3}):
        given = {"max_new_tokens": 90, "lookup": 2, **way}
        got = sc.generate(model, ids, report=reports.append, **given)
        assert reports[-1].compiled == reports[-1].forwards - 1 and reports[-1].drafted
        assert torch.equal(got, sc.generate(model, ids, processors=PLAIN, **given))
        assert torch.equal(got, sc.generate(model, ids, processors=PLAIN, max_new_tokens=90, **way))


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "granitemoehybrid", "lfm2"])
@pytest.mark.parametrize("back", [True, False])
def test_rounds_on_a_cache_that_is_given_leave_in_it_what_was_written(name: str, back: bool, alike: None) -> None:
    model, config, _ = build(name, **DENSE.get(name, {}))
    ids = torch.tensor([[5, 9, 33, 7] * 4, [8, 3, 90, 61] * 4], device="cuda")
    whole = sc.generate(model, ids, max_new_tokens=40, stop=[])[:, 16:].tolist()
    for end in (whole[0][12], whole[1][23], 97):
        turns: list[list[Any]] = [[], []]
        for more, seen in zip(({}, {"processors": PLAIN}), turns, strict=True):
            cache = sc.StateCache(
                config, rows=2, capacity=16 + 39 + 2 + 39, dtype=torch.float32, device="cuda", slack=5, back=back
            )
            reports: list[sc.Report] = []
            given = {"max_new_tokens": 40, "lookup": 2, "stop": [end], "report": reports.append, "cache": cache, **more}
            seen.append(sc.generate(model, ids, **given).tolist())
            seen.append(cache.lengths.tolist())
            seen.append(sc.generate(model, torch.tensor([[7, 9], [11, 12]], device="cuda"), **given).tolist())
            seen.append(cache.lengths.tolist())
            seen.append([(report.drafted, report.accepted, report.forwards) for report in reports])
            assert more or all(report.compiled == report.forwards - 1 for report in reports)
        assert turns[0] == turns[1]


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "granitemoehybrid", "lfm2"])
def test_what_is_looked_at_ahead_becomes_no_part_of_rows(name: str) -> None:
    given = prompts(3)
    with decoder_for(name, 3, slack=5, buckets=[3]) as decoder:
        first = decoder.prefill(given)
        want = torch.stack([first.clone(), *[decoder.step().clone() for _ in range(30)]], 1)
    with decoder_for(name, 3, slack=5, buckets=[3]) as decoder:
        decoder.prefill(given)
        decoder.leave([1])
        held, at, looked = decoder.lengths, [0, 0, 0], 0
        for counts in ([3, 0, 5], [1, 0, 1], [2, 0, 2], [5, 0, 4]):
            tokens = torch.stack([text[begin : begin + 5] for text, begin in zip(want, at, strict=True)])
            got = decoder.draft(tokens, counts, 4)
            at = [begin + n for begin, n in zip(at, counts, strict=True)]
            looked += 1
            assert all(torch.equal(got[row], want[row][at[row] : at[row] + 4]) for row in (0, 2))
            assert decoder.tokens.tolist() == [want[row][at[row]] for row in range(3)]
            assert decoder.lengths == decoder.cache.lengths.tolist() == [h + n for h, n in zip(held, at, strict=True)]
        assert decoder.counts.graphs == 1 and decoder.counts.replayed == looked
        assert decoder.step().tolist()[::2] == [want[row][at[row] + 1] for row in (0, 2)]


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "lfm2"])
def test_rounds_fill_a_cache_to_its_last_slot(name: str) -> None:
    model, config, _ = build(name)
    room: dict[str, Any] = {"dtype": torch.float32, "device": "cuda", "slack": 5, "back": False, "rows": 2}
    given, want = prompts(2), []
    for capacity in (64, 14):
        cache = sc.StateCache(config, capacity=capacity, **room)
        with sc.Decoder(model, cache) as decoder:
            first = decoder.prefill(given)
            if not want:
                want = torch.stack([first.clone(), *[decoder.step().clone() for _ in range(5)]], 1).tolist()
                continue
            drafts = torch.tensor([text[1:5] for text in want], device="cuda")
            assert decoder.check(drafts, [2, 1]).tolist() == [2, 1]
            assert decoder.lengths == [14, 12]
            assert decoder.tokens.tolist() == [want[0][3], want[1][2]]
            held = cache.snapshot(0)
            decoder.leave([0])
            assert decoder.check(drafts[:, 2:], [2, 1]).tolist() == [0, 1]
            assert decoder.tokens.tolist() == [want[0][3], want[1][4]]
            assert all(torch.equal(each, cache.snapshot(0).entries[n]) for n, each in held.entries.items())


def test_the_command_line_checks_drafts_by_captured_rounds() -> None:
    command = [sys.executable, "-m", "statecache", "generate", "Once upon a time", "--temperature", "0", "--json"]
    for drafts in (["--lookup", "2"], ["--draft", "tiny"]):
        done = subprocess.run([*command, *drafts], capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        assert told["speculation"]["drafted"]
        assert told["forwards_compiled"] == told["speculation"]["forwards"] - 1


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2", "granitemoehybrid", "lfm2"])
def test_an_assistant_drafts_by_captured_steps(name: str, alike: None) -> None:
    model, _, _ = build(name, **DENSE.get(name, {}))
    other, _, _ = build(name, **DENSE.get(name, {}))
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.002 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).to(weight)
    ids = torch.tensor([[5, 9, 33, 7] * 4, [8, 3, 90, 61] * 4], device="cuda")
    reports: list[sc.Report] = []
    given = {"max_new_tokens": 90, "assistant": other, "report": reports.append}
    got = sc.generate(model, ids, **given)
    assert torch.equal(got, sc.generate(model, ids, processors=PLAIN, **given))
    assert torch.equal(got, sc.generate(model, ids, processors=PLAIN, max_new_tokens=90))
    captured, plain = reports
    assert captured.compiled == captured.forwards - 1
    assert 0 < captured.accepted < captured.drafted
    assert (captured.drafted, captured.accepted) == (plain.drafted, plain.accepted)


@pytest.mark.parametrize("name", ["qwen3_5", "mamba2"])
def test_steps_take_little_memory_beside_weights_and_states(name: str) -> None:
    gc.collect()  # what tests before have left in cycles
    before = torch.cuda.memory_allocated()
    model, config, _ = build(name, vocab_size=32768)
    model.bfloat16()
    weights = sum(each.nbytes for each in model.parameters())
    cache = sc.StateCache(config, capacity=65536, rows=16, dtype=torch.bfloat16, device="cuda", slack=5, back=False)
    needed = weights + cache.nbytes().total
    with sc.Decoder(model, cache, buckets=[16]) as decoder:
        decoder.prefill(prompts(16))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            decoder.step()
        decoder.check(torch.ones(16, 4, dtype=torch.long, device="cuda"))
        workspace = torch.cuda.max_memory_allocated() - before - needed
    assert 0 < workspace < 256 * 2**20


def test_a_step_that_cannot_be_captured_is_run_plainly() -> None:
    model, _, _ = build("qwen3_5")
    ids = torch.tensor([each[:9] for each in prompts(2)], device="cuda")
    want = sc.generate(model, ids, max_new_tokens=70, processors=PLAIN)

    def looks(module: Any, args: Any, out: Any) -> None:
        out[0].sum().item()  # waits for the device, which a capture forbids

    hook = model.model.layers[2].register_forward_hook(looks)
    try:
        with pytest.warns(UserWarning, match="could not be captured, and is run plainly"):
            got = sc.generate(model, ids, max_new_tokens=70)
    finally:
        hook.remove()
    assert torch.equal(got, want)
    assert torch.equal(sc.generate(model, ids, max_new_tokens=70), want)  # and captured again without the hook


def test_a_round_that_cannot_be_captured_is_run_plainly() -> None:
    model, _, _ = build("qwen3_5")
    ids = torch.tensor([each[:9] * 2 for each in prompts(2)], device="cuda")
    want = sc.generate(model, ids, max_new_tokens=70, processors=PLAIN)

    def looks(module: Any, args: Any, out: Any) -> None:
        if out[0].shape[-2] > 1:
            out[0].sum().item()  # waits for the device, which a capture forbids

    hook = model.model.layers[2].register_forward_hook(looks)
    reports: list[sc.Report] = []
    try:
        with pytest.warns(UserWarning, match="this model's round could not be captured, and is run plainly"):
            got = sc.generate(model, ids, max_new_tokens=70, lookup=1, report=reports.append)
    finally:
        hook.remove()
    assert torch.equal(got, want)
    assert reports[0].drafted and reports[0].compiled < reports[0].forwards - 1


def test_an_assistant_that_cannot_be_captured_drafts_plainly() -> None:
    model, other = (build("qwen3_5")[0] for _ in range(2))
    ids = torch.tensor([each[:9] for each in prompts(2)], device="cuda")
    want = sc.generate(model, ids, max_new_tokens=70, processors=PLAIN)

    def looks(module: Any, args: Any, out: Any) -> None:
        out[0].sum().item()  # waits for the device, which a capture forbids

    other.model.layers[2].register_forward_hook(looks)
    reports: list[sc.Report] = []
    with pytest.warns(UserWarning, match="the assistant's draft could not be captured, and is run plainly"):
        got = sc.generate(model, ids, max_new_tokens=70, assistant=other, report=reports.append)
    assert torch.equal(got, want)
    assert reports[0].accepted > 0.9 * reports[0].drafted > 0  # of a model with the same weights
    assert reports[0].compiled == reports[0].forwards - 1


def test_rounds_are_captured_anew_where_rows_end_in_more_ways() -> None:
    with decoder_for("mamba2", 1, slack=3) as decoder:
        decoder.prefill(prompts(1))
        drafts = torch.ones(1, 2, dtype=torch.long, device="cuda")
        decoder.check(drafts)  # the only graph, which goes with all of its memory
        decoder.begin([0], [Request([0], ends=(1, 2))], decoder.tokens.clone(), decoder.lengths)
        assert decoder.check(drafts).tolist() == [0]
        assert decoder.counts.graphs == 2
