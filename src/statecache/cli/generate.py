"""`statecache generate`: go on with a text, and say what it cost."""

import json as json_format
import sys
from typing import Any

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, check_draftable, drawing, load, sampling, seeded
from statecache.cli.report import byte_rows, console, two_columns
from statecache.cli.writing import Stop, Written, write_drafted, write_on
from statecache.decode.options import MOST
from statecache.decode.report import Report


def generate_command(prompt: str, settings: Settings, *, json: bool, quiet: bool) -> bool:
    """Print the prompt and what the model makes of it; whether Ctrl-C cut it short."""
    loaded = load(settings, show=not quiet)
    seed = seeded(settings)
    ids = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise CommandError("the tokenizer makes no token of this prompt: give at least one word", 2)
    config = loaded.model.generation_config
    options = {"max_new_tokens": settings.max_new_tokens, **sampling(config, settings)}
    drafts = settings.lookup > 0 or loaded.assistant is not None
    if drafts:
        check_draftable(config, options)
    cache = sc.StateCache(loaded.model.config, slack=1 + MOST if drafts else 0)
    show, report = _ignore if json else _show, None
    with Stop() as stop:
        if drafts:
            drawn = {"max_new_tokens": settings.max_new_tokens, "seed": seed, **drawing(config, options)}
            written, report = write_drafted(loaded, prompt, cache, drawn, settings.lookup, stop, show)
        else:
            show(prompt)
            written = write_on(loaded, ids, cache, options, stop, show)
    if json:
        result = _as_json(loaded, prompt, ids, written, cache, {**options, "seed": seed}, stop)
        result["speculation"] = None if report is None else _gain(settings, report)
        _show(json_format.dumps(result))
    _show("\n")
    if not (json or quiet):
        rows = [
            ("prompt tokens", f"{len(ids)}"),
            ("new tokens", f"{len(written.tokens)}"),
            ("tokens per second", f"{written.tokens_per_second:.1f}"),
        ]
        if report is not None:
            rows += [
                ("tokens per forward pass", f"{report.tokens_per_forward:.2f}"),
                ("drafted tokens accepted", f"{report.accepted} of {report.drafted}"),
            ]
        if report is not None and loaded.assistant is not None:
            rows.append(("draft passes", f"{report.assistant_forwards}"))
        sizes = cache.nbytes()
        console().print(two_columns(rows + byte_rows(sizes.by_kind, sizes.total)))
    return stop.requested


def _gain(settings: Settings, report: Report) -> dict[str, Any]:
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
    loaded: Loaded, prompt: str, ids: list[int], written: Written, cache: Any, options: dict[str, Any], stop: Stop
) -> dict[str, Any]:
    sizes, config = cache.nbytes(), loaded.model.generation_config
    if options["do_sample"]:
        options = {**options, **drawing(config, options)}
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
            **options,
        },
    }


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
