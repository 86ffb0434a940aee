"""What can be typed: commands, options, exit codes. Nothing heavy is imported before a command runs."""

import errno
import importlib.metadata
import json as json_format
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statecache.cli.failure import CommandError
from statecache.cli.report import spinner
from statecache.decode.limits import LONGEST_RUN
from statecache.errors import StateCacheError

INTERRUPTED = 130
COOLEST = 1e-6  # the lowest temperature that can be typed: below it is likely a slip, and draws what 0 takes

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The inference state cache for hybrid language models.",
    epilog='Example: statecache generate "Once upon a time"',
)


def _named(name: str | None) -> str | None:
    if name is not None and not name.strip():
        raise typer.BadParameter("it is empty: give a folder or a name, or leave it out")
    return name


def _temperature(value: float | None) -> float | None:
    if value is not None and not (value == 0 or COOLEST <= value < float("inf")):
        raise typer.BadParameter(f"{value}: give 0 for the likeliest token, or a number from {COOLEST} up to draw")
    return value


def _top_p(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value}: give a probability above 0, up to 1 for all tokens")
    return value


def _lookup(n: int | None) -> int | None:
    if n is not None and not 1 <= n <= LONGEST_RUN:
        raise typer.BadParameter(f"{n}: give 1 to {LONGEST_RUN}, or leave it out to draft nothing")
    return n


