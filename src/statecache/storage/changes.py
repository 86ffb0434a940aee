"""Changes to many tensors, made together: a launch for all that are alike, not one for each.

A cache has a few tensors a layer, and a GPU takes longer to begin a copy than to make a small one.

B rows, k of them, *D the shape of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from statecache import kernels

ALONE = 1 << 23  # bytes from which on a tensor is worth a launch of its own: torch's single copies are the faster ones
ASIDE = 1 << 28  # bytes that are kept aside at once while rows trade places, and one buffer's at least
MANY = 512  # tensors from which on more at once are no quicker, and cost the host: it walks through what is alive

Rows = tuple[int, ...]
Pair = tuple[int, int]  # where a row goes, and where it is
Copies = tuple[Sequence[Tensor], Sequence[Tensor]]  # to where, and what: of one shape, dtype and layout on either side


class Changes:
    """What is to be zeroed, copied and moved, nothing before `make`, and then in any order.

    None may read or write what another one writes.
    """

    def __init__(self) -> None:
        self._zeroed: list[tuple[Tensor, Rows | None]] = []
        self._copied: list[tuple[Tensor, Tensor, Rows | None]] = []
        self._taken: list[tuple[Tensor, Rows]] = []

    def zero(self, held: Tensor, rows: Iterable[int] | None = None) -> None:
        """Zero these rows of `held` (B, *D), None for all of it."""
        self._zeroed.append((held, None if rows is None else tuple(rows)))

    def copy(self, to: Tensor, what: Tensor, rows: Sequence[int] | None = None) -> None:
        """Copy `what` into `to`, of the same shape; or the k `rows` of it (B, *D) into `to` (k, *D)."""
        self._copied.append((to, what, None if rows is None else tuple(rows)))

    def clone(self, what: Tensor) -> Tensor:
        """A tensor that is a copy of `what` once it is made."""
        # laid out alike; on the meta device, where a plan is made, that imports sympy, which takes half a second
        new = what.new_empty(what.shape) if what.is_meta else torch.empty_like(what)
        self.copy(new, what)
        return new

    def take(self, held: Tensor, rows: Sequence[int]) -> None:
        """Have the first k of the rows `held` (B, *D) be what the k `rows` were, in place."""
        self._taken.append((held, tuple(rows)))

    def make(self) -> None:
        """Make all of them, and be empty again."""
        zeroed, copied, taken = self._zeroed, self._copied, self._taken
        self._zeroed, self._copied, self._taken = [], [], []
        with torch.no_grad():  # no gradient flows through a store
            _zero([held] if rows is None else [held[row] for row in rows] for held, rows in zeroed)
            _copy(([to], [what]) if rows is None else _picked(to, what, rows) for to, what, rows in copied)
            _take(taken)


def order(rows: Sequence[int]) -> tuple[list[int], list[Pair], list[Pair]]:
    """How row n comes to be what row rows[n] was, for all n: which rows to keep aside, what to copy first, and then.

    No copy of either round writes what another one of it reads, but for what is kept aside: at most half of a ring of
    rows that trade places, rounded up.
    """
    moved = {to: row for to, row in enumerate(rows) if to != row}
    read, late = set(moved.values()), dict[int, bool]()
    for begin in sorted(moved, key=read.__contains__):  # from those that nobody reads, each before what it reads itself
        at, turn = begin, False
        while at in moved and at not in late:
            late[at], at, turn = turn, moved[at], not turn
    aside = {row for to, row in moved.items() if row in moved and not (late[row] and not late[to])}
    first, then = ([pair for pair in moved.items() if late[pair[0]] is turn] for turn in (False, True))
    return sorted(aside), first, then


# ---- inside


def _zero(zeroed: Iterable[Sequence[Tensor]]) -> None:
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensors in filter(None, zeroed):
        one = tensors[0]
        if one.nbytes < ALONE and one.is_contiguous():
            alike.setdefault((one.device, one.dtype), []).extend(tensors)
        else:
            for tensor in tensors:
                tensor.zero_()
    for together in alike.values():
        torch._foreach_zero_(together)


def _copy(copied: Iterable[Copies]) -> None:
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for tos, whats in copied:
        if not tos:
            continue
        to, what = tos[0], whats[0]
        # one that is not as torch's fused copies want it would have all others copied one by one
        fused = to.device == what.device and to.is_contiguous() and to.stride() == what.stride()
        if not fused or to.nbytes >= ALONE:
            for to, what in zip(tos, whats, strict=True):
                to.copy_(what)
            continue
        kind = to.device, to.dtype, what.dtype
        together = alike.setdefault(kind, ([], []))
        together[0].extend(tos)
        together[1].extend(whats)
        if len(together[0]) >= MANY:
            torch._foreach_copy_(*alike.pop(kind))
    for together in alike.values():
        torch._foreach_copy_(*together)


def _picked(to: Tensor, held: Tensor, rows: Rows) -> Copies:
    there = _views(held, rows)
    return to.unbind(0), [there[row] for row in rows]


def _take(taken: list[tuple[Tensor, Rows]]) -> None:
    """Move rows in place: a kernel those that it can, at once, and copies the others."""
    left, together = list[tuple[Tensor, Rows]](), dict[tuple[torch.device, Rows], list[Tensor]]()
    for held, rows in taken:
        if _by_kernel(held, rows):
            together.setdefault((held.device, rows), []).append(held)
        else:
            left.append((held, rows))
    for (_, rows), buffers in together.items():
        from statecache.kernels.rows import take

        take(buffers, rows)
    _trade(left)


def _by_kernel(held: Tensor, rows: Rows) -> bool:
    if not kernels.available(held.device):
        return False
    from statecache.kernels.rows import takes

    return takes(held, rows)


def _trade(taken: list[tuple[Tensor, Rows]]) -> None:
    """The same by copies, of as many buffers at once as what is kept aside allows."""
    orders = {rows: order(rows) for rows in {rows for _, rows in taken}}
    rounds: tuple[list[Copies], ...] = ([], [], [])
    size = views = 0
    for held, rows in taken:
        aside, *copies = orders[rows]
        if not any(copies):
            continue
        kept = held.new_empty(len(aside), *held.shape[1:])
        if size + kept.nbytes > ASIDE or views >= MANY:
            _rounds(rounds)
            size = views = 0
        there = _views(held, [*rows, *range(len(rows))])
        away = dict(zip(aside, kept.unbind(0), strict=True))
        rounds[0].append((list(away.values()), [there[row] for row in aside]))
        for pairs, copied in zip(copies, rounds[1:], strict=True):
            copied.append(([there[to] for to, _ in pairs], [away.get(row, there[row]) for _, row in pairs]))
        size, views = size + kept.nbytes, views + len(there)
    _rounds(rounds)


def _rounds(rounds: tuple[list[Copies], ...]) -> None:
    """Make these copies one round after the other, and forget them."""
    for copied in rounds:
        _copy(copied)
        copied.clear()


def _views(held: Tensor, rows: Sequence[int]) -> Mapping[int, Tensor] | Sequence[Tensor]:
    """At least these rows, by number: one by one where they are few, since all at once takes a quarter for each."""
    return {row: held[row] for row in rows} if 4 * len(rows) < len(held) else held.unbind(0)
