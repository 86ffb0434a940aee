"""The inference state cache for hybrid language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statecache import errors as errors
    from statecache.decode.decoder import Decoder as Decoder
    from statecache.decode.generate import generate as generate
    from statecache.decode.report import Report as Report
    from statecache.models.cache import StateCache as StateCache
    from statecache.models.fused import explain as explain
    from statecache.models.plan import Plan as Plan
    from statecache.models.plan import plan as plan
    from statecache.models.prepare import prepare as prepare
    from statecache.models.prepare import unprepare as unprepare
    from statecache.round import Round as Round
    from statecache.snapshot import Mark as Mark
    from statecache.spec import ModelSpec as ModelSpec
    from statecache.states import States as States

__version__ = "0.1.0"

_HOME = {
    "Decoder": "decode.decoder",
    "Mark": "snapshot",
    "ModelSpec": "spec",
    "Plan": "models.plan",
    "Report": "decode.report",
    "Round": "round",
    "StateCache": "models.cache",
    "States": "states",
    "explain": "models.fused",
    "generate": "decode.generate",
    "plan": "models.plan",
    "prepare": "models.prepare",
    "unprepare": "models.prepare",
}

__all__ = [
    "Decoder",
    "Mark",
    "ModelSpec",
    "Plan",
    "Report",
    "Round",
    "StateCache",
    "States",
    "errors",
    "explain",
    "generate",
    "plan",
    "prepare",
    "unprepare",
]

if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> object:
        if name == "errors":
            return import_module("statecache.errors")
        if name in _HOME:
            return getattr(import_module(f"statecache.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
