"""Kernels compiled side by side before they run: a pass of many kernels would compile one after the other.

In a rehearsal no `Kernel` is launched, so that the pass goes on while they are compiled on threads, and what they would
have made is zeros. It is for passes in which no row takes anything in; whoever writes to a state what a kernel made of
it has to know, see `rehearsing`. What copies entries, as `rows.take`, is no `Kernel`, and happens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode

THREADS = 8
NEW = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty)

T = TypeVar("T")

_rehearsing: ContextVar[bool] = ContextVar("rehearsing", default=False)
_known: set[Hashable] = set()


class Kernel:
    """What `triton.jit` makes, launched like that; in a rehearsal it is compiled instead."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self._compile, grid) if rehearsing() else self.jit[grid]

    def _compile(self, grid: Any, *args: Any, **options: Any) -> None:
        if hasattr(self.jit, "warmup"):  # the interpreter compiles nothing
            self.jit.warmup(*args, grid=grid, **options)


class _Zeros(TorchFunctionMode):
    """What is made without values is zeros, since no kernel writes it: finite, and a number of tokens is none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in NEW else made


def rehearsed(run: Callable[[], T], form: Hashable) -> T:
    """What `run` gives, after a rehearsal if there was none of this form: all that its kernels are compiled for."""
    if form not in _known and not rehearsing():
        rehearse(run)
        _known.add(form)
    return run()


def rehearsing() -> bool:
    """Whether kernels make nothing now."""
    return _rehearsing.get()


def rehearse(run: Callable[[], object]) -> None:
    """Call `run` with each `Kernel` compiled and none launched, and wait until they are.

    What `run` does by other means than these happens. A kernel that cannot be compiled says so when it is launched.
    """
    copy_context().run(_rehearse, run)


def _rehearse(run: Callable[[], object]) -> None:
    _rehearsing.set(True)
    with (
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _Zeros(),
    ):
        run()
