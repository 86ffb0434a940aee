"""Which prepared models there are: a family that keeps its states on its modules has none in a cache before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakValueDictionary

from torch import nn

from statecache.errors import ConfigError, OptionError
from statecache.models.table import ON_MODULES


class Exact(Protocol):
    """What stands in for the forward of a prepared model. `made_for`: a digest of what that model remembers."""

    made_for: str


_ready: WeakValueDictionary[int, Exact] = WeakValueDictionary()
_promised: ContextVar[bool] = ContextVar("promised", default=False)


def announce(forward: Exact) -> None:
    """Say that a model is prepared, as long as there is what stands in for its forward."""
    _ready[id(forward)] = forward


def is_ready(decoder: nn.Module) -> bool:
    """Whether this very decoder is prepared."""
    return any(value is not None and _ready.get(id(value)) is value for value in vars(decoder).values())


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
    if model in ON_MODULES and not _promised.get() and not _prepared(made_for):
        raise not_kept(model)


def check_rounds(model: str, made_for: str, store: str) -> None:
    """Raise OptionError where no such model is prepared, and the one there is would overwrite what is handed to it."""
    if not _promised.get() and not _prepared(made_for):
        raise needs_prepared(model, store)


def needs_prepared(model: str, store: str | None) -> OptionError:
    """Of a model as it is, and a store that its recurrent states cannot live in."""
    return OptionError(
        f"recurrent_store={store!r}: a {model} model as it is overwrites the states that it is handed, and a store "
        "that rounds hands out copies: call statecache.prepare(model) first"
    )


def _prepared(made_for: str) -> bool:
    """Whether a model that remembers this is prepared."""
    forwards = [forward() for forward in _ready.valuerefs()]
    return any(forward is not None and forward.made_for == made_for for forward in forwards)


def not_kept(model: str) -> ConfigError:
    """Of a model in `ON_MODULES` that is not prepared."""
    return ConfigError(
        f"there is no cache for a {model} model as it is: it keeps its recurrent states on its modules, where no cache "
        "reaches them: call statecache.prepare(model) first"
    )
