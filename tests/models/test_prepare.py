"""What `prepare` gives a model and leaves in it, and what a prepared model answers and refuses."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import families
import prepared_oracle as oracle
import pytest
import tiny_models
import torch
import torch._dynamo.testing
import transformers
from tiny_models import assert_same, draw
from torch import Tensor, nn

import statecache as sc
from declared_bytes import declared_bytes
from statecache import errors
from statecache.models.interface import NAMES as CACHE_NAMES
from statecache.models.mixers import MIXERS, Mixer
from statecache.models.names import FUNCTIONS_TAKE
from statecache.models.prepare import is_prepared
from statecache.models.table import model_spec

NAMES = list(families.FAMILIES)
OPERATORS = ["mamba", "mamba2", "qwen3_5", "kimi_linear", "lfm2", "minimax", "falcon_h1", "zamba", "zaya"]
OPERATORS += ["recurrent_gemma"] * ("recurrent_gemma" in NAMES)
GIVES_NONE = ["recurrent_gemma"]  # its outputs have no place for a cache
NAMED_OTHERWISE = ["mamba", "falcon_mamba", "mamba2"]  # their argument is cache_params
each_family = pytest.mark.parametrize("name", NAMES)
each_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def build(name: str, **overrides: Any) -> Any:
    return families.build(name, **overrides)[0]


def small(name: str, **overrides: Any) -> Any:
    # with biases, what zaya itself makes of pads on the left is no reference: they reach its convolutions
    sizes = {k: v for k, v in oracle.MODELS[name].items() if k not in ("experts_implementation", "attention_bias")}
    return build(name, **{**oracle.SIZE, **sizes, **overrides})


def new_cache(model: Any, **options: Any) -> sc.StateCache:
    return sc.StateCache(model.config, **options)


def feed(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=True, **{families.cache_arg(model): cache}).logits


def full(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False).logits


def held(model: nn.Module) -> dict[str, dict[str, int]]:
    """What every module's instance holds, by identity."""
    return {name: {key: id(value) for key, value in vars(m).items()} for name, m in model.named_modules()}


def decoder(model: nn.Module) -> Any:
    return next(m for m in model.modules() if any(n == "layers" for n, _ in m.named_children()))


def mixers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ in MIXERS]


def foreign(name: str, model: Any) -> Any:
    """A cache of transformers' own."""
    if name.startswith("minimax"):
        from transformers.models.minimax.modeling_minimax import MiniMaxCache

        return MiniMaxCache()
    return transformers.DynamicCache(config=model.config)


def two_passes(name: str, model: Any, ids: Tensor) -> list[Tensor]:
    cache = foreign(name, model)
    return [feed(model, cache, ids[:, :6]), feed(model, cache, ids[:, 6:7])]


# ---- what it changes, and takes back


@each_family
def test_preparing_twice_is_preparing_once(name: str) -> None:
    model = build(name)
    assert sc.prepare(model) is model and is_prepared(model)
    before = held(model)
    assert sc.prepare(model) is model
    assert held(model) == before


@each_family
def test_unprepare_leaves_the_model_as_it_was(name: str) -> None:
    model, ids = build(name), draw(2, 7)
    logits = two_passes(name, model, ids)  # after which some hold states
    before, weights = held(model), {k: v.clone() for k, v in model.state_dict().items()}
    sc.prepare(model)
    feed(model, new_cache(model, slack=2), ids)
    assert sc.unprepare(model) is model and not is_prepared(model)
    assert held(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(two_passes(name, model, ids), logits, strict=True))


@each_family
def test_modules_and_names_stay(name: str) -> None:
    model, plain = build(name), build(name)
    sc.prepare(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for part in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(model, part)()] == [n for n, _ in getattr(plain, part)()]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@each_operator
def test_a_prepared_model_is_saved_as_any_other(name: str, tmp_path: Any) -> None:
    model, plain = sc.prepare(build(name)), build(name)
    model.save_pretrained(tmp_path)
    read = type(plain).from_pretrained(tmp_path)
    assert not is_prepared(read)
    for (key, value), (other, same) in zip(read.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, same)


@each_family
def test_hooks_fire(name: str) -> None:
    model, fired = build(name), []
    modules = [decoder(model), *mixers(model)]

    def register(when: str) -> None:
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(lambda *_, i=index: fired.append((when, "before", i)))
            module.register_forward_hook(lambda *_, i=index: fired.append((when, "after", i)))

    register("early")
    full(model, draw(1, 3))
    unprepared = sorted(fired)  # layers that run several times fire as often
    fired.clear()
    assert {index for *_, index in unprepared} == set(range(len(modules)))
    sc.prepare(model)
    register("late")
    feed(model, new_cache(model), draw(1, 3))
    assert sorted(fired) == unprepared + [("late", when, index) for _, when, index in unprepared]


