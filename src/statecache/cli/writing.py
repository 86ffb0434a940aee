"""One run of `generate`: text as it comes, and a stop between two tokens."""

import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

import statecache as sc
from statecache.cli.model import Loaded
from statecache.decode.report import Report
from statecache.decode.text import Text


class Stop:
    """Turn Ctrl-C into a request that is looked at between two tokens. The second one interrupts at once."""

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

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion for `generate`: ids (B, T) -> (B,)."""
        return torch.full((ids.shape[0],), self.requested, device=ids.device)


class TextWriter:
    """A streamer for `generate`: turns tokens into text as they come and hands on every whole character."""

    def __init__(self, tokenizer: Any, before: list[int], write: Callable[[str], object]) -> None:
        self.new: list[int] = []
        self._text, self._write = Text(tokenizer, before), write
        self._prompt_is_next = True

    @property
    def text(self) -> str:
        """What has been handed on."""
        return self._text.text

    def put(self, ids: Tensor) -> None:
        """Take the next tokens; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.add(ids.reshape(-1).tolist())

    def add(self, tokens: list[int]) -> None:
        """Take the next tokens."""
        self.new += tokens
        for token in tokens:
            self._text.push(token)
        self._hand_on()

    def end(self) -> None:
        """Hand on what was kept back."""
        self._text.end()
        self._hand_on()

    def _hand_on(self) -> None:
        if piece := self._text.take():
            self._write(piece)


@dataclass(frozen=True)
class Written:
    """What one run wrote. seconds: from the first forward to the last token."""

    tokens: list[int]
    text: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def write_on(
    loaded: Loaded, ids: list[int], cache: Any, options: dict[str, Any], stop: Stop, write: Callable[[str], object]
) -> Written:
    """Go on from `ids`, of which the cache may hold the first ones, handing each piece of text to `write`."""
    model, held = loaded.model, int(cache.get_seq_length())
    # with cache_params, transformers feeds what it is given and does not ask the cache how much it holds
    feed = ids[held:] if loaded.cache_argument == "cache_params" else ids
    batch = torch.tensor([feed], device=model.device)
    writer = TextWriter(loaded.tokenizer, ids, write)
    start = time.perf_counter()
    model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        streamer=writer,
        stopping_criteria=[stop],
        num_beams=1,
        **{loaded.cache_argument: cache},
        **options,
    )
    return Written(writer.new, writer.text, time.perf_counter() - start)


def write_drafted(
    loaded: Loaded,
    prompt: str,
    cache: Any,
    options: dict[str, Any],
    lookup: int,
    stop: Stop,
    write: Callable[[str], object],
) -> tuple[Written, Report]:
    """Go on with `prompt` in rounds that check drafts, handing it and each piece of text to `write`; what they gave."""
    ids, reports = loaded.tokenizer(prompt)["input_ids"], list[Report]()
    writer = TextWriter(loaded.tokenizer, ids, write)
    start = time.perf_counter()
    rounds = sc.generate(
        loaded.model,
        torch.tensor(ids),
        cache=cache,
        lookup=lookup,
        assistant=loaded.assistant,
        stream=True,
        report=reports.append,
        **options,
    )
    write(prompt)  # only now: what makes no sense has been refused
    with closing(rounds):
        for new in rounds:
            writer.add(new)
            if stop.requested:
                break
    writer.end()
    return Written(writer.new, writer.text, time.perf_counter() - start), reports[0]
