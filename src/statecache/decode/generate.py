"""generate: from a prompt to what a model makes of it, in one call."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from statecache.decode.drafters import Assistant, Drafter, Lookup
from statecache.decode.options import (
    check_counts,
    check_kinds,
    check_room,
    end_ids,
    most_drafts,
    pad_id,
    relative_cost,
)
from statecache.decode.prompt import rows_of, stops_of, texts_of
from statecache.decode.report import Report
from statecache.decode.rounds import Rounds
from statecache.decode.sampling import Sampler, generator_of
from statecache.decode.text import Ending, Text, special_tokens
from statecache.errors import OptionError
from statecache.models.cache import StateCache
from statecache.models.prepare import borrowed


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
    strings, at which its text is cut; a special token may go by its name. Ids of rows that end early are filled up with
    the pad token (else the end token, else 0). Nothing else of that configuration is heeded: no penalties, no other
    processors. Rows of ids hold no padding; texts may differ in length. Temperature 0 takes the likeliest token. Draws
    with the same `seed` repeat themselves; without one they come from torch's own generator.

    `stream=True` returns an iterator: for one text, of pieces of new text; for ids, of lists of ids, what each round
    adds to each row, empty where the row has ended.

    `lookup=n`, at most 64, drafts what once followed a row's last n tokens, or fewer, in this call's prompt and text,
    not in what a `cache` holds already; `assistant` drafts with a smaller model of the same words. Drafts change the
    time, not the result: greedy tokens are the same, drawn ones have the same distribution. Not to the bit: a round's
    logits are rounded otherwise than a step's, so in bfloat16 and float16 greedy texts may part where two words are
    that close (in float32 the tests find 500 tokens the same). How many are drafted follows what was accepted of late.
    `report` is called once, when all is over.

    `cache` is a StateCache to go on from: the prompt is what comes after the tokens that it holds. Afterwards it holds
    each row's tokens but the last, with which the next prompt begins; of texts every token that they show, so that the
    next prompt is new text alone, after a stream that was closed early too. Texts show neither special tokens nor the
    configuration's end tokens: such a last token stays out. Drafts need a slack of at least 2 there, and use all of
    it. Only prepared models can go on with that cache.

    A model is prepared and in eval mode until the call, or the iterator, is over, and then as it was. Raises
    OptionError, ConfigError, RowsError, CapacityError or SlackError before anything is computed, UnknownLayerError
    where `prepare` does.
    """
    check_kinds(model, tokenizer, cache, assistant, report)
    check_counts(max_new_tokens, lookup, assistant)
    given = prompt if isinstance(prompt, Tensor) else texts_of(prompt)
    special = special_tokens(tokenizer)
    words, ends = stops_of(stop, model, tokenizer, special)
    rows = rows_of(given, model, tokenizer, first=cache is None or not any(cache.lengths.tolist()))
    if stream and not isinstance(given, Tensor) and len(rows) > 1:
        raise OptionError(f"stream=True with {len(rows)} texts: their pieces would mix; give one text, or ids")
    if cache is not None:
        check_room(cache, rows, max_new_tokens - isinstance(given, Tensor))
    most = most_drafts(cache, lookup, assistant)
    device = next(model.parameters()).device
    sampler = Sampler(temperature, top_p, top_k, generator_of(seed, device))
    drafter: Drafter | None = None
    if lookup:
        drafter = Lookup(lookup, most, device)
    elif assistant is not None:
        drafter = Assistant(assistant, sampler, most, relative_cost(assistant, model), device)

    config = getattr(model, "generation_config", None)
    hidden = end_ids(config) | set(special.values())
    texts = [Text(tokenizer, row, words) for row in rows] if words or not isinstance(given, Tensor) else []
    own = cache
    if own is None:
        own = StateCache(model.config, slack=1 + most if most else 0, back=False)
    ending = Ending(frozenset(ends | end_ids(config)), texts, frozenset(hidden))
    rounds = Rounds(model, own, rows, max_new_tokens, sampler, ending, drafter, keep_rows=cache is not None)

    def finish() -> None:
        if cache is not None and not isinstance(given, Tensor):
            rounds.take_in([[t for t in row[-1:] if t not in hidden] for row in rounds.rows])

    def run() -> Generator[list[list[int]]]:
        with borrowed(model), nullcontext() if assistant is None else borrowed(assistant):
            try:
                yield from rounds
            except GeneratorExit:
                finish()
                raise
            else:
                finish()
            finally:
                if report is not None:
                    report(rounds.report())

    if stream:
        if isinstance(given, Tensor):
            return run() if given.dim() == 2 else _only(run())
        return _pieces(run(), texts[0])
    for _ in run():
        pass
    if isinstance(given, Tensor):
        return _as_ids(rounds.rows, given, pad_id(config))
    whole = [before + _end(text) for before, text in zip(given, texts, strict=True)]
    return whole[0] if isinstance(prompt, str) else whole


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
