"""What the chunked recurrences share: gates, chunks of a sequence, states at chosen tokens.

Letters: B rows, T new tokens, M chunks, Q tokens of a chunk, n marks of a row (`at`).
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncast(compute: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `compute` without autocast, in the dtypes that it chooses itself; a tensor comes first."""

    @functools.wraps(compute)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return _uncast(compute, args, kwargs)

    return run


def forward_only(update: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run `update` without autograd, since it writes its state in place, and without autocast; a tensor comes first.

    Raises RuntimeError where a gradient was asked for; unseen while torch.compile traces.
    """
    name = f"{update.__module__.rpartition('.')[2]}.{update.__name__}"

    @functools.wraps(update)
    def forward(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not torch.is_grad_enabled():
            return _uncast(update, args, kwargs)
        if not torch.compiler.is_compiling():
            given = (*args, *kwargs.values())
            if any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in given):
                raise RuntimeError(
                    f"{name}: writes its state in place, an input requires grad; use chunk for gradients"
                )
        with torch.no_grad():
            return _uncast(update, args, kwargs)

    return forward


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # of meta, torch does not answer


def _uncast(compute: Callable[..., _R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _R:
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    if not autocasts(first):
        return compute(*args, **kwargs)
    with torch.autocast(first.device.type, enabled=False):
        return compute(*args, **kwargs)


def working(x: Tensor, state: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: the state's; without one that of `x`, at least float32."""
    return torch.promote_types(x.dtype, torch.float32) if state is None else state.dtype


def gated(gate: Tensor, count: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`gate` (B, T, ...) in `dtype`, zero at and after each row's `count` (B,)."""
    gate = gate.to(dtype)
    if count is None:
        return gate
    over = torch.arange(gate.shape[1], device=gate.device) >= count[:, None]
    return gate.masked_fill(_like(over, gate), 0.0)


def size(tokens: int, most: int) -> int:
    """Tokens of a chunk: as few chunks of at most `most` as hold `tokens`, of equal size."""
    count = max(1, -(-tokens // most))
    return max(1, -(-tokens // count))


def split(x: Tensor, size: int) -> Tensor:
    """`x` (B, T, ...) as chunks (B, M, Q, ...), padded with zeros; never fewer than one chunk."""
    count = max(1, -(-x.shape[1] // size))
    short = count * size - x.shape[1]
    if short:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, short))
    return torch.unflatten(x, 1, (count, size))


def join(y: Tensor, tokens: int) -> Tensor:
    """Chunks (B, M, Q, ...) as the sequence (B, T, ...)."""
    return y.flatten(1, 2)[:, :tokens]


def total(log: Tensor) -> Tensor:
    """The exponents of decay from a chunk's begin to each of its tokens, of `log` (B, M, Q, H); float64 if that can be.

    What counts are their differences, and behind a strong decay float32 has no digits left for a weak one.
    """
    return log.cumsum(2, dtype=log.dtype if log.device.type == "mps" else torch.float64)


def between(total: Tensor, dtype: torch.dtype) -> Tensor:
    """The decay from each token of a chunk to those after it, (B, M, H, Q, Q), of `total` (B, M, H, Q); else zero."""
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype).masked_fill_(later, -torch.inf).exp_()


def room(x: Tensor) -> int:
    """Elements of an intermediate worth holding at once: in a processor's cache, or enough to fill an accelerator."""
    return 1 << 20 if x.device.type == "cpu" else 1 << 26


def sweep(
    parts: Callable[..., tuple[Tensor, ...]],
    through: Callable[..., tuple[Tensor, Tensor]],
    gates: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    at: Tensor | None,
    band: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Carry `state` (B, *S) through all chunks; the outputs (B, M, Q, ...), the state after them, those `at` (B, n).

    Marks are 0..T each. `parts(*gates, *inputs)` computes, for `band` chunks at once, all that does not need the carry;
    `through(state, *parts)` takes one chunk's share of it to that chunk's outputs (B, Q, ...) and the state after it.
    """
    kept, outputs, size = begun(state, at), [], gates[0].shape[2]
    ready: tuple[Tensor, ...] = ()
    for m in range(gates[0].shape[1]):
        if m % band == 0:
            ready = parts(*(x[:, m : m + band] for x in (*gates, *inputs)))
        y, state = through(state, *(part[:, m % band] for part in ready))
        outputs.append(y)
        kept = passed(kept, state, at, size, m)
    if kept is not None and at is not None:
        ready = parts(*rest(at, size, gates, inputs))
        kept = through(kept.flatten(0, 1), *(part.flatten(0, 1) for part in ready))[1].view(kept.shape)
    return torch.stack(outputs, 1), state, kept


def begun(state: Tensor, at: Tensor | None) -> Tensor | None:
    """The states at the marks `at` (B, n) before the first chunk: `state` (B, *S) for each, (B, n, *S)."""
    return None if at is None else state.unsqueeze(1).expand(-1, at.shape[1], *state.shape[1:])


def passed(kept: Tensor | None, state: Tensor, at: Tensor | None, size: int, chunk: int) -> Tensor | None:
    """`kept` (B, n, *S) with `state` (B, *S), the one after `chunk`, at the marks that lie behind that chunk."""
    if kept is None or at is None:
        return None
    return torch.where(_like(at // size > chunk, kept), state.unsqueeze(1), kept)


def rest(at: Tensor, size: int, gates: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The chunk of every mark `at` (B, n): gates and inputs (B, M, Q, ...) as (B, n, Q, ...), gates zero from it on."""
    rows = torch.arange(at.shape[0], device=at.device)[:, None]
    home = (at // size).clamp(max=gates[0].shape[1] - 1)
    over = torch.arange(size, device=at.device) >= (at % size)[..., None]
    cut = tuple(gate[rows, home] for gate in gates)
    return (*(gate.masked_fill(_like(over, gate), 0.0) for gate in cut), *(x[rows, home] for x in inputs))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
