"""A speculative round: a forward pass reads and writes ahead, and only what is accepted becomes part of the rows.

B rows, T new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor

from statecache.errors import StepError
from statecache.states import States


class Round:
    """The round that `StateCache.speculate` begins: `with cache.speculate(8) as draft: ...; draft.commit(accepted)`.

    Its one forward pass writes entries past the rows' ends, into slots that the slack reserves, and moves no length.
    So leaving the block without a commit, by an exception too, leaves the rows as they were.
    """

    def __init__(
        self,
        states: States,
        max_tokens: int,
        committed: Callable[[], object] | None = None,
        *,
        unseen: bool = False,
    ) -> None:
        """`committed`: called when tokens have become part of the rows. `unseen`: see `StateCache.speculate`.

        Raises SlackError for more tokens than the slack, StepError in another round.
        """
        if not unseen:
            states.check_round(max_tokens)
        self.states, self.max_tokens, self.unseen = states, max_tokens, unseen
        self._committed = committed
        self._entered = self._over = False

    def __enter__(self) -> Self:
        if self._entered or self.states.tentative is not None:
            raise StepError("a speculative round cannot be entered twice, nor inside another: begin a new one after it")
        self.states.begin_round(self.max_tokens, self.unseen)
        self._entered = True
        return self

    def __exit__(self, *exception: Any) -> None:
        if not self._over:
            self._over = True
            self.states.end_round()

    def commit(self, accepted: Tensor | Sequence[int] | int) -> None:
        """Keep the first `accepted` tokens of the pass in each row: (B,) long, or one int for every row; each 0..T.

        Of a pass over some rows, one number for each of them. Ends the round. Raises StepError without a pass,
        RowsError for counts that do not fit it; nothing is kept then. May wait for the device.
        """
        if self._over or not self._entered:
            raise StepError("this speculative round is over: begin another with speculate()")
        try:
            self.states.end_round(accepted)
        finally:
            self._over = self.states.tentative is None
        if self._committed is not None and not self.unseen:
            self._committed()
