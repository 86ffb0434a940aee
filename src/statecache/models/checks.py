"""What a layer hands in: whether it belongs to its state, before anything is written; and that no gradient follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statecache.errors import DeviceError, DtypeError, RowsError, ShapeError, StateCacheError
from statecache.lease import Lease
from statecache.ring import Ring


def check(
    name: str,
    new: Tensor,
    expected: tuple[int, ...],
    *,
    model: str,
    rows: int | None,
    state: Ring | Lease | None,
    cast: bool,
) -> None:
    """Raise the error that says why `new` is not (rows, *expected) as the cache has `state`. `cast`: of any dtype."""
    if tuple(new.shape[1:]) != expected:
        raise ShapeError(
            f'state "{name}": came {tuple(new.shape)}, and the cache was made for (rows, '
            f"{', '.join(map(str, expected))}): make it from the configuration of the {model} model that uses it"
        )
    if rows is not None and len(new) != rows:
        raise RowsError(f'state "{name}": {len(new)} rows came in a pass of {rows}')
    if state is not None and new.device != state.device:
        raise DeviceError(f'state "{name}": came on {new.device}, and the cache holds it on {state.device}')
    if state is not None and new.dtype != state.dtype and not cast:
        raise DtypeError(
            f'state "{name}": came in {new.dtype}, and the cache holds {state.dtype}: make it with dtype={new.dtype}, '
            "or leave dtype= out"
        )


def no_token(held: Sequence[int]) -> ShapeError:
    """What is said of a pass without tokens. `held`: how many each row of its cache has taken in."""
    told = "no token came: a forward pass takes at least one"
    if any(held):
        told += (
            f". The cache holds {' and '.join(map(str, held))} tokens: to go on from them the whole text comes, longer "
            "than that; for another text reset() the cache"
        )
    return ShapeError(told)


class _NoGradient(torch.autograd.Function):
    """Identity that raises in the backward pass, since entries carry no gradient: wrong ones would be silent."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, new: Tensor) -> Tensor:
        return seen.view_as(seen)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        raise StateCacheError("a StateCache carries no gradient: train with use_cache=False")


def no_gradient(seen: Tensor, new: Tensor) -> Tensor:
    """What a layer sees of the cache after it handed in `new`: the same, but for a backward pass, which it refuses."""
    if new.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NoGradient.apply(seen, new)  # type: ignore[no-any-return, no-untyped-call]
    return seen
