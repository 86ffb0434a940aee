"""`statecache generate`: go on with a text, and say what it cost."""

import json as json_format
from typing import Any

from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, captured, drafts, load, most_drafts, new_cache, options
from statecache.cli.report import byte_rows, console, show, two_columns
from statecache.cli.writing import Stop, Written, write_on
from statecache.decode.capturing import fixed_cache
from statecache.decode.compiled import being_made
from statecache.decode.prompt import conversations_of, templated, tokens_of


def generate_command(
    prompt: str | list[Any], settings: Settings, *, json: bool, quiet: bool, loaded: Loaded | None = None
) -> bool:
    """Print the prompt and what the model makes of it, of messages its answer; whether Ctrl-C cut it short."""
    loaded = loaded or load(settings, show=not quiet)
    text = prompt if isinstance(prompt, str) else templated(conversations_of(prompt)[0], loaded.tokenizer)
    ids = tokens_of(text, loaded.tokenizer, first=text == prompt)
    if not ids:
        raise CommandError("the tokenizer makes no token of this prompt: give at least one word", 2)
    how = options(loaded.model.generation_config, settings)
    cache, most = None, most_drafts(loaded, settings)
    if captured(loaded, settings, how):
        cache = fixed_cache(loaded.model, 1, len(ids), how["max_new_tokens"], most)
    if cache is None:
        cache = new_cache(loaded, settings)
    with Stop() as stop:
        first = prompt if isinstance(prompt, str) else ""
        written = write_on(loaded, ids, cache, how, stop, _ignore if json else show, first)
    if json:
        result = _as_json(loaded, prompt, ids, written, cache, how, stop)
        result["speculation"] = _gain(settings, written) if drafts(loaded, settings) else None
        show(json_format.dumps(result))
    show("\n")
    if not (json or quiet):
        rows = [
            ("prompt tokens", f"{len(ids)}"),
            ("new tokens", f"{len(written.tokens)}"),
            ("prompt tokens per second", f"{len(ids) / written.first:.1f}" if written.first else "none"),
            ("new tokens per second", f"{written.decoded_per_second:.1f}"),
        ]
        if written.report.compiled:
            rows.append(("passes by compiled code", f"{written.report.compiled} of {written.report.forwards}"))
        elif being_made():
            rows.append(("compiled code", "will be made, for the texts to come"))
        if how["temperature"]:
            rows.append(("seed", f"{how['seed']}"))
        report = written.report
        if drafts(loaded, settings):
            rows += [
                ("tokens per forward pass", f"{report.tokens_per_forward:.2f}"),
                ("drafted tokens accepted", f"{report.accepted} of {report.drafted}"),
            ]
        if loaded.assistant is not None:
            rows.append(("draft passes", f"{report.assistant_forwards}"))
        sizes = cache.nbytes()
        console().print(two_columns(rows + byte_rows(sizes.by_kind, sizes.total)))
    return stop.requested


def _gain(settings: Settings, written: Written) -> dict[str, Any]:
    report = written.report
    return {
        "lookup": settings.lookup or None,
        "draft": settings.draft,
        "forwards": report.forwards,
        "tokens_per_forward": round(report.tokens_per_forward, 4),
        "drafted": report.drafted,
        "accepted": report.accepted,
        "accepted_per_round": round(report.accepted_per_round, 4),
        "assistant_forwards": report.assistant_forwards,
    }


def _as_json(
    loaded: Loaded,
    prompt: str | list[Any],
    ids: list[int],
    written: Written,
    cache: Any,
    how: dict[str, Any],
    stop: Stop,
) -> dict[str, Any]:
    sizes = cache.nbytes()
    return {
        "prompt": prompt,
        "text": written.text,
        "tokens": {"prompt": len(ids), "new": len(written.tokens)},
        "seconds": round(written.seconds, 4),
        "seconds_to_first_token": round(written.first, 4),
        "tokens_per_second": round(written.tokens_per_second, 2),
        "interrupted": stop.requested,
        "finish_reason": written.report.reasons[0],
        "forwards_compiled": written.report.compiled,
        "bytes": {**sizes.by_kind, "total": sizes.total},
        "settings": {
            "model": loaded.name,
            "device": str(loaded.model.device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "do_sample": how["temperature"] > 0,
            **{name: how[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")},
        },
    }


def _ignore(text: str) -> None:
    pass
