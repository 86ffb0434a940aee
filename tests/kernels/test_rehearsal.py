"""A rehearsal compiles kernels and launches none: what a pass changes by them stays as it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drawn import DEVICE, NAN, draw, error
from test_layers import model_of

import statecache as sc
from statecache.kernels import rehearsal
from statecache.kernels.conv_step import step
from statecache.kernels.linear import linear
from statecache.kernels.rehearsal import rehearse, rehearsed, rehearsing


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rehearsal, "_known", set())
    yield
    assert not rehearsing()


def taking_in(ring: torch.Tensor) -> Any:
    """A pass that writes to a ring, (2, 24, 5), and what it gives."""
    new, weight = draw(2, 24), draw(24, 4)
    start = torch.zeros(2, dtype=torch.long, device=DEVICE)
    return lambda: step(new, weight, None, ring, start, None)


def test_nothing_is_launched_and_what_would_be_written_is_zeros() -> None:
    ring = draw(2, 24, 5)
    before, run, seen = ring.clone(), taking_in(ring), []
    rehearse(lambda: seen.append(run()))
    assert torch.equal(ring, before)
    assert not seen[0].any()
    assert run().all()
    assert not torch.equal(ring, before)


@pytest.mark.parametrize("kind", ["empty", "empty_like", "new_empty", "empty_strided"])
def test_what_a_pass_makes_without_values_is_zeros(kind: str) -> None:
    made = []

    def run() -> None:
        poison = torch.full((4096,), NAN, device=DEVICE)
        how: dict[str, Any] = {
            "empty": lambda: torch.empty(4096, device=DEVICE),
            "empty_like": lambda: torch.empty_like(other),
            "new_empty": lambda: other.new_empty(4096),
            "empty_strided": lambda: torch.empty_strided((64, 64), (64, 1), device=DEVICE),
        }
        other = draw(4096)
        del poison  # whose memory comes next
        made.append(how[kind]())

    rehearse(run)
    assert not made[0].any()


def test_a_form_is_rehearsed_once_and_gives_what_it_gives() -> None:
    x, weight, calls = draw(3, 32), draw(40, 32), []

    def run() -> torch.Tensor:
        calls.append(rehearsing())
        return linear(x, weight)

    for _ in range(2):
        assert error(rehearsed(run, "linear"), x.double() @ weight.double().T) < 1e-5
    assert calls == [True, False, False]
    rehearsed(run, "another")
    assert calls == [True, False, False, True, False]


def test_within_a_rehearsal_there_is_no_other() -> None:
    calls = []
    rehearse(lambda: rehearsed(lambda: calls.append(rehearsing()), "inner"))
    assert calls == [True]
    assert "inner" not in rehearsal._known


def test_an_error_of_the_pass_is_its_own_and_leaves_nothing() -> None:
    def run() -> None:
        raise ValueError("of the pass")

    for _ in range(2):
        with pytest.raises(ValueError, match="of the pass"):
            rehearsed(run, "wrong")
    assert not rehearsal._known
    x = draw(4, 32)
    assert error(rehearsed(lambda: linear(x, x), "right"), x.double() @ x.double().T) < 1e-5


def test_kernels_of_other_threads_are_launched_meanwhile() -> None:
    ring = draw(2, 24, 5)
    before, run = ring.clone(), taking_in(ring)

    def beside() -> None:
        other = threading.Thread(target=run)
        other.start()
        other.join()

    rehearse(beside)
    assert not torch.equal(ring, before)


FAMILIES = ["mamba2", "jamba", "qwen3_5", "lfm2", "minimax", "recurrent_gemma"]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_cache_is_changed_by_a_rehearsal_of_its_rounds(
    name: str, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rounds = model_of(name), [(1, 0), (9, 0), (15, 0), (9, 3)]
    cache = sc.StateCache(model.config, capacity=64, rows=2, slack=16, dtype=torch.float32, device=DEVICE, back=back)
    with sc.Decoder(model, cache) as decoder:
        decoder.prefill([[5, 9, 33, 8], [8, 2, 71]])
        decoder.check(torch.full((2, 2), 3, device=DEVICE))
        decoder._count.zero_()  # as while something is captured
        for apart in (False, True):
            if apart:  # as where a mixer is hooked: states take in what is kept one by one
                monkeypatch.setattr("statecache.models.mixers.base.Recurrent.together", lambda *_: None)
            for drafts, ahead in rounds:
                draft, ran = decoder._fill(torch.full((2, drafts), 7, device=DEVICE), None), []
                if ahead:
                    decoder._ahead_by(ahead)
                before = [buffer.clone() for buffer in (*cache.states.buffers(), decoder._ids)]

                def run(draft: Any = draft, ahead: int = ahead, ran: list[bool] = ran) -> None:
                    decoder._check_or_look(2, draft, ahead)
                    ran.append(rehearsing())

                with decoder._kernels():
                    rehearse(run)
                after = [*cache.states.buffers(), decoder._ids]
                assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)), f"{drafts} drafts"
                assert ran == [True]
