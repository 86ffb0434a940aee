"""The command line, on tiny random checkpoints: what is printed where, exit codes, Ctrl-C, and that chat reads once."""

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
)

import statecache as sc
from command_line import TEMPLATE, program, save_checkpoint
from statecache.cli import chat
from statecache.cli.measure import measure, ratio
from statecache.cli.model import EMBEDDED, Settings, drawing, load, load_model
from statecache.cli.plot import curves
from statecache.cli.writing import Stop, write_on
from statecache.decode.processors import APPLIED, REFUSED, REFUSED_DRAWN
from statecache.models.names import FUNCTIONS_TAKE
from statecache.models.prepare import is_prepared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_checkpoint("qwen3_5", tmp_path_factory.mktemp("qwen3_5"))


# ---- starting


@pytest.mark.program
@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["generate", "--help"],
        ["chat", "--help"],
        ["inspect", "--help"],
        ["demo", "-h"],
        ["bench", "-h"],
        ["plan", "-h"],
        ["--version"],
    ],
)
def test_help_answers_without_torch(args):
    code = (
        "import sys, statecache.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # 0.3 s on an idle machine
    assert ("Example: statecache" if args != ["--version"] else sc.__version__) in run.stdout
    assert run.stdout.endswith("[]\n")


# compilers, what runs models, tokenizers: seconds of importing that a configuration does not need
SLOW = ("torch._dynamo", "torch._inductor", "sympy", "triton", "tokenizers", "transformers.modeling_utils")


@pytest.mark.program
@pytest.mark.parametrize(
    "args", [["inspect"], ["plan", "--store", "paged", "--checkpoints", "2"]], ids=["inspect", "plan"]
)
def test_a_configuration_is_looked_at_without_what_runs_models(args: list[str], tmp_path: Path) -> None:
    file = shutil.copy(EMBEDDED / "config.json", tmp_path)
    code = (
        "import sys; from statecache.cli import main; sys.argv[0] = 'statecache'\n"
        "try: main()\n"
        f"finally: print([m for m in {SLOW} if m in sys.modules], file=sys.stderr)"
    )
    given = ["--model", file] if args[0] == "inspect" else [file]
    run = subprocess.run([sys.executable, "-c", code, *args, *given], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[-1] == "[]" and "attention state" in run.stdout


def test_version_is_that_of_the_package(statecache):
    assert statecache("--version")[:2] == (0, "statecache 0.1.0\n")


# ---- errors: one line on standard error, nothing on standard output


@pytest.mark.parametrize(
    ("args", "terminal", "code", "message"),
    [
        (["generate"], True, 2, "no prompt: give one as an argument, with --file, or through a pipe"),
        (["generate"], False, 2, "the prompt is empty: give at least one word"),
        (["generate", "a", "--prompt", "b"], False, 2, "PROMPT and --prompt are both given: keep one of them"),
        (["generate", "--file", "x", "-p", "b"], False, 2, "--prompt and --file are both given: keep one of them"),
        (["generate", "--file", "no/such.txt"], False, 1, "cannot read no/such.txt: No such file or directory"),
        (["generate", "a", "--lookup", "2", "--draft", "tiny"], False, 2, "--lookup and --draft are both given: keep"),
        (
            ["generate", "a", "--lookup", "0"],
            False,
            2,
            "Invalid value for '--lookup': 0: give 1 to 64, or leave it",
        ),
        (["generate", "a", "--lookup", "65"], False, 2, "Invalid value for '--lookup': 65: give 1 to 64"),
        (["generate", "a", "--draft", ""], False, 2, "Invalid value for '--draft': it is empty: give a folder"),
        (["generate", "a", "--model", ""], False, 2, "Invalid value for '--model' / '-m': it is empty"),
        (["bench", "--repeats", "2"], False, 2, "Invalid value for '--repeats'"),
        (["bench", "-m", "./no/model"], False, 1, 'there is no folder "./no/model": give'),
        (["inspect", "-m", " "], False, 2, "Invalid value for '--model' / '-m': it is empty"),
        (["generate", "a", "--seed", str(2**63)], False, 2, "Invalid value for '--seed'"),
        (["generate", "a", "--top-p", "0"], False, 2, "Invalid value for '--top-p': 0.0: give a probability above 0"),
        (["generate", "a", "--top-p", "nan"], False, 2, "Invalid value for '--top-p': nan: give a probability"),
        (["generate", "a", "--top-p", "1.1", "--lookup", "2"], False, 2, "Invalid value for '--top-p': 1.1: give a"),
        (["generate", "a", "--temperature", "inf"], False, 2, "Invalid value for '--temperature': inf: give 0 for"),
        (["chat", "--temperature", "nan"], False, 2, "Invalid value for '--temperature': nan: give 0 for the"),
        (["generate", "a", "--temperature", "1e-46"], False, 2, "Invalid value for '--temperature': 1e-46: give 0"),
        (["generate", "a", "--temperature", "-1"], False, 2, "Invalid value for '--temperature': -1.0: give 0"),
        (["generate", "a\udcff"], False, 2, "the prompt is not UTF-8 text"),
        (["generate", "a", "--draft", "./no/draft"], False, 1, 'there is no folder "./no/draft": give'),
        (["generate", "a", "-n", "0"], False, 2, "Invalid value for '--max-new-tokens' / '-n'"),
        (["generate", "a", "--dtype", "int4"], False, 2, "Invalid value for '--dtype'"),
        (["generate", "a", "--nonsense"], False, 2, "No such option: --nonsense"),
        (
            ["generate", "Once", "upon", "a"],
            False,
            2,
            "Got unexpected extra argument(s) (upon a) (put a prompt of several",
        ),
        (["nonsense"], False, 2, "No such command 'nonsense'"),
        (["generate", "a", "--model", "./no/such/folder"], False, 1, 'there is no folder "./no/such/folder": give'),
        (["inspect", "--model", "tests"], False, 1, '"tests" holds no config.json: give the folder of'),
        (["plan", "tests"], False, 1, '"tests" holds no config.json: give the folder of'),
        (["plan", "pyproject.toml"], False, 1, 'cannot load "pyproject.toml"'),
        (["plan", "--budget", "much"], False, 1, "budget='much': give bytes, or a size such as \"24GiB\""),
        (["plan", "--budget", "1KiB"], False, 1, "budget=1024: 1 row of 1 token need"),
        (["plan", "--capacity", "4", "--length", "4"], False, 2, "--capacity and --length are both given: keep"),
        (["plan", "--capacity", "4", "--slack", "5"], False, 1, "slack=5 is more than capacity=4"),
        (["plan", "--store", "cloud"], False, 1, "store='cloud': give one of 'dense'"),
        (["plan", "--checkpoint-store", "fp8"], False, 1, "checkpoint_store='fp8': give None, or 'int8'"),
        (["plan", "--recurrent-store", "fp8"], False, 1, "recurrent_store='fp8': give None, or 'bfloat16'"),
        (["plan", "--plot", "x.gif"], False, 2, "--plot x.gif: give a name that ends in .svg or .png"),
        (["plan", "--plot", "no/x.svg"], False, 2, "--plot no/x.svg: there is no folder no: make it first"),
        (["generate", "a", "--device", "abacus"], False, 2, 'no device "abacus" here: leave --device out'),
    ],
)
def test_bad_call_is_one_line(statecache, args, terminal, code, message):
    got, out, err = statecache(*args, terminal=terminal)
    assert (got, out) == (code, "")
    assert err.startswith(f"statecache: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["generate", "Once"], ["generate", "Once", "--lookup", "2"], ["chat"]])
def test_model_that_cannot_be_prepared_is_refused_before_anything_is_written(statecache, checkpoint, tmp_path, command):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    BloomForCausalLM(BloomConfig(vocab_size=259, n_layer=1, n_head=2, hidden_size=8)).save_pretrained(tmp_path)
    code, out, err = statecache(*command, "-m", str(tmp_path), stdin="Once")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f'statecache: cannot write with "{tmp_path}", which prepare() does not take: layer 0')
    assert "is a BloomBlock in which nothing asks" in err


def test_minimax_writes_and_chats(statecache, tmp_path):
    save_checkpoint("minimax", tmp_path)
    args = ("-m", str(tmp_path), "-n", "3")
    assert statecache("generate", "Once", *args)[0] == 0
    assert "3 written" in statecache("chat", *args, stdin="Once\nupon")[2]


@pytest.mark.parametrize("kind", ["qwen3_5", "llama"])  # with a class of tokenizer, which is empty then, and without
def test_model_without_a_tokenizer_is_told_so(statecache, checkpoint, tmp_path, kind):
    config = json.loads(Path(checkpoint, "config.json").read_text()) | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = statecache("generate", "Once", "-m", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f'statecache: "{tmp_path}" has no tokenizer that transformers can read: save the model')


def test_closed_standard_output_is_one_line(checkpoint):
    code = "from statecache.cli import main; main()"
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code, "generate", "Once", "-m", checkpoint]
    run = subprocess.run(shell, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False)
    assert (run.returncode, run.stderr) == (
        1,
        "statecache: standard output is closed: there is nowhere to write\n",
    )


@pytest.mark.program
def test_unreachable_hub_is_one_line():
    run = program("inspect", "--model", "org/no-such", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    out, err = run.communicate(timeout=120)
    assert (run.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith('statecache: "org/no-such" is no folder here and no model that the hub gave (check the name')


def test_unreadable_checkpoint_is_one_line(statecache, checkpoint, tmp_path):
    for file in Path(checkpoint).iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    code, out, err = statecache("generate", "Once", "--model", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f'statecache: cannot load "{tmp_path}": ')


@pytest.mark.parametrize("kind", ["wavelet", "window_attention"])  # unknown to transformers, and to the table alone
def test_unknown_layer_type_is_one_line(statecache, checkpoint, tmp_path, kind):
    config = json.loads(Path(checkpoint, "config.json").read_text())
    config |= {"model_type": "llama", "layer_types": [kind] * 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = statecache("inspect", "--model", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert kind in err


# ---- generate


def test_generate_streams_text_and_keeps_the_rest_off_standard_output(statecache, checkpoint):
    code, out, err = statecache("generate", "Once upon", "--model", checkpoint, "-n", "12", "--temperature", "0")
    assert code == 0
    assert out.startswith("Once upon")
    assert out.endswith("\n")
    for name in ("prompt tokens", "new tokens", "tokens per second", "conv", "recurrent", "attention", "all states"):
        assert name in err


def test_quiet_prints_the_text_alone(statecache, checkpoint):
    args = ("generate", "Once", "--model", checkpoint, "-n", "12", "--temperature", "0")
    _, loud, _ = statecache(*args)
    assert statecache(*args, "--quiet") == (0, loud, "")


@pytest.mark.parametrize("way", ["argument", "option", "file", "pipe", "dash"])
def test_prompt_comes_from_one_of_its_sources(statecache, checkpoint, tmp_path, way):
    (tmp_path / "prompt.txt").write_text("Once upon\n")
    args = {
        "argument": ["Once upon"],
        "option": ["--prompt", "Once upon"],
        "file": ["--file", str(tmp_path / "prompt.txt")],
        "pipe": [],
        "dash": ["--file", "-"],
    }[way]
    stdin = "Once upon\n" if way in ("pipe", "dash") else None
    code, out, _ = statecache("generate", *args, "--model", checkpoint, "-n", "1", "--json", stdin=stdin)
    assert code == 0
    assert json.loads(out)["prompt"] == "Once upon"


def test_json_is_one_object_with_what_was_asked_and_what_it_cost(statecache, checkpoint):
    args = ("generate", "Once", "--model", checkpoint, "-n", "9", "--temperature", "0.5", "--top-p", "0.9")
    code, out, err = statecache(*args, "--seed", "3", "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert report["tokens"] == {"prompt": 4, "new": 9}
    assert report["finish_reason"] == "length"
    assert 0 < report["seconds_to_first_token"] < report["seconds"]
    assert report["tokens_per_second"] == pytest.approx(9 / report["seconds"], rel=0.01)
    sizes = report["bytes"]
    assert min(sizes["conv"], sizes["recurrent"], sizes["attention"]) > 0
    assert sizes.pop("total") == sum(sizes.values())
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "do_sample": True, "max_new_tokens": 9}
    assert wanted.items() <= report["settings"].items()
    assert (report["settings"]["device"], report["settings"]["dtype"]) == ("cpu", "float32")


def test_same_seed_gives_the_same_text(statecache, checkpoint):
    def text(seed):
        args = ("generate", "Once", "--model", checkpoint, "-n", "24", "--temperature", "1", "--seed", seed, "--json")
        return json.loads(statecache(*args)[1])["text"]

    assert text("1") == text("1") != text("2")


def test_greedy_text_is_the_argmax_of_full_forwards(statecache, checkpoint):
    _, out, _ = statecache("generate", "Once upon", "--model", checkpoint, "-n", "16", "--temperature", "0", "--json")
    loaded = load(Settings(checkpoint, device="cpu"))
    sc.unprepare(loaded.model)
    ids = torch.tensor([loaded.tokenizer("Once upon")["input_ids"]])
    before = ids.shape[1]
    for _ in range(16):
        with torch.no_grad():
            ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert json.loads(out)["text"] == loaded.tokenizer.decode(ids[0, before:], skip_special_tokens=True)


@pytest.mark.parametrize("how", [["--lookup", "3"], ["--draft", "tiny"]])
def test_drafts_leave_the_text_and_say_what_they_gained(statecache, how):
    args = ("generate", "The cat sat. The dog ran. The cat sat. The dog", "-n", "40", "--temperature", "0")
    _, plain, _ = statecache(*args, "--quiet")
    code, out, err = statecache(*args, *how)
    assert (code, out) == (0, plain)
    assert "tokens per forward pass" in err
    assert "drafted tokens accepted" in err
    report = json.loads(statecache(*args, "--json", *how)[1])
    gain = report["speculation"]
    assert report["prompt"] + report["text"] + "\n" == plain
    assert report["tokens"]["new"] == 40 == gain["forwards"] + gain["accepted"]
    assert gain["tokens_per_forward"] == pytest.approx(40 / gain["forwards"], abs=1e-3)
    assert 0 < gain["accepted"] < gain["drafted"]
    assert (gain["lookup"], gain["draft"]) == ((3, None) if "3" in how else (None, "tiny"))
    assert report["bytes"]["log"] > 0


def test_passes_of_the_draft_model_are_told_where_there_is_one(statecache):
    args = ("generate", "The cat sat. The cat sat. The", "-n", "20", "--temperature", "0")
    assert "draft passes" in statecache(*args, "--draft", "tiny")[2]
    assert "draft passes" not in statecache(*args, "--lookup", "2")[2]


@pytest.mark.parametrize("config", [{}, {"top_k": 7}, {"top_p": 0.3, "temperature": 0.5}, {"top_k": 0}])
@pytest.mark.parametrize("settings", [Settings(temperature=1.5), Settings(top_p=0.9)])
def test_tokens_are_drawn_with_the_values_that_transformers_takes(checkpoint, config, settings):
    model = load(Settings(checkpoint, device="cpu")).model
    model.generation_config = GenerationConfig(**config)
    given = {name: getattr(settings, name) for name in ("temperature", "top_p")}
    typed = {name: x for name, x in given.items() if x is not None}
    whole, _ = model._prepare_generation_config(None, do_sample=True, **typed)
    got = drawing(model.generation_config, settings)
    assert got == {name: getattr(whole, name) for name in ("temperature", "top_p", "top_k")}


def test_unset_values_are_neutral_where_transformers_does_not_tell():
    config = SimpleNamespace(do_sample=True, temperature=0.5, top_p=None, top_k=None)
    assert drawing(config, Settings()) == {"temperature": 0.5, "top_p": 1.0, "top_k": 0}


def test_json_shows_the_values_used_with_and_without_drafts(statecache):
    args = ("generate", "Once", "-n", "2", "--seed", "1", "--json")
    plain, drafted = (json.loads(statecache(*args, *how)[1])["settings"] for how in ([], ["--lookup", "2"]))
    assert plain == drafted
    assert (plain["temperature"], plain["top_p"], plain["top_k"]) == (0.8, 0.95, 50)


@pytest.mark.parametrize(
    ("config", "temperature", "named"),
    [
        ({"guidance_scale": 1.3, "forced_bos_token_id": 3}, "0", "guidance_scale, forced_bos_token_id"),
        ({"min_p": 0.1, "typical_p": 0.9, "top_h": 0.4}, "1", "top_h, typical_p"),
        ({"min_p": 0.1, "typical_p": 0.9}, "0", None),  # nothing is drawn
        (
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "suppress_tokens": [5]},
            "1",
            None,
        ),  # these are applied
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "typical_p": 1.0}, "1", None),
    ],
)
def test_checkpoint_that_asks_for_processors_is_refused_unless_they_are_ignored(
    statecache, checkpoint, tmp_path, config, temperature, named
):
    shutil.copytree(checkpoint, tmp_path / "model")
    Path(tmp_path, "model", "generation_config.json").write_text(json.dumps(config))
    for args in (
        ("generate", "Once", "-m", str(tmp_path / "model"), "-n", "2", "-q", "--temperature", temperature),
        (
            "generate",
            "Once",
            "-m",
            str(tmp_path / "model"),
            "-n",
            "2",
            "-q",
            "--temperature",
            temperature,
            "--lookup=2",
        ),
        ("chat", "-m", str(tmp_path / "model"), "-n", "2", "--temperature", temperature),
    ):
        code, out, err = statecache(*args)
        if named is None:
            assert code == 0
        else:
            assert (code, out) == (1, "")
            assert err == (
                f"statecache: the checkpoint's generation_config sets {named}, which statecache does not apply: write "
                "without with --ignore-processors\n"
            )
        assert statecache(*args, "--ignore-processors")[0] == 0


def test_every_field_that_changes_logits_is_known():
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    fields = set(re.findall(r"generation_config\.(\w+)", source))
    heeded = {"do_sample", "temperature", "top_k", "top_p", "min_p"}
    harmless = {
        "remove_invalid_values",
        "renormalize_logits",
        "num_beams",
        "num_return_sequences",
        "use_cache",
        "max_length",
    }
    assert fields - heeded - harmless - {"_eos_token_tensor"} == {*APPLIED, *REFUSED, *REFUSED_DRAWN}


def test_drafted_text_with_the_same_seed_is_the_same(statecache):
    def text(seed):
        args = ("generate", "Once", "-n", "16", "--temperature", "1", "--seed", seed, "--draft", "tiny", "--json")
        return json.loads(statecache(*args)[1])["text"]

    assert text("1") == text("1") != text("2")


def test_draft_model_of_other_words_is_one_line(statecache, checkpoint):
    code, out, err = statecache("generate", "Once", "--draft", checkpoint, "--quiet")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "give one with the same tokenizer" in err


def test_dtype_is_that_of_the_model_and_its_cache(statecache, checkpoint):
    def sizes(dtype):
        args = ("generate", "Once", "--model", checkpoint, "-n", "4", "--dtype", dtype, "--json")
        return json.loads(statecache(*args)[1])["bytes"]

    full, half = sizes("float32"), sizes("bfloat16")
    assert half["conv"] * 2 == full["conv"]
    assert half["recurrent"] == full["recurrent"]  # float32 or better, always


def test_embedded_model_is_the_default(statecache):
    code, out, _ = statecache("generate", "Once upon a time", "-n", "8", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["settings"]["model"] == "embedded"
    assert min(report["bytes"][kind] for kind in ("conv", "recurrent", "attention")) > 0


def test_text_comes_in_whole_characters(checkpoint, monkeypatch):
    loaded, pieces = load(Settings(checkpoint, device="cpu")), []
    tokens = loaded.tokenizer("a\N{LATIN SMALL LETTER E WITH ACUTE} \N{FOX FACE}<|end|>b").input_ids
    tokens += loaded.tokenizer("\N{FOX FACE}").input_ids[:2]

    class Stream(list, contextlib.AbstractContextManager):
        def __exit__(self, *_): ...

    def generate(*_, report, **__):
        report("the report of a run")
        return Stream([n] for n in tokens)

    monkeypatch.setattr(sc, "generate", generate)
    cache = sc.StateCache(loaded.model.config)
    written = write_on(loaded, loaded.tokenizer("Once").input_ids, cache, {}, Stop(), pieces.append, "Once")
    assert pieces == [
        *("Once", "a", "\N{LATIN SMALL LETTER E WITH ACUTE}", " ", "\N{FOX FACE}", "b", "\N{REPLACEMENT CHARACTER}")
    ]
    assert written.text == "".join(pieces[1:])
    assert written.tokens == tokens


def test_messages_and_a_system_message_reach_the_model(statecache, checkpoint, tmp_path):
    folder = tmp_path / "chat"
    save_checkpoint("qwen3_5", folder, TEMPLATE)
    talk = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Once"}]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    (tmp_path / "asks.json").write_text(json.dumps(talk[1:]))
    args = ("-m", str(folder), "-n", "6", "--temperature", "0", "--json")
    whole = "<|system|>Be kind<|end|><|user|>Once<|end|><|assistant|>"
    want = json.loads(statecache("generate", whole, *args)[1])
    for how in (
        ["--messages", str(tmp_path / "talk.json")],
        ["--messages", str(tmp_path / "asks.json"), "--system", "Be kind"],
        ["Once", "--system", "Be kind"],
    ):
        got = json.loads(statecache("generate", *how, *args)[1])
        assert got["prompt"] == talk
        assert (got["text"], got["tokens"]) == (want["text"], want["tokens"])
    assert statecache("generate", *how, *args[:-1], "-q")[1] == want["text"] + "\n"
    read = want["tokens"]["prompt"]
    assert f"0 tokens reused, {read} read" in statecache("chat", *args[:-1], "--system", "Be kind", stdin="Once")[2]
    for bad, told in (
        ("{", "this is no JSON"),
        ('{"role": "user"}', "give a JSON list such as"),
        ("[]", "give a JSON"),
    ):
        (tmp_path / "bad.json").write_text(bad)
        code, out, err = statecache("generate", "--messages", str(tmp_path / "bad.json"), *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"statecache: --messages: {told}")
    for command in (["chat"], ["generate", "Once"]):  # the embedded model knows no chat
        code, out, err = statecache(*command, "--system", "Be kind")
        assert (out, err.count("\n")) == ("", 1)
        assert code
        assert "chat template" in err


# ---- Ctrl-C


@pytest.mark.program
def test_ctrl_c_keeps_what_was_written(checkpoint):
    run = program("generate", "Once", "--model", checkpoint, "-n", "100000")
    assert run.stdout.read(8).startswith("Once")
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "new tokens" in err
    assert "Traceback" not in err
    assert out.endswith("\n")


@pytest.mark.program
def test_ctrl_c_keeps_what_was_drafted():
    run = program("generate", "Once", "-n", "100000", "--draft", "tiny", "--temperature", "0")
    assert run.stdout.read(8).startswith("Once")
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "tokens per forward pass" in err
    assert "Traceback" not in err
    assert out.endswith("\n")


@pytest.mark.program
def test_reader_that_leaves_is_no_error(checkpoint):
    reader, writer = os.pipe()
    run = program("generate", "Once", "--model", checkpoint, "-n", "2000", "--quiet", stdout=writer)
    os.close(writer)
    os.read(reader, 4)
    os.close(reader)
    assert run.communicate(timeout=60) == (None, "")
    assert run.returncode == 1


@pytest.mark.program
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("args", [["generate", "Once", "-n", "2", "-q"], ["inspect"], ["inspect", "--json"], ["-h"]])
def test_full_device_is_one_line(args):
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        run = program(*args, stdout=full, env=buffered)
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (1, "statecache: cannot go on: [Errno 28] No space left on device\n")


def test_second_ctrl_c_interrupts_at_once():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---- chat


def stepwise(talk: chat.Conversation, fed: list[int], written: list[int]) -> None:
    """Every written token is the argmax of one full forward over what came before it."""
    ids = torch.tensor([[*fed, *written]])
    model = sc.unprepare(talk.loaded.model)
    with torch.no_grad():
        best = model(ids, use_cache=False).logits[0].argmax(-1)
    assert best[len(fed) - 1 : -1].tolist() == written


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["story", "template"])
@pytest.mark.parametrize("family", ["qwen3_5", "mamba", "mamba2", "jamba", "bamba"])
def test_chat_never_reads_a_token_twice(tmp_path, family, template):
    settings = Settings(save_checkpoint(family, tmp_path, template), device="cpu")
    talk = chat.Conversation(load(settings), settings)
    options = {"max_new_tokens": 7}
    for turn, line in enumerate(("Once upon a time", "there was a fox", "and it ran")):
        held, before = talk.held(), list(talk.ids)
        assert held == max(len(before) - 1, 0)
        talk.say(line)
        assert talk.ids[:held] == before[:held], f"turn {turn} changes what the cache holds"
        fed = list(talk.ids)
        with Stop() as stop:
            written = talk.answer(options, stop)
        stepwise(talk, fed, written.tokens)
    assert talk.held() == len(talk.ids) - 1


def test_chat_goes_on_after_ctrl_c(checkpoint, monkeypatch):
    settings = Settings(checkpoint, device="cpu")
    talk = chat.Conversation(load(settings), settings)
    pieces = []

    def press_ctrl_c(text):
        pieces.append(text)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "show", press_ctrl_c)
    talk.say("Once upon a time")
    with Stop() as stop:
        written = talk.answer({"max_new_tokens": 500}, stop)
    assert stop.requested
    assert 3 <= len(written.tokens) < 500
    assert talk.held() == len(talk.ids) - 1
    talk.say("and then")
    fed = list(talk.ids)
    with Stop() as stop:
        stepwise(talk, fed, talk.answer({"max_new_tokens": 5}, stop).tokens)


def test_chat_goes_on_after_an_interrupt_within_a_forward(checkpoint, monkeypatch):
    settings = Settings(checkpoint, device="cpu")
    talk = chat.Conversation(load(settings), settings)

    def interrupt(*_):
        raise KeyboardInterrupt

    talk.say("Once")
    with Stop() as stop, monkeypatch.context() as patch:
        patch.setattr(chat, "show", interrupt)
        assert talk.answer({"max_new_tokens": 5}, stop) is None
    assert talk.held() == 0
    talk.say("upon")
    fed = list(talk.ids)
    with Stop() as stop:
        stepwise(talk, fed, talk.answer({"max_new_tokens": 5}, stop).tokens)


def test_chat_command_reports_reuse_and_obeys(statecache, checkpoint):
    lines = "Once\nupon\n/stats\n/what\n/reset\na time\n/exit\nnever read\n"
    code, out, err = statecache(
        "chat", "--model", checkpoint, "-n", "6", "--temperature", "0", "--seed", "1", stdin=lines
    )
    assert code == 0
    assert "0 tokens reused, 4 read, 6 written" in err
    assert "9 tokens reused, 6 read, 6 written" in err  # 4 + 6 - 1, then the one left over and " upon"
    assert "tokens in the cache" in err
    assert "No command /what: /undo takes" in err
    assert "0 tokens reused, 6 read, 6 written" in err
    assert "never" not in err + out


@pytest.mark.parametrize("how", [{}, {"lookup": 2}], ids=["plain", "lookup"])
def test_chat_takes_turns_back_and_keeps_copies(checkpoint, how):
    settings = Settings(checkpoint, device="cpu", **how)
    talk, kept = chat.Conversation(load(settings), settings), []
    options = {"max_new_tokens": 7, **how}

    def turn(talk: chat.Conversation, line: str) -> list[int]:
        talk.say(line)
        fed = list(talk.ids)
        with Stop() as stop:
            written = talk.answer(options, stop)
        stepwise(talk, fed, written.tokens)
        assert talk.held() == len(talk.ids) - 1
        return talk.ids

    first = list(turn(talk, "Once upon a time"))
    kept.append(talk.fork())
    second = list(turn(talk, "there was a fox"))
    assert talk.undo() == "there was a fox"
    assert (talk.ids, talk.held()) == (first, len(first) - 1)
    assert turn(talk, "it ran") != second
    assert turn(kept[0], "there was a fox") == second
    assert [talk.undo(), talk.undo(), talk.turns, talk.ids, talk.held()] == ["it ran", "Once upon a time", [], [], 0]
    assert turn(talk, "Once upon a time") == first
    assert kept[0].undo() == "there was a fox"
    assert not kept[0].turns  # what came before the copy stays


def test_chat_takes_a_turn_back_after_an_interrupt(checkpoint, monkeypatch):
    settings = Settings(checkpoint, device="cpu")
    talk = chat.Conversation(load(settings), settings)
    talk.say("Once")
    with Stop() as stop:
        talk.answer({"max_new_tokens": 5}, stop)
    ids = list(talk.ids)
    talk.say("upon")
    with Stop() as stop, monkeypatch.context() as patch:
        patch.setattr(chat, "show", lambda *_: signal.raise_signal(signal.SIGINT) or signal.raise_signal(signal.SIGINT))
        assert talk.answer({"max_new_tokens": 5}, stop) is None
    assert (talk.undo(), talk.ids, talk.held()) == ("upon", ids, len(ids) - 1)
    talk.say("a time")
    fed = list(talk.ids)
    with Stop() as stop:
        stepwise(talk, fed, talk.answer({"max_new_tokens": 5}, stop).tokens)


def test_chat_command_undoes_and_returns(statecache, checkpoint):
    lines = "/undo\n/back\nOnce\n/fork\nupon\n/undo\n/retry\n/undo\n/retry\n/back\n/stats\n/undo\n"
    args = ("chat", "-m", checkpoint, "-n", "6", "--temperature", "0", "--lookup", "2")
    code, out, err = statecache(*args, stdin=lines)
    assert code == 0
    told = [line for line in err.splitlines() if line and line[0].isalnum()]
    assert [line.partition(";")[0].partition(", 6 written")[0] for line in told] == [
        "There is no turn to take back.",
        "There is no copy: /fork keeps one.",
        "0 tokens reused, 4 read",
        "Kept: 10 tokens",
        "9 tokens reused, 6 read",
        "Taken back: upon",
        "0 tokens reused, 4 read",
        "Taken back: Once",
        "There is no turn to take back.",
        "Back at 10 tokens.",
        "There is no turn to take back.",
    ]
    once = statecache("generate", "Once", *args[1:], "-q")[1].removeprefix("Once")
    assert out.startswith(once)
    assert out.endswith(once)


def test_demo_writes_a_story_and_measures_what_was_saved(statecache):
    code, out, err = statecache("demo", "-n", "40", "--seed", "1")
    assert code == 0
    assert out == statecache("generate", "Once upon a time", "-n", "40", "--seed", "1", "-q")[1]
    cells = dict(re.findall(r"\u2502 (\S.*?) +\u2502 +(\S.*?) \u2502", err))
    assert (cells["prompt tokens"], cells["new tokens"], cells["seed"]) == ("4", "40", "1")
    for name in ("prompt tokens per second", "new tokens per second", "tokens per forward pass"):
        assert float(cells[name]) >= 1
    assert {"40 tokens, likeliest each", "the same text, --lookup 3", "recurrent state", "all states"} <= cells.keys()
    assert cells["second turn: tokens reused"] == "43 of 47"
    assert all(cells[name].endswith(" ms") for name in ("first token after", "without the cache"))


# ---- bench

SHORT = ("--prompt-tokens", "12", "-n", "4", "--repeats", "3")


def test_bench_measures_three_caches_on_the_same_tokens(statecache, checkpoint):
    code, out, err = statecache("bench", "-m", checkpoint, *SHORT, "--rows", "2", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["settings"] == {"prompt_tokens": 12, "new_tokens": 4, "rows": 2, "rounds": 3}
    assert report["versions"]["transformers"] == transformers.__version__
    own, plain, prepared = report["caches"]
    assert [x["cache"] for x in report["caches"]] == ["transformers' own", "StateCache", "StateCache, prepared"]
    for part, tokens in (("prefill", 24), ("decode", 8)):
        assert own[part]["beside"] is None
        for told in (plain, prepared):
            seconds, beside = told[part]["seconds"], told[part]["beside"]
            assert told[part]["tokens_per_second"] == pytest.approx(tokens / sorted(seconds)[1], rel=1e-2)
            ratios = sorted(a / b for a, b in zip(seconds, own[part]["seconds"], strict=True))
            assert beside["median"] == pytest.approx(ratios[1], rel=1e-2)
            assert beside["low"] == pytest.approx((ratios[0] + ratios[1]) / 2, rel=1e-2)
            assert beside["noise"] == (beside["low"] <= 1 <= beside["high"])
    model = load_model(Settings(checkpoint, device="cpu"))
    cache = sc.StateCache(model.config)
    model(torch.ones(2, 12, dtype=torch.long), **{FUNCTIONS_TAKE: cache})
    assert plain["bytes"] == prepared["bytes"] == cache.nbytes().total
    assert own["bytes"] > 0


def test_bench_table_says_what_is_noise(statecache):
    code, out, _ = statecache("bench", *SHORT)
    assert code == 0
    assert "1 row of 12 tokens at once and 4 one by one, medians of 3 rounds:" in out
    rows = [line for line in out.splitlines() if re.match(r"transformers' own |StateCache", line)]
    assert len(rows) == 3
    assert all(re.search(r" ~?\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\) .* ~?\d+\.\d\d \(", row) for row in rows[1:])
    assert "~: the middle half of the rounds lies on both sides of 1, which is noise." in " ".join(out.split())


@pytest.mark.parametrize(
    ("ours", "noise"), [([0.8, 1.2, 0.9, 1.1], True), ([1.2, 1.3, 1.2, 0.9], False), ([0.5, 0.6, 0.9, 1.1], False)]
)
def test_ratio_is_noise_where_the_middle_half_has_one(ours, noise):
    found = ratio(ours, [1.0] * 4)
    assert found.noise == noise
    assert found.low <= found.median <= found.high


def test_bench_says_why_a_cache_has_no_figures(statecache, checkpoint, tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=259, n_layer=1, n_head=2, hidden_size=8)).save_pretrained(
        tmp_path / "bloom"
    )
    code, out, _ = statecache("bench", "-m", str(tmp_path / "bloom"), *SHORT)
    assert code == 0
    assert re.search(r"^StateCache, prepared( +-){5}", out, re.MULTILINE)
    assert 'StateCache, prepared: layer 0 ("full_attention") is a BloomBlock' in out
    save_checkpoint("minimax", tmp_path / "minimax")
    _, out, _ = statecache("bench", "-m", str(tmp_path / "minimax"), *SHORT, "--json")
    own, plain, prepared = json.loads(out)["caches"]
    assert "is not compatible with" in plain["why"]
    assert "decode" not in plain
    assert own["why"] is prepared["why"] is None
    assert prepared["decode"]["tokens_per_second"] > 0


def test_bench_of_a_model_that_takes_no_such_prompt_is_one_line(statecache, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_layer=1, n_head=2, n_embd=8, n_positions=4)).save_pretrained(tmp_path)
    code, out, err = statecache("bench", "-m", str(tmp_path), *SHORT)
    assert (code, out) == (1, "")
    assert err == "statecache: this model runs with no cache at all: index out of range in self\n"


