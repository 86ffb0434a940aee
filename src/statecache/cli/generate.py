"""`statecache generate`: go on with a text, and say what it cost."""

import json as json_format
from typing import Any

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, load, options
from statecache.cli.report import byte_rows, console, show, two_columns
from statecache.cli.writing import Stop, Written, write_on
from statecache.decode.limits import MOST_DRAFTS


def generate_command(prompt: str, settings: Settings, *, json: bool, quiet: bool) -> bool:
    """Print the prompt and what the model makes of it; whether Ctrl-C cut it short."""
    loaded = load(settings, show=not quiet)
    ids = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise CommandError("the tokenizer makes no token of this prompt: give at least one word", 2)
    how = options(loaded.model.generation_config, settings)
    drafts = settings.lookup > 0 or loaded.assistant is not None
    cache = sc.StateCache(loaded.model.config, slack=1 + MOST_DRAFTS if drafts else 0)
    with Stop() as stop:
        written = write_on(loaded, ids, cache, how, stop, _ignore if json else show, prompt)
    if json:
        result = _as_json(loaded, prompt, ids, written, cache, how, stop)
        result["speculation"] = _gain(settings, written) if drafts else None
        show(json_format.dumps(result))
    show("\n")
    if not (json or quiet):
        rows = [
            ("prompt tokens", f"{len(ids)}"),
            ("new tokens", f"{len(written.tokens)}"),
            ("tokens per second", f"{written.tokens_per_second:.1f}"),
        ]
        report = written.report
        if drafts:
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
    loaded: Loaded, prompt: str, ids: list[int], written: Written, cache: Any, how: dict[str, Any], stop: Stop
) -> dict[str, Any]:
    sizes = cache.nbytes()
    return {
        "prompt": prompt,
        "text": written.text,
        "tokens": {"prompt": len(ids), "new": len(written.tokens)},
        "seconds": round(written.seconds, 4),
        "tokens_per_second": round(written.tokens_per_second, 2),
        "interrupted": stop.requested,
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
