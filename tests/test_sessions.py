"""A conversation that is kept in a file goes on as one that was never left, and the file is whole at any moment."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig

import statecache as sc
from command_line import TEMPLATE, program, save_checkpoint
from statecache.cli import chat, session
from statecache.cli.model import Settings, load
from statecache.cli.writing import Stop
from statecache.decode import capturing
from statecache.models import file, layout

LINES = "Once upon a time|there was a fox|/retry\nand it ran|/undo|/undo\na hen|/fork\n/retry|/retry\n/reset|Once|again"
FEWER = "Once upon a time\nthere was a fox|/retry|/undo\n/undo|a hen"
NOTE = re.compile(
    r"^(\d+ tokens reused, \d+ read, \d+ written|Taken back: .*|Kept: .*|The conversation .*)", re.MULTILINE
)


def checkpoint_of(family: str, folder: Path, template: str | None = None, **asks) -> str:
    name = save_checkpoint(family, folder, template)
    if asks:
        GenerationConfig(**asks).save_pretrained(folder)
    return name


# ---- going on


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + 2 * j for j in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 44,
}
CHANGES = {"falcon_h1": {"rope_parameters": LONGROPE, "max_position_embeddings": 512}}


CASES = [
    (None, None, "--temperature 0", FEWER),
    (None, None, "--temperature 0.8 --seed 4 --lookup 2", FEWER),
    ("qwen3_5", TEMPLATE, "--temperature 0.9 --seed 7 --system hm", LINES),
    ("qwen3_5", None, "--temperature 0.9 --seed 7 --lookup 2", FEWER),
    ("bamba", TEMPLATE, "--temperature 0", FEWER),
    ("mamba", None, "--temperature 1 --seed 1", FEWER),
    ("recurrent_gemma", TEMPLATE, "--temperature 1 --seed 2", FEWER),
    ("qwen4_exp", None, "--temperature 1 --seed 2", FEWER),
    ("falcon_h1", None, "--temperature 1 --seed 2", "Once\na fox|and\nthere was a hen|/undo|/undo\na|/retry"),
]


@pytest.mark.parametrize(
    ("family", "template", "how", "lines"), [case for case in CASES if case[0] in (None, *families.FAMILIES)]
)
def test_a_conversation_that_is_left_after_each_line_is_the_one_that_never_was(
    statecache, tmp_path, family, template, how, lines
):
    args = ["chat", "-n", "9", *how.split()]
    if family is not None:
        args += ["-m", save_checkpoint(family, tmp_path / "model", template, **CHANGES.get(family, {}))]
    _, whole, told = statecache(*args, stdin=lines.replace("|", "\n"))
    kept, parts, notes = str(tmp_path / "kept"), "", []
    for line in lines.split("|"):
        code, out, err = statecache(*args, "--session", kept, stdin=line)
        assert code == 0, err
        parts, notes = parts + out, notes + NOTE.findall(err)
    assert parts == whole
    assert notes == NOTE.findall(told)  # so nothing was read once more, either


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("mamba2", marks=pytest.mark.long)])
def test_a_conversation_on_caches_for_captured_steps_is_the_same(statecache, tmp_path, monkeypatch, family):
    lines = "Once\n/fork\nupon\na time\n/undo\n/retry\nthere\nwas\n/back\na hen\n/undo\n/undo\n/reset\nanew\n"
    model = save_checkpoint(family, tmp_path / "model", TEMPLATE)
    args = ["chat", "-m", model, "-n", "9", "--temperature", "0.8", "--seed", "4"]
    _, want, told = statecache(*args, stdin=lines)
    made = []

    def fixed_cache(*given):
        made.append(capturing.fixed_cache(*given))
        return made[-1] if len(made) != 4 else None  # for the fourth there is no memory

    monkeypatch.setattr(capturing, "worth_capturing", lambda *_: True)
    monkeypatch.setattr(chat, "fixed_cache", fixed_cache)
    monkeypatch.setattr(chat, "ROOM", 16)
    monkeypatch.setattr(capturing, "SHORTEST", 16)
    kept = str(tmp_path / "kept")
    code, got, notes = statecache(*args, "--session", kept, stdin=lines)
    assert code == 0, notes
    assert got == want
    assert NOTE.findall(notes) == NOTE.findall(told)
    assert len(made) > 4
    assert len({cache.capacity for cache in made}) > 2
    made.clear()
    goes_on = statecache(*args, "--session", kept, stdin="more\n")[1]
    assert made[0].lengths.tolist()[0] > 9
    monkeypatch.setattr(chat, "fixed_cache", lambda *_: None)
    assert statecache(*args, stdin=f"{lines}more\n")[1] == want + goes_on


def test_processors_see_what_was_said_before_the_conversation_was_left(statecache, tmp_path):
    model = checkpoint_of("qwen3_5", tmp_path / "model", repetition_penalty=5.0, no_repeat_ngram_size=2)
    args = ["chat", "-m", model, "-n", "30", "--session"]
    _, whole, _ = statecache(*args, str(tmp_path / "whole"), stdin="Once\nupon\n")
    parts = "".join(statecache(*args, str(tmp_path / "parts"), stdin=line)[1] for line in ("Once", "upon"))
    assert parts == whole
    assert statecache(*args, str(tmp_path / "forked"), stdin="Once\n/fork\n/back\nupon\n")[1] == whole


def test_a_seed_that_was_drawn_is_kept(statecache, tmp_path):
    args = ("chat", "-n", "8", "--temperature", "1")
    kept = tmp_path / "kept"
    parts = "".join(statecache(*args, "--session", str(kept), stdin=line)[1] for line in ("Once", "/retry", "then"))
    told = file.describe(kept).session
    assert told["retries"] == 1
    assert statecache(*args, "--seed", str(told["seed"]), stdin="Once\n/retry\nthen\n")[1] == parts
    (tmp_path / "copy").write_bytes(kept.read_bytes())
    typed = statecache(*args, "--session", str(tmp_path / "copy"), "--seed", "77", stdin="more")[1]
    assert typed != statecache(*args, "--session", str(kept), stdin="more")[1]
    assert file.describe(tmp_path / "copy").session["seed"] == 77


def test_what_is_told_at_the_start(statecache, tmp_path):
    args = ("chat", "-n", "5", "--temperature", "0", "--session", str(tmp_path / "kept"))
    assert f"{tmp_path}/kept is new: the conversation is kept there." in statecache(*args, stdin="Once\nupon a")[2]
    told = statecache(*args)[2]
    assert f"{tmp_path}/kept: 2 turns, 13 tokens, 12 of them in the cache; the last began: upon a\n" in told
    assert not [x for x in tmp_path.iterdir() if x.name != "kept"]


def test_newest_turns_are_kept_with_their_states_and_keys_once(statecache, tmp_path):
    kept, args = tmp_path / "kept", ("chat", "-n", "5", "--temperature", "0", "--session")
    lines = ["one", "two", "three", "four", "five", "six"]
    statecache(*args, str(kept), stdin="\n".join(lines))
    described = file.describe(kept)
    assert len(described.points) == session.POINTS == 4
    for n, point in enumerate(described.points):
        names = {name.partition("/")[2] for name in described.tensors if name.startswith(f"p{n}/")}
        assert names and not [name for name in names if described.states[name]["kind"] == "attention"]
        assert 0 < point["length"] < described.rows[0]["length"]
    lengths = [0, *(point["length"] for point in described.points)]
    for n in (1, 2, 4, 5):
        copy = tmp_path / f"copy{n}"
        copy.write_bytes(kept.read_bytes())
        _, _, err = statecache(*args, str(copy), stdin="\n".join([*["/undo"] * n, "again"]))
        reused = int(re.search(r"(\d+) tokens reused", err)[1])
        assert reused == lengths[-n], n  # of older turns nothing, and their tokens are read again
        assert "".join(f"Taken back: {line}\n" for line in reversed(lines[-n:])) in err


def test_back_and_undo_and_reset_are_kept_without_another_turn(statecache, tmp_path):
    args = ("chat", "-n", "5", "--temperature", "0", "--session", str(tmp_path / "kept"))
    for lines, turns, held in (
        ("Once\n/fork\nupon\nthere was", ["Once", "upon", "there was"], [18]),
        ("/undo", ["Once", "upon"], [11]),
        ("/fork\na hen\n/back", [], [11]),
        ("/reset", [], []),
        ("Once\n/undo", [], []),
    ):
        statecache(*args, stdin=lines)
        described = file.describe(tmp_path / "kept")
        assert ([turn["line"] for turn in described.session["turns"]], described.lengths) == (turns, held), lines


@pytest.fixture
def talk(tmp_path):
    """A conversation with a tiny model, and how to keep it, read it again, and go on."""
    settings = Settings(save_checkpoint("qwen3_5", tmp_path / "model", TEMPLATE), device="cpu")
    loaded, path = load(settings), tmp_path / "kept"

    def turn(of: chat.Conversation, line: str) -> list[int]:
        of.say(line)
        with Stop() as stop:
            of.answer({"max_new_tokens": 5}, stop)
        return of.ids

    def write(of: chat.Conversation) -> None:
        session.write(path, session.Session(of.cache, of.ids, of.turns, of.system, 1), loaded)

    def read() -> chat.Conversation:
        return chat.Conversation.of(session.read(path, session.describe(path), loaded, settings), loaded, settings)

    return SimpleNamespace(
        new=lambda: chat.Conversation(loaded, settings), turn=turn, write=write, read=read, path=path, loaded=loaded
    )


def test_an_answer_that_is_interrupted_leaves_the_turns_before_it(talk, monkeypatch):
    of = talk.new()
    for line in ("Once", "upon"):
        talk.turn(of, line)
    before = list(of.ids)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "show", interrupt)
        talk.turn(of, "a time")
    assert of.held() == len(before) - 1 < len(of.ids) - 1  # nothing of it is in the cache
    talk.write(of)
    again = talk.read()
    assert (again.ids, again.held()) == (of.ids, of.held())
    assert talk.turn(again, "then") == talk.turn(of, "then")
    for each in (of, again):
        assert [each.undo(), each.undo(), each.ids, each.held()] == ["then", "a time", before, len(before) - 1]
    assert talk.turn(again, "a hen") == talk.turn(of, "a hen")


def test_what_the_next_turn_took_off_comes_back_with_undo(talk):
    talk.loaded.tokenizer.chat_template = None
    of = talk.new()
    talk.turn(of, "Once")
    of.ids[-1] = talk.loaded.tokenizer.eos_token_id  # a story that has ended goes on without its end
    ended = list(of.ids)
    talk.turn(of, "upon")
    assert of.ids[: len(ended)] != ended
    talk.write(of)
    assert talk.read().turns[-1].ids == ended
    again = talk.read()
    assert (again.undo(), again.ids, again.held()) == ("upon", ended, len(ended) - 1)


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(talk, monkeypatch):
    of = talk.new()
    with monkeypatch.context() as patch:
        patch.setattr(chat, "show", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        of.say("Once")
        with Stop() as stop:
            written = of.answer({"max_new_tokens": 100}, stop)
    assert len(written.tokens) < 100
    talk.write(of)
    assert talk.turn(talk.read(), "upon") == talk.turn(of, "upon")


# ---- what is refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A session of the embedded model, and a plain saved cache of it."""
    folder = tmp_path_factory.mktemp("begun")
    settings = Settings(device="cpu")
    loaded = load(settings, show=False)
    of = chat.Conversation(loaded, settings)
    for line in ("Once upon a time", "there was"):
        of.say(line)
        with Stop() as stop:
            of.answer({"max_new_tokens": 3}, stop)
    session.write(folder / "kept", session.Session(of.cache, of.ids, of.turns, None, 1), loaded)
    of.cache.save(folder / "cache")
    return folder