@pytest.mark.parametrize("name", ["zaya", "falcon_h1", "qwen3_next"])
def test_an_unknown_mixer_is_named_and_the_model_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    for row in {type(module).__name__ for module in mixers(model)}:
        monkeypatch.delitem(MIXERS, row)
    before = held(model)
    with pytest.raises(errors.UnknownLayerError, match=r"layer \d.*there is an operator for none.*adding_a_layer\.md"):
        sc.prepare(model)
    assert held(model) == before


@each_operator
def test_one_unknown_mixer_is_enough(name: str) -> None:
    model = build(name)
    last = mixers(model)[-1]
    layer = max(n for n, each in enumerate(decoder(model).layers) if last in each.modules())
    last.__class__ = type("Somebody", (type(last),), {})
    before = held(model)
    with pytest.raises(errors.UnknownLayerError, match=f"layer {layer} .*Somebody") as raised:
        sc.prepare(model)
    assert "MIXERS" in str(raised.value)
    assert held(model) == before


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(errors.UnknownLayerError, match="Linear has no list of decoder layers"):
        sc.prepare(nn.Linear(2, 2))


@each_operator
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_prepared_and_stands_alone(name: str, copied: Callable[[Any], Any]) -> None:
    model, ids = sc.prepare(small(name)), draw(2, 9) % oracle.V
    want = full(model, ids)
    other = copied(model)
    assert is_prepared(other)
    inside = {id(m) for m in other.modules()}
    for module in other.modules():
        for value in vars(module).values():
            owner = getattr(value, "__self__", None)
            if owner is not None:
                assert {id(x) for x in vars(owner).values() if isinstance(x, nn.Module)} <= inside
    for parameter in model.parameters():
        parameter.zero_()
    cache = new_cache(other, slack=3)
    assert_same(torch.cat([feed(other, cache, part) for part in ids.split((4, 2, 3), 1)], 1), want)
    assert not is_prepared(sc.unprepare(other)) and is_prepared(model)


@each_operator
def test_the_decoder_alone_can_be_prepared(name: str) -> None:
    plain = getattr(build(name), "model", None) or build(name).backbone
    model, ids = sc.prepare(copy.deepcopy(plain)), draw(2, 9)
    cache, argument = new_cache(model), families.cache_arg(model)
    got = [model(part, use_cache=True, **{argument: cache}).last_hidden_state for part in ids.split((5, 4), 1)]
    assert_same(torch.cat(got, 1), plain(ids, use_cache=False).last_hidden_state)


# ---- without a cache of ours


def exact(name: str) -> tuple[Any, Any]:
    """A model and the same prepared, both in float64."""
    try:
        plain = build(name, experts_implementation="eager")  # the others take no float64
    except TypeError:
        plain = build(name)
    plain = oracle.precise(plain)
    return plain, sc.prepare(copy.deepcopy(plain))


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_cache_logits_are_those_of_the_unprepared_model(name: str, side: str) -> None:
    plain, model = exact(name)
    ids, lengths = draw(3, 19), (19, 11, 1)
    mask = torch.stack([torch.arange(19) < n for n in lengths]).long()
    mask = mask.flip(1) if side == "left" else mask
    with oracle.Precise():
        assert_same(full(model, ids), full(plain, ids), 1e-9)
        got = full(model, ids, mask)
        for b in range(3):
            real = mask[b].bool()
            assert_same(got[b : b + 1, real], full(plain, ids[b : b + 1, real]), 1e-9)


@each_family
def test_without_a_cache_float32_is_close(name: str) -> None:
    ids = draw(2, 21)
    assert_same(full(sc.prepare(build(name)), ids), full(build(name), ids), 1e-5)


@each_operator
def test_gradients_are_those_of_the_unprepared_model(name: str) -> None:
    pair, ids = (oracle.build(name).plain, oracle.build(name).filling), draw(2, 11) % oracle.V
    gradients = []
    with torch.enable_grad(), oracle.Precise():
        for model in pair:
            loss = full(model, ids).square().mean()
            gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


@each_operator
def test_a_backward_pass_through_the_cache_is_refused(name: str) -> None:
    model, ids = sc.prepare(small(name)), draw(2, 5) % oracle.V
    with torch.enable_grad():
        cache = new_cache(model, slack=2)
        feed(model, cache, ids)
        logits = feed(model, cache, ids[:, :1])
        with pytest.raises(errors.StateCacheError, match="no gradient"):
            logits.sum().backward()
        feed(model, cache, ids[:, :1])
    assert cache.lengths.tolist() == [7, 7]
    assert not any(buffer.requires_grad for buffer in cache.fork().buffers())


