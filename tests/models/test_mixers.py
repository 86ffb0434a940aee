"""Mixers by themselves: their rows, the parts of a log entry, what they keep of weights, and what autocast does."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from math import prod
from types import FrameType
from typing import Any

import families
import pytest
import torch
from tiny_models import assert_same, draw
from torch import Tensor, nn

import statecache as sc
from statecache.models.mixers import MIXERS, Recurrent
from statecache.models.mixers.base import Derived, decay
from statecache.models.names import FUNCTIONS_TAKE
from statecache.models.table import model_spec
from statecache.replay import Operators

NAMES = list(families.FAMILIES)
OPERATORS = ["mamba", "mamba2", "qwen3_5", "kimi_linear", "minimax", "zamba", "zaya", "recurrent_gemma"]
OPERATORS = [name for name in OPERATORS if name in NAMES]
each_family = pytest.mark.parametrize("name", NAMES)
each_operator = pytest.mark.parametrize("name", OPERATORS)


def build(name: str) -> Any:
    return families.build(name)[0].requires_grad_(False)


def mixers(model: nn.Module) -> list[Any]:
    """A mixer for each module that has one."""
    decoder: Any = next(m for m in model.modules() if "layers" in m._modules and _mixed(m))
    made = []
    for index, layer in enumerate(decoder.layers):
        for module in _mixed(layer):
            made.append(MIXERS[type(module).__name__](module, module.forward))
            made[-1].layer = index
    return made


def _mixed(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if type(m).__name__ in MIXERS]


def feed(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=True, **{families.cache_arg(model): cache}).logits


# ---- the table


@each_family
def test_rows_say_what_modules_have(name: str) -> None:
    """What a family has that others of its operator have not stands in its row, and shows in its modules."""
    for mixer in mixers(build(name)):
        kind, m = type(mixer).__name__, mixer.module
        if kind == "Scan":
            assert bool(mixer.norms) == hasattr(m, "dt_layernorm")
            assert mixer.groups == getattr(m, "n_mamba_heads", 1)
        if kind == "SSD":
            assert mixer.scaled == hasattr(m, "mup_vector")
            assert mixer.normed == getattr(m, "mamba_rms_norm", True)
        if kind == "Delta":
            assert mixer.doubled == getattr(m, "allow_neg_eigval", False)


@each_family
def test_parts_fill_the_entries_of_the_log(name: str) -> None:
    model = build(name)
    layers = model_spec(model.config).layers
    for mixer in mixers(model):
        if isinstance(mixer, Recurrent):
            widths = [sum(prod(shape) for shape in shapes) for shapes in (mixer.inputs, mixer.gates)]
            assert widths == [state.shape[0] for state in layers[mixer.layer].log]
            assert len(mixer.operator.taken) == len(mixer.inputs) + len(mixer.gates)


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
def test_a_convolution_has_the_models_activation(name: str) -> None:
    plain = families.build(name, hidden_act="gelu")[0]
    model, ids = sc.prepare(copy.deepcopy(plain)), draw(2, 12)
    cache = sc.StateCache(model.config)
    with torch.no_grad():
        got = torch.cat([feed(model, cache, part) for part in ids.split((9, 1, 2), 1)], 1)
        assert_same(got, plain(ids, use_cache=False).logits)


@pytest.mark.skipif("recurrent_gemma" not in NAMES, reason="of later transformers")
def test_an_rg_lru_begins_anew_where_positions_do() -> None:
    plain, ids = build("recurrent_gemma"), draw(2, 12)
    positions = torch.tensor([[*range(7), *range(5)], [*range(12)]])
    model, mask = (
        sc.prepare(copy.deepcopy(plain)),
        torch.ones_like(ids),
    )  # without one the attention would part them, too
    cache, got = sc.StateCache(model.config, slack=3), []
    with torch.no_grad():
        want = plain(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        for part, at in zip(ids.split((5, 1, 1, 1, 4), 1), positions.split((5, 1, 1, 1, 4), 1), strict=True):
            got.append(model(part, position_ids=at, use_cache=True, **{families.cache_arg(model): cache}).logits)
        assert_same(torch.cat(got, 1), want)
        cache.rollback(3)
        again = {"position_ids": positions[:, 9:], families.cache_arg(model): cache}
        assert_same(model(ids[:, 9:], use_cache=True, **again).logits, want[:, 9:])
    assert not torch.allclose(want, plain(ids, use_cache=False).logits)


@pytest.mark.skipif("glm5_next" not in NAMES, reason="of later transformers")
@pytest.mark.parametrize("name", [name for name in NAMES if name in ("inkling", "inkling2")])
def test_a_residual_convolution_counts_in_float32(name: str) -> None:
    model = families.build(name, dtype=torch.bfloat16)[0]
    modules = [m for m in model.modules() if type(m).__name__.endswith("ShortConvolution")]
    assert modules
    for module in modules[:4]:
        mixer = MIXERS[type(module).__name__](module, module.forward)
        width = getattr(module, "conv1d", None)
        x = torch.randn(2, 9, len(module.static_weight[0]) if width is None else width.in_channels).bfloat16()
        given = [torch.randn(2, 9, module.weight_proj.in_features).bfloat16()] if width is None else []
        mixer.layer = 0
        with torch.no_grad():
            assert torch.equal(mixer.forward(x, *given), module(x, *given))


@pytest.mark.parametrize("name", [name for name in NAMES if name == "inkling"])
def test_a_key_out_of_the_reach_of_biases_has_none(name: str) -> None:
    model, ids = build(name), draw(1, 40)  # a bias for each of 16 distances
    want = model(ids, use_cache=False).logits
    cache = sc.StateCache(sc.prepare(model).config)
    got = torch.cat([feed(model, cache, part) for part in ids.split((20, 19, 1), 1)], 1)
    assert_same(got, want)


@pytest.mark.parametrize("tail", [True, False])
def test_a_pooled_index_chooses_what_the_modules_own_does(tail: bool) -> None:
    """Of the tokens that there are, in any order, in every row at its own length; and not all of them."""
    model = build("glm5_next")
    mixer = next(m for m in mixers(model) if type(m).__name__ == "PooledIndex")
    m, config = mixer.module, model.config.get_text_config()
    m.index_kpool_always_select_tail = tail
    torch.manual_seed(0)
    x, query = torch.randn(2, 30, config.hidden_size), torch.randn(2, 30, config.q_lora_rank)
    cache = sc.StateCache(model.config, rows=2, dtype=torch.float32, device="cpu", capacity=40)
    sc.prepare(model)
    got: list[list[set[int]]] = [[], []]
    with torch.no_grad():
        want = mixer.unmodified(x, query, attention_mask=torch.ones(2, 30, dtype=torch.bool), **{FUNCTIONS_TAKE: None})
        for counts in ([9, 7], [1, 0], [5, 8], [15, 15]):
            done, width = torch.tensor([[len(row)] for row in got]), max(counts)
            at = (done + torch.arange(width)).clamp(max=29)[..., None]
            writer = cache.begin(x, width, counts, None, counted=None, operators=Operators())
            index = mixer.forward(x.take_along_dim(at, 1), query.take_along_dim(at, 1), None, **{FUNCTIONS_TAKE: cache})
            writer.end()
            for row, n in enumerate(counts):
                got[row] += [set(each.tolist()) - {-1} for each in index[row, :n]]
    assert got == [[set(each.tolist()) - {-1} for each in row] for row in want]
    assert max(len(chosen) for chosen in got[0]) <= config.index_topk + config.index_kpool - 1


@pytest.mark.skipif("qwen4_exp" not in NAMES, reason="of later transformers")
def test_a_block_index_chooses_what_the_modules_own_does() -> None:
    """Of the tokens that there are, in every row at its own length; and not all of them."""
    model = build("qwen4_exp")
    mixer = next(m for m in mixers(model) if type(m).__name__ == "BlockIndex")
    config, rotary, layer = model.config, model.model.rotary_emb, mixer.layer
    torch.manual_seed(0)
    x, causal = torch.randn(2, 30, config.hidden_size), torch.ones(30, 30, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    cache = sc.StateCache(config, rows=2, dtype=torch.float32, device="cpu", capacity=40)
    sc.prepare(model)
    got: list[list[set[int]]] = [[], []]
    with torch.no_grad():
        want = mixer.unmodified(x, rotary(x, torch.arange(30).expand(3, 2, -1)), causal, None)
        for counts in ([9, 7], [1, 0], [5, 8], [15, 15]):
            done, width = torch.tensor([[len(row)] for row in got]), max(counts)
            place = done + torch.arange(width)
            part = x.take_along_dim(place.clamp(max=29)[..., None], 1)
            writer, new = (
                cache.begin(x, width, counts, None, counted=None, operators=Operators()),
                place.expand(3, 2, -1),
            )
            place = torch.cat([cache.positions(layer), new], -1)
            cache.take_positions(layer, place)
            seen = mixer.forward(part, rotary(x, place), None, cache)
            writer.end()
            for row, n in enumerate(counts):
                got[row] += [set(each.nonzero().flatten().tolist()) for each in seen[row, 0, :n]]
    assert got == [[set(each.nonzero().flatten().tolist()) for each in row[0]] for row in want]
    assert max(len(chosen) for chosen in got[0]) == config.indexer_budget + config.indexer_compress_ratio - 1


@pytest.mark.skipif("qwen4_exp" not in NAMES, reason="of later transformers")
@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_a_block_index_tells_every_form_of_attention(form: str) -> None:
    plain = families.build("qwen4_exp", attn=form)[0]
    model, ids = sc.prepare(copy.deepcopy(plain)), draw(2, 24)
    cache = sc.StateCache(model.config)
    with torch.no_grad():
        got = torch.cat([feed(model, cache, part) for part in ids.split((15, 1, 8), 1)], 1)
        assert_same(got, plain(ids, use_cache=False).logits)


# ---- the operator of a module


def tokens(mixer: Recurrent, n: int) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Inputs and gates of n tokens (2, n, *shape), queries, and a state."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, *shape) for shape in mixer.inputs]
    drawn = {"g": lambda *shape: -torch.rand(shape), "alive": torch.ones}
    names = mixer.operator.taken[len(inputs) :]
    gates = [drawn.get(name, torch.rand)(2, n, *shape) for name, shape in zip(names, mixer.gates, strict=True)]
    query = torch.randn(2, n, *mixer.query)
    spec = next(s for s in model_spec(mixer.module.config).layers[mixer.layer].states if s.name == "recurrent")
    return (*inputs, *gates), query, torch.randn(2, *spec.shape)


def recurrent(name: str) -> Recurrent:
    model = build(name)
    mixer = next(m for m in mixers(model) if isinstance(m, Recurrent))
    mixer.module.config = model.config
    return mixer


def forms(mixer: Recurrent) -> list[Tensor]:
    """Outputs and states of five tokens, by step, fold and chunk."""
    taken, query, state = tokens(mixer, 5)
    stepped, folded = state.clone(), state.clone()
    y = [mixer.step(tuple(part[:, t] for part in taken), query[:, t], stepped) for t in range(5)]
    mixer.fold(taken, folded, None)
    return [torch.stack(y, 1), stepped, folded, *mixer.chunk(taken, query, state)[:2]]


@each_operator
def test_step_fold_and_chunk_are_one_recurrence(name: str) -> None:
    y, stepped, folded, chunked, after = forms(recurrent(name))
    assert torch.equal(stepped, folded)
    assert_same(chunked, y, 1e-5)
    assert_same(after, stepped, 1e-5)


@each_operator
def test_counts_and_marks_reach_the_operator(name: str) -> None:
    mixer = recurrent(name)
    taken, query, state = tokens(mixer, 5)
    count, at = torch.tensor([0, 3]), torch.tensor([[1, 2], [0, 3]])
    _, after, states = mixer.chunk(taken, query, state, count, at)
    folded = state.clone()
    mixer.fold(taken, folded, count)
    assert_same(after, folded, 1e-5)
    assert states is not None and states.shape == (2, 2, *state.shape[1:])
    assert torch.equal(states[1, 0], state[1])
    assert_same(states[1, 1], folded[1], 1e-5)


@each_operator
def test_autocast_does_not_reach_into_the_operator(name: str) -> None:
    mixer = recurrent(name)
    expected = forms(mixer)
    with torch.autocast("cpu", torch.bfloat16):
        got = forms(mixer)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_under_autocast_a_prepared_model_is_no_worse(name: str) -> None:
    plain, errors = build(name), Counter()
    model = sc.prepare(copy.deepcopy(plain))
    with torch.no_grad():
        for seed in range(4):
            ids = draw(2, 48, seed=seed)
            want = plain(ids, use_cache=False).logits
            for label, each in (("plain", plain), ("prepared", model)):
                cache = sc.StateCache(each.config)
                with torch.autocast("cpu", torch.bfloat16):
                    got = torch.cat([feed(each, cache, part) for part in ids.split((24, *[1] * 24), 1)], 1)
                errors[label] += float((got - want).abs().mean())
    assert errors["prepared"] <= 1.01 * errors["plain"]  # both mostly of the projections, in bfloat16


# ---- what is kept of a weight


class Holder(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(-1, 1, 7, dtype=dtype))


class Counted:
    """`decay`, and how often it was computed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, weight: Tensor) -> Tensor:
        self.times += 1
        return decay(weight)