def test_another_file_is_refused_in_one_line_and_stays(statecache, tmp_path, begun):
    whole = (begun / "kept").read_bytes()
    (tmp_path / "damaged").write_bytes(whole[:-1])
    (tmp_path / "bytes").write_bytes(whole[:9000] + b"x" + whole[9001:])
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Once upon a time")
    (tmp_path / "cache").write_bytes((begun / "cache").read_bytes())
    (tmp_path / "kept").write_bytes(whole)
    other = save_checkpoint("qwen3_5", tmp_path / "model", TEMPLATE)
    cases = [
        ("damaged", [], 1, "damaged is damaged"),
        ("bytes", [], 1, "bytes is damaged"),
        ("empty", [], 1, "empty is damaged"),
        ("text", [], 1, "text is damaged"),
        ("cache", [], 1, "cache: this is a saved cache, and no conversation: give another name"),
        ("model", [], 1, "model: cannot read it: Is a directory"),
        ("no/folder", [], 2, f"no/folder: there is no folder {tmp_path}/no: make it first"),
        ("kept", ["-m", other], 1, 'it is a conversation with "embedded" in float32, and this is "'),
        (
            "kept",
            ["--dtype", "bfloat16"],
            1,
            'and this is "embedded" in bfloat16, with other weights: give --model and',
        ),
        ("kept", ["--system", "hm"], 2, "kept: it was begun without --system: leave --system out, or give another"),
    ]
    before = {x: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()}
    for name, more, code, said in cases:
        found = statecache("chat", "--session", str(tmp_path / name), *more, stdin="more\n")
        line = found[2].splitlines()[-1]
        assert (found[0], found[1]) == (code, ""), found
        assert line.startswith("statecache: ") and said in line, line
        assert "Traceback" not in found[2]
    assert {x: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()} == before


