"""What can be typed: commands, options, exit codes. Nothing heavy is imported before a command runs."""

import errno
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from statecache.cli.failure import CommandError
from statecache.cli.report import spinner
from statecache.decode.limits import LONGEST_RUN
from statecache.errors import StateCacheError

INTERRUPTED = 130
COOLEST = 1e-6  # the lowest temperature that can be typed: below it is likely a slip, and draws what 0 takes

app = typer.Typer(
    add_completion=False,
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
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
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
    text = _one_prompt(prompt, prompt_option, file)
    if lookup and draft:
        raise CommandError("--lookup and --draft are both given: keep one of them", 2)
    with spinner("starting PyTorch", show=not quiet):
        from statecache.cli.generate import generate_command
        from statecache.cli.model import Settings
    settings = Settings(
        model, device, dtype, max_new_tokens, temperature, top_p, seed, lookup or 0, draft, ignore_processors
    )
    if generate_command(text, settings, json=json, quiet=quiet):
        raise typer.Exit(INTERRUPTED)


@app.command(epilog="Example: statecache chat --temperature 0.7")
def chat(
    model: ModelOption = None,
    max_new_tokens: NewTokensOption = 200,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    ignore_processors: IgnoreOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Talk with a model that keeps its cache: no token is read twice.

    A model without a chat template, such as the embedded one, goes on with what you type.
    """
    with spinner("starting PyTorch"):
        from statecache.cli.chat import chat_command
        from statecache.cli.model import Settings
    chat_command(
        Settings(model, device, dtype, max_new_tokens, temperature, top_p, seed, ignore_processors=ignore_processors)
    )


@app.command(epilog="Example: statecache inspect --rows 8 --length 32768")
def inspect(
    model: ModelOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Sequences side by side.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in each of them.")] = 2048,
    dtype: Annotated[Dtype | None, typer.Option(help="Left out: the checkpoint's own.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what a model's cache is made of. Reads the configuration only, never the weights."""
    with spinner("starting PyTorch"):
        from statecache.cli.inspect import inspect_command
    inspect_command(model, rows, length, dtype, json=json)


def _one_prompt(argument: str | None, option: str | None, file: Path | None) -> str:
    given = [name for name, x in (("PROMPT", argument), ("--prompt", option), ("--file", file)) if x is not None]
    if len(given) > 1:
        raise CommandError(f"{' and '.join(given)} are both given: keep one of them", 2)
    if not given and sys.stdin.isatty():
        raise CommandError("no prompt: give one as an argument, with --file, or through a pipe", 2)
    text = argument if argument is not None else option
    if text is None:
        text = _read(file)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CommandError("the prompt is not UTF-8 text", 2) from error
    if not text.strip():
        raise CommandError("the prompt is empty: give at least one word", 2)
    return text


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
    try:
        code = app(prog_name="statecache", standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")  # empty after a bare `statecache`, which has printed its help
        code = _fail(f"{message} (statecache --help says what there is)", 2) if message else 2
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
