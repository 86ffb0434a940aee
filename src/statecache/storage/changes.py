"""Changes to many tensors, made together: a launch for all that are alike, not one for each.

A cache has a few tensors a layer, and a GPU takes longer to begin a copy than to make a small one.

B rows, k of them, *D the shape of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ALONE = 1 << 23  # bytes from which on a tensor is worth a launch of its own: torch's single copies are the faster ones
ASIDE = 1 << 28  # bytes that are kept aside at once while rows trade places, and one buffer's at least

Pair = tuple[int, int]  # where a row goes, and where it is
Stretch = tuple[int, int, int]  # the same of several rows in order: the first of each, and how many


class Changes:
    """What is to be zeroed, copied and moved, nothing before `make`, and then in any order.

    None may read or write what another one writes.
    """

    def __init__(self) -> None:
        self._zeroed: list[Tensor] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._taken: list[tuple[Tensor, tuple[int, ...]]] = []

    def zero(self, what: Tensor) -> None:
        """Zero this tensor."""
        self._zeroed.append(what)

    def copy(self, to: Tensor, what: Tensor) -> None:
        """Copy `what` into a tensor of the same shape."""
        self._copied.append((to, what))

    def clone(self, what: Tensor) -> Tensor:
        """A tensor that is a copy of `what` once it is made."""
        new = torch.empty_like(what)
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
            _zero(zeroed)
            _copy(copied)
            _take(taken)


def stretches(pairs: Iterable[Pair]) -> list[Stretch]:
    """As few stretches as there can be: of pairs in a row both sides of which go up by one."""
    found: list[Stretch] = []
    for to, row in pairs:
        if found and (to, row) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((to, row, 1))
    return found


def order(rows: Sequence[int]) -> tuple[list[int], list[Pair], list[Pair]]:
    """How row n comes to be what row rows[n] was, for all n: which rows to keep aside, what to copy first, and then.

    No copy of either round writes what another one of it reads, but for what is kept aside: at most half of a ring of
    rows that trade places.
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


def _zero(tensors: list[Tensor]) -> None:
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.nbytes >= ALONE or not tensor.is_contiguous():
            tensor.zero_()
        else:
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for each in alike.values():
        torch._foreach_zero_(each)


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for to, what in pairs:
        # one that is not as torch's fused copies want it would have all others copied one by one
        fused = to.device == what.device and to.is_contiguous() and to.stride() == what.stride()
        if to.nbytes >= ALONE or not fused:
            to.copy_(what)
        else:
            tos, whats = alike.setdefault((to.device, to.dtype, what.dtype), ([], []))
            tos.append(to)
            whats.append(what)
    for tos, whats in alike.values():
        torch._foreach_copy_(tos, whats)


def _take(taken: list[tuple[Tensor, tuple[int, ...]]]) -> None:
    """Move rows in place, as many buffers at once as what is kept aside of them allows."""
    orders = {rows: order(rows) for _, rows in taken}
    while taken:
        away: list[tuple[Tensor, Tensor]] = []
        early: list[tuple[Tensor, Tensor]] = []
        late: list[tuple[Tensor, Tensor]] = []
        size = 0
        while taken and size < ASIDE:
            held, rows = taken.pop()
            aside, first, then = orders[rows]
            kept = held.new_empty(len(aside), *held.shape[1:])
            size += kept.nbytes
            away += _rows(kept, held, enumerate(aside))
            for pairs, copies in ((first, early), (then, late)):
                place = {row: n for n, row in enumerate(aside)}
                copies += _rows(held, kept, ((to, place[row]) for to, row in pairs if row in place))
                copies += _rows(held, held, (pair for pair in pairs if pair[1] not in place))
        for copies in (away, early, late):
            _copy(copies)


def _rows(to: Tensor, what: Tensor, pairs: Iterable[Pair]) -> list[tuple[Tensor, Tensor]]:
    """These rows of one tensor, and what is to come there; several at once where they lie one behind the other."""
    if to.is_contiguous() and what.is_contiguous():
        return [(to[a : a + n], what[b : b + n]) for a, b, n in stretches(pairs)]
    return [(to[a], what[b]) for a, b in pairs]
