"""Rows that change places by a kernel are those that copies move, and nothing else is written."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from drawn import DEVICE, NAN
from torch import Tensor

import statecache.kernels.rows as kernel
from statecache.kernels.rows import take, takes
from statecache.snapshot import Snapshot
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States
from statecache.storage.changes import Changes

ROWS = 6


def several() -> list[Tensor]:
    """Buffers of several dtypes and sizes, each in rows of whole pieces."""
    made = [torch.randn(ROWS, 4), torch.randn(ROWS, 2, 3, 700), torch.randn(ROWS, 8, 5).bfloat16()]
    made += [
        torch.randint(0, 9, (ROWS, 2)),
        torch.randn(ROWS, 16).to(torch.float8_e4m3fn),
        torch.randn(ROWS, 32)[:, 4:16],
    ]
    return [held.to(DEVICE) if held.is_contiguous() else apart(held) for held in made]


def apart(held: Tensor) -> Tensor:
    """The same rows, with others between them that nobody may touch."""
    wide = torch.full((len(held), 32), NAN, device=DEVICE)
    wide[:, 4:16] = held
    return wide[:, 4:16]


def bits(held: Tensor) -> Tensor:
    return held.contiguous().view(torch.uint8)


@pytest.mark.parametrize("size", [8192, 64], ids=["at once", "in pieces"])
def test_rows_are_what_others_were(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SIZE", size)
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    for k in (1, 2, 3, ROWS, ROWS, ROWS):
        rows, buffers = random.choices(range(ROWS), k=k), several()
        assert all(takes(held, rows) for held in buffers)
        was = [bits(held).clone() for held in buffers]
        take(buffers, rows)
        for held, before in zip(buffers, was, strict=True):
            assert torch.equal(bits(held)[:k], before[rows]), rows
            assert torch.equal(bits(held)[k:], before[k:]), rows
        wide = buffers[-1]._base
        assert wide is not None and wide[:, :4].isnan().all() and wide[:, 16:].isnan().all()


def test_rows_that_are_no_whole_pieces_are_left_to_others() -> None:
    ok = torch.zeros(4, 8)
    assert takes(ok, [1, 0])
    beyond = range(kernel.MOST + 1)
    assert not takes(ok, beyond)
    for held in (torch.zeros(4, 3), torch.zeros(4, 0), torch.zeros(4, 9)[:, :8], torch.zeros(4, 9)[:, 1:5], ok.mT[:4]):
        assert not takes(held, [1, 0])


def test_what_a_default_device_is_does_not_matter() -> None:
    held = torch.arange(16.0, device=DEVICE).view(2, 8)
    want = held[[1, 0]]
    with torch.device("meta"):
        take([held], [1, 0])
    assert torch.equal(held, want)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many buffers each launch had."""
    seen: list[int] = []

    def counted(buffers: list[Tensor], rows: list[int], run: Callable[..., None] = take) -> None:
        seen.append(len(buffers))
        run(buffers, rows)

    monkeypatch.setattr(kernel, "take", counted)
    return seen


def test_changes_move_by_it_what_it_can(taken: list[int]) -> None:
    changes, buffers = Changes(), [*several(), torch.randn(ROWS, 3, device=DEVICE)]
    was = [held.clone() for held in buffers]
    for held in buffers:
        changes.take(held, (3, 0, 1))
    changes.make()
    for held, before in zip(buffers, was, strict=True):
        assert torch.equal(bits(held), bits(before[[3, 0, 1, 3, 4, 5]]))
    assert taken == [len(buffers) - 1]


def test_a_gather_of_a_cache_is_one_launch(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    states = (
        StateSpec("key", "attention", (2, 8), axis=1),
        StateSpec("conv", "conv", (8,), 3, axis=1),
        StateSpec("recurrent", "recurrent", (2, 8), 1, dtype=torch.float32, leased=True),
    )
    spec = ModelSpec(tuple(LayerSpec(n, "test", states) for n in range(3)))
    of = States(spec, capacity=16, slack=2, rows=ROWS, dtype=torch.bfloat16, device=DEVICE)
    for row in range(ROWS):
        of.admit(row, Snapshot(8, {}, of.made_for))
    for state in of.values():
        for buffer in state.buffers():
            buffer.random_(0, 9)
    other = of.fork()
    of.gather([4, 0, 0, 5, 1])
    assert taken and len(taken) == 1
    monkeypatch.setattr("statecache.kernels.available", lambda device: False)
    other.gather([4, 0, 0, 5, 1])
    for one, two in zip(of.values(), other.values(), strict=True):
        for a, b in zip(one.buffers(), two.buffers(), strict=True):
            assert torch.equal(a, b)
