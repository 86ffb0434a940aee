"""Models are prepared, lent and given back by several threads at once, and by the collector at any moment."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator

import families
import pytest
import torch

import statecache as sc
from statecache.models import prepare as module
from statecache.models.prepare import borrowed, is_prepared, lend

TRIALS = 300


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Let threads change places as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def model():
    return families.build("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])[0]


def together(*works: Callable[[], object]) -> list[BaseException]:
    """Run each in a thread, begun at once; what they raised."""
    begin, raised = threading.Barrier(len(works)), []

    def run(work: Callable[[], object]) -> None:
        begin.wait()
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def held(model) -> list[dict]:
    return [dict(vars(each)) for each in model.modules()]


def test_threads_borrow_one_model_and_give_it_back_as_it_was(model):
    model.train()
    before = held(model)

    def borrow() -> None:
        with borrowed(model):
            assert is_prepared(model) and not model.training

    for _ in range(TRIALS):
        assert together(borrow, borrow) == []
        assert held(model) == before


def test_threads_prepare_and_unprepare_one_model(model):
    before = held(model)
    for _ in range(TRIALS):
        assert together(lambda: sc.prepare(model), lambda: sc.unprepare(model), lambda: is_prepared(model)) == []
        sc.unprepare(model)
        assert held(model) == before


def test_threads_generate_with_one_model_and_caches_of_their_own(model):
    prompts = [torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    options = [{"temperature": 1.0, "seed": 1}, {"lookup": 2}]
    want = [sc.generate(model, p, max_new_tokens=8, **o) for p, o in zip(prompts, options, strict=True)]
    before = held(model)
    for _ in range(10):
        got: list[torch.Tensor | None] = [None, None]

        def write(n: int, got: list = got) -> None:
            got[n] = sc.generate(model, prompts[n], max_new_tokens=8, **options[n])

        assert together(lambda: write(0), lambda: write(1)) == []
        assert all(map(torch.equal, got, want))
        assert held(model) == before


def test_loan_that_ends_while_models_are_changed_ends_afterwards(model, monkeypatch):
    """As the collector may have it, in the thread that holds the lock: it neither waits nor comes in between."""
    before, seen = held(model), []
    loan, real = lend(model), module.decoder_of

    def collect(given):
        loan.end()
        seen.append(is_open_now(model))
        return real(given)

    monkeypatch.setattr(module, "decoder_of", collect)
    other = families.build("mamba2")[0]
    sc.prepare(other)
    assert seen[0]
    assert held(model) == before
    loan.end()  # again
    assert held(model) == before


def is_open_now(model) -> bool:
    return any(isinstance(v, module.Forward) for m in model.modules() for v in vars(m).values())


def test_loan_that_ends_in_another_thread_does_not_wait_for_the_lock(model):
    before, loan = held(model), lend(model)
    with module._alone():
        thread = threading.Thread(target=loan.end)
        thread.start()
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert is_open_now(model)
    assert held(model) == before


def test_a_loan_that_is_collected_together_with_its_model_ends_quietly(monkeypatch):
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)

    class Stream:
        def __init__(self) -> None:
            self.loan, self.itself = lend(families.build("lfm2")[0]), self

        def __del__(self) -> None:
            self.loan.end()
            ended.append(True)

    ended: list[bool] = []
    Stream()
    gc.collect()
    assert ended == [True]
    assert not raised
