"""What a StateCache answers, refuses and keeps in place, inside unmodified models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import torch._dynamo.testing
import transformers
from tiny_models import renamed
from transformers import Cache

import statecache as sc
from declared_bytes import declared_bytes
from statecache import errors, lease
from statecache.models.table import KINDS, model_spec
from statecache.storage import store

NAMES = [name for name in families.FAMILIES if "+" not in name and name not in ("minimax", "recurrent_gemma")]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


SHALLOW: dict[str, dict[str, Any]] = {  # every kind of layer once: compiling takes its time
    "mamba2": {"num_hidden_layers": 2},
    "falcon_h1": {"num_hidden_layers": 2},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}


def build(name: str, **overrides: Any) -> tuple[Any, Any, torch.Tensor]:
    model, config = families.build(name, **overrides)
    return model, config, torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def feed(model: Any, ids: torch.Tensor, cache: sc.StateCache, start: int = 0) -> torch.Tensor:
    kwargs: dict[str, Any] = {families.cache_arg(model): cache}
    if "mamba" not in type(model).__name__.lower():
        kwargs["position_ids"] = torch.arange(start, start + ids.shape[1]).expand(len(ids), -1)
    return model(ids, use_cache=True, **kwargs).logits


def contents(cache: sc.StateCache) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in cache.buffers()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the interface


def test_it_is_a_cache_by_its_own_code_alone() -> None:
    public = [name for name in dir(Cache) if not name.startswith("_")] + ["__init__", "__len__", "__repr__"]
    for name in public:
        owner = next(c for c in sc.StateCache.__mro__ if name in vars(c))
        assert owner.__module__.startswith("statecache"), f"Cache.{name} is transformers' own"


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_known_from_the_configuration(name: str, fixed: bool) -> None:
    model, config, ids = build(name)
    spec = model_spec(config)
    for dtype in (torch.float32, torch.bfloat16):
        at_once = sc.StateCache(config, capacity=32, slack=2, rows=2, dtype=dtype, device="cpu")
        assert at_once.nbytes() == declared_bytes(spec, 2, 32, dtype, slack=2)
    cache = sc.StateCache(config, capacity=32 if fixed else None, slack=2)
    assert cache.nbytes().total == 0
    feed(model, ids, cache)
    if fixed:
        assert cache.nbytes() == declared_bytes(spec, 2, 32, slack=2)
    assert cache.nbytes().total == sum(storages(cache).values())


def storages(root: object) -> dict[int, int]:
    """Bytes of every distinct storage that can be reached from an object, by address."""
    found, seen, todo = {}, set(), [root]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple | set):
            todo += thing
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            todo += vars(thing).values()
    return found


def test_a_growing_cache_moves_seldom() -> None:
    model, config, ids = build("lfm2")
    cache, addresses = sc.StateCache(config), set()
    feed(model, ids, cache)
    for n in range(9, 300):
        feed(model, ids[:, :1], cache, n)
        addresses.add(cache.states["1.key"].buffers()[0].data_ptr())
    assert len(addresses) <= 4  # 73, 146, 292, 584 slots
    assert cache.nbytes().by_kind["attention"] <= 2.1 * declared_bytes(model_spec(config), 2, 300).by_kind["attention"]


def test_left_pads_are_columns_of_a_row() -> None:
    model, config, ids = build("bamba")
    cache = sc.StateCache(config)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.generate(ids, attention_mask=mask, **{families.cache_arg(model): cache}, max_new_tokens=3)
    assert cache.lengths.tolist() == [11, 11]
    assert cache.get_seq_length() == 11


def test_a_recurrent_cache_knows_its_length_after_generate() -> None:
    model, config, ids = build("mamba2")
    cache = sc.StateCache(config, capacity=64)
    model.generate(ids, **{families.cache_arg(model): cache}, max_new_tokens=5)
    assert cache.lengths.tolist() == [13, 13]
    assert cache.get_max_length() == -1  # nothing in it can fill up
    assert int(cache.get_seq_length()) == 13


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe"])
def test_assisted_decoding_of_transformers_works(name: str) -> None:
    model, config, ids = build(name)
    argument, prompt = families.cache_arg(model), torch.cat([ids[:1, :6]] * 4, 1)
    plain = model.generate(prompt, max_new_tokens=20)
    cache = sc.StateCache(config, slack=12)
    assert torch.equal(
        model.generate(prompt, **{argument: cache}, max_new_tokens=20, prompt_lookup_num_tokens=5),
        plain,
    )
    draft, _ = families.build(name, seed=1)
    cache = sc.StateCache(config, slack=24)
    assert torch.equal(model.generate(prompt, **{argument: cache}, max_new_tokens=20, assistant_model=draft), plain)
    with pytest.raises(errors.SlackError, match="make it with slack="):
        model.generate(prompt, **{argument: sc.StateCache(config)}, max_new_tokens=20, prompt_lookup_num_tokens=5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: c.fork()])
def test_a_copy_of_a_fixed_cache_is_fixed_and_goes_on(copied: Callable[[Any], sc.StateCache]) -> None:
    model, config, ids = build("falcon_h1")
    cache = sc.StateCache(config, capacity=32, slack=2)
    feed(model, ids, cache)
    other = copied(cache)
    assert not set(storages(cache)) & set(storages(other))
    assert torch.equal(feed(model, ids[:, :1], cache, 9), feed(model, ids[:, :1], other, 9))
    other.rollback(1)
    assert (cache.lengths - other.lengths).tolist() == [1, 1]


def test_a_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    model, config, ids = build("jamba")
    with torch.inference_mode():
        cache = sc.StateCache(config)
        feed(model, ids, cache)
    a = feed(model, ids[:, :1], cache, 9)
    with torch.inference_mode():
        feed(model, ids[:, :1], cache, 10)
        copies = [cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    for other in copies:
        feed(model, ids[:, :1], other, 11)
        assert other.lengths.tolist() == [12, 12]
    cache.gather(torch.tensor([1]))
    assert torch.isfinite(feed(model, ids[:1, :1], cache, 11)).all()
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "lfm2"])
def test_a_backward_pass_through_the_cache_is_refused(name: str) -> None:
    model, config, ids = build(name)
    with torch.enable_grad():
        cache = sc.StateCache(config)
        feed(model, ids, cache)
        logits = feed(model, ids[:, :1], cache, 9)
        own = name != "mamba2"  # whose overwritten lease makes autograd itself refuse
        with pytest.raises(errors.StateCacheError if own else RuntimeError, match="no gradient" if own else "inplace"):
            logits.sum().backward()
        feed(model, ids[:, :1], cache, 10)
    assert not any(buffer.requires_grad for buffer in cache.fork().buffers())


# ---- what a caller gives, and is shown


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(name: Any) -> None:
    cache = sc.StateCache(build("lfm2")[1], capacity=8, rows=2, dtype=name, device="cpu")
    assert {b.dtype for b in cache.buffers() if b.is_floating_point()} == {torch.bfloat16}
    assert cache.nbytes() == declared_bytes(cache.spec, 2, 8, name)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda config: sc.StateCache(config, dtype="half precision"), r"dtype='half precision': give a torch\.dtype"),
        (lambda config: sc.StateCache(config, dtype=16), r"dtype=16: give a torch\.dtype"),
        (lambda config: sc.StateCache(config, device="gpu"), r"device='gpu': give a torch\.device"),
        (lambda config: sc.StateCache(SimpleNamespace()), "not a SimpleNamespace: give model.config"),
        (lambda config: sc.StateCache("lfm2"), "not a str: give model.config"),
        (lambda config: sc.prepare("lfm2"), "this is a str, and no model"),
        (sc.unprepare, "this is a Lfm2Config, and no model"),
    ],
)
def test_what_is_no_option_is_refused_with_what_to_give(call: Any, why: str) -> None:
    with pytest.raises(errors.OptionError, match=why):
        call(build("lfm2")[1])


def test_a_cache_shows_its_lengths() -> None:
    model, config, ids = build("lfm2")
    cache = sc.StateCache(config, slack=1)
    assert repr(cache).endswith("growing, slack 1: empty)")
    feed(model, ids, cache)
    assert "slack 1: lengths [9, 9], " in repr(cache)


def test_a_refused_rollback_says_where_a_row_can_go_if_anywhere() -> None:
    model, config, ids = build("qwen3_5")
    cache = sc.StateCache(config, slack=6)
    feed(model, ids, cache)
    with pytest.raises(errors.RollbackError, match=r"inside a chunk; feed what may be forgotten"):
        cache.rollback(2)
    feed(model, ids[:, :1], cache, 9)
    with pytest.raises(errors.RollbackError, match=r"was inside a chunk; it can go back to 9: feed what"):
        cache.rollback(2)


# ---- compiled


@pytest.mark.parametrize("name", SHALLOW)
def test_compiled_steps_share_one_graph_and_the_host_catches_up(name: str) -> None:
    model, config, ids = build(name, **SHALLOW[name])
    cache = sc.StateCache(config, capacity=16, slack=3)
    feed(model, ids, cache)
    addresses = [b.data_ptr() for b in cache.buffers()]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    forward, model.forward = model.forward, torch.compile(model.forward, fullgraph=True, backend=counter)
    for n in range(9, 14):
        feed(model, ids[:, :1], cache, n)
    assert counter.frame_count == 1
    assert addresses == [b.data_ptr() for b in cache.buffers()]
    compiled, model.forward = model.forward, forward
    assert cache.lengths.tolist() == [14, 14]
    cache.rollback(2)
    got = feed(model, ids[:, 1:2], cache, 12)
    want = model(torch.cat([ids, ids[:, :1].expand(-1, 3), ids[:, 1:2]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    cache.reset()
    feed(model, ids[:, :4], cache)  # a prompt of another length
    model.forward = compiled
    feed(model, ids[:, 4:5], cache, 4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", SHALLOW)
def test_a_growing_cache_compiles_a_few_times_and_serves_every_length(name: str) -> None:
    model, config, ids = build(name, **SHALLOW[name])
    ids = torch.cat([ids] * 12, 1)
    cache = sc.StateCache(config)
    feed(model, ids[:, :9], cache)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    forward, model.forward = model.forward, torch.compile(model.forward, fullgraph=True, backend=counter)
    got = torch.cat([feed(model, ids[:, n : n + 1], cache, n) for n in range(9, 100)], 1)
    model.forward = forward
    assert counter.frame_count <= 4  # a first length, any length, and slots that doubled once
    assert cache.lengths.tolist() == [100, 100]
    want = model(ids[:, :100], use_cache=False).logits[:, 9:]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_compiled_step_past_the_capacity_is_reported_by_the_next_call() -> None:
    model, config, ids = build("lfm2", **SHALLOW["lfm2"])
    cache = sc.StateCache(config, capacity=11)
    feed(model, ids, cache)
    mark = cache.checkpoint()
    forward = model.forward
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for n in range(9, 13):
        feed(model, ids[:, :1], cache, n)
    model.forward = forward
    for call in (
        lambda: cache.lengths,
        cache.checkpoint,
        lambda: cache.rollback(1),
        lambda: feed(model, ids, cache, 9),
    ):
        with pytest.raises(errors.CapacityError, match="capacity=11"):
            call()
    cache.restore(mark)
    assert cache.lengths.tolist() == [9, 9]
    want = model(torch.cat([ids, ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(feed(model, ids[:, :1], cache, 9), want, rtol=1e-4, atol=1e-4)


# ---- bad input


def keys(rows: int = 2, heads: int = 2, tokens: int = 1, size: int = 16, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(rows, heads, tokens, size, **kwargs)


BAD = {
    "heads": (errors.ShapeError, "made for", lambda c: c.update(keys(heads=3), keys(heads=3), 1)),
    "head size": (errors.ShapeError, "made for", lambda c: c.update(keys(), keys(size=8), 1)),
    "rank": (errors.ShapeError, "made for", lambda c: c.update(keys()[0], keys()[0], 1)),
    "keys without values": (
        errors.ShapeError,
        r"\(rows, 2, 2, 16\)",
        lambda c: c.update(keys(tokens=2), keys(), 1),
    ),
    "channels": (
        errors.ShapeError,
        "made for",
        lambda c: c.update_conv_state(torch.zeros(2, 5, 1), 0, conv_kernel_size=4),
    ),
    "kernel": (
        errors.ConfigError,
        "convolves 7",
        lambda c: c.update_conv_state(torch.zeros(2, 128, 1), 0, conv_kernel_size=7),
    ),
    "state": (errors.ShapeError, "made for", lambda c: c.update_recurrent_state(torch.zeros(2, 4, 4), 0)),
    "dtype": (
        errors.DtypeError,
        "float64",
        lambda c: c.update(keys(dtype=torch.float64), keys(dtype=torch.float64), 1),
    ),
    "device": (errors.DeviceError, "meta", lambda c: c.update(keys(device="meta"), keys(device="meta"), 1)),
    "rows": (errors.RowsError, "3 rows", lambda c: c.update(keys(rows=3), keys(rows=3), 1)),
    "layer": (errors.LayerError, "no layer 9", lambda c: c.update(keys(), keys(), 9)),
    "negative layer": (errors.LayerError, "no layer -1", lambda c: c.get_recurrent_state(-1)),
    "no attention there": (errors.LayerError, 'no "key"', lambda c: c.update(keys(), keys(), 0)),
    "no convolution there": (errors.LayerError, 'no "conv"', lambda c: c.get_conv_state(1)),
    "no second state": (errors.LayerError, 'no "recurrent1"', lambda c: c.get_recurrent_state(0, 1)),
    "capacity": (errors.CapacityError, "capacity=16", lambda c: c.update(keys(tokens=9), keys(tokens=9), 1)),
    "rollback past the slack": (errors.RollbackError, "slack=2", lambda c: c.rollback(3)),
    "rollback into a chunk": (errors.RollbackError, "inside a chunk", lambda c: c.rollback(2)),
    "rollback of a negative number": (errors.RollbackError, "cannot forget -1", lambda c: c.rollback(-1)),
    "rollback of other rows": (errors.RowsError, r"\(2,\)", lambda c: c.rollback(torch.tensor([1, 1, 1]))),
    "rollback of fractions": (errors.RowsError, "float32", lambda c: c.rollback(torch.tensor([1.0, 1.0]))),
    "one row too far": (errors.RollbackError, "row 1", lambda c: c.rollback(torch.tensor([0, 9]))),
    "crop forwards": (errors.OptionError, "minus", lambda c: c.crop(3)),
    "row that is not there": (errors.RowsError, "0..1", lambda c: c.gather(torch.tensor([0, 2]))),
    "negative row": (errors.RowsError, "0..1", lambda c: c.gather(torch.tensor([-1]))),
    "no rows": (errors.RowsError, "at least one", lambda c: c.gather(torch.tensor([], dtype=torch.long))),
    "more rows than allocated": (errors.RowsError, "rows=4", lambda c: c.batch_repeat_interleave(2)),
    "mark of another cache": (errors.MarkError, "another cache", lambda c: c.restore(c.fork().checkpoint())),
    "offloading": (errors.StateCacheError, "nothing to offload", lambda c: c.offload(0)),
    "indexer": (errors.LayerError, 'holds key, value, no "index"', lambda c: c.update_indexer(keys(), 1)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    error, text, call = BAD[case]
    model, config, ids = build("bamba")
    cache = sc.StateCache(config, capacity=16, slack=2)
    feed(model, ids[:, :5], cache)
    feed(model, ids[:, 5:8], cache, 5)
    before = contents(cache)
    with pytest.raises(error, match=text):
        call(cache)
    assert same(before, contents(cache))
    got = feed(model, ids[:, 8:], cache, 8)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 4.5}, "capacity=4.5"),
        ({"slack": -1}, "slack=-1"),
        ({"slack": True}, "slack=True"),
        ({"rows": 0}, "rows=0"),
        ({"capacity": 4, "slack": 5}, "slack=5 is more than capacity=4"),
        ({"dtype": torch.int8}, "floating point"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.OptionError, match=text):
        sc.StateCache(families.build("lfm2")[1], **options)


def test_a_model_instead_of_its_configuration_is_refused() -> None:
    with pytest.raises(errors.OptionError, match=r"give model\.config"):
        sc.StateCache(families.build("lfm2")[0])


def test_a_configuration_of_another_model_is_refused_at_the_first_write() -> None:
    model, _, ids = build("mamba2")
    other = transformers.Mamba2Config(**{**families.FAMILIES["mamba2"]["kwargs"], "state_size": 8})
    cache = sc.StateCache(other)
    with pytest.raises(errors.ShapeError, match="make it from the configuration"):
        feed(model, ids, cache)
    assert cache.nbytes().total == 0


def test_an_unknown_layer_type_is_named_with_the_way_out() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "wormhole"]
    with pytest.raises(errors.UnknownLayerError, match=r'layer 1 .* "wormhole".*adding_a_layer\.md'):
        sc.StateCache(config)
    assert "wormhole" not in KINDS


def test_a_model_that_would_drop_its_state_is_stopped() -> None:
    model, config, ids = build("mamba")
    cache = sc.StateCache(config)
    feed(model, ids, cache)
    before = contents(cache)
    with pytest.raises(errors.StepError, match="one token at a time"):
        feed(model, ids[:, :2], cache)
    assert same(before, contents(cache))


def test_a_pass_that_never_shows_how_many_tokens_it_takes_in_is_refused() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.model_type, config.layer_types = "somebody_elses", ["linear_attention"] * 2
    cache = sc.StateCache(config)
    cache.update_conv_state(torch.ones(2, 8, 3), 0)  # windows that the layers have cut themselves
    with pytest.raises(errors.StepError, match=r'state "1.conv".*no state showed how many tokens.*adding_a_layer\.md'):
        cache.update_conv_state(torch.ones(2, 8, 3), 1)
    assert cache.nbytes().total == 0


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("slack", [0, 1])
def test_what_comes_before_a_pass_shows_its_tokens_waits(slack: int, listed: bool) -> None:
    """An end in the first layer, between its window and its keys, leaves the cache as it was."""
    model, config, ids = build("zaya")
    cache = sc.StateCache(config if listed else renamed(config), slack=slack)
    feed(model, ids[:, :5], cache)
    before = contents(cache)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].self_attn.qk_norm.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, ids[:, 3:6], cache, 5)
    hook.remove()
    assert same(before, contents(cache))
    got = feed(model, ids[:, 5:], cache, 5)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("repair", ["reset", "restore"])
@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_interrupted_pass_is_noticed_and_can_be_repaired(repair: str, slack: int, tokens: int) -> None:
    model, config, ids = build("granitemoehybrid")
    ids = ids[:, : 5 + tokens]
    cache = sc.StateCache(config, slack=slack)
    feed(model, ids[:, :5], cache)
    mark = cache.checkpoint()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, ids[:, 5:], cache, 5)
    hook.remove()
    for call in (lambda: feed(model, ids[:, 5:], cache, 5), lambda: cache.rollback(1), cache.checkpoint, cache.fork):
        with pytest.raises(errors.StepError, match="interrupted"):
            call()
    assert "interrupted" in str(cache.capabilities["step"])
    cache.reset() if repair == "reset" else cache.restore(mark)
    start = int(cache.get_seq_length())
    got = feed(model, ids[:, start:], cache, start)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, start:], rtol=1e-4, atol=1e-4)


def test_a_compiled_step_after_an_interrupted_pass_counts_from_the_reset() -> None:
    model, config, ids = build("lfm2", **SHALLOW["lfm2"])
    cache = sc.StateCache(config, capacity=16)
    feed(model, ids[:, :5], cache)
    cache.update_conv_state(torch.zeros(2, 64, 7), 0, conv_kernel_size=3)  # a pass of 7 that nothing ends
    cache.reset()
    torch._dynamo.reset()
    forward, model.forward = model.forward, torch.compile(model.forward, fullgraph=True, backend="eager")
    feed(model, ids[:, :1], cache)
    model.forward = forward
    assert cache.lengths.tolist() == [1, 1]
    torch.testing.assert_close(feed(model, ids[:, 1:], cache, 1), model(ids, use_cache=False).logits[:, 1:])


def test_a_mark_of_other_rows_is_stale() -> None:
    model, config, ids = build("lfm2")
    cache = sc.StateCache(config)
    feed(model, ids, cache)
    cache.reset()
    mark = cache.checkpoint()
    feed(model, ids[:1], cache)
    with pytest.raises(errors.StaleMarkError, match="number of rows"):
        cache.restore(mark)


def test_capabilities_say_what_the_method_would_raise() -> None:
    model, config, ids = build("qwen3_next")
    cache = sc.StateCache(config, slack=2)
    feed(model, ids, cache)
    assert cache.capabilities["checkpoint"] and cache.capabilities["gather"]
    with pytest.raises(errors.RollbackError) as raised:
        cache.rollback(1)
    assert cache.capabilities["rollback"].why == str(raised.value)
    feed(model, ids[:, :1], cache, 9)
    assert cache.capabilities["rollback"]


def test_ragged_rows_are_refused_by_an_unmodified_model() -> None:
    model, config, ids = build("lfm2")
    cache = sc.StateCache(config, slack=4)
    feed(model, ids, cache)
    cache.rollback(torch.tensor([2, 0]))
    for call in (cache.get_seq_length, lambda: feed(model, ids[:, :1], cache, 9)):
        with pytest.raises(errors.RaggedError, match=r"\[7, 9\]"):
            call()
    cache.rollback(torch.tensor([0, 2]))
    want = model(torch.cat([ids[:, :7], ids[:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(feed(model, ids[:, :1], cache, 7), want, rtol=1e-4, atol=1e-4)


def test_a_fixed_cache_keeps_its_rows_and_a_growing_one_takes_others_after_reset() -> None:
    model, config, ids = build("lfm2")
    fixed, growing = sc.StateCache(config, capacity=16), sc.StateCache(config)
    for cache in (fixed, growing):
        feed(model, ids, cache)
        with pytest.raises(errors.RowsError, match="holds 2"):
            feed(model, ids[:1], cache, 9)
        cache.reset()
    with pytest.raises(errors.RowsError, match="allocated with 2"):
        feed(model, ids[:1], fixed)
    feed(model, ids[:1], growing)
    assert growing.lengths.tolist() == [9]
    feed(model, ids, fixed)
    fixed.gather([1])
    assert fixed.lengths.tolist() == [9] and fixed.batch_size == 1
    want = model(torch.cat([ids[1:], ids[1:, :1]], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(feed(model, ids[1:, :1], fixed, 9), want, rtol=1e-4, atol=1e-4)


def test_buffers_are_static_for_compile_only_with_a_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[int] = []
    for module in (store, lease):
        monkeypatch.setattr(module, "fixed", lambda t: marked.append(t.data_ptr()) or t)
    config = families.build("jamba")[1]
    sc.StateCache(config, rows=2, dtype=torch.float32, device="cpu")
    assert not marked
    cache = sc.StateCache(config, capacity=8, rows=2, dtype=torch.float32, device="cpu")
    assert {b.data_ptr() for b in cache.buffers() if b.numel()} <= set(marked)
