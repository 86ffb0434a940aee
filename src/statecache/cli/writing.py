"""One run of `sc.generate`: text as it comes, and a stop between two rounds."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch

import statecache as sc
from statecache.cli.model import Loaded, tokens_held
from statecache.decode.prompt import stops_of
from statecache.decode.report import Report
from statecache.decode.text import Text, special_tokens


class Stop:
    """Turn Ctrl-C into a request that is looked at between two rounds. The second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass(frozen=True)
class Written:
    """What one run wrote. seconds: from the first forward to the last token; first: to the first one."""

    tokens: list[int]
    text: str
    seconds: float
    report: Report
    first: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def decoded_per_second(self) -> float:
        """New tokens but the first, for each second after it."""
        return (len(self.tokens) - 1) / (self.seconds - self.first) if len(self.tokens) > 1 else 0.0


def write_on(
    loaded: Loaded,
    ids: list[int],
    cache: Any,
    options: dict[str, Any],
    stop: Stop,
    write: Callable[[str], object],
    first: str = "",
) -> Written:
    """Go on from `ids`, of which the cache may hold the first ones, handing `first` and each piece of text to `write`.

    `options`: of `sc.generate`. What makes no sense is refused before anything is handed on.
    """
    special = special_tokens(loaded.tokenizer)
    stops, _ = stops_of(options.get("stop"), loaded.model, loaded.tokenizer, special)
    text, reports, tokens = Text(loaded.tokenizer, ids, stops), list[Report](), list[int]()
    held = tokens_held(cache)
    start, arrived = time.perf_counter(), 0.0
    stream = sc.generate(
        loaded.model,
        torch.tensor(ids[held:]),
        loaded.tokenizer,
        cache=cache,
        assistant=loaded.assistant,
        stream=True,
        report=reports.append,
        **options,
    )
    if first:
        write(first)
    with stream:
        for new in stream:
            arrived = arrived or time.perf_counter() - start
            tokens += new
            for token in new:
                text.push(token)
            if piece := text.take():
                write(piece)
            if stop.requested:
                break
    seconds = time.perf_counter() - start
    text.end()
    if piece := text.take():
        write(piece)
    return Written(tokens, text.text, seconds, reports[0], arrived)
