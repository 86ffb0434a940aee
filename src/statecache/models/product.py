"""A linear layer of a step with what stands around it, and norms, as modules of transformers say.

B rows, E inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from statecache.models.parts import NORMS, eps_of


def product(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    *,
    by: Any = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer of x (B, E) with what stands around it, see `kernels.linear`; the library's for many rows.

    `by`: the norm module in front, or `squares` with `eps`, what is left of one; `gated`: the two weights are those of
    a gated unit, whose outputs these are. `dtype`: of sums and of what comes out, without a residual.
    """
    from statecache.kernels.linear import FEW_ROWS, MOST_ROWS, linear
    from statecache.kernels.norms import unit

    weights = (weight,) if isinstance(weight, Tensor) else weight
    if by is not None and len(x) > FEW_ROWS:  # every program would compute it
        x, by = normed(by, x, weights[0].dtype), None
    if len(x) <= MOST_ROWS:
        return linear(
            x,
            weights,
            **(like(by) or {"eps": eps}),
            squares=squares,
            unit=gated,
            residual=residual,
            scale=scale,
            dtype=dtype if residual is None else residual.dtype,
        )
    assert squares is None
    weights = weights if dtype is None else tuple(each.to(dtype) for each in weights)
    x = x.to(weights[0].dtype)
    y = torch.cat([F.linear(x, each) for each in weights], -1) if len(weights) > 1 else F.linear(x, weights[0])
    y = unit(y) if gated else y
    if residual is not None:
        return torch.add(residual, y, alpha=scale)
    return y if scale == 1.0 else y * scale


def normed(by: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Take x (B, E) through a norm, a module of `NORMS`, to this dtype."""
    from statecache.kernels.norms import norm

    given = like(by)
    return norm(x, given.pop("norm"), **given, dtype=dtype)


def like(by: Any) -> dict[str, Any]:
    """What kernels are told of a norm, a module of `NORMS`, that they are to take; nothing of None."""
    return {} if by is None else {"norm": by.weight, "eps": eps_of(by), "offset": NORMS[type(by).__name__]}