def test_a_system_message_is_the_one_that_it_was_begun_with(statecache, tmp_path):
    model = save_checkpoint("qwen3_5", tmp_path / "model", TEMPLATE)
    args = ("chat", "-m", model, "-n", "5", "--temperature", "0")
    kept = ("--session", str(tmp_path / "kept"))
    statecache(*args, *kept, "--system", "hm", stdin="Once")
    code, _, err = statecache(*args, *kept, "--system", "other", stdin="Once")
    assert code == 2 and 'it was begun with --system "hm": leave --system out, or give another file' in err
    whole = statecache(*args, "--system", "hm", stdin="upon\na time")
    parts = statecache(*args, *kept, stdin="/reset\nupon"), statecache(*args, *kept, "--system", "hm", stdin="a time")
    assert parts[0][1] + parts[1][1] == whole[1]


def test_a_conversation_that_makes_no_sense_is_damage(statecache, tmp_path, begun):
    described = file.describe(begun / "kept")
    config = AutoConfig.from_pretrained(str(files("statecache") / "tiny/story"))
    cache = sc.StateCache.load(begun / "kept", config, allow_unverified=True)
    ids = [described.rows[0]["tokens"]]
    for change in (
        {"turns": 3},
        {"turns": [{"line": "x"}]},
        {"unread": None},
        {"seed": "x"},
        {"seed": ...},
        {"model": ...},
    ):
        told = {name: x for name, x in {**described.session, **change}.items() if x is not ...}
        fingerprint = "x" if "model" in change else described.fingerprint
        file.write(tmp_path / "kept", cache.states, ids, fingerprint=fingerprint, session=told)
        code, _, err = statecache("chat", "--session", str(tmp_path / "kept"), stdin="more\n")
        assert code == 1 and "kept is damaged: its conversation makes no sense (" in err


