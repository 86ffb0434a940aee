"""generate: from a prompt to what a model makes of it, in one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from statecache.decode.drafters import Assistant, Drafter, Lookup
from statecache.decode.report import Report
from statecache.decode.rounds import Rounds
from statecache.decode.sampling import Sampler
from statecache.decode.text import Ending, Text
from statecache.errors import CapacityError, ConfigError, OptionError, RowsError, SlackError
from statecache.models.cache import StateCache
from statecache.models.prepare import is_prepared, prepare, unprepare

MOST = 8  # drafted tokens in one round


def generate(
    model: Any,
    prompt: str | Sequence[str] | Tensor,
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    stream: bool = False,
    cache: Any = None,
    lookup: int = 0,
    assistant: Any = None,
    report: Callable[[Report], object] | None = None,
) -> Any:
    """Go on with a prompt: one text gives the whole text, several give a list, ids (B, T) or (T,) give ids, T + new.

    A row ends after `max_new_tokens`, with an end token of `model.generation_config`, or with one of `stop`: ids, or
    strings, at which its text is cut. Ids of rows that end early are filled up with the pad token (else the end token,
    else 0). Rows of ids hold no padding; texts may differ in length. Temperature 0 takes the likeliest token. Draws
    with the same `seed` repeat themselves; without one they come from torch's own generator.

    `stream=True` returns an iterator: for one text, of pieces of new text; for ids, of lists of ids, what each round
    adds to each row, empty where the row has ended.

    `lookup=n` drafts what once followed a row's last n tokens, or fewer; `assistant` drafts with a smaller model of the
    same words. Drafts change the time, not the result: greedy tokens are the same, drawn ones have the same
    distribution. How many are drafted follows what was accepted of late. `report` is called once, when all is over.

    `cache` is a StateCache to go on from: the prompt is what comes after the tokens that it holds. Afterwards it holds
    each row's tokens but the last, with which the next prompt begins; of texts the last too, unless it is an end token,
    so that the next prompt is new text alone. Drafts need a slack of at least 2 there, and use all of it. Only prepared
    models can go on with that cache.

    A model that is not prepared is so until the call, or the iterator, is over. Raises OptionError, ConfigError,
    RowsError, CapacityError or SlackError before anything is computed, UnknownLayerError where `prepare` does.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise OptionError(f"generate takes a transformers model, not a {type(model).__name__}")
    _check_counts(max_new_tokens, lookup, assistant)
    words, ends = _stops(stop)
    if isinstance(prompt, Tensor):
        rows = _rows_of(prompt, model)
        if words and tokenizer is None:
            raise OptionError(f"stop={stop!r}: to find a string among ids takes their tokenizer: give tokenizer=")
    else:
        rows = _tokenize(prompt, tokenizer, first=cache is None or not any(cache.lengths.tolist()))
        if stream and not isinstance(prompt, str):
            raise OptionError(f"stream=True with {len(rows)} texts: their pieces would mix; give one text, or ids")
    if cache is not None:
        _check_cache(cache, rows, max_new_tokens - isinstance(prompt, Tensor))
    most = _most(cache, lookup, assistant)
    device = next(model.parameters()).device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    sampler = Sampler(temperature, top_p, top_k, generator)
    drafter: Drafter | None = None
    if lookup:
        drafter = Lookup(lookup, most, device)
    elif assistant is not None:
        drafter = Assistant(assistant, sampler, most, _relative_cost(assistant, model), device)

    config = getattr(model, "generation_config", None)
    ends |= _end_ids(config)
    spoken = words or not isinstance(prompt, Tensor)
    texts = [Text(tokenizer, row, words) for row in rows] if spoken else []
    own = cache
    if own is None:
        own = StateCache(model.config, slack=1 + most if most else 0)
        own.lasting = True  # only rounds go back
    ending = Ending(frozenset(ends), texts)
    rounds = Rounds(model, own, rows, max_new_tokens, sampler, ending, drafter, keep_rows=cache is not None)

    def run() -> Generator[list[list[int]]]:
        with _prepared(model), _prepared(assistant):
            try:
                yield from rounds
                if cache is not None and not isinstance(prompt, Tensor):
                    rounds.take_in([[t for t in row[-1:] if t not in ends] for row in rounds.rows])
            finally:
                if report is not None:
                    report(rounds.report())

    if stream:
        if isinstance(prompt, Tensor):
            return run() if prompt.dim() == 2 else _only(run())
        return _pieces(run(), texts[0])
    for _ in run():
        pass
    if isinstance(prompt, Tensor):
        return _as_ids(rounds.rows, prompt, _pad(config))
    whole = [_end(text) for text in texts]
    return prompt + whole[0] if isinstance(prompt, str) else [p + new for p, new in zip(prompt, whole, strict=True)]


# ---- what comes in