def test_bench_leaves_the_model_as_it_was(checkpoint):
    model = load_model(Settings(checkpoint, device="cpu"))
    before = model(torch.ones(1, 3, dtype=torch.long)).logits
    timings = measure(model, torch.ones(1, 9, dtype=torch.long), 2, 3)
    assert [(len(x.prefill), len(x.decode), x.why) for x in timings] == [(3, 3, None)] * 3
    assert not is_prepared(model)
    assert torch.equal(model(torch.ones(1, 3, dtype=torch.long)).logits, before)


def test_stop_and_top_k_reach_the_model(statecache):
    args = ("generate", "Once upon a time", "-n", "20", "--temperature", "0", "--json")
    free = json.loads(statecache(*args)[1])["text"]
    for how in ([], ["--lookup", "2"]):
        report = json.loads(statecache(*args, "--stop", "zebra", "--stop", free[9:13], *how)[1])
        assert report["text"] == free[: free.index(free[9:13]) + 4]
        assert report["finish_reason"] == "stop"
    drawn = ("generate", "Once upon a time", "-n", "20", "--seed", "1", "--json", "--top-k")
    assert json.loads(statecache(*drawn, "1")[1])["text"] == free
    assert json.loads(statecache(*drawn, "3")[1])["settings"]["top_k"] == 3


