"""A CPU's step compiled ahead of time: what its code is good for, that it is never waited for, and that it is right."""

from __future__ import annotations

import copy
import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._inductor import config as inductor
from transformers.utils.output_capturing import OutputRecorder

import statecache as sc
from statecache.decode import compiled
from statecache.decode.capturing import fixed_cache
from statecache.decode.compiled import compiles, inputs, load_code, name_of
from statecache.decode.compiling import FEW, Sums, _write_early, compile_step
from statecache.decode.feed import advance
from statecache.models.cache import StateCache
from statecache.models.decoder import decoder_of, layers_of
from statecache.models.parts import collects
from statecache.models.table import model_spec

SHAPE: dict[str, Any] = {"rows": 2, "capacity": 512, "slack": 1, "back": False}
IDS = torch.tensor([[5, 9, 33, 70], [8, 8, 90, 3]])
PATIENCE = 240  # seconds


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for code, of which nothing is known in this process yet."""
    monkeypatch.setenv(compiled.FOLDER, str(tmp_path))
    for known in ("_spent", "_ordered", "_waiting", "_right"):
        monkeypatch.setattr(compiled, known, type(getattr(compiled, known))())
    return tmp_path


def model_of(name: str = "qwen3_5", **options: Any) -> Any:
    return sc.prepare(families.build(name, **options)[0])


def filled(model: Any, **options: Any) -> StateCache:
    cache = StateCache(model.config, dtype=torch.float32, device="cpu", **{**SHAPE, **options})
    advance(model, cache, IDS, None)
    return cache


def at_once(patched: pytest.MonkeyPatch) -> None:
    """Have code made from the first plain step on."""
    patched.setattr(compiled, "WORTH", 0.0)
    patched.setattr(compiled, "AFTER", 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Code for `model_of()`, by a process of its own, which `generate` has started."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(compiled.FOLDER, str(folder))
        at_once(patched)
        patched.setattr(compiled, "_ordered", set())
        model, reports = model_of(), list[sc.Report]()
        sc.generate(model, IDS, max_new_tokens=40, report=reports.append)
        assert compiled.being_made() and reports[0].compiled == 0
        start = time.monotonic()
        while compiled.being_made():
            assert time.monotonic() - start < PATIENCE, "nothing was compiled"
            time.sleep(0.2)
        assert not list(folder.glob("*.why")), next(folder.glob("*.why")).read_text()
        (file,) = folder.glob("*.pt2")
        return file.read_bytes()


def put(code: Path, made: bytes, model: Any) -> Path:
    """The code where a decoder of this model and of `SHAPE` looks for it."""
    file = code / f"{name_of(model, filled(model))}.pt2"
    file.write_bytes(made)
    return file


# ---- what it does


@pytest.mark.parametrize("how", [{}, {"temperature": 0.9, "top_k": 20, "seed": 5}], ids=["greedy", "drawn"])
def test_generate_takes_the_code_that_is_there_and_writes_the_same(
    code: Path, made: bytes, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, reports = model_of(), list[sc.Report]()
    put(code, made, model)
    got = sc.generate(model, IDS, max_new_tokens=60, report=reports.append, **how)
    assert reports[0].compiled == 59
    monkeypatch.setenv(compiled.FOLDER, "")
    want = sc.generate(model, IDS, max_new_tokens=60, report=reports.append, **how)
    assert reports[1].compiled == 0
    assert torch.equal(got, want)


def test_a_text_switches_over_when_its_code_has_come(code: Path, made: bytes) -> None:
    model = model_of()
    with sc.Decoder(model, filled(model)) as decoder:
        decoder.reset([0, 1])
        decoder.prefill(IDS)
        got = [decoder.step().clone() for _ in range(10)]
        assert (decoder.counts.plain, decoder.counts.compiled) == (10, 0)
        put(code, made, model)
        got += [decoder.step().clone() for _ in range(10)]
        assert (decoder.counts.plain, decoder.counts.compiled) == (10, 10)
    want = sc.generate(model, IDS, max_new_tokens=21)[:, 5:]
    assert torch.equal(torch.stack(got, 1), want)


def test_rows_come_and_go_and_the_cache_is_as_after_plain_steps(code: Path, made: bytes) -> None:
    model = model_of()
    put(code, made, model)
    lengths, logits = [], []
    for plain in (False, True):
        with sc.Decoder(model, filled(model)) as decoder:
            if plain:
                decoder._ahead._folder = None
            decoder.reset([0, 1])
            decoder.prefill([[3, 4, 5]], [1])
            for _ in range(3):
                decoder.step()
            decoder.prefill([[9, 8, 7, 6, 5]], [0])
            for _ in range(4):
                decoder.step()
            decoder.leave([1])
            decoder.step()
            assert decoder.counts.compiled == (0 if plain else 8)
        mark = decoder.cache.checkpoint()
        lengths.append(decoder.cache.lengths.tolist())
        first = advance(model, decoder.cache, IDS[:, :2], None)
        decoder.cache.restore(mark)
        assert torch.equal(advance(model, decoder.cache, IDS[:, :2], None), first)
        logits.append(first)
    assert lengths == [[10, 10], [10, 10]]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


# ---- what it is good for


def rebuilt(change: Callable[[Any], object]) -> Any:
    model = model_of()
    change(model)
    return model


class Wrapped(nn.Linear):
    """A linear layer of another class."""


def wrap(model: Any) -> None:
    layer = model.model.layers[0].mlp
    own = layer.up_proj
    layer.up_proj = Wrapped(own.in_features, own.out_features, bias=False)


def nearer(model: Any) -> None:
    model.model.layers[0].input_layernorm.eps = 1.0


def test_the_name_is_of_the_structure_and_not_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = model_of(), model_of()
    for parameter in other.parameters():
        parameter.mul_(2)
    other.config._name_or_path = "elsewhere"
    want = name_of(model, filled(model))
    assert name_of(other, filled(other)) == want
    for different in (rebuilt(wrap), rebuilt(nearer), model_of(intermediate_size=40), model_of("mamba2")):
        assert name_of(different, filled(different)) != want
    for options in ({"capacity": 640}, {"slack": 2}, {"rows": 2, "back": True}):
        assert name_of(model, filled(model, **options)) != want
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert name_of(model, filled(model)) != want


def hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def swap(model: Any) -> None:
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: x


@pytest.mark.parametrize("change", [hook, swap, lambda model: model.to(torch.bfloat16)], ids=["hook", "own", "half"])
def test_what_cannot_be_known_is_not_compiled(change: Callable[[Any], object]) -> None:
    assert compiles(model_of())
    assert not compiles(rebuilt(change))


def test_a_call_that_asked_for_hidden_states_changes_nothing() -> None:
    model = model_of()
    want = name_of(model, filled(model))
    assert model(IDS, output_hidden_states=True).hidden_states
    assert any(module._forward_hooks for module in model.modules()), "what transformers leaves there"
    assert compiles(model) and name_of(model, filled(model)) == want
    assert not collects(OutputRecorder(nn.Linear)), "which is no hook"
    packed = io.BytesIO()
    compiled.Hollow(packed).dump(model)
    again = pickle.loads(packed.getvalue())
    assert advance(again, StateCache(again.config), IDS, None).shape == (*IDS.shape, 101)


def test_an_empty_folder_name_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert compiles(model) and fixed_cache(model, 1, 10, 40) is not None
    monkeypatch.setenv(compiled.FOLDER, "")
    assert not compiles(model) and fixed_cache(model, 1, 10, 40) is None


def test_capacities_are_few() -> None:
    model = model_of()
    caches = [fixed_cache(model, 1, longest, 40) for longest in (1, 400, 480, 2100, 5000)]
    assert [cache and cache.capacity for cache in caches] == [512, 512, 1024, 2560, 5120]
    assert fixed_cache(model, 1, 10, 31) is None and fixed_cache(model, 9, 10, 40) is None


# ---- what goes wrong


def write(model: Any) -> tuple[Tensor, int]:
    reports = list[sc.Report]()
    out = sc.generate(model, IDS, max_new_tokens=40, report=reports.append)
    return out, reports[0].compiled


def test_code_of_another_model_is_found_out(code: Path, made: bytes) -> None:
    model = rebuilt(nearer)
    file = put(code, made, model)
    with pytest.warns(UserWarning, match=f"{file.name}: its logits are not those of the plain step"):
        got, taken = write(model)
    assert taken == 0
    file.unlink()
    assert torch.equal(got, write(model)[0])


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"x" * len(data)])
def test_damaged_code_is_not_used(code: Path, made: bytes, damage: Callable[[bytes], bytes]) -> None:
    model = model_of()
    put(code, damage(made), model)
    with pytest.warns(UserWarning, match="a compiled step is not used"):
        _, taken = write(model)
    assert taken == 0


def test_what_failed_is_not_tried_again(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[Path]()
    at_once(monkeypatch)
    monkeypatch.setattr(compiled, "_process", lambda file, packed: started.append(file))
    model = model_of()
    model.mine = lambda: None  # a process cannot be sent this
    write(model)
    (why,) = code.iterdir()
    assert why.suffix == ".why" and "cannot be pickled" in why.read_text()
    compiled._ordered.clear()
    write(model)
    assert not started


def test_a_short_text_has_its_code_made_when_the_process_ends(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[Path]()
    monkeypatch.setattr(compiled, "WORTH", 0.0)
    monkeypatch.setattr(compiled, "_process", lambda file, packed: started.append(file) or SimpleNamespace(pid=1))
    model = model_of()
    write(model)
    assert compiled.being_made() and not started
    compiled._start_all()
    compiled._start_all()
    assert started == [code / f"{name_of(model, filled(model))}.pt2"]


def test_a_compiler_that_died_leaves_a_note(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    model = model_of()
    name = name_of(model, filled(model))
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    (code / f"{name}.lock").write_text(str(gone))
    write(model)
    assert [file.name for file in code.iterdir()] == [f"{name}.why"]


def test_a_folder_that_cannot_be_written_is_nobodys_trouble(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code / "file").write_text("")
    monkeypatch.setenv(compiled.FOLDER, str(code / "file" / "below"))
    at_once(monkeypatch)
    assert write(model_of())[1] == 0


def test_nobodys_home_and_a_class_of_a_notebook_are_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    with monkeypatch.context() as patched:
        patched.delenv(compiled.FOLDER)
        patched.delenv("XDG_CACHE_HOME", raising=False)

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        patched.setattr(Path, "home", homeless)
        assert not compiles(model) and write(model)[1] == 0
    monkeypatch.setattr(type(model), "__module__", "__main__.cell")
    assert not compiles(model)


def test_a_folder_that_is_closed_is_nobodys_trouble(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(file: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(file))

    model, own = model_of(), Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda file: closed(file) if code in file.parents else own(file))
    at_once(monkeypatch)
    monkeypatch.setattr(compiled, "_process", lambda file, packed: closed(file))
    assert write(model)[1] == 0


# ---- all families

# The layers of a family that are compiled: fewer, with all states and modules that it has. A family that is not here
# is as it is, since some of its layers run several times, or read what blocks of layers gave.
KEPT: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "falcon_h1", "granitemoehybrid"), (0, 1)),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "bailing_hybrid"), (0, 1)),
    **dict.fromkeys(("lfm2", "lfm2_moe", "zaya", "inkling", "inkling+scaled", "minimax", "minimax+full0"), (0, 1)),
    **dict.fromkeys(("recurrent_gemma", "glm5_next"), (0, 1, 2)),
    **dict.fromkeys(("lara_mini", "lfm3"), (0, 1, 3)),
    **dict.fromkeys(("zamba", "zamba2", "zamba2+clamp"), (0, 2, 4)),  # two that share weights
    **dict.fromkeys(("nemotron_h", "nemotron_h+clamp"), (0, 1, 2, 4)),
    "bailing_hybrid+unbounded": (0, 1),
    "qwen4_exp": (0, 1, 4),  # the first and the last have n-grams
}


def short(name: str) -> tuple[Any, Any]:
    """A model of some layers of a family, and of all of them."""
    whole, kept = families.build(name)[0], KEPT.get(name)
    if kept is None:
        again = {"loop_num_passes": 2} if name == "inkling2_loop" else {}  # the third is as the second
        return families.build(name, **again)[0], whole
    layers = whole.config.get_text_config(decoder=True).num_hidden_layers
    given = families.FAMILIES[name]["kwargs"]
    text = given.get("text_config", given)
    cut = {key: [value[n] for n in kept] for key, value in text.items() if key.endswith(("_types", "_block_type"))}
    assert all(len(text[key]) == layers for key in cut)
    for key, first in (("attn_layer_indices", 0), ("ple_layer_ids", 1)):
        if key in text:
            cut[key] = [kept.index(n - first) + first for n in text[key] if n - first in kept]
    if "num_hidden_layers" in text:
        cut["num_hidden_layers"] = len(kept)
    return families.build(name, **({"text_config": {**text, **cut}} if text is not given else cut))[0], whole


def parts(model: Any) -> set[Any]:
    """The kinds of its layers, the states that these have, and the classes of all modules."""
    found: set[Any] = {type(module) for module in model.modules()}
    for layer in model_spec(model.config).layers:
        found |= {layer.kind, *layer.states, *layer.log}
    return found


@pytest.mark.parametrize("name", [name for name in KEPT if name in families.FAMILIES])
def test_the_layers_that_are_compiled_have_all_that_a_family_has(name: str) -> None:
    model, whole = short(name)
    assert len(layers_of(decoder_of(model))) < len(layers_of(decoder_of(whole)))
    assert parts(model) == parts(whole)


def llama() -> Any:
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


def every_family() -> list[Any]:
    """By name; another configuration of a family, as "zamba2+clamp", is for `make check-long`."""
    return [pytest.param(name, marks=pytest.mark.long) if "+" in name else name for name in families.FAMILIES]


@pytest.mark.parametrize("name", [*every_family(), "llama"])
def test_rows_that_differ_and_wait_step_by_code_as_plainly(name: str, code: Path) -> None:
    model = sc.prepare(llama() if name == "llama" else short(name)[0])
    shape = {"rows": 3, "capacity": 32, "slack": 1, "back": False}
    file, draw = code / "step.pt2", torch.Generator().manual_seed(1)
    # the same code, but what calls its kernels is not optimised: g++ then takes half as long
    with inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        compile_step(copy.deepcopy(model), shape, file)
    caches = [StateCache(model.config, dtype=torch.float32, device="cpu", **shape) for _ in range(2)]
    prompt = torch.randint(1, 90, (3, 7), generator=draw)
    for cache in caches:
        advance(model, cache, prompt, [7, 3, 5])
    step, held = compiled.load_code(file), inputs(model, caches[1])
    for _ in range(12):
        ids, count = torch.randint(1, 90, (3, 1), generator=draw), torch.randint(0, 2, (3,), generator=draw)
        caches[0].expect(count)
        want = advance(model, caches[0], ids, None)[:, -1]
        got = step.run([*held, ids, count])[0]
        caches[1].states.moved()
        takes = count > 0
        if takes.any():
            assert (got - want)[takes].abs().max() / want.abs().max() < 1e-5
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()


def traced(*steps: str) -> list[str]:
    """The nodes of a graph of a and b, with these in it, after its writes have moved."""
    graph, aten = torch.fx.Graph(), torch.ops.aten
    nodes: dict[str, Any] = {name: graph.placeholder(name) for name in "ab"}
    for step in steps:
        name, form, *given = step.split()
        made = {"add": aten.add.Tensor, "view": aten.t.default, "copy": aten.copy_.default}[form]
        nodes[name] = graph.call_function(made, tuple(nodes[each] for each in given))
        nodes[name].name = name
    graph.output(nodes["out"])
    _write_early(graph)
    graph.lint()
    return [node.name for node in graph.nodes]


def test_writes_follow_the_last_reader() -> None:
    assert traced("n add a b", "m add a n", "out add b m", "w copy a n") == ["a", "b", "n", "m", "w", "out", "output"]
    # a view is a reader, and so is what reads it
    assert traced("v view a", "n add a b", "m add v n", "out add b b", "w copy a n")[4:6] == ["m", "w"]
    # never read
    assert traced("n add b b", "out add b n", "w copy a n") == ["a", "b", "n", "w", "out", "output"]
    # one write reads what another writes
    order = traced("n add b b", "m add b n", "out add n m", "w copy a b", "x copy b n")
    assert order == ["a", "b", "w", "n", "m", "x", "out", "output"]
    # a view goes out
    assert traced("n add a b", "out view a", "w copy a n") == ["a", "b", "n", "out", "w", "output"]


@pytest.mark.parametrize(("name", "rows"), [("qwen3_5", 1), ("mamba", 1), ("mamba2", FEW)])
def test_few_rows_step_by_sums_as_plainly(name: str, rows: int, code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, summed = sc.prepare(short(name)[0]), []
    own = Sums._linear
    monkeypatch.setattr(Sums, "_linear", lambda _, *given: (summed.append(len(given)), own(*given))[1])
    shape = {"rows": rows, "capacity": 32, "slack": 1, "back": False}
    compile_step(copy.deepcopy(model), shape, code / "few.pt2")
    assert len(summed) >= sum(isinstance(module, nn.Linear) for module in model.modules())
    run = load_code(code / "few.pt2")
    caches = [StateCache(model.config, dtype=torch.float32, device="cpu", **shape) for _ in range(2)]
    for cache in caches:
        advance(model, cache, IDS[:1].repeat(rows, 1), None)
    for token in (3, 9, 27):
        ids, count = token + torch.arange(rows)[:, None], torch.ones(rows, dtype=torch.long)
        want = advance(model, caches[0], ids, None)[:, -1]
        got = run.run([*inputs(model, caches[1]), ids, count])[0]
        assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
