"""A linear layer of a step with what stands around it, and norms, as modules of transformers say.

B rows, E inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.models.parts import NORMS, eps_of

GOES_ALONG = "statecache_handed"  # of a tensor, what was handed on with it


@dataclass(frozen=True)
class Into:
    """The sum that a product is added to, (B, O), times `scale`; and the norm that takes it next, if that is known."""

    sum: Tensor
    scale: float = 1.0
    behind: Any = None


@dataclass(frozen=True)
class Handed:
    """What a product has made of its sum, of this version, for the norm behind: see `kernels.linear.added`."""

    norm: Any
    weighted: Tensor
    squares: Tensor
    version: int


def product(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    *,
    by: Any = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    into: Into | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer of x (B, E) with what stands around it, see `kernels.linear`; the library's for many rows.

    `by`: the norm in front, a module or what was `handed` on for it, or `squares` with `eps`, what is left of one;
    `gated`: the two weights are those of a gated unit, whose outputs these are. `dtype`: of what comes out. `into`:
    what it is added to, in place of `scale` and `dtype`.
    """
    from statecache.kernels.linear import FEW_ROWS, MOST_ROWS, linear
    from statecache.kernels.norms import unit

    assert into is None or (scale == 1.0 and dtype is None)
    weights = (weight,) if isinstance(weight, Tensor) else weight
    if isinstance(by, Handed):
        if by.weighted.dtype == weights[0].dtype:
            x, squares, eps, by = by.weighted, by.squares, eps_of(by.norm), None
        else:
            by = by.norm
    if by is not None and len(x) > FEW_ROWS:  # every program would compute it
        x, by = normed(by, x, weights[0].dtype), None
    given: Any = {**(like(by) or {"eps": eps}), "squares": squares, "unit": gated}
    if len(x) <= MOST_ROWS:
        if into is None:
            return linear(x, weights, **given, scale=scale, dtype=dtype)
        if by is None and not gated and _hands(into, weights):
            return _added(x, weights[0], squares, eps, into)
        return linear(x, weights, **given, residual=into.sum, scale=into.scale, dtype=into.sum.dtype)
    assert squares is None
    weights = weights if dtype is None else tuple(each.to(dtype) for each in weights)
    x = x.to(weights[0].dtype)
    y = torch.cat([F.linear(x, each) for each in weights], -1) if len(weights) > 1 else F.linear(x, weights[0])
    y = unit(y) if gated else y
    if into is not None:
        return torch.add(into.sum, y, alpha=into.scale)
    return y if scale == 1.0 else y * scale


def _hands(into: Into, weights: tuple[Tensor, ...]) -> bool:
    """Whether a sum goes on to its norm with what that needs. float16 may have no place for what is not normed."""
    if into.behind is None or len(weights) > 1 or len(into.sum) == 1:
        return False
    if torch.is_inference_mode_enabled():  # in which tensors have no version
        return False
    return torch.float16 not in (into.sum.dtype, weights[0].dtype)


def _added(x: Tensor, weight: Tensor, squares: Tensor | None, eps: float, into: Into) -> Tensor:
    from statecache.kernels.linear import added

    by, offset = into.behind, NORMS[type(into.behind).__name__]
    options: Any = {"offset": offset, "squares": squares, "eps": eps, "scale": into.scale}
    total, weighted, parts = added(x, weight, into.sum, by.weight, **options)
    return _with(total, Handed(by, weighted, parts, total._version))


def _with(x: Tensor, made: Handed) -> Tensor:
    """The same tensor, with what goes along."""
    setattr(x, GOES_ALONG, made)
    return x


def _along(x: Tensor) -> Handed | None:
    """What goes along with x; None where that is nothing or x was changed since.

    What changes x behind torch's back, by `.data` or a kernel of its own, is not seen.
    """
    made: Handed | None = getattr(x, GOES_ALONG, None)
    return made if made is not None and made.version == x._version else None


def handed(x: Tensor, by: Any) -> Any:
    """What was handed on with x for this norm, a module; the module, where that is nothing."""
    made = _along(x)
    return made if made is not None and made.norm is by else by


def shaped(x: Tensor, *shape: int) -> Tensor:
    """The same entries in this shape, and what was handed on with them."""
    made, y = _along(x), x.reshape(shape)
    return y if made is None else _with(y, replace(made, version=y._version))


def normed(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Take x (B, E) through a norm, a module of `NORMS`, to this dtype."""
    from statecache.kernels.norms import norm

    given = like(by)
    return norm(x, given.pop("norm"), **given, dtype=dtype)


def like(by: Any) -> dict[str, Any]:
    """What kernels are told of a norm, a module of `NORMS`, that they are to take; nothing of None."""
    return {} if by is None else {"norm": by.weight, "eps": eps_of(by), "offset": NORMS[type(by).__name__]}