@pytest.mark.program
def test_package_runs_as_a_module_and_completes():
    run = [sys.executable, "-m", "statecache"]
    out = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout
    assert out == "statecache 0.1.0\n"
    asked = {**os.environ, "_STATECACHE_COMPLETE": "complete_bash", "COMP_WORDS": "statecache gen", "COMP_CWORD": "1"}
    out = subprocess.run(run, capture_output=True, text=True, check=False, env=asked).stdout
    assert "generate" in out.split()


# ---- inspect


def test_inspect_shows_a_saved_cache(statecache, tmp_path):
    model, file = families.build("lfm2")[0], str(tmp_path / "c")
    cache = sc.StateCache(model.config)
    with torch.no_grad():
        model(torch.ones(2, 5, dtype=torch.long), **{families.cache_arg(model): cache})
    cache.save(file)
    code, out, _ = statecache("inspect", file, "--json")
    said = json.loads(out)
    assert (code, said["model_type"], said["weights"]) == (0, "lfm2", None)
    assert [row["length"] for row in said["rows"]] == [5, 5]
    keys, inputs = 2 * 5 * 2 * 2 * 32 * 4, 2 * 2 * 64 * 2 * 4  # rows, tokens, key and value, heads, ...
    assert said["bytes"]["total"] == keys + inputs
    assert "unverified" in statecache("inspect", file)[1]
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-1])
    code, out, err = statecache("inspect", file)
    assert (code, out) == (1, "") and "damaged" in err
    assert statecache("inspect", file, "--model", "x")[0] == 2
    code, out, err = statecache("inspect", str(tmp_path))
    assert (code, out) == (2, "") and f"--model {tmp_path}" in err.replace("\n", "")


