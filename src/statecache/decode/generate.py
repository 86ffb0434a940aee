"""generate: from a prompt to what a model makes of it, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict, Unpack, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from statecache.decode.batch import Batch, Row
from statecache.decode.captured_assistant import CapturedAssistant
from statecache.decode.capturing import fixed_cache, takes, worth_capturing
from statecache.decode.draft_length import PLAIN, Rounds
from statecache.decode.drafters import Assistant, Drafter, Lookup
from statecache.decode.feed import input_device
from statecache.decode.options import (
    after,
    check_counts,
    check_kinds,
    check_new,
    check_room,
    check_turns,
    each_row,
    end_ids,
    most_drafts,
    pad_id,
    relative_cost,
    seeds_of,
)
from statecache.decode.processors import APPLIED, Processor, asked, made, refused
from statecache.decode.prompt import conversations_of, rows_of, stops_of, templated, texts_of
from statecache.decode.report import Report
from statecache.decode.request import Request
from statecache.decode.stream import Run, Stream
from statecache.decode.text import Text, special_tokens
from statecache.errors import OptionError
from statecache.models.cache import StateCache
from statecache.models.ready import promised


class Options(TypedDict, total=False):
    """What `generate` may be told beside the prompt."""

    max_new_tokens: int
    temperature: float | Sequence[float]
    top_p: float | Sequence[float]
    top_k: int | Sequence[int]
    min_p: float | Sequence[float] | None
    repetition_penalty: float | None
    processors: Sequence[Processor] | None
    seed: int | Sequence[int] | None
    stop: str | int | Sequence[str | int] | None
    cache: StateCache | None
    lookup: int
    assistant: Any
    report: Callable[[Report], object] | None


Message = Mapping[str, Any]  # {"role": ..., "content": ...}


@overload
def generate(
    model: Any, prompt: str, tokenizer: Any = None, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> str: ...
@overload
def generate(
    model: Any, prompt: Sequence[Message], tokenizer: Any, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> str: ...
@overload
def generate(
    model: Any,
    prompt: Iterable[str] | Sequence[Sequence[Message]],
    tokenizer: Any,
    *,
    stream: Literal[False] = False,
    **options: Unpack[Options],
) -> list[str]: ...
@overload
def generate(
    model: Any, prompt: Tensor, tokenizer: Any = None, *, stream: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...
@overload
def generate(
    model: Any, prompt: Tensor, tokenizer: Any = None, *, stream: Literal[True], **options: Unpack[Options]
) -> Stream[list[Any]]: ...
@overload
def generate(
    model: Any,
    prompt: Iterable[str] | Sequence[Message] | Sequence[Sequence[Message]],
    tokenizer: Any,
    *,
    stream: Literal[True],
    **options: Unpack[Options],
) -> Stream[str]: ...
@overload
def generate(
    model: Any, prompt: Any, tokenizer: Any = None, *, stream: bool = False, **options: Unpack[Options]
) -> Any: ...


def generate(
    model: Any,
    prompt: Any,
    tokenizer: Any = None,
    *,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.0,
    top_p: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    min_p: float | Sequence[float] | None = None,
    repetition_penalty: float | None = None,
    processors: Sequence[Processor] | None = None,
    seed: int | Sequence[int] | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    stream: bool = False,
    cache: Any = None,
    lookup: int = 0,
    assistant: Any = None,
    report: Callable[[Report], object] | None = None,
) -> Any:
    """Go on with a prompt: one text gives the whole text, several give a list, ids (B, T) or (T,) give ids, T + new.
    Messages, {"role": ..., "content": ...}, give the answer alone, and lists of them a list.

    A row ends after `max_new_tokens`, with an end token of `model.generation_config`, or with one of `stop`: ids, or
    strings, at which its text is cut; a special token may go by its name. Ids of rows that end early are filled up with
    the pad token (else the end token, else 0). Rows of ids hold no padding; texts may differ in length.

    Temperature 0 takes the likeliest token. What is drawn depends on the row's seed, on the position of the token and
    on the model, never on the rows beside it. One `seed` gives each row one of its own, `row_seed(seed, row)`; without
    one, they come from torch's own generator. `temperature`, `top_p`, `top_k` and `seed` may be lists, one for each
    row.

    `processors`: functions of a row's ids (1, L) and the logits (1, V) float32 after them, that give other logits, such
    as transformers' own; with drafts they see every drafted position. Left out, the model's generation_config says
    which, and `min_p`; OptionError where it asks for one that is not known here. `repetition_penalty` comes first.

    `stream=True` returns an iterator: for one text, of pieces of new text; for ids, of lists of ids, what each round
    adds to each row, empty where the row has ended. It has a `close()`, and is a context.

    `lookup=n`, at most 64, drafts what once followed a row's last n tokens, or fewer, in this call's prompt and text,
    not in what a `cache` holds already; `assistant` drafts with a smaller model of the same tokens. Drafts change the
    time, not the result: tokens are the same, but that those drawn with an assistant are others of the same
    distribution. Not to the bit: a round's logits are rounded otherwise than a step's, so in bfloat16 and float16
    texts may part where two tokens are that close (in float32 the tests find 500 tokens the same). How many are drafted
    follows what was accepted of late. `report` is called once, when all is over.

    On a CUDA device that has all of the model, texts of 32 new tokens or more are written with a captured step, see
    `statecache.Decoder`, on a cache of its own or one that never moves; not with processors, with an assistant at
    temperature 0 alone, and with drafts and `stop` strings on a cache of its own alone. On a CPU so, without drafts,
    are those of a float32 model, up to 8 rows without a `cache`, with a step that a process behind the first such text
    compiles; `STATECACHE_COMPILED=` in the environment, empty, has none compiled.

    `cache` is a StateCache to go on from: the prompt is what comes after the tokens that it holds. Afterwards it holds
    each row's tokens but the last, with which the next prompt begins; of texts every token that they show, so that the
    next prompt is new text alone, after a stream that was closed early too. After one that was dropped, unclosed, it
    holds all but the last: what a collector finds runs no forward pass. Texts show neither special tokens nor the
    configuration's end tokens: such a last token stays out. Messages come as a whole each time. Drafts need a slack of
    at least 2 there, and use all of it. Only prepared models can go on with that cache.

    A model is prepared and in eval mode until the call, or the iterator, is over, and then as it was. Raises
    OptionError, ConfigError, RowsError, CapacityError or SlackError before anything is computed, UnknownLayerError
    where `prepare` does.
    """
    check_kinds(model, tokenizer, cache, assistant, report)
    check_counts(max_new_tokens, lookup, assistant)
    talks = conversations_of(prompt)
    given = prompt if isinstance(prompt, Tensor) else [templated(t, tokenizer) for t in talks] or texts_of(prompt)
    special = special_tokens(tokenizer)
    stops, ends = stops_of(stop, model, tokenizer, special)
    held = [] if cache is None else cache.lengths.tolist()
    rows = rows_of(given, model, tokenizer, first=not any(held) and not talks)
    if stream and not isinstance(given, Tensor) and len(rows) > 1:
        raise OptionError(f"stream=True with {len(rows)} texts: their pieces would mix; give one text, or ids")
    history = [list[int]()] * len(rows)
    if cache is not None:
        history = _history(cache, held) or history
        if talks and any(held):
            rows = after(rows, history)
        check_new(rows, history)
        more = max_new_tokens - isinstance(given, Tensor)
        check_room(cache, held, rows, more)
        check_turns(cache, held, rows, history, more)
    most = most_drafts(cache, lookup, assistant)
    config = getattr(model, "generation_config", None)
    requests = _requests(
        rows,
        held if any(held) else [0] * len(rows),
        max_new_tokens,
        frozenset(ends | end_ids(config)),
        {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p or 0.0},
        seed,
    )
    requests = _process(requests, history, config, min_p, repetition_penalty, processors, input_device(model))
    hidden = frozenset(end_ids(config) | set(special.values()))
    texts: list[Text | None] = [None] * len(rows)
    if stops or not isinstance(given, Tensor):
        texts = [Text(tokenizer, row, stops, hidden) for row in rows]
    cost = 0.0 if assistant is None else relative_cost(assistant, model)
    longest = max(map(len, rows))
    certain = assistant is None or not any(request.temperature for request in requests)
    capturable = certain and not any(request.processors for request in requests)
    used = cache
    if cache is not None:
        cut = not (most and stops)  # within a round nobody looks for strings, and the cache would hold what follows
        captured = capturable and cut and takes(cache) and worth_capturing(model, max_new_tokens, most)
    else:
        used = fixed_cache(model, len(rows), longest, max_new_tokens, most) if capturable else None
        captured = used is not None
    if used is None:
        with promised():
            used = StateCache(model.config, slack=1 + most if most else 0, back=False)
    drafter: Drafter | None = None
    rounds = Rounds.captured(len(rows)) if captured else PLAIN
    if lookup:
        drafter = Lookup(lookup, most, rounds)
    elif assistant is not None:
        room = fixed_cache(assistant, len(rows), longest, max_new_tokens, most) if captured else None
        about = assistant, most, cost, input_device(model)
        drafter = Assistant(*about, rounds=rounds) if room is None else CapturedAssistant(*about, room, rounds)
    batch = Batch(
        model, used, drafter, keep_rows=captured or cache is not None, captured=captured, runs_ahead=cache is None
    )
    written = batch.join(requests, texts, goes_on=cache is not None)
    if cache is not None:
        _written[cache] = history, [row.tokens for row in written]

    def shown() -> list[Row]:
        """The rows whose last tokens the next turn of texts takes for granted."""
        return [row for row in written if row.tokens[-1] not in hidden] if keeps_all else []

    keeps_all = cache is not None and not isinstance(given, Tensor)
    models = [model] if assistant is None else [model, assistant]
    run = Run(batch, written, models, shown, report)
    if stream:
        if isinstance(given, Tensor):
            return Stream(run, run if given.dim() == 2 else _only(run))
        return Stream(run, _pieces(run, written[0]))
    try:
        for _ in run:
            pass
    finally:
        run.forget()
    if isinstance(given, Tensor):
        return _as_ids([row.tokens for row in written], given, pad_id(config))
    new = [_end(row) for row in written]
    if talks:
        return new[0] if isinstance(prompt[0], Mapping) else new
    whole = [before + text for before, text in zip(given, new, strict=True)]
    return whole[0] if isinstance(prompt, str) else whole


# ---- what goes in

# of each cache that a call went on from: the tokens that it held before, and those of the rows that the call wrote
_written: WeakKeyDictionary[Any, tuple[list[list[int]], list[list[int]]]] = WeakKeyDictionary()


def remember(cache: Any, tokens: list[list[int]]) -> None:
    """Say which tokens the rows of a cache hold, where it comes from a file or is a copy. Processors look at them."""
    _written[cache] = tokens, [[] for _ in tokens]


def _history(cache: Any, held: list[int]) -> list[list[int]]:
    """The tokens that each row of a cache holds, as far as calls of `generate` put them there; else nothing."""
    before, rows = _written.get(cache, ([], []))
    known = [[*tokens, *row][:n] for tokens, row, n in zip(before, rows, held, strict=False)]
    return known if list(map(len, known)) == held else []


def _requests(
    prompts: list[list[int]],
    before: list[int],
    limit: int,
    ends: frozenset[int],
    drawing: dict[str, Any],
    seed: Any,
) -> list[Request]:
    """A request for each row. `drawing`: by option, a value for each row or one for all."""
    n = len(prompts)
    options = {name: each_row(name, value, n) for name, value in drawing.items()}
    requests = [
        Request(prompt, limit, ends, **{name: values[row] for name, values in options.items()}, before=before[row])
        for row, prompt in enumerate(prompts)
    ]
    return [replace(request, seed=s) for request, s in zip(requests, seeds_of(seed, requests), strict=True)]


def _process(
    requests: list[Request],
    history: list[list[int]],
    config: Any,
    min_p: Any,
    penalty: float | None,
    processors: Sequence[Processor] | None,
    device: torch.device,
) -> list[Request]:
    """The requests with what changes their logits: given, or asked for by the model's generation configuration."""
    settings: dict[str, Any] = {}
    if processors is None:
        if names := refused(config, draws=any(request.temperature for request in requests)):
            raise OptionError(
                f"the model's generation_config sets {names}, which statecache does not apply: write without with "
                "processors=[]"
            )
        settings = asked(config, APPLIED)
        if min_p is None and (least := getattr(config, "min_p", None)):
            requests = [replace(request, min_p=least) for request in requests]
    if penalty is not None:
        if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < float("inf"):
            raise OptionError(f"repetition_penalty={penalty!r}: give 1 for none, or more to avoid what was said before")
        settings["repetition_penalty"] = float(penalty)
    for processor in processors or ():
        if not callable(processor):
            raise OptionError(f"processors: came a {type(processor).__name__}, expected functions of ids and logits")
    changed = []
    for request, held in zip(requests, history, strict=True):
        own = made(settings, end_ids(config), len(held) + len(request.prompt), device)
        changed.append(replace(request, processors=[*own, *(processors or ())], history=held))
    return changed


# ---- what goes out


def _as_ids(rows: list[list[int]], prompt: Tensor, pad: int) -> Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=prompt.device)
    return ids if prompt.dim() == 2 else ids[0]


def _only(run: Run) -> Iterator[list[int]]:
    """What the rounds add to the one row there is."""
    for new in run:
        yield new[0]


def _pieces(run: Run, row: Row) -> Iterator[str]:
    """The text in pieces, as the rounds bring it."""
    assert row.text is not None
    for _ in run:
        if piece := row.text.take():
            yield piece
    row.text.end()
    if piece := row.text.take():
        yield piece


def _end(row: Row) -> str:
    assert row.text is not None
    row.text.end()
    return row.text.text
