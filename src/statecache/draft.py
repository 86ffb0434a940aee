"""A speculative round: a forward pass reads and writes ahead, and only what is accepted becomes part of the rows.

B rows, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from statecache.errors import CapacityError, RowsError, StepError

if TYPE_CHECKING:
    from statecache.cache import Rings
    from statecache.ring import Step


class Draft:
    """The round that `StateCache.speculate` begins: `with cache.speculate(8) as draft: ...; draft.commit(accepted)`.

    Its one forward pass writes entries past the rows' ends, into slots that the slack reserves, and moves no length.
    So leaving the block without a commit, by an exception too, leaves the rows as they were.
    """

    def __init__(self, cache: Rings, tokens: int) -> None:
        self.cache, self.tokens = cache, tokens
        self.step: Step | None = None  # of the pass, once it has run
        self.taken: list[int] = []  # tokens of it in each row
        self._over = False

    def __enter__(self) -> Self:
        if self._over or self.cache._draft is not None:
            raise StepError("a speculative round cannot be entered twice, nor inside another: begin a new one after it")
        self.cache._draft = self
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.cache._draft is self:
            self._end()
            self.cache._drop_step()

    def check(self, tokens: int) -> None:
        """Whether a pass of T `tokens` may begin."""
        if self.step is not None:
            raise StepError("a speculative round is one forward pass, and it has had it: commit(), and begin another")
        if tokens > self.tokens:
            raise CapacityError(
                f"the pass brings {tokens} tokens, and the round was begun with max_tokens={self.tokens}: give more, "
                "up to the cache's slack="
            )

    def commit(self, accepted: Tensor | Sequence[int] | int) -> None:
        """Keep the first `accepted` tokens of the pass in each row: (B,) long, or one int for every row; each 0..T.

        Ends the round. Raises StepError without a pass, RowsError for counts that do not fit it; nothing is kept then.
        May wait for the device.
        """
        clock, step = self.cache.clock, self.step
        if self._over or self.cache._draft is not self:
            raise StepError("this speculative round is over: begin another with speculate()")
        if clock is None or step is None:
            raise StepError("nothing to commit: the round had no whole forward pass")
        most = self.taken or ([step.tokens] * clock.rows if step.count is None else step.count.tolist())
        keep = list(accepted) if isinstance(accepted, Sequence) else self._listed(accepted, clock.rows)
        for row, (n, of) in enumerate(zip(keep, most, strict=True)):
            if not 0 <= n <= of:
                raise RowsError(f"row {row} cannot keep {n} tokens: the pass brought it {of}")
        clock.sync()
        self._end()
        clock.accept(step, keep)
        self.cache._committed()

    @staticmethod
    def _listed(accepted: Tensor | int, rows: int) -> list[int]:
        given = torch.as_tensor([accepted] * rows if isinstance(accepted, int) else accepted)
        if given.is_floating_point() or given.dtype == torch.bool or given.shape != (rows,):
            raise RowsError(
                f"accepted tokens are a long tensor ({rows},), one number a row, not {given.dtype} {tuple(given.shape)}"
            )
        return [int(n) for n in given.tolist()]

    def _end(self) -> None:
        self.cache._announce(self.step or self.cache._step)
        self._over, self.cache._draft = True, None