def test_inspect_shows_every_layer_and_the_total(statecache, checkpoint):
    code, out, err = statecache("inspect", "--model", checkpoint, "--length", "100", "--rows", "2")
    assert (code, err) == (0, "")
    for word in ("linear_attention", "full_attention", "recurrent", "key", "per token", "2 rows of 100 tokens"):
        assert word in out


def test_inspect_shows_equal_layers_once(statecache, checkpoint):
    first = [line.partition("  ")[0] for line in statecache("inspect")[1].splitlines()]
    assert [cell.split(" l")[0].split(" f")[0] for cell in first if "(" in cell] == ["0-2, 4-6 (6)", "3, 7 (2)"]
    out = statecache("inspect", "--model", checkpoint)[1]
    assert out.index("0, 2 (2) linear_attention") < out.index("1, 3 (2) full_attention")
    assert out.count("recurrent ") == 2  # of the layers, and of the bytes


def test_inspect_needs_no_weights_and_agrees_with_the_cache(statecache, checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes(Path(checkpoint, "config.json").read_bytes())
    code, out, _ = statecache("inspect", "--model", str(tmp_path), "--length", "16", "--dtype", "float32", "--json")
    report = json.loads(out)
    assert code == 0
    assert [x["kind"] for x in report["layers"]] == ["linear_attention", "full_attention"] * 2
    fixed = sum(s["bytes_per_row"] for x in report["layers"] for s in x["states"])
    per_token = sum(s["bytes_per_token"] for x in report["layers"] for s in x["states"])
    sizes = report["bytes"]
    assert fixed == sizes["conv"] + sizes["recurrent"]
    assert per_token * 16 == sizes["attention"] + sizes["sliding"]
    _, out, _ = statecache("generate", "Once", "--model", checkpoint, "-n", "4", "--json")
    allocated = json.loads(out)["bytes"]
    assert {k: sizes[k] for k in ("conv", "recurrent")} == {k: allocated[k] for k in ("conv", "recurrent")}


def test_inspect_says_what_it_cannot_know(statecache, checkpoint, tmp_path):
    config = json.loads(Path(checkpoint, "config.json").read_text()) | {"model_type": "qwen2_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = statecache("inspect", "--model", str(tmp_path))
    assert code == 0
    assert "unknown until the model first writes them" in " ".join(out.split())
    _, out, _ = statecache("inspect", "--model", str(tmp_path), "--json")
    assert json.loads(out)["bytes"] is None


def test_inspect_knows_the_embedded_model(statecache):
    code, out, _ = statecache("inspect", "--json")
    report = json.loads(out)
    assert code == 0
    assert {s["kind"] for x in report["layers"] for s in x["states"]} >= {"conv", "recurrent", "attention"}


# ---- plan


@pytest.mark.parametrize("where", ["folder", "file"])
def test_plan_is_what_a_cache_takes(statecache, checkpoint, where):
    model = checkpoint if where == "folder" else str(Path(checkpoint, "config.json"))
    args = ("--rows", "2", "--capacity", "40", "--slack", "3", "--dtype", "float32", "--store", "int8")
    code, out, err = statecache("plan", model, *args, "--checkpoints", "2", "--weights", "--budget", "1GB", "--json")
    assert (code, err) == (0, "")
    said, config = json.loads(out), transformers.AutoConfig.from_pretrained(checkpoint)
    options = {"rows": 2, "capacity": 40, "slack": 3, "dtype": "float32", "store": "int8"}
    cache = sc.StateCache(config, device="cpu", **options)
    assert said["bytes"] == {**cache.nbytes().by_kind, "total": cache.nbytes().total}
    assert said["bytes_per_checkpoint"] == cache.checkpoint().nbytes
    kept = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    assert said["weights"] == sum(t.nbytes for t in [*kept.parameters(), *kept.buffers()])
    assert said["total"] == said["bytes"]["total"] + 2 * said["bytes_per_checkpoint"] + said["weights"]
    assert said["fits"] and said["budget"] == 10**9


def test_plan_finds_what_fits(statecache):
    code, out, _ = statecache("plan", "--rows", "8", "--budget", "1GiB", "--json")
    widest = json.loads(out)
    assert code == 0 and widest["rows"] == 8
    assert 2**30 - 8 * widest["bytes_per_token"]["total"] < widest["total"] <= 2**30
    most = json.loads(statecache("plan", "--capacity", "4096", "--budget", "1GiB", "--json")[1])
    assert 2**30 - most["bytes_per_row"]["total"] < most["total"] <= 2**30
    assert most["capacity"] == 4096


def test_plan_shows_a_table(statecache):
    code, out, err = statecache(
        "plan", "--rows", "3", "--length", "2048", "--checkpoints", "1", "--weights", "--budget", "20MiB"
    )
    assert (code, err) == (1, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:2] == ["qwen3_5_text, bfloat16: 3 rows grown to 2,048 tokens", "all rows a row a token"]
    assert lines[2].startswith("attention state 7.5 MiB 2.5 MiB 1.0 KiB")
    assert lines[-1].startswith("It does not fit: ")
    assert max(map(len, out.splitlines())) <= 80
    assert "A checkpoint of all rows would take" in statecache("plan")[1]


def test_plan_of_what_does_not_grow_says_so(statecache, tmp_path):
    transformers.Mamba2Config().save_pretrained(tmp_path)
    assert "1 row of any length" in statecache("plan", str(tmp_path), "--budget", "1GiB")[1]
    assert json.loads(statecache("plan", str(tmp_path), "--budget", "1GiB", "--json")[1])["capacity"] is None


def test_plan_says_which_shapes_nobody_knows(statecache, tmp_path):
    BloomConfig().save_pretrained(tmp_path)
    code, out, err = statecache("plan", str(tmp_path))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "layer 0 of bloom" in err and "does not know the shapes" in err


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plan_draws_what_it_says(statecache, checkpoint, tmp_path, suffix):
    file = tmp_path / f"plan.{suffix}"
    code, out, _ = statecache("plan", checkpoint, "--capacity", "4096", "--slack", "2", "--plot", str(file))
    assert code == 0 and f"drawn: {file}" in out
    assert file.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_a_curve_is_what_caches_take(checkpoint):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    options = {"rows": 2, "capacity": 1000, "slack": 2, "dtype": "float32", "store": "paged"}
    lengths, ours, alone = curves(config, sc.plan(config, **options), options)
    assert lengths == [256, 512, 1000]
    kept = {**options, "device": "cpu"}
    assert ours == [sc.StateCache(config, **{**kept, "capacity": n}).nbytes().total for n in lengths]
    # four layers with two heads of 16 for keys and for values, and lengths of the rows
    assert [n - 2 * 4 * 2 * 2 * 16 * 4 * of for n, of in zip(alone, lengths, strict=True)] == [66] * 3


def test_without_a_plotting_library_plan_says_what_to_install(statecache, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = statecache("plan", "--plot", str(tmp_path / "x.svg"))
    assert (code, out, err) == (
        1,
        "",
        "statecache: --plot needs matplotlib: pip install 'statecache[plot]', or leave it out\n",
    )