@each_operator
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_forward_that_makes_its_own_cache_are_whole(name: str, training: bool) -> None:
    plain, model, ids = small(name), sc.prepare(small(name)), draw(2, 9) % oracle.V
    mask = torch.tensor([[1] * 9, [0, 0, *[1] * 7]])
    used = {"use_cache": True} if training else {}
    with torch.enable_grad():
        for row in (ids[:1], ids[1:, 2:]):  # alone: not every model hides pads from its recurrence
            full(plain.train(training), row).square().sum().backward()
        out = model.train(training)(ids, attention_mask=mask, **used)
        out.logits[mask == 1].square().sum().backward()
    for (key, p), (_, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert_same(q.grad, p.grad, 1e-3)
    if name in GIVES_NONE:
        return
    cache = out[families.cache_arg(model)]
    assert isinstance(cache, sc.StateCache) and cache.lengths.tolist() == [9, 7]
    turn = draw(2, 3, seed=1) % oracle.V
    with torch.enable_grad():
        logits = feed(model.eval(), cache, turn)
        assert_same(logits[0], full(plain.eval(), torch.cat([ids, turn], 1))[0, 9:])
        with pytest.raises(errors.StateCacheError, match="no gradient"):
            logits.sum().backward()


@pytest.mark.parametrize("mask", [[[1] * 9, [0, 0, *[1] * 7]], [[0, *[1] * 8], [0, 0, *[1] * 7]]], ids=["one", "all"])
@pytest.mark.parametrize("name", ["qwen3_5", "gemma3_text"])
def test_gradients_go_through_attention_of_padded_rows(name: str, mask: list[list[int]]) -> None:
    """Also where a window, or a pad in every row, has the cache show more or fewer keys than there are columns."""
    plain, ids, real = tiny_models.build(name), draw(2, 9), torch.tensor(mask)
    grads = []
    for model, used in ((copy.deepcopy(plain), False), (sc.prepare(copy.deepcopy(plain)), True)):
        with torch.enable_grad():
            model(ids, attention_mask=real, use_cache=used).logits[real == 1].square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for got, want in zip(*reversed(grads), strict=True):
        assert_same(got, want, 1e-3)


@each_family
def test_bfloat16_runs_and_is_close(name: str) -> None:
    ids, coarse = draw(2, 12), sc.prepare(build(name, dtype=torch.bfloat16))
    # routed experts may differ: the reference has the weights that bfloat16 leaves
    plain = build(name, dtype=torch.bfloat16)
    dtype = full(plain, ids).dtype
    want = full(plain.float(), ids)
    cache = new_cache(coarse, slack=3)
    got = torch.cat([feed(coarse, cache, part) for part in ids.split((7, 2, 2, 1), 1)], 1)
    assert got.dtype == dtype
    error = (got.float() - want).abs().mean() / want.std()
    assert error < 0.1, f"off by {error:.2f} deviations"
    kept = {s.dtype for n, state in cache.states.items() if "recurrent" in n for s in state.buffers()}
    assert kept <= {dtype if name == "zaya" else torch.float32}  # zaya's is a value that waits, and nothing is added


@pytest.mark.parametrize("name", [n for n in NAMES if n not in GIVES_NONE])
def test_use_cache_gives_a_cache_of_ours(name: str) -> None:
    model, ids = sc.prepare(build(name)), draw(2, 8)
    out = model(ids[:, :5], use_cache=True)
    cache = out[families.cache_arg(model)]
    assert isinstance(cache, sc.StateCache) and cache.lengths.tolist() == [5, 5]
    assert_same(feed(model, cache, ids[:, 5:]), full(model, ids)[:, 5:])


@each_family
def test_a_foreign_cache_behaves_as_it_does_unprepared(name: str) -> None:
    model, plain, ids = sc.prepare(build(name)), build(name), draw(2, 7)
    for got, want in zip(two_passes(name, model, ids), two_passes(name, plain, ids), strict=True):
        assert torch.equal(got, want)


# ---- generate


@each_operator
def test_generate_makes_its_own_cache(name: str) -> None:
    model, plain, ids = sc.prepare(build(name)), build(name), draw(2, 9)
    out = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain.generate(ids, max_new_tokens=6, use_cache=False))
    assert isinstance(out[FUNCTIONS_TAKE], sc.StateCache)


