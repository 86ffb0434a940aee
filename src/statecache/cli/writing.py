"""One run of `generate`: text as it comes, and a stop between two tokens."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from statecache.cli.model import Loaded

CONTEXT = 8  # tokens that a tokenizer may look back to when it turns the next ones into text


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
        self.text = ""
        self._tokenizer, self._write = tokenizer, write
        self._tail = before[-CONTEXT:]
        self._shown = len(self._decode())
        self._prompt_is_next = True

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tail, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def put(self, ids: Tensor) -> None:
        """Take the next tokens; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.new += ids.reshape(-1).tolist()
        self._tail += ids.reshape(-1).tolist()
        text = self._decode()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._hand_on(text)
            self._tail = self._tail[-CONTEXT:]
            self._shown = len(self._decode())

    def end(self) -> None:
        """Hand on what was kept back."""
        self._hand_on(self._decode())

    def _hand_on(self, text: str) -> None:
        piece, self._shown = text[self._shown :], len(text)
        self.text += piece
        if piece:
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
