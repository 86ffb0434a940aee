"""From tokens to text, as they come."""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import suppress
from typing import Any

CONTEXT = 8  # tokens that a tokenizer may look back to when it turns the next ones into text


class Text:
    """The text of a row's new tokens, in whole characters.

    `before`: the tokens they follow; `stops`: strings with which it ends; `hidden`: tokens that it does not show.
    """

    def __init__(
        self, tokenizer: Any, before: Sequence[int], stops: Sequence[str] = (), hidden: Container[int] = ()
    ) -> None:
        self.text = ""
        self._tokenizer, self._stops, self._hidden = tokenizer, stops, hidden
        self._tail = list(before[-CONTEXT:])
        self._shown = len(self._decode())  # characters of the tail that `text` or the prompt has
        self._taken = 0

    def push(self, token: int) -> bool:
        """Append a token; whether it completes a stop string, with which the text then ends."""
        if token in self._hidden:
            return False
        self._tail.append(token)
        text = self._decode()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character
            return False
        stopped = self._append(text)
        self._tail = self._tail[-CONTEXT:]
        self._shown = len(self._decode())
        return stopped

    def end(self) -> None:
        """Append what was kept back: the row ends here."""
        self._append(self._decode())

    def take(self) -> str:
        """The text since the last call."""
        piece, self._taken = self.text[self._taken :], len(self.text)
        return piece

    def _append(self, text: str) -> bool:
        before = len(self.text)
        self.text += text[self._shown :]
        self._shown = len(text)
        found = [(self.text.find(stop, max(before - len(stop) + 1, 0)), len(stop)) for stop in self._stops]
        ends = [at + length for at, length in found if at >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        return bool(ends)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tail, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The names and ids of the tokens that are left out of texts."""
    named = zip(getattr(tokenizer, "all_special_tokens", ()), getattr(tokenizer, "all_special_ids", ()), strict=False)
    special: dict[str, int] = dict(named)
    with suppress(AttributeError, NotImplementedError):  # where a tokenizer does not tell, it has named them all
        special |= {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special
