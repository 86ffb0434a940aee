"""Stores by name, and which states of a cache live in which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from statecache.errors import OptionError
from statecache.spec import StateSpec
from statecache.storage.coded import BITS, Coded, Fp8, Int8
from statecache.storage.dense import Dense
from statecache.storage.paged import Paged
from statecache.storage.rounded import Rounded
from statecache.storage.store import MakeStore


@dataclass(frozen=True)
class Kind:
    """How a store is made, and what is read of it: "bitwise" what was written, or something near it ("lossy")."""

    make: MakeStore
    exactness: Literal["bitwise", "lossy"]
    least: int = 1  # numbers along the last axis of the entries that it takes


STORES: dict[str, Kind] = {
    "dense": Kind(Dense, "bitwise"),
    "paged": Kind(Paged, "bitwise"),
    "int8": Kind(partial(Coded, Int8()), "lossy", least=BITS),
    "fp8": Kind(partial(Coded, Fp8()), "lossy", least=BITS),
}
RECURRENT: dict[str, Kind] = {"bfloat16": Kind(partial(Rounded, torch.bfloat16), "lossy")}


@dataclass(frozen=True)
class Stores:
    """Which store each state of a cache lives in: keys and values, and recurrent states, in those of these names.

    All else is in `Dense`, and recurrent states where `recurrent` is None. Raises OptionError for a name that is none.
    """

    attention: str = "dense"
    recurrent: str | None = None

    def __post_init__(self) -> None:
        if self.recurrent is not None and (not isinstance(self.recurrent, str) or self.recurrent not in RECURRENT):
            hint = "; those of store= are for keys and values" if self.recurrent in (*STORES,) else ""
            raise OptionError(
                f"recurrent_store={self.recurrent!r}: give None, or {', '.join(map(repr, RECURRENT))}{hint}"
            )
        if not isinstance(self.attention, str) or self.attention not in STORES:
            raise OptionError(f"store={self.attention!r}: give one of {', '.join(map(repr, STORES))}")

    def of(self, spec: StateSpec) -> MakeStore:
        """What makes the store of this state."""
        if spec.kind == "recurrent" and self.recurrent is not None:
            return RECURRENT[self.recurrent].make
        kind = STORES[self.attention]
        # what an index compares, and what counts, chooses entries: near is not enough there
        if spec.kind not in ("attention", "sliding") or spec.name == "index" or spec.dtype is not None:
            return Dense
        return kind.make if spec.shape and spec.shape[-1] >= kind.least else Dense


def apart(make: MakeStore) -> MakeStore:
    """The same store where its memory comes and goes, so that no other can share it."""
    return partial(Paged, shares=False) if make is Paged else make
