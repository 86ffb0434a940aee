"""The inference state cache for hybrid language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statecache import errors as errors
    from statecache.decode.generate import generate as generate
    from statecache.models.cache import StateCache as StateCache
    from statecache.models.prepare import prepare as prepare
    from statecache.models.prepare import unprepare as unprepare

__version__ = "0.1.0"

_HOME = {
    "StateCache": "statecache.models.cache",
    "generate": "statecache.decode.generate",
    "prepare": "statecache.models.prepare",
    "unprepare": "statecache.models.prepare",
}

__all__ = ["StateCache", "errors", "generate", "prepare", "unprepare"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("statecache.errors")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
