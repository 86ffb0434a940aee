"""`statecache chat`: turn after turn on one cache, which never reads a token twice."""

import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from statecache.cli import session as sessions
from statecache.cli.failure import CommandError
from statecache.cli.model import Loaded, Settings, captured, load, most_drafts, new_cache, options, tokens_held
from statecache.cli.report import byte_rows, console, show, two_columns
from statecache.cli.session import Session, Turn
from statecache.cli.writing import Stop, Written, write_on
from statecache.decode.capturing import fixed_cache
from statecache.decode.generate import remember
from statecache.decode.prompt import templated, tokens_of
from statecache.errors import RotaryError, StaleMarkError

COMMANDS = (
    "/undo takes the last turn back, /retry answers it anew, /fork keeps a copy to which /back returns, "
    "/stats shows what the cache holds, /reset starts anew, /exit or Ctrl-D leaves"
)
ROOM = 1024  # tokens that a cache for a captured step has room for at least
ANSWER = "\N{OBJECT REPLACEMENT CHARACTER}answer\N{OBJECT REPLACEMENT CHARACTER}"


def chat_command(settings: Settings, system: str | None = None, path: Path | None = None) -> None:
    """Read what the user says, line by line, until there is no more.

    `system`: what comes before all of it. `path`: of the file in which the conversation is kept, to go on from it.
    """
    described = None if path is None else sessions.describe(path)
    if path is not None and described is not None:
        sessions.check_system(path, described, system)
    loaded = load(settings)
    if system is not None and loaded.tokenizer.chat_template is None:
        raise CommandError(f'--system takes a chat model, and "{loaded.name}" has no chat template: leave it out', 2)
    how = options(loaded.model.generation_config, settings)
    talk, kept = Conversation(loaded, settings, system), list[Conversation]()
    seed, retries = how["seed"], 0
    note = partial(console().print, style="dim", markup=False, soft_wrap=True)
    note(f"{COMMANDS}; Ctrl-C stops an answer.")
    if path is not None and described is not None:
        begun = sessions.read(path, described, loaded, settings)
        talk, system = Conversation.of(begun, loaded, settings), begun.system
        seed, retries = begun.seed if settings.seed is None else seed, begun.retries
        how["seed"] = (seed + retries) % 2**63
        count = f"{len(talk.turns)} turn{'s' * (len(talk.turns) != 1)}"
        last = f"; the last began: {talk.turns[-1].line}" if talk.turns else ""
        note(f"{path}: {count}, {len(talk.ids)} tokens, {talk.held()} of them in the cache{last}")
    elif path is not None:
        note(f"{path} is new: the conversation is kept there.")
    seen = None if path is None else sessions.stamp(path)

    def keep() -> None:
        nonlocal seen
        if path is None:
            return
        if sessions.stamp(path) != seen:
            note(f"{path} was changed by another process: this conversation takes its place.")
        session = Session(talk.cache, talk.ids, talk.turns, system, seed, retries)
        try:
            with Stop():  # Ctrl-C waits for it
                sessions.write(path, session, loaded)
            seen = sessions.stamp(path)
        except OSError as error:
            note(f"Not kept: {path} cannot be written ({error.strerror or error}), and stays as it was.")

    while (line := _next_line()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                talk = Conversation(loaded, settings, system)
                keep()
                note("The conversation starts anew.")
            case "/undo" | "/retry" if not talk.turns:
                note("There is no turn to take back.")
            case "/undo":
                line = talk.undo()
                keep()
                note(f"Taken back: {line}")
            case "/retry":
                retries += 1
                how["seed"] = (seed + retries) % 2**63
                told = _turn(talk, talk.undo(), how)
                keep()
                note(told)
            case "/fork":
                kept.append(talk.fork())
                note(f"Kept: {len(talk.ids)} tokens; /back returns there.")
            case "/back" if not kept:
                note("There is no copy: /fork keeps one.")
            case "/back":
                talk = kept.pop()
                keep()
                note(f"Back at {len(talk.ids)} tokens.")
            case "/stats":
                sizes = talk.cache.nbytes()
                rows = [("tokens so far", str(len(talk.ids))), ("tokens in the cache", str(talk.held()))]
                console().print(two_columns(rows + byte_rows(sizes.by_kind, sizes.total)))
            case text if text.startswith("/"):
                note(f"No command {text}: {COMMANDS}.")
            case _:
                told = _turn(talk, line.rstrip("\n"), how)
                keep()
                note(told)


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

    def __init__(self, loaded: Loaded, settings: Settings, system: str | None = None) -> None:
        self.loaded, self.settings, self.system = loaded, settings, system
        self.cache: Any = new_cache(loaded, settings)
        self.ids: list[int] = []
        self.turns: list[Turn] = []

    @classmethod
    def of(cls, session: Session, loaded: Loaded, settings: Settings) -> "Conversation":
        """The one that was kept."""
        talk = cls(loaded, settings, session.system)
        talk.cache, talk.ids, talk.turns = session.cache, session.ids, session.turns
        return talk

    def undo(self) -> str:
        """Take the last turn back; what the user said in it. Where nothing leads back, the cache starts anew."""
        turn = self.turns.pop()
        try:
            if turn.point is None:
                self._start_over()
            else:
                self.cache.admit(0, turn.point)
        except RotaryError:  # the row was read anew since, with keys that are no use to a shorter one
            self._start_over()
        self.ids = turn.ids
        return turn.line

    def _start_over(self) -> None:
        """Read all tokens again in the next turn: an empty row goes back to no point."""
        self.cache = new_cache(self.loaded, self.settings)
        self.turns = [replace(turn, point=None) for turn in self.turns]

    def fork(self) -> "Conversation":
        """A copy to go on from, whose turns so far cannot be taken back."""
        other = Conversation(self.loaded, self.settings, self.system)
        other.cache, other.ids = self.cache.fork(), list(self.ids)
        return other

    def held(self) -> int:
        """How many of the tokens the cache has taken in."""
        return tokens_held(self.cache)

    def say(self, text: str) -> None:
        """Append what the user says, in the model's own form, to the tokens."""
        point = self.cache.snapshot(0, point=True) if self.held() else None
        turn = Turn(point, list(self.ids), text)
        if self.loaded.tokenizer.chat_template is None:
            self._continue(text)
        else:
            self._next_message(text)
        if len(self.ids) <= self.held():
            raise CommandError("the tokenizer makes no token of this line")
        self.turns.append(turn)

    def _continue(self, text: str) -> None:
        tokenizer = self.loaded.tokenizer
        if not self.ids:
            self.ids = tokens_of(text, tokenizer)
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
        elif self.system is not None:
            asks = [{"role": "system", "content": self.system}, *asks]
        whole = templated(asks, tokenizer)
        rest = whole.rpartition(ANSWER)[2] if self.ids else whole
        new = list(tokenizer(rest, add_special_tokens=False)["input_ids"])
        if self.ids and new[:1] == self.ids[-1:]:
            new = new[1:]  # the model has closed its answer itself
        self.ids += new

    def answer(self, how: dict[str, Any], stop: Stop) -> Written | None:
        """Let the model answer, onto standard output; None if it is interrupted within: what was said is then unread.

        `how`: options of `sc.generate`.
        """
        if captured(self.loaded, self.settings, how):
            self._settle(how["max_new_tokens"])
        mark = self.cache.checkpoint()
        remember(self.cache, [self.ids[: self.held()]])
        try:
            written = write_on(self.loaded, self.ids, self.cache, how, stop, show)
        except KeyboardInterrupt:
            try:
                self.cache.restore(mark)
            except StaleMarkError:
                self._start_over()
            return None
        self.ids += written.tokens
        return written

    def _settle(self, new: int) -> None:
        """Have the cache be one that a decoder takes, with room for so many new tokens, where that is quicker.

        Its capacities are powers of two: a conversation outgrows few, and on a CPU code is good for one.
        """
        needed, most = len(self.ids) + new, most_drafts(self.loaded, self.settings)
        if (self.cache.capacity or 0) >= needed:
            return
        room = max(ROOM, 1 << (needed + most - 1).bit_length())
        settled = fixed_cache(self.loaded.model, 1, room - new - most, new, most)
        if settled is None and self.cache.capacity is not None:  # there is no more memory for one
            settled = new_cache(self.loaded, self.settings)
            settled.states.clock_for(1, self.loaded.model.device)
        if settled is not None:
            if self.held():
                settled.admit(0, self.cache.snapshot(0))
            self.cache = settled


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
