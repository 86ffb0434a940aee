"""How often a round waits for the device, and how often it sends something there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import families
import pytest
import torch
from torch import Tensor

import statecache as sc
from statecache.decode.batch import Batch
from statecache.decode.drafters import Lookup
from statecache.decode.request import Request

READS = ("tolist", "item", "__bool__", "__int__", "__index__", "__float__")
UPLOADS = ("tensor", "as_tensor")


def site() -> str | None:
    """The line of statecache that this happens under; None for those of a model or a test."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename.replace("\\", "/")
        if "/src/statecache/" in name:
            return f"{name.rpartition('/src/statecache/')[2]}:{frame.f_lineno}"
        if "/transformers/" in name or "/tests/" in name:
            return None
        frame = frame.f_back
    return None


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Counter[str]]]:
    """Reads and uploads within, by line. A tensor of a list or a number is an upload, wherever it is."""
    found, within = {"reads": Counter(), "uploads": Counter()}, []

    def counting(real: Callable, kind: str, counts: Callable[..., bool]) -> Callable:
        def call(*args, **kwargs):
            where = None if within else site()
            if where is not None and counts(args[0]):
                found[kind][where] += 1
            within.append(1)  # one call of these inside another is the same one
            try:
                return real(*args, **kwargs)
            finally:
                within.pop()

        return call

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(getattr(Tensor, name), "reads", lambda _: True))
        for name in UPLOADS:
            real = getattr(torch, name)
            patch.setattr(torch, name, counting(real, "uploads", lambda x: not isinstance(x, Tensor)))
        yield found


def decode(found: Counter[str]) -> int:
    return sum(n for where, n in found.items() if where.startswith("decode/"))


WAYS = {
    "greedy": [{}],
    "drawn": [{"temperature": 1.0, "seed": 5}],
    "rows": [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.5, "top_k": 9, "seed": 3}],
}


@pytest.fixture
def running(request, always_drafts) -> Iterator[Callable[[list[dict], Lookup | None], Batch]]:
    """A batch in the middle of its work."""
    model, _ = families.build("qwen3_5", vocab_size=4)  # so few that a lookup finds something each time
    sc.prepare(model)

    def start(ways: list[dict], drafter: Lookup | None) -> Batch:
        cache = sc.StateCache(model.config, slack=5 if drafter else 0)
        cache.lasting = True
        batch = Batch(model, cache, drafter)
        batch.join([Request([n, 0, 1, 2, 3] * 2, 60, **way) for n, way in enumerate(ways)])
        for _ in range(4):
            batch.round()
        return batch

    return start


@pytest.mark.parametrize("ways", WAYS)
def test_plain_round_is_one_read_and_one_upload(running, ways, monkeypatch):
    batch = running(WAYS[ways], None)
    with counted(monkeypatch) as found:
        for _ in range(5):
            batch.round()
    assert sum(found["reads"].values()) == decode(found["reads"]) == 5, found
    assert sum(found["uploads"].values()) == decode(found["uploads"]) == 5, found


@pytest.mark.parametrize("ways", WAYS)
def test_lookup_round_is_one_read_and_two_uploads(running, ways, monkeypatch):
    batch = running(WAYS[ways], Lookup(2, 4))
    before = batch.report()
    with counted(monkeypatch) as found:
        while batch.report().forwards < before.forwards + 5:
            batch.round()
    assert batch.report().rounds == before.rounds + 5 * len(WAYS[ways])
    assert sum(found["reads"].values()) == decode(found["reads"]) == 5, found
    assert decode(found["uploads"]) == 5, found
    assert sum(found["uploads"].values()) <= 10, found  # the other is what the cache is told to keep