@contextmanager
def old_names() -> Iterator[None]:
    """Let transformers say that a name is an old one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(past_key_values|cache_params)` is deprecated", FutureWarning)
        yield


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
@pytest.mark.parametrize("argument", CACHE_NAMES)
@pytest.mark.parametrize("name", [*NAMED_OTHERWISE, "lfm2", "qwen3_5"])
def test_generate_takes_the_cache_under_every_name(name: str, argument: str, options: dict[str, Any]) -> None:
    model, plain, ids, new = sc.prepare(build(name)), build(name), draw(2, 9), draw(2, 5, seed=1)

    def written(tokens: Tensor) -> Tensor:
        return plain.generate(tokens, max_new_tokens=6, use_cache=False)

    def generate(tokens: Tensor, cache: sc.StateCache) -> Tensor:
        with old_names():
            return model.generate(tokens, max_new_tokens=6, **{argument: cache}, **options)

    cache = new_cache(model)
    first = generate(ids, cache)
    assert torch.equal(first, written(ids)) and cache.lengths.tolist() == [14, 14]
    turn = torch.cat([first, new], 1)
    assert torch.equal(generate(turn, cache.fork()), written(turn))
    mask = torch.ones_like(turn)
    options = {**options, "attention_mask": mask}
    assert torch.equal(generate(turn[:, 14:], cache), written(turn)[:, 14:])
    assert cache.lengths.tolist() == [25, 25]


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", [*NAMED_OTHERWISE, "lfm2", "qwen3_5"])
def test_new_ids_may_be_more_than_the_cache_holds(name: str, options: dict[str, Any]) -> None:
    model, plain = sc.prepare(build(name)), build(name)
    ids, new, cache = draw(2, 3), draw(2, 9, seed=1), new_cache(model)
    given = {families.cache_arg(model): cache, **options}
    first = model.generate(ids, max_new_tokens=2, **given)
    turn = torch.cat([first, new], 1)
    second = model.generate(turn[:, 4:], attention_mask=torch.ones_like(turn), max_new_tokens=4, **given)
    assert torch.equal(second, plain.generate(turn, max_new_tokens=4, use_cache=False)[:, 4:])


@pytest.mark.parametrize("argument", CACHE_NAMES)
@pytest.mark.parametrize("name", [*OPERATORS, "falcon_mamba"])
def test_forward_takes_the_cache_under_every_name(name: str, argument: str) -> None:
    model, ids = sc.prepare(build(name)), draw(2, 9)
    cache = new_cache(model)
    with old_names():
        parts = [model(part, **{argument: cache}).logits for part in (ids[:, :5], ids[:, 5:])]
    assert_same(torch.cat(parts, 1), full(build(name), ids))
    assert cache.lengths.tolist() == [9, 9]


def test_two_caches_are_refused() -> None:
    model, ids = sc.prepare(build("lfm2")), draw(2, 9)
    caches = {name: new_cache(model) for name in CACHE_NAMES[:2]}
    with pytest.raises(errors.ConfigError, match="two caches came, as cache and past_key_values: give one"):
        model.model(ids, **caches)


# ---- refusals


@pytest.mark.parametrize("where", ["forward", "generation"])
def test_a_model_that_is_refused_is_left_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_5")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def refuse(function: Any) -> str:
        raise errors.ConfigError("no name")

    monkeypatch.setattr(f"statecache.models.{where}.cache_name", refuse)
    with pytest.raises(errors.ConfigError, match="no name"):
        sc.prepare(model)
    assert not is_prepared(model)
    assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


def test_a_cache_of_another_model_is_refused() -> None:
    model = sc.prepare(build("lfm2"))
    for other in (build("mamba2"), build("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])):
        cache = sc.StateCache(other.config)
        with pytest.raises(errors.ConfigError, match=r"make it from model\.config"):
            feed(model, cache, draw(1, 3))
        assert cache.nbytes().total == 0


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "lfm2", "falcon_h1"])
def test_an_unprepared_model_cannot_go_on_with_the_cache_of_a_prepared_one(name: str, slack: int) -> None:
    model, plain, ids = sc.prepare(build(name)), build(name), draw(2, 6)
    cache = new_cache(model, slack=slack)
    feed(model, cache, ids)
    with pytest.raises(errors.StepError, match=r"statecache\.prepare\(model\)"):
        feed(plain, cache, ids[:, :1])
    assert_same(feed(model, cache, ids[:, :1]), full(plain, torch.cat([ids, ids[:, :1]], 1))[:, -1:])


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize(
    "name", [n for n in OPERATORS if n not in ("minimax", "recurrent_gemma")]
)  # which take none of ours
def test_a_prepared_model_goes_on_with_the_cache_of_an_unprepared_one(name: str, slack: int) -> None:
    model, ids = build(name), draw(2, 9)
    cache, want = new_cache(model, slack=slack), full(model, ids)
    feed(model, cache, ids[:, :5])
    sc.prepare(model)
    with pytest.raises(errors.RollbackError):
        cache.rollback(5)
    assert_same(torch.cat([feed(model, cache, part) for part in ids[:, 5:].split((1, 3), 1)], 1), want[:, 5:])
    if slack:
        with pytest.raises(errors.RollbackError, match="can go back to 6"):
            cache.rollback(4)
        cache.rollback(3)
        assert_same(feed(model, cache, ids[:, 6:]), want[:, 6:])


@pytest.mark.parametrize(
    ("mask", "came"),
    [
        (torch.ones(2, 3), r"\(2, 3\)"),
        (torch.ones(3, 4), r"\(3, 4\)"),
        (torch.ones(2, 1, 4, 4), r"\(2, 1, 4, 4\)"),
        ({"full_attention": torch.ones(2, 4)}, "dict"),
    ],
    ids=["short", "rows", "rank", "dict"],
)
@pytest.mark.parametrize("name", ["mamba2", "lfm2"])
def test_a_mask_of_the_wrong_shape_is_refused(name: str, mask: Any, came: str) -> None:
    model = sc.prepare(build(name))
    cache = new_cache(model)
    with pytest.raises(errors.ShapeError, match=rf"attention_mask: came {came}, expected \(2, 4 or more\)"):
        feed(decoder(model), cache, draw(2, 4), mask) if isinstance(mask, dict) else feed(
            model, cache, draw(2, 4), mask
        )
    assert cache.lengths.tolist() == []


@each_operator
def test_a_mixer_by_itself_is_refused(name: str) -> None:
    model, ids = sc.prepare(build(name)), draw(2, 4)
    cache = new_cache(model)
    feed(model, cache, ids)
    given = {families.cache_arg(model): cache, "position_ids": torch.zeros(2, 1)}
    with pytest.raises(errors.StepError, match=r"layer 0 was called by itself.*call the model"):
        mixers(model)[0](torch.zeros(2, 1, model.config.hidden_size), **given)
    assert cache.lengths.tolist() == [4, 4]


def test_packed_sequences_are_refused() -> None:
    model = sc.prepare(build("mamba2"))
    with pytest.raises(errors.StepError, match="no packed sequences"):
        mixers(model)[0](torch.zeros(1, 4, model.config.hidden_size), seq_idx=torch.zeros(1, 4))


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_an_attention_that_takes_no_mask_refuses_ragged_rows_and_changes_nothing(name: str) -> None:
    model, ids = sc.prepare(build(name)), draw(2, 6)
    cache, config = new_cache(model, slack=2), decoder(model).config
    feed(model, cache, ids)
    cache.rollback(torch.tensor([1, 0]))
    before = [buffer.clone() for buffer in cache.buffers()]
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(errors.RaggedError, match=r'"flash_attention_2".*attn_implementation="sdpa"'):
        feed(model, cache, ids[:, :1])
    config._attn_implementation = "sdpa"
    assert cache.lengths.tolist() == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(before, cache.buffers(), strict=True))
    got = feed(model, cache, ids[:, :1])
    assert_same(got[1:], full(build(name), torch.cat([ids[1:], ids[1:, :1]], 1))[:, -1:])


@pytest.mark.parametrize("capacity", [None, 32])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "falcon_h1", "zamba", "minimax"])
def test_eager_attention_equals_sdpa_for_ragged_rows(name: str, capacity: int | None) -> None:
    ids, got = draw(3, 8), []
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5, [0] * 8])
    for form in ("eager", "sdpa"):
        model = sc.prepare(build(name, attn=form))
        assert decoder(model).config._attn_implementation == form
        cache = new_cache(model, capacity=capacity, slack=3)
        feed(model, cache, ids)
        got.append([feed(model, cache, ids, mask)[mask.bool()], feed(model, cache, ids[:, :2])])
    for eager, sdpa in zip(*got, strict=True):
        assert_same(eager, sdpa, 1e-5)


# ---- rollback and rounds


@pytest.mark.parametrize("capacity", [None, 32])
@each_family
def test_a_rollback_reaches_into_a_chunk_row_by_row(name: str, capacity: int | None) -> None:
    model, plain, ids, new = sc.prepare(build(name)), build(name), draw(3, 12), draw(3, 2, seed=1)
    cache, forget = new_cache(model, capacity=capacity, slack=4), (4, 1, 0)
    feed(model, cache, ids)
    cache.rollback(torch.tensor(forget))
    got = feed(model, cache, new)
    for b, n in enumerate(forget):
        row = torch.cat([ids[b : b + 1, : 12 - n], new[b : b + 1]], 1)
        assert_same(got[b : b + 1], full(plain, row)[:, -2:])
    with pytest.raises(errors.RollbackError, match="row 0 holds 10 tokens and can go back to 8, not to 5"):
        cache.rollback(5)


@each_operator
def test_slack_does_not_change_the_bits_of_decoding_before_a_rollback(name: str) -> None:
    model = sc.prepare(build(name))
    ids, caches = draw(2, 14), [new_cache(model, slack=slack) for slack in (0, 3)]
    for tokens in torch.split(ids, [6, *[1] * 8], 1):
        plain, logged = (feed(model, cache, tokens) for cache in caches)
        assert torch.equal(plain, logged)
    caches[1].rollback(2)
    assert_same(feed(model, caches[1], ids[:, -2:])[:, -1:], plain)


def opened(cache: sc.StateCache, model: Any, ids: Tensor, tokens: int = 2) -> Any:
    draft = cache.speculate(3)
    draft.__enter__()
    feed(model, cache, ids[:, :tokens])
    return draft


def _overlong(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    with cache.speculate(2):
        feed(model, cache, ids[:, :3])


def _nested(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    with cache.speculate(2), cache.speculate(2):
        pass


def _without_a_pass(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    with cache.speculate(2) as draft:
        draft.commit(1)


def _entered_again(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    draft = cache.speculate(2)
    with draft:
        pass
    draft.__enter__()


def _committed_twice(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    draft = opened(cache, model, ids)
    draft.commit(0)
    draft.commit(0)


def _after_the_block(cache: sc.StateCache, model: Any, ids: Tensor) -> None:
    with cache.speculate(2) as draft:
        feed(model, cache, ids[:, :2])
    draft.commit(1)


ROUNDS: dict[str, tuple[type[Exception], str, Callable[[sc.StateCache, Any, Tensor], Any]]] = {
    "no tokens": (errors.OptionError, "max_tokens=0: give the most", lambda c, m, i: c.speculate(0)),
    "a flag": (errors.OptionError, "max_tokens=True: give", lambda c, m, i: c.speculate(True)),
    "past the slack": (errors.SlackError, "slack=3; make it with slack=4", lambda c, m, i: c.speculate(4)),
    "overlong": (errors.CapacityError, "max_tokens=2: give more", _overlong),
    "nested": (errors.StepError, r"round is open: commit\(\)", _nested),
    "entered again": (errors.StepError, "begin a new one", _entered_again),
    "second pass": (
        *(errors.StepError, r"has had it: commit\(\)"),
        lambda c, m, i: (opened(c, m, i), feed(m, c, i[:, :1])),
    ),
    "nothing to commit": (errors.StepError, "no whole forward pass", _without_a_pass),
    "committed twice": (errors.StepError, r"begin another with speculate\(\)", _committed_twice),
    "after the block": (errors.StepError, r"begin another with speculate\(\)", _after_the_block),
    "too many": (
        *(errors.RowsError, "row 1 cannot keep 3 tokens: the pass brought it 2"),
        lambda c, m, i: opened(c, m, i).commit(torch.tensor([0, 3])),
    ),
    "negative": (errors.RowsError, "row 0 cannot keep -1", lambda c, m, i: opened(c, m, i).commit(-1)),
    "fractions": (errors.RowsError, "float32", lambda c, m, i: opened(c, m, i).commit(torch.tensor([1.0, 1.0]))),
    "other rows": (errors.RowsError, r"\(2,\)", lambda c, m, i: opened(c, m, i).commit(torch.tensor([1, 1, 1]))),
    "checkpoint": (errors.StepError, "round is open", lambda c, m, i: (opened(c, m, i), c.checkpoint())),
    "rollback": (errors.StepError, "round is open", lambda c, m, i: (opened(c, m, i), c.rollback(1))),
    "gather": (errors.StepError, "round is open", lambda c, m, i: (opened(c, m, i), c.gather([0]))),
    "fork": (errors.StepError, "round is open", lambda c, m, i: (opened(c, m, i), c.fork())),
    "reset": (errors.StepError, "round is open", lambda c, m, i: (opened(c, m, i), c.reset())),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_a_misused_round_is_refused_and_leaves_the_rows(case: str) -> None:
    error, text, call = ROUNDS[case]
    model, ids = sc.prepare(build("qwen3_5")), draw(2, 8)
    cache = new_cache(model, slack=3)
    feed(model, cache, ids)
    with pytest.raises(error, match=text):
        call(cache, model, ids)
    if cache.states.tentative is not None:
        cache.states.end_round()
    assert cache.lengths.tolist() == [8, 8]
    assert_same(feed(model, cache, ids[:, :1]), full(build("qwen3_5"), torch.cat([ids, ids[:, :1]], 1))[:, -1:])


@pytest.mark.parametrize("capacity", [None, 32])
@each_family
def test_a_round_without_a_commit_leaves_no_trace(name: str, capacity: int | None) -> None:
    model, ids, new = sc.prepare(build(name)), draw(2, 9), draw(2, 3, seed=1)
    cache = new_cache(model, capacity=capacity, slack=3)
    feed(model, cache, ids)
    feed(model, cache, new)
    other = cache.fork()
    with cache.speculate(3):
        feed(model, cache, draw(2, 3, seed=2))
    for part in (new, new[:, :1]):
        assert torch.equal(feed(model, cache, part), feed(model, other, part))


def test_a_round_in_an_unprepared_model_is_refused() -> None:
    model, ids = build("mamba2"), draw(2, 5)
    cache = new_cache(model, slack=3)
    feed(model, cache, ids)
    with cache.speculate(2), pytest.raises(errors.StepError, match=r"statecache\.prepare\(model\) first"):
        feed(model, cache, ids[:, :2])


# ---- sizes


@pytest.mark.parametrize("slack", [0, 3])
@each_family
def test_bytes_are_those_of_the_declaration(name: str, slack: int) -> None:
    model, ids = sc.prepare(build(name)), draw(2, 9)
    spec = model_spec(model.config)
    for allocated in ({}, {"rows": 2, "dtype": torch.float32, "device": "cpu"}):
        cache = new_cache(model, capacity=32, slack=slack, **allocated)
        feed(model, cache, ids)
        feed(model, cache, ids[:, :1])
        assert cache.nbytes() == declared_bytes(spec.with_logs() if slack else spec, 2, 32, slack=slack)
        assert cache.nbytes().total == sum(b.untyped_storage().nbytes() for b in cache.buffers())


def test_a_log_takes_a_hundredth_of_copies() -> None:
    given = {"rows": 1, "capacity": 1024, "dtype": torch.bfloat16}
    plain, copies, logged = (
        sc.plan(transformers.Qwen3NextConfig(), **given, **more).states.by_kind
        for more in ({}, {"slack": 8}, {"slack": 8, "prepared": True})
    )
    assert logged["recurrent"] == 2 * plain["recurrent"]  # at the row's end and at its log's
    assert copies["recurrent"] - plain["recurrent"] >= 100 * logged["log"]


# ---- compiled


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize(
    "name",  # a graph takes long to make: of the other operators in `check-long`
    [
        pytest.param(n, marks=() if n in ("mamba2", "qwen3_5", "lfm2", "minimax") else pytest.mark.long)
        for n in OPERATORS
    ],
)
def test_compiled_steps_are_one_graph_and_ragged_rows_one_more(name: str, slack: int) -> None:
    shallow = {"num_hidden_layers": 1} if name in ("mamba", "mamba2", "falcon_h1") else {}
    model, plain, ids = sc.prepare(small(name, **shallow)), small(name, **shallow), draw(2, 20) % oracle.V
    cache, rows = new_cache(model, capacity=32, slack=slack), [ids[:1, :9], ids[1:, :9]]
    feed(model, cache, ids[:, :9])
    addresses = [b.data_ptr() for b in cache.buffers()]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model.forward, fullgraph=True, backend=counter)

    def step(new: Tensor, mask: Tensor | None = None) -> None:
        got = forward(new, attention_mask=mask, use_cache=True, **{families.cache_arg(model): cache}).logits
        for b in range(2):
            if mask is None or mask[b]:
                rows[b] = torch.cat([rows[b], new[b : b + 1]], 1)
                assert_same(got[b : b + 1], full(plain, rows[b])[:, -1:], 1e-5)

    for n in range(9, 14):
        step(ids[:, n : n + 1])
    assert counter.frame_count == 1
    assert cache.lengths.tolist() == [14, 14]
    if slack:
        cache.rollback(torch.tensor([3, 1]))
        rows = [rows[0][:, :-3], rows[1][:, :-1]]
        for n in range(14, 17):
            step(ids[:, n : n + 1])
        assert counter.frame_count == 2
        assert cache.lengths.tolist() == [14, 16]
    counter.frame_count = 0
    for real in ([1, 1], [0, 1], [1, 0]):
        step(ids[:, 18:19], torch.tensor(real)[:, None])
    assert counter.frame_count == 1
    assert cache.lengths.tolist() == [len(row[0]) for row in rows]
    assert addresses == [b.data_ptr() for b in cache.buffers()]


# ---- modules that are not what they were


class Int8Linear(nn.Module):
    """Weights as whole numbers and a scale a row; there is no `weight` to take."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.bias = linear.bias

    def plain(self) -> Tensor:
        return self.codes * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.plain(), self.bias)


