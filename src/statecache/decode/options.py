"""Whether the options of `generate` make sense, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from statecache.decode.limits import LONGEST_RUN, MOST_DRAFTS
from statecache.decode.request import Request, check_seed, row_seed
from statecache.errors import CapacityError, ConfigError, OptionError, RotaryError, RowsError, SlackError
from statecache.models.cache import StateCache


def check_kinds(model: Any, tokenizer: Any, cache: Any, assistant: Any, report: Any) -> None:
    """Whether each is what it is to be; all but the model may be None."""
    if not _is_model(model):
        raise OptionError(f"generate takes a transformers model, not a {type(model).__name__}")
    if assistant is not None and not _is_model(assistant):
        raise OptionError(f"assistant: came a {type(assistant).__name__}, expected a transformers model")
    for each in (model, assistant):
        if each is not None and not _has_head(each):
            raise OptionError(
                f"a {type(each).__name__} gives no logits: give the model with its language-model head, as "
                "AutoModelForCausalLM loads it"
            )
    if tokenizer is not None and not (callable(tokenizer) and callable(getattr(tokenizer, "decode", None))):
        raise OptionError(f"tokenizer: came a {type(tokenizer).__name__}, expected the model's tokenizer")
    if cache is not None and not isinstance(cache, StateCache):
        raise OptionError(f"cache: came a {type(cache).__name__}, expected a StateCache")
    if report is not None and not callable(report):
        raise OptionError(f"report: came a {type(report).__name__}, expected a function that takes the Report")


def _is_model(model: Any) -> bool:
    return isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_output_embeddings")


def _has_head(model: nn.Module) -> bool:
    """Whether a model, or the one inside it, has a language-model head."""
    heads: list[Any] = [getattr(module, "get_output_embeddings", None) for module in model.modules()]
    return any(head is not None and head() is not None for head in heads)


def check_counts(max_new_tokens: int, lookup: int, assistant: Any) -> None:
    """Whether the numbers of tokens are such, and one drafter at most is asked for."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("lookup", lookup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}: give an integer of at least {least}")
    if lookup > LONGEST_RUN:
        raise OptionError(
            f"lookup={lookup}: every run of up to that many tokens is kept, in memory that grows with its square: give "
            f"at most {LONGEST_RUN}"
        )
    if lookup and assistant is not None:
        raise OptionError(f"lookup={lookup} and assistant= are two ways to draft: give one of them")


def check_new(rows: list[list[int]], history: list[list[int]]) -> None:
    """Whether no row brings once more all that its cache holds, as far as that is known."""
    for b, (row, held) in enumerate(zip(rows, history, strict=False)):
        if held and row[: len(held)] == held:
            raise OptionError(
                f"row {b}: the cache holds {len(held)} tokens, and the prompt begins with these once more: give what "
                "comes after them alone, or reset() the cache for a new text"
            )


def after(rows: list[list[int]], history: list[list[int]]) -> list[list[int]]:
    """What whole conversations bring after the tokens that a cache holds of them."""
    for b, (row, held) in enumerate(zip(rows, history, strict=False)):
        if not held or row[: len(held)] != held or row == held:
            raise OptionError(
                f"row {b}: the messages do not begin with what the cache holds, as far as generate() wrote it: give "
                "the conversation that it holds, and more, or reset() the cache"
            )
    return [row[len(held) :] for row, held in zip(rows, history, strict=False)]


def check_room(cache: Any, held: list[int], rows: list[list[int]], more: int) -> None:
    """Whether a cache whose rows hold so many tokens has a row for each of `rows`, and room for `more` tokens each."""
    held = held or [0] * len(rows)
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


def check_turns(cache: Any, held: list[int], rows: list[list[int]], history: list[list[int]], more: int) -> None:
    """Whether rows of a cache whose tokens are not known can take in theirs and `more` without being read anew."""
    for b, (row, known, length) in enumerate(zip(rows, history, held, strict=False)):
        if len(known) != length and any(cache.turned(b, n) for n in (len(row), len(row) + more)):
            raise RotaryError(
                f"row {b}: its cache holds {length} tokens that generate() did not put there, the prompt brings "
                f"{len(row)} and {more} more are to come, but {cache.spec.rotary.told}: reset() the cache and give the "
                "whole text, or a smaller max_new_tokens="
            )


def most_drafts(cache: StateCache | None, lookup: int, assistant: Any) -> int:
    """How many tokens a round may draft."""
    if not lookup and assistant is None:
        return 0
    if cache is None:
        return MOST_DRAFTS
    if cache.slack < 2:
        raise SlackError(
            f"a round feeds a token and its drafts, and takes back what is refused: the cache was made with "
            f"slack={cache.slack}; make it with slack={1 + MOST_DRAFTS}, or at least 2"
        )
    return cache.slack - 1


def token_ids(model: Any) -> int:
    """How many tokens a model can read and write: its ids are below that."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def relative_cost(assistant: Any, model: Any) -> float:
    """What a forward pass of the assistant costs, as a part of one of the model."""
    if token_ids(assistant) != token_ids(model):
        raise ConfigError(
            f"the assistant has {token_ids(assistant)} tokens, the model {token_ids(model)}: give one with the same "
            "tokenizer"
        )
    pair: tuple[Any, Any] = assistant, model
    # a large model takes its time for its weights, a small one for its layers
    weights: list[int] = [sum(p.numel() for p in m.parameters()) for m in pair]
    layers = [int(m.config.get_text_config(decoder=True).num_hidden_layers) for m in pair]
    return max(weights[0] / weights[1], layers[0] / layers[1])


def end_ids(config: Any) -> set[int]:
    """The tokens that a generation configuration ends a row with."""
    ends = getattr(config, "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def pad_id(config: Any) -> int:
    """What fills up a row that has ended."""
    pad = getattr(config, "pad_token_id", None)
    return int(pad) if pad is not None else min(end_ids(config), default=0)


def each_row(name: str, value: Any, n: int) -> list[Any]:
    """A value for each of n rows, of one for all or of a list of them."""
    if not isinstance(value, list | tuple):
        return [value] * n
    if len(value) != n:
        raise OptionError(f"{name}={value!r}: {len(value)} values came for {n} rows; give one for each, or one for all")
    return list(value)


def seeds_of(seed: Any, requests: Sequence[Request]) -> list[int]:
    """A seed for each row; of torch's own generator only if a row draws."""
    if isinstance(seed, list | tuple):
        return each_row("seed", seed, len(requests))
    if seed is None:
        draws = any(request.temperature for request in requests)
        return torch.randint(2**63 - 1, (len(requests),)).tolist() if draws else [0] * len(requests)
    check_seed(seed)
    return [row_seed(seed, row) for row in range(len(requests))]