def _check_counts(max_new_tokens: int, lookup: int, assistant: Any) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("lookup", lookup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: give an integer of at least {least}")
    if lookup and assistant is not None:
        raise OptionError(f"lookup={lookup} and assistant= are two ways to draft: give one of them")


def _stops(stop: str | int | Sequence[str | int] | None) -> tuple[list[str], set[int]]:
    """The strings and the ids that end a row."""
    given = [] if stop is None else [stop] if isinstance(stop, str | int) else list(stop)
    for one in given:
        if isinstance(one, bool) or not isinstance(one, str | int) or one == "":
            raise OptionError(f"stop={stop!r}: give token ids, or strings that are not empty")
    return [x for x in given if isinstance(x, str)], {x for x in given if isinstance(x, int)}


def _rows_of(ids: Tensor, model: Any) -> list[list[int]]:
    if ids.dim() not in (1, 2) or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise OptionError(
            f"prompt: came {ids.dtype} {tuple(ids.shape)}, expected integers (rows, tokens) or (tokens,), at least one"
        )
    rows: list[list[int]] = (ids if ids.dim() == 2 else ids[None]).tolist()
    size = _words(model)
    least, greatest = min(map(min, rows)), max(map(max, rows))
    if least < 0 or greatest >= size:
        raise OptionError(f"prompt: ids {least}..{greatest}, and the model has words 0..{size - 1}")
    return rows


def _tokenize(prompt: str | Sequence[str], tokenizer: Any, first: bool) -> list[list[int]]:
    """The tokens of each text, with the special ones that begin it if it is the `first` of its cache."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"prompt: a {type(prompt).__name__} came; give a text, a list of texts, or a tensor of ids")
    if tokenizer is None:
        raise OptionError("a text prompt takes the model's tokenizer: give tokenizer=, or a tensor of ids")
    rows = [list(tokenizer(text, add_special_tokens=first)["input_ids"]) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise OptionError(f"prompt {text!r} has no token: give at least one word")
    return rows


def _check_cache(cache: Any, rows: list[list[int]], more: int) -> None:
    """Whether a cache has a row for each of `rows`, and room for them and `more` tokens each."""
    if not isinstance(cache, StateCache):
        raise OptionError(f"cache: came a {type(cache).__name__}, expected a StateCache")
    held = cache.lengths.tolist() or [0] * len(rows)
    if any(held) and len(held) != len(rows):
        raise RowsError(
            f"{len(rows)} prompts came for a cache of {len(held)} rows: select or repeat them with gather()"
        )
    limit = cache.get_max_length()
    for b, (row, length) in enumerate(zip(rows, held, strict=False)):
        need = length + len(row) + more
        if 0 <= limit < need:
            raise CapacityError(
                f"row {b} holds {length} tokens, its prompt brings {len(row)} and {more} more are to come: make the "
                f"cache with capacity={need} or more, not {cache.capacity}, or give a smaller max_new_tokens="
            )


def _most(cache: StateCache | None, lookup: int, assistant: Any) -> int:
    """How many tokens a round may draft."""
    if not lookup and assistant is None:
        return 0
    if cache is None:
        return MOST
    if cache.slack < 2:
        raise SlackError(
            f"a round feeds a token and its drafts, and takes back what is refused: the cache was made with "
            f"slack={cache.slack}; make it with slack={1 + MOST}, or at least 2"
        )
    return cache.slack - 1


def _words(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _relative_cost(assistant: Any, model: Any) -> float:
    """What a forward pass of the assistant costs, as a part of one of the model."""
    if not isinstance(assistant, nn.Module) or not hasattr(assistant, "config"):
        raise OptionError(f"assistant: came a {type(assistant).__name__}, expected a transformers model")
    if _words(assistant) != _words(model):
        raise ConfigError(
            f"the assistant has {_words(assistant)} words, the model {_words(model)}: give one with the same tokenizer"
        )
    pair: tuple[Any, Any] = assistant, model
    # a large model takes its time for its weights, a small one for its layers
    weights: list[int] = [sum(p.numel() for p in m.parameters()) for m in pair]
    layers = [int(m.config.get_text_config(decoder=True).num_hidden_layers) for m in pair]
    return max(weights[0] / weights[1], layers[0] / layers[1])


def _end_ids(config: Any) -> set[int]:
    ends = getattr(config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _pad(config: Any) -> int:
    pad = getattr(config, "pad_token_id", None)
    return int(pad) if pad is not None else min(_end_ids(config), default=0)


_borrowed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # models prepared here, by how many calls use them


@contextmanager
def _prepared(model: Any) -> Iterator[None]:
    """Have a model prepared within, and as it was afterwards; streams over one model may overlap."""
    users = _borrowed.get(model, 0) if model is not None else 0
    if model is None or (not users and is_prepared(model)):
        yield
        return
    if not users:
        prepare(model)
    _borrowed[model] = users + 1
    try:
        yield
    finally:
        _borrowed[model] -= 1
        if not _borrowed[model]:
            del _borrowed[model]
            unprepare(model)


# ---- what goes out


def _as_ids(rows: list[list[int]], prompt: Tensor, pad: int) -> Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=prompt.device)
    return ids if prompt.dim() == 2 else ids[0]


def _only(rounds: Generator[list[list[int]]]) -> Iterator[list[int]]:
    """What the rounds add to the one row there is."""
    with closing(rounds):
        for new in rounds:
            yield new[0]


def _pieces(rounds: Generator[list[list[int]]], text: Text) -> Iterator[str]:
    """The text in pieces, as the rounds bring it."""
    with closing(rounds):
        for _ in rounds:
            if piece := text.take():
                yield piece
    text.end()
    if piece := text.take():
        yield piece


def _end(text: Text) -> str:
    text.end()
    return text.text
