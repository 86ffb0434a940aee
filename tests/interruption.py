"""An exception at any operator of a block, as Ctrl-C or a full memory would raise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Interruption(BaseException):
    """Like KeyboardInterrupt, no Exception: what mends itself by `except Exception` is to be found, too."""


class Operators(TorchDispatchMode):
    """Counts the points of its block where it could end, two an operator: before it runs, and after. Ends it at one."""

    def __init__(self, end_at: int | None = None) -> None:
        super().__init__()
        self.end_at, self.points = end_at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._reach()
        result = func(*args, **(kwargs or {}))
        self._reach()
        return result

    def _reach(self) -> None:
        if self.points == self.end_at:
            raise Interruption
        self.points += 1


@dataclass
class Cut:
    """Where an operation of several parts ends: at a point of one of them; without one it counts the points of all."""

    part: str | None = None
    end_at: int = 0
    points: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Run a part of the operation."""
        operators = Operators(self.end_at if part == self.part else None)
        try:
            with operators:
                yield
        finally:
            self.points[part] = self.points.get(part, 0) + operators.points


def ends_early(operation: Callable[[Cut], object], cut: Cut) -> bool:
    """Run an operation that may end at `cut`; whether it did."""
    try:
        operation(cut)
    except Interruption:
        return True
    return False