Dtype = Literal["float32", "bfloat16", "float16", "float64"]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER|NAME",
        callback=_named,
        help="Checkpoint folder or hub name. Left out: the embedded model.",
    ),
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write at most.")]
TemperatureOption = Annotated[
    float | None,
    typer.Option(callback=_temperature, help="0 always takes the likeliest token. Left out: what the model asks for."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(callback=_top_p, help="Draw from the likeliest tokens that make up this probability, 1 for all."),
]
TopKOption = Annotated[
    int | None, typer.Option(min=0, help="Draw from that many of the likeliest tokens, 0 for all of them.")
]
StopOption = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End where the text has this; may be given several times.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text. Left out: another one each time.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Left out: cuda where there is one.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Left out: float32 on a CPU, the checkpoint's own elsewhere.")]
LookupOption = Annotated[
    int | None,
    typer.Option(
        "--lookup",
        metavar="N",
        callback=_lookup,
        help=f"Draft what once followed the last N tokens, or fewer; 1 to {LONGEST_RUN}. Left out: no drafts.",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="tiny|FOLDER|NAME",
        callback=_named,
        help="Draft with this smaller model; tiny goes with the embedded one.",
    ),
]
IgnoreOption = Annotated[
    bool,
    typer.Option(
        "--ignore-processors",
        help="Write without the penalties and other processors that the checkpoint's generation_config asks for.",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What a chat model is told before all else, as its system message.")
]
SessionOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep the conversation there, after each turn, and go on from where it stopped."),
]
RowsOption = Annotated[int, typer.Option(min=1, help="Sequences side by side.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"statecache {importlib.metadata.version('statecache')}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
]


@app.callback()
def _root(version: VersionOption = False) -> None:
    pass


@app.command(epilog='Example: statecache generate --draft tiny --temperature 0.7 --seed 1 "Once upon a time"')
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.", show_default=False)] = None,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as an option.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read it from a file; - is standard input.")] = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='A conversation instead: JSON, [{"role": "user", "content": "..."}, ...].'),
    ] = None,
    system: SystemOption = None,
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    stop: StopOption = None,
    seed: SeedOption = None,
    lookup: LookupOption = None,
    draft: DraftOption = None,
    ignore_processors: IgnoreOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text and nothing else.")] = False,
) -> None:
    """Go on with a text, and say what it cost. Without a prompt, a pipe is read.

    With --lookup or --draft several tokens are checked in one forward pass. Greedy text stays the same, and with
    --lookup drawn text, too.
    """
    asked: Any = _one_prompt(prompt, prompt_option, file, messages)
    if messages is not None:
        asked = _messages(asked)
    elif system is not None:
        asked = [{"role": "user", "content": asked}]
    if system is not None:
        asked = [{"role": "system", "content": system}, *asked]
    _one_drafter(lookup, draft)
    with spinner("starting PyTorch", show=not quiet):
        from statecache.cli.generate import generate_command
        from statecache.cli.model import Settings
    settings = Settings(
        model=model,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        seed=seed,
        lookup=lookup or 0,
        draft=draft,
        ignore_processors=ignore_processors,
    )
    if generate_command(asked, settings, json=json, quiet=quiet):
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Example: statecache chat --temperature 0.7")
def chat(
    model: ModelOption = None,
    session: SessionOption = None,
    system: SystemOption = None,
    max_new_tokens: NewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    stop: StopOption = None,
    seed: SeedOption = None,
    lookup: LookupOption = None,
    draft: DraftOption = None,
    ignore_processors: IgnoreOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Talk with a model that keeps its cache: no token is read twice.

    A model without a chat template, such as the embedded one, goes on with what you type.
    """
    _one_drafter(lookup, draft)
    with spinner("starting PyTorch"):
        from statecache.cli.chat import chat_command
        from statecache.cli.model import Settings
    settings = Settings(
        model=model,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        seed=seed,
        lookup=lookup or 0,
        draft=draft,
        ignore_processors=ignore_processors,
    )
    chat_command(settings, system, session)


@app.command(epilog="Example: statecache demo --seed 1")
def demo(
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 200,
    seed: SeedOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Write a story, then show what drafts and a cache that is kept save, measured here and now."""
    with spinner("starting PyTorch"):
        from statecache.cli.demo import demo_command
        from statecache.cli.model import Settings
    settings = Settings(model=model, device=device, dtype=dtype, max_new_tokens=max_new_tokens, seed=seed)
    if demo_command(settings):
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Example: statecache bench --prompt-tokens 2048 --rows 4")
def bench(
    model: ModelOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, read at once.")] = 256,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens after it, one by one.")] = 32,
    rows: RowsOption = 1,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds to take the medians of.")] = 7,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure a model on this machine, with transformers' own cache, with a StateCache, and prepared.

    Tokens are random, so any checkpoint will do, with or without a tokenizer. Each round runs every cache once.
    """
    with spinner("starting PyTorch"):
        from statecache.cli.bench import bench_command
        from statecache.cli.model import Settings
    settings = Settings(model=model, device=device, dtype=dtype, max_new_tokens=new_tokens)
    bench_command(settings, prompt_tokens, rows, repeats, json=json)


@app.command(epilog="Example: statecache inspect --rows 8 --length 32768")
def inspect(
    file: Annotated[Path | None, typer.Argument(help="A saved cache, to show that instead.")] = None,
    model: ModelOption = None,
    rows: RowsOption = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in each of them.")] = 2048,
    dtype: Annotated[Dtype | None, typer.Option(help="Left out: the checkpoint's own.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what a model's cache is made of, from the configuration alone; or what a saved cache holds."""
    if file is not None and model is not None:
        raise CommandError("a file and --model are both given: keep one of them", 2)
    if file is not None and (file.is_dir() or file.suffix == ".json"):
        raise CommandError(f"{file} is no saved cache: give a model with --model {file}", 2)
    with spinner("starting PyTorch"):
        from statecache.cli.inspect import inspect_command, inspect_file
    if file is not None:
        inspect_file(file, json=json)
        return
    inspect_command(model, rows, length, dtype, json=json)