def test_a_file_that_changes_while_it_is_read_is_refused(statecache, tmp_path, begun, monkeypatch):
    kept, read = tmp_path / "kept", sc.StateCache.load.__func__
    kept.write_bytes((begun / "kept").read_bytes())

    def meanwhile(cls, *args, **options):
        found = read(cls, *args, **options)
        described = file.describe(kept)
        told = {**described.session, "seed": 2, "turns": []}
        file.write(kept, found.states, fingerprint=described.fingerprint, session=told)
        return found

    monkeypatch.setattr(sc.StateCache, "load", classmethod(meanwhile))
    code, _, err = statecache("chat", "--session", str(kept), stdin="more\n")
    assert code == 1 and "another process wrote it while it was read: try again" in err


def test_two_chats_on_one_file_take_each_others_place_and_say_so(statecache, tmp_path, begun, monkeypatch):
    kept, answers = tmp_path / "kept", iter(range(9))

    def another_writes(text):
        if text == "\n" and next(answers) == 2:  # while the third answer comes
            kept.unlink()
            kept.write_bytes((begun / "kept").read_bytes())

    args = ("chat", "-n", "2", "--temperature", "0", "--session", str(kept))
    with monkeypatch.context() as patch:
        patch.setattr(chat, "show", another_writes)
        _, _, err = statecache(*args, stdin="a\nb\nc\nd\n")
    said = f"{kept} was changed by another process: this conversation takes its place."
    told = [line for line in err.splitlines() if " reused, " in line or line == said]
    assert told.index(said) == 2 and len(told) == 5
    assert [turn["line"] for turn in file.describe(kept).session["turns"]] == ["a", "b", "c", "d"]
    assert said not in statecache(*args, stdin="e\nf\n")[2]


def test_what_cannot_be_written_is_said_and_the_conversation_goes_on(statecache, tmp_path, begun, monkeypatch):
    kept = tmp_path / "kept"
    kept.write_bytes((begun / "kept").read_bytes())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = ("chat", "-n", "5", "--temperature", "0", "--session", str(kept))
    with monkeypatch.context() as patch:
        patch.setattr(layout, "write", full)
        code, out, err = statecache(*args, stdin="there was\na fox\n")
    assert code == 0 and out and err.count("tokens reused") == 2
    said = f"Not kept: {kept} cannot be written (No space left on device), and stays as it was."
    assert err.splitlines().count(said) == 2
    assert kept.read_bytes() == (begun / "kept").read_bytes()
    assert [x.name for x in tmp_path.iterdir()] == ["kept"]