def kept() -> tuple[Holder, Derived, Counted]:
    """A weight that has been asked for."""
    module, compute = Holder(), Counted()
    derived = Derived("A_log", compute)
    with torch.no_grad():
        derived(module)
    assert compute.times == 1
    return module, derived, compute


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_that_stays_is_computed_once(mode: Any) -> None:
    module, derived, compute = kept()
    with mode():
        for _ in range(3):
            assert torch.equal(derived(module), decay(module.A_log))
        assert compute.times == 1
        derived(module, anew=True)
        assert compute.times == 2


def _optimized(optimizer: type[torch.optim.Optimizer], **options: Any) -> Callable[[Holder], None]:
    def change(module: Holder) -> None:
        module.A_log.grad = torch.ones_like(module.A_log)
        optimizer(module.parameters(), lr=0.1, **options).step()

    return change


CHANGES: dict[str, Callable[[Holder], Any]] = {
    "written to": lambda m: m.A_log.add_(1),
    "loaded": lambda m: m.load_state_dict({"A_log": torch.ones(7)}),
    "assigned": lambda m: m.load_state_dict({"A_log": torch.ones(7)}, assign=True),
    "another": lambda m: setattr(m, "A_log", nn.Parameter(torch.ones(7))),
    "other data": lambda m: setattr(m.A_log, "data", torch.ones(7)),
    "wider": lambda m: m.double(),
    "rounded": lambda m: m.half().float(),
    "read otherwise": lambda m: setattr(m.A_log, "data", m.A_log.data.view(torch.bfloat16)),
    "moved away": lambda m: m.to("meta"),
    "SGD": _optimized(torch.optim.SGD),
    "AdamW": _optimized(torch.optim.AdamW, foreach=True),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", CHANGES)
def test_a_weight_that_changed_is_seen(case: str, mode: Any) -> None:
    module, derived, _ = kept()
    with torch.no_grad():
        CHANGES[case](module)
    with mode():
        got, want = derived(module), decay(module.A_log)
    assert (got.dtype, got.device) == (want.dtype, want.device)
    assert want.is_meta or torch.equal(got, want)


def test_the_same_memory_in_another_parameter_is_another_weight() -> None:
    module, derived, _ = kept()
    with torch.no_grad():
        module.A_log.add_(1)
        derived(module)
        same = nn.Parameter(module.A_log.data)
        same.add_(1)  # its own first write
        assert same._version == module.A_log._version
        module.A_log = same
        assert torch.equal(derived(module), decay(same))


def test_the_memory_of_a_weight_is_not_given_to_another_while_its_address_counts() -> None:
    module, derived, _ = kept()
    address = module.A_log.data_ptr()
    module.A_log.data = torch.ones(7)
    assert derived._kept is not None
    assert address in [held.data_ptr() for held in derived._kept if isinstance(held, Tensor)]


@pytest.mark.parametrize("change", ["data", "fused"])
def test_a_write_behind_autograds_back_is_seen_where_it_is_computed_anew(change: str) -> None:
    module, derived, _ = kept()
    if change == "data":
        module.A_log.data.add_(1)
    else:
        _optimized(torch.optim.AdamW, fused=True)(module)
    with torch.no_grad():
        assert torch.equal(derived(module, anew=True), decay(module.A_log))
        assert torch.equal(derived(module), decay(module.A_log))


def test_what_wants_a_gradient_is_computed_with_one_and_not_kept() -> None:
    module, derived, compute = kept()
    (gradient,) = torch.autograd.grad(derived(module).sum(), [module.A_log])
    assert torch.equal(gradient, decay(module.A_log).detach())
    _optimized(torch.optim.SGD, fused=True)(module)  # which no version shows
    with torch.no_grad():
        got = derived(module)
        assert torch.equal(got, decay(module.A_log)) and not got.requires_grad
    assert compute.times == 3


def test_what_was_kept_in_inference_mode_serves_a_backward_pass() -> None:
    module, derived = Holder().requires_grad_(False), Derived("A_log", decay)
    with torch.inference_mode():
        derived(module)
    x = torch.ones(7, requires_grad=True)
    (x * derived(module)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, decay(module.A_log))


def test_weights_made_in_inference_mode_are_never_kept() -> None:
    with torch.inference_mode():
        module, derived = Holder(), Derived("A_log", decay)
        derived(module)
        module.A_log.add_(1)  # counted by nobody
        assert torch.equal(derived(module), decay(module.A_log))


def test_nothing_is_kept_of_a_module_whose_weights_come_and_go() -> None:
    module, derived, compute = kept()
    module._hf_hook = object()
    with torch.no_grad():
        assert torch.equal(derived(module), derived(module))
    assert compute.times == 3 and derived._kept is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_keeps_nothing(copied: Callable[[Any], Any]) -> None:
    module, derived = Holder(), Derived("A_log", decay)
    with torch.no_grad():
        derived(module)
        other, same = copied((module, derived))
        assert derived._kept is not None and same._kept is None
        assert torch.equal(same(other), decay(other.A_log))


def test_a_compiled_graph_computes_it_every_time() -> None:
    module, derived, _ = kept()
    read = torch.compile(lambda: derived(module) * 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(read(), decay(module.A_log))
            module.A_log.data.add_(1)


@each_operator
def test_a_pass_of_several_tokens_sees_every_write(name: str) -> None:
    model, other, ids = sc.prepare(build(name)), sc.prepare(build(name)), draw(2, 9)
    caches = [sc.StateCache(model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            feed(model, cache, ids[:, :6])
        for each in (model, other):  # which has kept nothing yet
            for key, parameter in each.named_parameters():
                if key.endswith("A_log"):
                    parameter.data.mul_(1.5)
        for part in ids[:, 6:].split((2, 1), 1):
            assert torch.equal(feed(model, caches[0], part), feed(other, caches[1], part))


@pytest.mark.parametrize("slack", [0, 3])
@each_operator
def test_decoding_goes_on_with_the_weights_that_were_loaded(name: str, slack: int) -> None:
    """In the middle of a row: with the states as they are, as a model that never had other weights goes on."""
    model, ids = sc.prepare(build(name)), draw(2, 9)
    other = sc.prepare(build(name))
    with torch.no_grad():
        for key, parameter in other.named_parameters():
            if key.endswith(("A_log", "slope_rate")):
                parameter.mul_(1.5)
        caches = [sc.StateCache(model.config, slack=slack) for _ in range(2)]
        for cache in caches:
            for part in ids[:, :8].split((5, 1, 1, 1), 1):
                feed(model, cache, part)
        model.load_state_dict(other.state_dict())
        assert torch.equal(feed(model, caches[0], ids[:, 8:]), feed(other, caches[1], ids[:, 8:]))


class Offloading:
    """Does what accelerate's hook does: a module's weights are made while it is called, and are on "meta" otherwise."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
        self.post_forward(module, None)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for name, weight in self.weights.items():
            module._parameters[name] = nn.Parameter(weight.clone(), requires_grad=False)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for name, weight in self.weights.items():
            module._parameters[name] = nn.Parameter(weight.to("meta"), requires_grad=False)
        return output


def offload(module: Any) -> None:
    hook, forward = Offloading(module), module.forward

    def through(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, module._old_forward(*args, **kwargs))

    module._hf_hook, module._old_forward, module.forward = hook, forward, through


@pytest.mark.parametrize("slack", [0, 3])
@each_operator
def test_offloaded_weights_may_change_while_they_are_away(name: str, slack: int) -> None:
    """Whatever is kept of a layer's weights, its next token sees those that come."""
    model, other, ids = sc.prepare(build(name)), sc.prepare(build(name)), draw(2, 12)
    modules = [m for mixer in mixers(model) for m in mixer.module.modules()]
    for module in modules:
        if module._parameters:
            offload(module)
    cache, same = (sc.StateCache(model.config, slack=slack) for _ in range(2))
    with torch.no_grad():
        for part in ids[:, :9].split((6, 1, 1, 1), 1):
            assert torch.equal(feed(model, cache, part), feed(other, same, part))
        for one, two in zip(mixers(model), mixers(other), strict=True):
            if "A_log" in two.module._parameters:
                two.module.A_log.add_(0.5)
                one.module._hf_hook.weights["A_log"].add_(0.5)
        for part in ids[:, 9:].split(1, 1):
            assert torch.equal(feed(model, cache, part), feed(other, same, part))
    assert all(p.is_meta for m in modules for p in m._parameters.values() if p is not None)


# ---- the trip of a token


def test_a_token_passes_few_functions() -> None:
    """Of mixers and operators, in a Mamba-2 layer; the cache's own come on top."""
    model, ids = sc.prepare(build("mamba2")), draw(1, 12)
    cache, entered = sc.StateCache(model.config), []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and ("/statecache/ops/" in path or "/models/mixers/" in path):
            entered.append(frame.f_code.co_name)

    with torch.no_grad():
        for part in ids[:, :11].split((8, 1, 1, 1), 1):
            feed(model, cache, part)
        sys.setprofile(profile)
        try:
            feed(model, cache, ids[:, 11:])
        finally:
            sys.setprofile(None)
    assert len(entered) == 9 * model.config.num_hidden_layers, entered


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3_5", "minimax", "recurrent_gemma"])
def test_a_kernel_may_stand_in_for_the_whole_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`advance` is all that touches the states: what stands in for it, and calls it, changes no bit."""
    model, ids, seen = sc.prepare(build(name)), draw(2, 7), []
    kind = type(next(m for m in mixers(model) if isinstance(m, Recurrent)))
    layers = sum(isinstance(m, kind) for m in mixers(model))
    with torch.no_grad():
        want = feed(model, sc.StateCache(model.config), ids)
        advance = kind.advance

        def kernel(self: Any, projected: tuple[Tensor, ...], states: Any) -> Tensor:
            seen.append({part.shape[:2] for part in projected})
            return advance(self, projected, states)

        monkeypatch.setattr(kind, "advance", kernel)
        assert torch.equal(feed(model, sc.StateCache(model.config), ids), want)
    assert seen == [{(2, 7)}] * layers
