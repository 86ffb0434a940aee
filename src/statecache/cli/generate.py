"""`statecache generate`: go on with a text, and say what it cost."""

import json as json_format
import sys
from typing import Any

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, load, sampling, seeded
from statecache.cli.report import byte_rows, console, two_columns
from statecache.cli.writing import Stop, Written, write_on


def generate_command(prompt: str, settings: Settings, *, json: bool, quiet: bool) -> bool:
    """Print the prompt and what the model makes of it; whether Ctrl-C cut it short."""
    loaded = load(settings, show=not quiet)
    seed = seeded(settings)
    ids = loaded.tokenizer(prompt)["input_ids"]
    if not ids:
        raise CommandError("the tokenizer makes no token of this prompt: give at least one word", 2)
    options = {"max_new_tokens": settings.max_new_tokens, **sampling(loaded.model.generation_config, settings)}
    cache = sc.StateCache(loaded.model.config)
    if not json:
        _show(prompt)
    with Stop() as stop:
        written = write_on(loaded, ids, cache, options, stop, _ignore if json else _show)
    if json:
        _show(json_format.dumps(_as_json(loaded, prompt, ids, written, cache, {**options, "seed": seed}, stop)))
    _show("\n")
    if not (json or quiet):
        rows = [
            ("prompt tokens", f"{len(ids)}"),
            ("new tokens", f"{len(written.tokens)}"),
            ("tokens per second", f"{written.tokens_per_second:.1f}"),
        ]
        sizes = cache.nbytes()
        console().print(two_columns(rows + byte_rows(sizes.by_kind, sizes.total)))
    return stop.requested


def _as_json(
    loaded: Loaded, prompt: str, ids: list[int], written: Written, cache: Any, options: dict[str, Any], stop: Stop
) -> dict[str, Any]:
    sizes, config = cache.nbytes(), loaded.model.generation_config
    if options["do_sample"]:
        options = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k, **options}
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