@app.command(epilog="Example: statecache plan org/name --rows 32 --capacity 8192 --budget 24GiB")
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER|FILE|NAME",
            callback=_named,
            help="Checkpoint folder, its config.json, or hub name. Left out: the embedded model.",
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Sequences side by side. Left out: 1, or as many as fit the budget.")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a row, at fixed addresses. Left out: --length, or all that fit the budget."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a growing cache was given at once. Left out: 2048."),
    ] = None,
    slack: Annotated[int, typer.Option(min=0, help="Tokens that each row can forget.")] = 0,
    store: Annotated[str, typer.Option(help="Where keys and values live: dense, paged, int8, fp8.")] = "dense",
    recurrent_store: Annotated[
        str | None, typer.Option(help="What recurrent states are kept in: bfloat16; else as they are computed.")
    ] = None,
    checkpoints: Annotated[int, typer.Option(min=0, help="Checkpoints that are held at once.")] = 0,
    checkpoint_store: Annotated[
        str | None, typer.Option(help="What checkpoints keep recurrent states in: int8; else as they are.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What there is, such as 24GiB. Left out with --device cuda: what is free."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1: whose free memory is the budget.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Left out: the checkpoint's own.")] = None,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="For a prepared model: slack by logs, not copies.")
    ] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Count the model's weights, too.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg|png", help="Draw bytes over context length. Needs statecache\\[plot]."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what a cache will take, and the most rows or tokens for a budget. Reads the configuration, never weights."""
    if capacity is not None and length is not None:
        raise CommandError("--capacity and --length are both given: keep one of them", 2)
    if capacity is None and length is None and budget is None and device in (None, "cpu"):
        length = 2048
    with spinner("starting PyTorch"):
        from statecache.cli.plan import plan_command
    options = {
        "rows": rows,
        "capacity": capacity,
        "lengths": length,
        "slack": slack,
        "store": store,
        "recurrent_store": recurrent_store,
        "checkpoints": checkpoints,
        "checkpoint_store": checkpoint_store,
        "budget": budget,
        "device": device,
        "dtype": dtype,
        "prepared": prepared,
        "weights": weights,
    }
    plan_command(model, options, plot, json=json)


def _one_prompt(argument: str | None, option: str | None, file: Path | None, messages: Path | None) -> str:
    ways = {"PROMPT": argument, "--prompt": option, "--file": file, "--messages": messages}
    given = [name for name, x in ways.items() if x is not None]
    if len(given) > 1:
        raise CommandError(f"{' and '.join(given)} are both given: keep one of them", 2)
    if not given and sys.stdin.isatty():
        raise CommandError("no prompt: give one as an argument, with --file, or through a pipe", 2)
    text = argument if argument is not None else option
    if text is None:
        text = _read(file or messages)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError("the prompt is not UTF-8 text", 2) from error
    if not text.strip():
        raise CommandError("the prompt is empty: give at least one word", 2)
    return text


def _one_drafter(lookup: int | None, draft: str | None) -> None:
    if lookup and draft:
        raise CommandError("--lookup and --draft are both given: keep one of them", 2)


def _messages(text: str) -> list[Any]:
    try:
        messages = json_format.loads(text)
    except ValueError as error:
        raise CommandError(f"--messages: this is no JSON: {error}", 2) from error
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise CommandError('--messages: give a JSON list such as [{"role": "user", "content": "..."}]', 2)
    return messages


def _read(file: Path | None) -> str:
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"cannot read {file or 'standard input'}: it is not UTF-8 text") from error
    return text.rstrip("\n")


def main() -> None:
    """Run one command. Exit codes: 1 for what failed, 2 for a call that makes no sense, 130 after Ctrl-C."""
    if sys.stdout is None:  # so Python has it where it was closed
        sys.exit(1 if sys.stderr is None else _fail("standard output is closed: there is nowhere to write", 1))
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    try:
        code = app(prog_name="statecache", standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")  # empty after a bare `statecache`, which has printed its help
        words = "extra argument" in message
        hint = "put a prompt of several words in quotes" if words else "statecache --help says what there is"
        code = _fail(f"{message} ({hint})", 2) if message else 2
    except CommandError as error:
        code = _fail(str(error), error.code)
    except StateCacheError as error:
        code = _fail(" ".join(str(error).split()), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        left = error.errno == errno.EPIPE  # the reader has gone: there is nobody to tell
        code = 1 if left else _fail(f"cannot go on: {error}", 1)
        # what is still buffered would fail again when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print(f"statecache: {message}", file=sys.stderr)
    return code