@each_family
def test_quantised_linear_layers_are_called_as_modules(name: str) -> None:
    model, plain, ids = build(name), build(name), draw(2, 9)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not any(
            name in path for name in ("lm_head", "message_gate")
        ):  # called as modules
            quantised = Int8Linear(module)
            model.set_submodule(path, quantised)
            plain.get_submodule(path).weight.copy_(quantised.plain())
    sc.prepare(model)
    cache = new_cache(model, slack=3)
    got = torch.cat([feed(model, cache, part) for part in ids.split((4, 3, 1, 1), 1)], 1)
    assert_same(got, full(plain, ids), 1e-4)


class Adapted(nn.Module):
    """A linear layer with an adapter of low rank beside it, as peft has them: its weights are those below."""

    def __init__(self, linear: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = linear
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(linear.out_features, rank, generator=generator))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.mT @ self.up.mT

    def merged(self) -> Tensor:
        return self.weight + self.up @ self.down


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_an_adapter_of_dt_proj_counts_in_prepared_models_alone(name: str) -> None:
    model, merged, ids = build(name), build(name), draw(2, 9)
    alone = full(model, ids)
    for path, module in list(model.named_modules()):
        if path.endswith("dt_proj"):
            adapted = Adapted(module)
            model.set_submodule(path, adapted)
            merged.get_submodule(path).weight.copy_(adapted.merged())
    assert_same(full(model, ids), alone)  # the model's own code reads the weights below the adapter
    sc.prepare(model)
    cache = new_cache(model, slack=3)
    want = full(merged, ids)
    assert (want - alone).abs().max() > 1e-2
    got = torch.cat([feed(model, cache, part) for part in ids.split((4, 3, 1, 1), 1)], 1)
    assert_same(got, want)
    assert_same(full(model, ids), want)
    with torch.enable_grad():
        model(ids, use_cache=False).logits.square().sum().backward()
    found = [p.grad for path, p in model.named_parameters() if path.endswith("dt_proj.up")]
    assert found and all(grad is not None and grad.any() for grad in found)


