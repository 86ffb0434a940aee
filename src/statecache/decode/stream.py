"""What `generate(stream=True)` returns: an iterator that can be closed, and that may be forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Generic, Self, TypeVar

from torch import nn

from statecache.decode.batch import Batch, Row
from statecache.decode.report import Report
from statecache.models.prepare import Loan, lend

Piece = TypeVar("Piece")


class Run:
    """The rounds of one call, from the loan of its models to their return: each one's new tokens, a list for each row.

    `shown`: which rows' last tokens the cache is to take in at the end. `report` is called then, once.
    """

    def __init__(
        self,
        batch: Batch,
        rows: Sequence[Row],
        models: Sequence[nn.Module],
        shown: Callable[[], Sequence[Row]],
        report: Callable[[Report], object] | None,
    ) -> None:
        self.batch, self.rows, self.models, self.shown, self.report = batch, rows, models, shown, report
        self._loans: list[Loan] = []
        self._begun = self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[list[int]]:
        if self._over:
            raise StopIteration
        try:
            if not self._begun:
                for model in self.models:
                    self._loans.append(lend(model))
                self._begun = True
            if self.batch.running:
                new = self.batch.round()
                return [new.get(row, []) for row in self.rows]
        except BaseException:
            self._end()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Leave in the cache what is promised, and the models as they were. One forward pass at most."""
        if self._over:
            return
        try:
            if self._begun:
                self.batch.take_in(self.shown())
        finally:
            self._end()

    def forget(self) -> None:
        """Leave the models as they were, and no more than that: no forward pass, no report."""
        self._over = True
        self.batch.close()
        for loan in self._loans:
            loan.end()

    def __del__(self) -> None:
        self.forget()

    def _end(self) -> None:
        self.forget()
        if self._begun and self.report is not None:
            self.report(replace(self.batch.report(), reasons=tuple(row.reason for row in self.rows)))


class Stream(Generic[Piece]):
    """Pieces of what is written, as each round brings them; a context, too, which closes it.

    Until it is closed or at its end it has the model prepared. One that is dropped before gives the model back, but
    runs nothing: its cache holds all tokens of each row but the last.
    """

    def __init__(self, run: Run, pieces: Iterator[Piece]) -> None:
        self._run, self._pieces = run, pieces

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """End it here: the cache then holds what it would after as many tokens. May run one forward pass."""
        self._run.close()
        self._pieces = iter(())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
