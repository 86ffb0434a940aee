"""Recurrent states that nobody computes on, those of marks and files, in a byte a number. Lossy.

A run of numbers along the last axis has one scale, see `Int8`. Fewer numbers than hold a scale stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statecache.errors import OptionError
from statecache.spec import StateSpec
from statecache.storage.coded import BITS, Int8

CODES = {"int8": Int8()}


def check_code(name: object, option: str = "recurrent_store") -> None:
    """Raise OptionError unless what came for an option is None or the name of a code."""
    if name is not None and (not isinstance(name, str) or name not in CODES):
        raise OptionError(f"{option}={name!r}: give None, or {', '.join(map(repr, CODES))}, for what is at rest")


def code_of(spec: StateSpec, name: str | None) -> str | None:
    """The code of a state's copies, where that of recurrent ones has this name."""
    return name if spec.kind == "recurrent" else None


def rests(state: Tensor) -> bool:
    """Whether a state (..., D) of a recurrence has a code."""
    return state.is_floating_point() and state.dim() > 0 and state.shape[-1] >= BITS


def rested(name: str | None, state: Tensor) -> Tensor:
    """The codes of a state (..., D), int8; or it, where it has none, or no code has a name."""
    return CODES[name].encode(state) if name is not None and rests(state) else state


def woken(name: str | None, kept: Tensor) -> Tensor:
    """What `rested` was given, near to it, in float32 where it was coded."""
    return CODES[name].decode(kept, kept.shape[-1]) if name is not None and kept.dtype == torch.int8 else kept