class Offloading:
    """What accelerate's hook does: weights are there while their module is called, and away otherwise."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.clone() for name, p in module.named_parameters(recurse=False)}
        self.post_forward(module, None)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name, p in module.named_parameters(recurse=False):
            p.copy_(self.weights[name])
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for p in module.parameters(recurse=False):
            p.fill_(float("nan"))
        return output


def offload(model: nn.Module) -> None:
    """Hang such a hook on every module that has weights of its own, as accelerate does."""

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module._hf_hook, module._old_forward = Offloading(module), module.forward
            module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)


@pytest.mark.parametrize("first", ["prepare", "offload"])
@each_family
def test_offloaded_weights_come_where_they_are_needed(name: str, first: str) -> None:
    model, ids, new = build(name, tie_word_embeddings=False), draw(2, 9), draw(2, 3, seed=1)
    want = full(build(name, tie_word_embeddings=False), torch.cat([ids[:, :7], new], 1))[:, 7:]
    for change in (sc.prepare, offload) if first == "prepare" else (offload, sc.prepare):
        change(model)
    cache = new_cache(model, slack=4)
    feed(model, cache, ids[:, :4])
    for part in ids[:, 4:].split((3, 2), 1):
        feed(model, cache, part)
    cache.rollback(2)
    assert_same(feed(model, cache, new), want)
    assert all(p.isnan().all() for p in model.parameters())
    sc.unprepare(model)
    assert not any(isinstance(getattr(v, "__self__", None), Mixer) for m in model.modules() for v in vars(m).values())
    assert_same(full(model, torch.cat([ids[:, :7], new], 1))[:, 7:], want)


def test_a_model_that_sees_is_prepared_at_its_text_decoder() -> None:
    torch.manual_seed(0)
    text = build("qwen3_5").config.to_dict()
    eye = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
    }
    config = transformers.Qwen3_5Config(text_config=text, vision_config=eye)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    ids = draw(2, 12)
    want = full(model, ids)
    cache = new_cache(sc.prepare(model), slack=3)
    got = torch.cat([feed(model, cache, ids[:, :7]), feed(model, cache, ids[:, 7:])], 1)
    assert_same(got, want)
