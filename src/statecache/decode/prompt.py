"""What a call goes on from and where it is to end: texts, ids, stops, as rows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from statecache.decode.options import token_ids
from statecache.errors import OptionError


def conversations_of(prompt: Any) -> list[list[Any]]:
    """The one conversation, a list of messages, or each of several; none where the prompt is something else."""
    several = prompt if isinstance(prompt, list | tuple) else []
    if several and all(isinstance(message, Mapping) for message in several):
        several = [several]
    talks = [list(talk) for talk in several if isinstance(talk, list | tuple)]
    if not talks or len(talks) < len(several):
        return []
    for talk in talks:
        for message in talk:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise OptionError(f'prompt: {message!r} is no message: give {{"role": "user", "content": "..."}}')
    return talks


def templated(talk: list[Any], tokenizer: Any) -> str:
    """A conversation in the model's own form, up to where its answer begins."""
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        told = "a tokenizer" if tokenizer is None else "a chat template, which the tokenizer lacks"
        raise OptionError(f"messages take {told}: give tokenizer= of a chat model, or a text")
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise OptionError(f"the chat template refuses these messages: {error}") from error


def tokens_of(text: str, tokenizer: Any, first: bool = True) -> list[int]:
    """The tokens of a text; with those that begin one, if it is the `first` and does not begin with them itself."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not first:
        return plain
    whole = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    more = len(whole) - len(plain)
    return plain if whole[more:] == plain and whole[:more] == plain[:more] else whole


def texts_of(prompt: Any) -> list[str]:
    """The one text, or each of several."""
    if isinstance(prompt, Mapping):
        raise OptionError(f'prompt: a {type(prompt).__name__} came; give its ["input_ids"], a tensor of ids')
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"prompt: a {type(prompt).__name__} came; give a text, a list of texts, or a tensor of ids")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(
                f"prompt {text!r}: character {error.start} is half of one (a lone surrogate): give whole characters"
            ) from error
    return texts


def rows_of(prompt: Tensor | list[str], model: Any, tokenizer: Any, first: bool) -> list[list[int]]:
    """The tokens of each row; of texts with the special ones that begin a text, if they are the `first` of a cache."""
    rows = _ids(prompt) if isinstance(prompt, Tensor) else _tokenize(prompt, tokenizer, first)
    least, greatest, size = min(map(min, rows)), max(map(max, rows)), token_ids(model)
    if least < 0 or greatest >= size:
        raise OptionError(
            f"prompt: ids {least}..{greatest}, and the model has ids 0..{size - 1}: is the tokenizer another model's?"
        )
    return rows


def _ids(prompt: Tensor) -> list[list[int]]:
    if prompt.dim() not in (1, 2) or not prompt.numel() or prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise OptionError(
            f"prompt: came {prompt.dtype} {tuple(prompt.shape)}, expected integers (rows, tokens) or (tokens,), at "
            "least one"
        )
    rows: list[list[int]] = (prompt if prompt.dim() == 2 else prompt[None]).tolist()
    return rows


def _tokenize(texts: list[str], tokenizer: Any, first: bool) -> list[list[int]]:
    if tokenizer is None:
        raise OptionError("a text prompt takes the model's tokenizer: give tokenizer=, or a tensor of ids")
    rows = [tokens_of(text, tokenizer, first) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            way_out = "is the tokenizer the model's own?" if text.strip() else "give at least one word"
            raise OptionError(f"prompt {text!r} has no token: {way_out}")
    return rows


def stops_of(stop: Any, model: Any, tokenizer: Any, special: Mapping[str, int]) -> tuple[list[str], set[int]]:
    """The strings and the ids that end a row; of a `special` token, which no text shows, the id."""
    one = stop is None or isinstance(stop, str | int | bytes) or not isinstance(stop, Iterable)
    given = [] if stop is None else [stop] if one else list(stop)
    for x in given:
        if isinstance(x, bool) or not isinstance(x, str | int) or x == "":
            raise OptionError(f"stop={stop!r}: give token ids, or strings that are not empty")
    stops = [x for x in given if isinstance(x, str) and x not in special]
    ids = {special[x] if isinstance(x, str) else x for x in given if not isinstance(x, str) or x in special}
    if stops and tokenizer is None:
        raise OptionError(f"stop={stop!r}: to find a string among ids takes their tokenizer: give tokenizer=")
    if ids and not 0 <= min(ids) <= max(ids) < token_ids(model):
        raise OptionError(f"stop={stop!r}: the model has ids 0..{token_ids(model) - 1}: give one that it can write")
    return stops, ids