def test_ctrl_c_waits_for_the_file(statecache, tmp_path, begun, monkeypatch):
    kept, save = tmp_path / "kept", layout.write
    kept.write_bytes((begun / "kept").read_bytes())
    monkeypatch.setattr(layout, "write", lambda *args: (signal.raise_signal(signal.SIGINT), save(*args)))
    code, _, err = statecache("chat", "-n", "2", "--session", str(kept), stdin="a\nb\n")
    assert code == 0 and err.count("tokens reused") == 2
    assert [turn["line"] for turn in file.describe(kept).session["turns"][2:]] == ["a", "b"]


def test_a_link_stays_one(statecache, tmp_path, begun):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_bytes((begun / "kept").read_bytes())
    (tmp_path / "link").symlink_to(tmp_path / "there" / "kept")
    statecache("chat", "-n", "2", "--session", str(tmp_path / "link"), stdin="there was")
    assert (tmp_path / "link").is_symlink()
    assert len(file.describe(tmp_path / "there" / "kept").session["turns"]) == 3


# ---- what is in it


def test_inspect_shows_a_conversation(statecache, begun):
    kept = str(begun / "kept")
    code, out, _ = statecache("inspect", kept, "--json")
    told = json.loads(out)
    assert (code, told["model_type"], told["checksums"]) == (0, "qwen3_5_text", "right")
    assert told["session"] == {
        "model": "embedded",
        "dtype": "float32",
        "system": None,
        "tokens": 12,
        "turns": ["Once upon a time", "there was"],
        "points": [6],
    }
    out = statecache("inspect", kept)[1]
    for words in (
        "conversation with │ embedded, float32",
        "its tokens │ 12",
        "its turns │ 2",
        "back to tokens │ 6",
        "checksums │ right",
    ):
        assert words in " ".join(out.split()), out
    assert told["bytes"]["total"] == sum(tensor.nbytes for tensor in load_file(kept).values())
    assert json.loads(statecache("inspect", str(begun / "cache"), "--json")[1])["session"] is None


def test_a_session_is_a_cache_too(begun):
    settings = Settings(device="cpu")
    cache = sc.StateCache.load(begun / "kept", load(settings, show=False).model)
    assert cache.lengths.tolist() == [11]


# ---- a process that ends


def test_a_process_that_is_killed_while_it_writes_leaves_its_last_turn_or_the_one_before(talk):
    of, turns, rnd = talk.new(), [], random.Random(0)
    for line in ("Once", "upon", "a time", "there was", "a fox"):
        talk.turn(of, line)
        turns.append(session.Session(of.cache.fork(), list(of.ids), list(of.turns), None, 1))
    session.write(talk.path, turns[0], talk.loaded)
    n, found = 0, set()
    for _ in range(100):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            while True:
                for n, turn in enumerate(turns):
                    os.write(writer, bytes([n]))  # it has been answered
                    session.write(talk.path, turn, talk.loaded)
        answered, enough = [n], rnd.randint(2, 5)
        while len(answered) < enough:
            answered += os.read(reader, 1)
        time.sleep(rnd.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writer)
        answered += os.read(reader, 10**6)
        os.close(reader)
        now = talk.read()
        n = next(n for n, turn in enumerate(turns) if turn.ids == now.ids)
        assert n in answered[-2:]
        assert (now.held(), len(now.turns)) == (len(now.ids) - 1, n + 1)
        found.add(n)
    assert len(found) > 2
    more = [talk.turn(each, "and") for each in (now, chat.Conversation.of(turns[n], talk.loaded, of.settings))]
    assert more[0] == more[1]


@pytest.mark.program
def test_a_chat_that_is_killed_answers_its_next_turn_as_if_nothing_had_happened(statecache, tmp_path):
    args = ("chat", "-n", "60", "--temperature", "0.9", "--device", "cpu")
    kept = ("--session", str(tmp_path / "kept"))
    running = program(*args, *kept, stdin=subprocess.PIPE, bufsize=1)
    running.stdin.write("Once upon a time\n")
    while " read, " not in running.stderr.readline():
        pass
    seed = str(file.describe(tmp_path / "kept").session["seed"])
    first = os.read(running.stdout.fileno(), 10**6).decode()
    running.stdin.write("there was a fox\n")
    os.read(running.stdout.fileno(), 1)  # it is answering
    running.kill()
    running.communicate()
    code, again, err = statecache(*args, *kept, stdin="there was a fox\n")
    assert code == 0 and "kept: 1 turn, " in err
    assert first + again == statecache(*args, "--seed", seed, stdin="Once upon a time\nthere was a fox\n")[1]
