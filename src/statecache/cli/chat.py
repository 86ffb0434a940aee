"""`statecache chat`: turn after turn on one cache, which never reads a token twice."""

import sys
from contextlib import suppress
from functools import partial
from typing import Any

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, load, options
from statecache.cli.report import byte_rows, console, show, two_columns
from statecache.cli.writing import Stop, Written, write_on

COMMANDS = "/stats shows what the cache holds, /reset starts anew, /exit or Ctrl-D leaves"
ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer\N{OBJECT REPLACEMENT CHARACTER}"


def chat_command(settings: Settings) -> None:
    """Read what the user says, line by line, until there is no more."""
    loaded = load(settings)
    how = options(loaded.model.generation_config, settings)
    talk = Conversation(loaded)
    note = partial(console().print, style="dim", markup=False, soft_wrap=True)
    note(f"{COMMANDS}; Ctrl-C stops an answer.")
    while (line := _next_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                talk = Conversation(loaded)
                note("The conversation starts anew.")
            case "/stats":
                sizes = talk.cache.nbytes()
                rows = [("tokens so far", str(len(talk.ids))), ("tokens in the cache", str(talk.held()))]
                console().print(two_columns(rows + byte_rows(sizes.by_kind, sizes.total)))
            case text if text.startswith("/"):
                note(f"No command {text}: {COMMANDS}.")
            case _:
                note(_turn(talk, line.rstrip("\n"), how))


def _turn(talk: "Conversation", line: str, how: dict[str, Any]) -> str:
    reused = talk.held()
    talk.say(line)
    read = len(talk.ids) - reused
    with Stop() as stop:
        written = talk.answer(how, stop)
    show("\n")
    count, speed = (len(written.tokens), written.tokens_per_second) if written else (0, 0.0)
    note = f"{reused} tokens reused, {read} read, {count} written, {speed:.1f} tokens/s"
    return f"{note}; stopped" if stop.requested else note


class Conversation:
    """The tokens so far, and a cache that holds all of them but the newest."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.cache: Any = sc.StateCache(loaded.model.config)
        self.ids: list[int] = []

    def held(self) -> int:
        """How many of the tokens the cache has taken in."""
        return int(self.cache.get_seq_length())

    def say(self, text: str) -> None:
        """Append what the user says, in the model's own form, to the tokens."""
        if self.loaded.tokenizer.chat_template is None:
            self._continue(text)
        else:
            self._next_message(text)
        if len(self.ids) <= self.held():
            raise CommandError("the tokenizer makes no token of this line")

    def _continue(self, text: str) -> None:
        tokenizer = self.loaded.tokenizer
        if not self.ids:
            self.ids = list(tokenizer(text)["input_ids"])
            return
        if self.ids[-1] == tokenizer.eos_token_id and self.held() < len(self.ids):
            self.ids.pop()  # the story goes on; the cache has not taken its end in
        glue = "" if tokenizer.decode(self.ids[-4:])[-1:].isspace() else " "
        self.ids += tokenizer(glue + text, add_special_tokens=False)["input_ids"]

    def _next_message(self, text: str) -> None:
        """Only what the template puts after the last answer: what came before stays as the cache has it."""
        tokenizer, asks = self.loaded.tokenizer, [{"role": "user", "content": text}]
        if self.ids:
            asks = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}, *asks]
        whole = tokenizer.apply_chat_template(asks, tokenize=False, add_generation_prompt=True)
        rest = whole.rpartition(ANSWER)[2] if self.ids else whole
        new = list(tokenizer(rest, add_special_tokens=False)["input_ids"])
        if self.ids and new[:1] == self.ids[-1:]:
            new = new[1:]  # the model has closed its answer itself
        self.ids += new

    def answer(self, how: dict[str, Any], stop: Stop) -> Written | None:
        """Let the model answer, onto standard output; None if it is interrupted within: the cache is then anew.

        `how`: options of `sc.generate`.
        """
        try:
            written = write_on(self.loaded, self.ids, self.cache, how, stop, show)
        except KeyboardInterrupt:
            self.cache = sc.StateCache(self.loaded.model.config)
            return None
        self.ids += written.tokens
        return written


def _next_line() -> str | None:
    """What the user types next; None at the end."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with suppress(ImportError):  # where there is one, it gives input() history and editing
        import readline  # noqa: F401

    while True:
        try:
            return input("> ")
        except EOFError:
            show("\n")
            return None
        except KeyboardInterrupt:
            show("\n")
