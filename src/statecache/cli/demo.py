"""`statecache demo`: a story, and what the cache did for it, measured on the spot."""

from dataclasses import replace
from typing import Any

from statecache.cli.generate import generate_command
from statecache.cli.model import Loaded, Settings, load, new_cache, options, tokens_held
from statecache.cli.report import console, spinner, two_columns
from statecache.cli.writing import Stop, Written, write_on
from statecache.decode.capturing import fixed_cache
from statecache.decode.compiled import being_made

PROMPT, MORE = "Once upon a time", " The next day"
DRAFTS = 3


def demo_command(settings: Settings) -> bool:
    """Write a story; then measure drafts and a second turn with the same model. Whether Ctrl-C cut it short."""
    loaded = load(settings)
    if generate_command(PROMPT, settings, json=False, quiet=False, loaded=loaded):
        return True
    with Stop() as stop:
        with spinner("measuring drafts and a second turn"):
            greedy = replace(settings, temperature=0.0)
            fast = _compiled(loaded, greedy, stop)
            plain, drafted = (_write(loaded, replace(greedy, lookup=n), stop) for n in (0, DRAFTS))
            ids, reused, turn, whole = _second_turn(loaded, greedy, stop)
        rows = [
            (f"{len(plain.tokens)} tokens, likeliest each", f"{plain.seconds:.2f} s"),
            *([(f"{_same(plain, fast)}, by compiled code", f"{fast.seconds:.2f} s")] if fast else []),
            (f"{_same(plain, drafted)}, --lookup {DRAFTS}", f"{drafted.seconds:.2f} s"),
            ("tokens per forward pass", f"{drafted.report.tokens_per_forward:.2f}"),
            ("second turn: tokens reused", f"{reused} of {ids}"),
            ("first token after", f"{turn.first * 1e3:.0f} ms"),
            ("without the cache", f"{whole.first * 1e3:.0f} ms"),
        ]
        if not stop.requested:
            console().print(two_columns(rows))
    return stop.requested


def _write(loaded: Loaded, settings: Settings, stop: Stop, cache: Any = None) -> Written:
    """A text of likeliest tokens, onto nothing: a new cache, if none is given."""
    ids, how = loaded.tokenizer(PROMPT)["input_ids"], options(loaded.model.generation_config, settings)
    return write_on(loaded, ids, new_cache(loaded, settings) if cache is None else cache, how, stop, len)


def _same(one: Written, other: Written) -> str:
    return "the same text" if one.text == other.text else "another text"


def _compiled(loaded: Loaded, settings: Settings, stop: Stop) -> Written | None:
    """The same by code that was compiled before; None where there is none."""
    if being_made():
        return None
    longest = len(loaded.tokenizer(PROMPT)["input_ids"])
    cache = fixed_cache(loaded.model, 1, longest, settings.max_new_tokens)
    if cache is None:
        return None
    written = _write(loaded, settings, stop, cache)
    return written if written.report.compiled else None


def _second_turn(loaded: Loaded, first: Settings, stop: Stop) -> tuple[int, int, Written, Written]:
    """Tokens of a text that goes on, how many its cache held, and runs of one token with that cache and without."""
    one = replace(first, max_new_tokens=1)
    cache, how = new_cache(loaded, first), [options(loaded.model.generation_config, each) for each in (first, one)]
    ids = list(loaded.tokenizer(PROMPT)["input_ids"])
    ids += write_on(loaded, ids, cache, how[0], stop, len).tokens
    ids += loaded.tokenizer(MORE, add_special_tokens=False)["input_ids"]
    reused = tokens_held(cache)
    turn = write_on(loaded, ids, cache, how[1], stop, len)
    return len(ids), reused, turn, write_on(loaded, ids, new_cache(loaded, one), how[1], stop, len)
