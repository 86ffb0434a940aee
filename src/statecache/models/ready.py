"""Which prepared models there are: a family that keeps its states on its modules has none in a cache before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakValueDictionary

from statecache.errors import ConfigError
from statecache.models.table import ON_MODULES


class Exact(Protocol):
    """What stands in for the forward of a prepared model. `made_for`: a digest of what that model remembers."""

    made_for: str


_ready: WeakValueDictionary[int, Exact] = WeakValueDictionary()
_promised: ContextVar[bool] = ContextVar("promised", default=False)


def announce(forward: Exact) -> None:
    """Say that a model is prepared, as long as there is what stands in for its forward."""
    _ready[id(forward)] = forward


@contextmanager
def promised() -> Iterator[None]:
    """Have caches made within whose models are prepared by the time that they are fed."""
    before = _promised.set(True)
    try:
        yield
    finally:
        _promised.reset(before)


def check_kept(model: str, made_for: str) -> None:
    """Raise ConfigError where no such model is prepared, and a cache for it would not be filled."""
    if model in ON_MODULES and not _promised.get():
        forwards = [forward() for forward in _ready.valuerefs()]
        if not any(forward is not None and forward.made_for == made_for for forward in forwards):
            raise not_kept(model)


def not_kept(model: str) -> ConfigError:
    """Of a model in `ON_MODULES` that is not prepared."""
    return ConfigError(
        f"there is no cache for a {model} model as it is: it keeps its recurrent states on its modules, where no cache "
        "reaches them: call statecache.prepare(model) first"
    )
