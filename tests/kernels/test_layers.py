"""Layers run by kernels against the same layers run by their modules, in float32, on tiny models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from drawn import DEVICE, HALF, draw, error
from torch.nn.modules.module import register_module_forward_hook
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import statecache as sc
from statecache.kernels import delta_step, ssd_step
from statecache.kernels import experts as kernel_experts
from statecache.kernels import linear as kernel_linear
from statecache.models.decoder import decoder_of, layers_of
from statecache.models.fused import by_kernels, ways
from statecache.models.product import GOES_ALONG, Handed, Into, handed, product, shaped
from statecache.models.table import KINDS
from statecache.models.whole import LAYERS

STEPS = 2
TWO = ["linear_attention", "full_attention"]
SMALL: dict[str, dict[str, Any]] = {  # a layer of each kind, and no experts
    "mamba": {"num_hidden_layers": 2},
    "falcon_mamba": {"num_hidden_layers": 2},
    "mamba2": {"num_hidden_layers": 2},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.1,
        "num_hidden_layers": 2,
        "layer_types": TWO,
    },
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "falcon_h1": {
        "num_hidden_layers": 2,
        "attention_in_multiplier": 0.7,
        "attention_out_multiplier": 0.6,
        "ssm_in_multiplier": 0.8,
        "ssm_out_multiplier": 1.3,
        "key_multiplier": 0.4,
        "mlp_multipliers": [0.9, 1.2],
        "ssm_multipliers": [0.5, 0.6, 0.7, 1.8, 0.9],
    },
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "qwen3_5": {"num_hidden_layers": 2, "layer_types": TWO},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}


def model_of(name: str) -> Any:
    model, _ = families.build(name, **SMALL.get(name, {}))
    return sc.prepare(model.to(DEVICE))


def texts(rows: int) -> torch.Tensor:
    return torch.randint(1, 90, (rows, 9 + STEPS), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def logits(
    model: Any, ids: torch.Tensor, kernels: bool, counts: list[int] | None = None, store: str | None = None
) -> torch.Tensor:
    """Of the steps after a prompt of nine tokens, of which row 1 is one behind. `store`: of recurrent states."""
    rows, kept = len(ids), {"dtype": model.dtype, "device": DEVICE, "recurrent_store": store}
    cache = sc.StateCache(model.config, capacity=32, slack=1, back=False, rows=rows, **kept)
    prompt = ids[:, :9]
    name = families.cache_arg(model)
    with torch.no_grad():
        cache.expect([9 if row != 1 else 8 for row in range(rows)])
        model(prompt, **{name: cache})
        out = []
        for n in range(9, 9 + STEPS):
            if counts is not None:
                cache.expect(counts)
            if kernels:
                with by_kernels(model):
                    out.append(model(ids[:, n : n + 1], **{name: cache}).logits)
            else:
                out.append(model(ids[:, n : n + 1], **{name: cache}).logits)
    return torch.cat(out, 1)


SLOW = () if DEVICE == "cuda" else pytest.mark.long  # in the interpreter
CASES = [("mamba2", 1), ("granitemoehybrid", 2), ("qwen3_5", 2), ("bamba", 1), ("nemotron_h", 2), ("lfm2", 2)]
CASES += [("falcon_mamba", 2), ("falcon_h1", 2)]
MORE = [("mamba2", 70), ("granitemoehybrid", 1), ("granitemoehybrid", 17), ("qwen3_5", 1), ("qwen3_5", 17)]
MORE += [("falcon_h1", 70), ("lfm2", 17), ("nemotron_h", 70), ("mamba", 1), ("jamba", 2)]


@pytest.mark.parametrize(("name", "rows"), [*CASES, *(pytest.param(*case, marks=SLOW) for case in MORE)])
def test_whole_layers_give_what_their_modules_give(name: str, rows: int) -> None:
    model = model_of(name)
    assert all(way.way == "whole" for way in ways(model)), list(map(str, ways(model)))
    ids = texts(rows)
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert not torch.equal(got, want)  # kernels did run


@pytest.mark.parametrize("name", ["qwen3_5", pytest.param("mamba2", marks=SLOW)])
def test_layers_take_states_that_are_kept_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, taken = model_of(name), texts(2), []
    for kernel in (ssd_step, delta_step):
        own = kernel.step
        monkeypatch.setattr(
            kernel, "step", lambda *args, own=own, **kwargs: (taken.append(args[-3].dtype), own(*args, **kwargs))[1]
        )
    want, got = (logits(model, ids, kernels=each, store="bfloat16") for each in (False, True))
    first, second = ((got - want).abs().amax((0, 2)) / want.abs().max()).tolist()
    assert taken and set(taken) == {torch.bfloat16}
    assert 0 < first < 1e-5  # from the same states
    assert second < 1e-2  # from states of which a last place may be another


HANDED = [("qwen3_5", 2, 3), ("falcon_h1", 3, 3), ("nemotron_h", 2, 2), pytest.param("lfm2", 17, 3, marks=SLOW)]


@pytest.mark.parametrize(("name", "rows", "sums"), HANDED)
def test_sums_go_on_to_their_norms_ready(name: str, rows: int, sums: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of(name), texts(rows)
    behind, normed, taken = [], [], []
    own, first = kernel_linear.added, kernel_linear.linear
    monkeypatch.setattr(kernel_linear, "added", lambda *args, **given: (behind.append(args[3]), own(*args, **given))[1])
    monkeypatch.setattr(
        kernel_linear,
        "linear",
        lambda *args, **given: (
            normed.append(given.get("norm")),
            taken.append(given.get("squares")),
            first(*args, **given),
        )[2],
    )
    logits(model, ids, kernels=True)
    assert len(behind) == STEPS * sums  # all but the last, and that of a mixer to which attention is added
    assert sum(squares is not None for squares in taken) >= STEPS * sums
    layer: Any = layers_of(decoder_of(model))[0]
    norm = layer.get_submodule(LAYERS[type(layer).__name__].before)
    assert all(weight is None or weight is norm.weight for weight in normed)


@pytest.mark.parametrize("how", ["in place", "anew", "seen in another form"])
def test_a_sum_that_was_changed_since_is_normed_again(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of("qwen3_5"), texts(2)
    kind = type(model.model.layers[0])
    own: Any = kind.__call__
    change = {
        "in place": lambda x: x.add_(0.5),
        "anew": lambda x: x + 0.5,
        "seen in another form": lambda x: (x.view(-1)[0].add_(0.5), x)[1],
    }[how]
    monkeypatch.setattr(kind, "__call__", lambda self, x, *args, **given: own(self, change(x), *args, **given))
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5 and not torch.equal(got, want)


def test_a_norm_that_is_another_takes_the_sum_itself() -> None:
    model = model_of("qwen3_5")
    first, other = (layer.input_layernorm for layer in model.model.layers)
    x, weight = draw(2, 64), draw(64, 32)
    total = product(x[:, :32], weight, into=Into(x, behind=first))
    made = handed(total, first)
    assert isinstance(made, Handed) and handed(total, other) is other and handed(total.clone(), first) is first
    seen = handed(shaped(total, 2, 1, 64), first)
    assert seen.weighted is made.weighted and seen.squares is made.squares
    after = draw(8, 64, dtype=HALF)  # of another dtype than the product in front
    assert torch.equal(product(total, after, by=made), product(total, after, by=first))
    turned = total.t().add_(0.5)  # a shape that is a copy of what was changed
    assert handed(shaped(total, 128), first) is first and handed(shaped(turned, 128), first) is first


def test_what_has_no_place_or_no_version_is_not_handed_on() -> None:
    norm = model_of("qwen3_5").model.layers[0].input_layernorm
    for dtype, kept in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        x, weight, total = draw(2, 32, dtype=dtype), draw(64, 32, dtype=dtype), draw(2, 64, dtype=kept)
        assert handed(product(x, weight, into=Into(total, behind=norm)), norm) is norm
    x, weight, total = draw(2, 32), draw(64, 32), draw(2, 64)
    with torch.inference_mode():
        made = product(x, weight, into=Into(total, behind=norm))
        assert made.is_inference() and getattr(made, GOES_ALONG, None) is None
    assert isinstance(handed(product(x, weight, into=Into(total, behind=norm)), norm), Handed)


SPARSE = ("granitemoehybrid", "jamba", "nemotron_h", "qwen3_next", "qwen3_5_moe", "lfm2_moe")


def sparse_model(name: str, **options: Any) -> Any:
    """A model with experts, whose choice everything has a say in."""
    model = sc.prepare(families.build(name, **options)[0].to(DEVICE))
    for path, buffer in model.named_buffers():
        if path.endswith(("expert_bias", "e_score_correction_bias")):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    for module in model.modules():
        if hasattr(module, "routed_scaling_factor"):
            module.routed_scaling_factor = 2.5
    return model


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, 2) for name in SPARSE), *(pytest.param(name, 17, marks=SLOW) for name in ("lfm2_moe", "qwen3_5_moe"))],
)
def test_layers_with_experts_give_what_their_modules_give(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ran = sparse_model(name), []
    own = kernel_experts.experts
    monkeypatch.setattr(kernel_experts, "experts", lambda *given, **more: (ran.append(0), own(*given, **more))[1])
    monkeypatch.setattr(kernel_experts, "TOKENS", 16)  # so that they are read for each of 17
    assert all(way.way == "whole" and not way.why for way in ways(model)), list(map(str, ways(model)))
    ids = texts(rows)
    want = logits(model, ids, kernels=False)
    assert not ran
    got = logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert len(ran) == STEPS * sum(hasattr(module, "has_gate") for module in model.modules())


ASKED = [
    ("qwen3_next", {"norm_topk_prob": False, "linear_num_key_heads": 2, "linear_num_value_heads": 2}),
    ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False}),
    ("granitemoehybrid", {"output_router_logits": True}),
]


@pytest.mark.parametrize(("name", "options"), ASKED, ids=[name for name, _ in ASKED])
def test_what_a_configuration_asks_of_experts(name: str, options: dict[str, Any]) -> None:
    model, ids = sparse_model(name, **options), texts(2)
    assert all(way.way == "whole" for way in ways(model))
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5 and not torch.equal(got, want)


def test_a_wide_router_is_wide_for_many_tokens() -> None:
    x, weight = draw(70, 64, dtype=torch.bfloat16), draw(16, 64, dtype=torch.bfloat16)
    want = x.double() @ weight.double().mT
    assert error(product(x, weight, dtype=torch.float32), want) < 2e-6


def test_experts_that_somebody_runs_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called, ids = sparse_model("qwen3_5_moe"), [], texts(1)
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping,
        "mine",
        lambda module, x, index, share: (called.append(0), grouped_mm_experts_forward(module, x, index, share))[1],
    )
    model.config._experts_implementation = "mine"
    assert {way.why for way in ways(model)} == {"but for its experts: no kernel reads its experts"}
    logits(model, ids, kernels=True)
    assert len(called) == (1 + STEPS) * len(model.model.layers)


def test_experts_of_many_tokens_go_by_their_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model("qwen3_5_moe")
    monkeypatch.setattr(kernel_experts, "TOKENS", 0)
    monkeypatch.setattr(kernel_experts, "experts", None)
    ids = texts(2)
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


@pytest.mark.parametrize(
    "path", ["mlp", "mlp.gate", "mlp.experts", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"]
)
def test_experts_with_a_hook_run_by_themselves(path: str) -> None:
    model, called, ids = sparse_model("qwen3_5_moe"), [], texts(1)
    want = logits(model, ids, kernels=False)
    model.model.layers[0].get_submodule(path).register_forward_hook(lambda *_: called.append(0))
    name = path if path != "mlp" else "Qwen3_5MoeSparseMoeBlock"
    assert ways(model)[0].way == "whole"
    assert ways(model)[0].why == f"but for its experts: its {name.removeprefix('mlp.')} is hooked"
    got = logits(model, ids, kernels=True)
    assert len(called) == 1 + STEPS
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


def test_experts_that_are_not_as_their_family_made_them_run_by_themselves() -> None:
    model, ids = sparse_model("qwen3_5_moe"), texts(1)
    blocks = [layer.mlp for layer in model.model.layers]
    own = blocks[0].shared_expert
    blocks[0].shared_expert = torch.nn.Identity()
    assert ways(model)[0].why == "but for its experts: its shared_expert.gate_proj is not there"
    blocks[0].shared_expert = own
    blocks[0].gate.__class__ = type("Qwen3_5MoeTopKRouter", (type(blocks[0].gate),), {})
    blocks[1].shared_expert.down_proj = torch.nn.Sequential(blocks[1].shared_expert.down_proj)
    blocks[2].gate.weight.data = blocks[2].gate.weight.data.mT.contiguous().mT
    blocks[3].experts.is_transposed = True
    assert [way.why for way in ways(model)] == [
        f"but for its experts: {why}"
        for why in (
            "its gate is a Qwen3_5MoeTopKRouter",
            "its shared_expert.down_proj is a Sequential",
            "its gate has an unusual weight",
            "no kernel reads its experts",
        )
    ]
    blocks[3].experts.is_transposed = False
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


OTHERS = {"olmo_hybrid": "in part", "zamba2": "in part", "zamba": "modules"}


@pytest.mark.parametrize("name", ["olmo_hybrid", pytest.param("zamba2", marks=SLOW), pytest.param("zamba", marks=SLOW)])
def test_other_families_run_in_part(name: str) -> None:
    model = sc.prepare(families.build(name)[0].to(DEVICE))
    assert OTHERS[name] in {way.way for way in ways(model)} != {"whole"}
    ids = texts(3)
    want, got = logits(model, ids, False, [1, 0, 1]), logits(model, ids, True, [1, 0, 1])
    alive = [0, 2]
    assert ((got - want)[alive].abs().max() / want.abs().max()).item() < 1e-5
    assert OTHERS[name] == "modules" or not torch.equal(got[alive], want[alive])


def test_every_family_says_how_its_layers_run() -> None:
    for name in families.FAMILIES:
        if "+" not in name:
            model = sc.prepare(families.build(name)[0].to(DEVICE))
            assert {way.way for way in ways(model)} <= {"whole", "in part", "modules"}
            assert all(way.why for way in ways(model) if way.way != "whole")


def test_a_model_is_left_as_it_was() -> None:
    model = model_of("qwen3_5")

    def own() -> dict[str, Any]:
        return {name: dict(vars(module)) for name, module in model.named_modules()}

    before = own()
    with by_kernels(model):
        assert own() != before
    assert own() == before


def test_what_is_unusual_goes_through_its_own_module() -> None:
    model = sc.prepare(families.build("mamba2")[0].to(DEVICE))
    layers = model.backbone.layers
    called: list[int] = []
    layers[0].mixer.in_proj.register_forward_hook(lambda *_: called.append(0))
    layers[1].mixer.out_proj = torch.nn.Sequential(layers[1].mixer.out_proj)
    layers[2].mixer.in_proj.weight.data = layers[2].mixer.in_proj.weight.data.mT.contiguous().mT
    found = ways(model)
    assert [way.way for way in found] == ["in part", "in part", "in part", "whole"]
    assert found[0].why == "its mixer.in_proj is hooked"
    assert found[1].why == "its mixer.out_proj is a Sequential"
    assert found[2].why == "mixer.in_proj has an unusual weight"
    ids = texts(1)
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert len(called) == 2 * (1 + STEPS)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5


HOOKED = {
    ("granitemoehybrid", 0): ["input_layernorm", "shared_mlp", "shared_mlp.activation", "post_attention_layernorm"],
    ("granitemoehybrid", 1): ["self_attn", "self_attn.v_proj", "self_attn.o_proj", "shared_mlp.output_linear"],
    ("lfm2", 0): ["", "conv", "conv.in_proj", "operator_norm", "feed_forward", "feed_forward.w3", "ffn_norm"],
    ("lfm2", 1): ["self_attn", "self_attn.q_layernorm", "self_attn.out_proj"],
    ("nemotron_h", 1): ["norm", "mixer", "mixer.act_fn", "mixer.up_proj"],
    ("qwen3_5", 0): ["mlp", "mlp.act_fn", "mlp.gate_proj", "linear_attn", "linear_attn.norm", "linear_attn.in_proj_a"],
    ("falcon_h1", 0): ["mamba", "self_attn", "self_attn.k_proj", "feed_forward.act_fn", "input_layernorm"],
    ("falcon_mamba", 0): ["mixer.x_proj", "mixer.dt_proj", "mixer.b_layernorm", "mixer"],
}


@pytest.mark.parametrize(("name", "index"), HOOKED)
def test_no_layer_with_a_hook_in_it_runs_whole(name: str, index: int) -> None:
    model = model_of(name)
    layer = list(layers_of(decoder_of(model)))[index]
    assert ways(model)[index].way == "whole"
    for path in HOOKED[name, index]:
        handle = layer.get_submodule(path).register_forward_hook(lambda *_: None)
        assert ways(model)[index].why == f"its {path or type(layer).__name__} is hooked"
        handle.remove()
    assert ways(model)[index].way == "whole"


def test_a_hook_of_all_modules_is_called() -> None:
    model, called = model_of("lfm2"), []
    handle = register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        assert ways(model)[0].why == "its Lfm2DecoderLayer is hooked"
        logits(model, texts(1), kernels=True)
    finally:
        handle.remove()
    assert called.count(model.model.layers[0].feed_forward.w2) == 1 + STEPS
    assert ways(model)[0].way == "whole"


def test_norms_that_a_kernel_takes_together_are_alike() -> None:
    model = model_of("falcon_mamba")
    model.backbone.layers[0].mixer.b_layernorm.eps = 5.0
    assert [way.why for way in ways(model)] == ["no kernel runs its FalconMambaMixer", ""]
    model = model_of("qwen3_5")
    model.model.layers[1].self_attn.k_norm.eps = 5.0
    assert [way.why for way in ways(model)] == ["", "its norms of queries and keys differ"]


@pytest.mark.parametrize("path", ["mlp.act_fn", "linear_attn.norm", "mlp"])
def test_hooks_are_called(path: str) -> None:
    model, called = model_of("qwen3_5"), []
    model.model.layers[0].get_submodule(path).register_forward_hook(lambda *_: called.append(0))
    logits(model, texts(1), kernels=True)
    assert len(called) == 1 + STEPS


def test_a_call_that_asked_for_hidden_states_leaves_no_hooks_that_count() -> None:
    model, ids = model_of("lfm2"), texts(2)
    assert model(ids, output_hidden_states=True).hidden_states and model.model.layers[0]._forward_hooks
    assert {way.way for way in ways(model)} == {"whole"}
    want, got = logits(model, ids, kernels=False), logits(model, ids, kernels=True)
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5 and not torch.equal(got, want)


def test_what_no_family_made_is_not_run_as_if() -> None:
    model = sc.prepare(families.build("lfm2")[0].to(DEVICE))
    layers = model.model.layers

    class Lfm2MLP(type(layers[0].feed_forward)):  # type: ignore[misc]
        pass

    layers[0].feed_forward.__class__ = Lfm2MLP
    layers[1].self_attn.__class__ = type("Clamped", (type(layers[1].self_attn),), {})
    layers[2].__class__ = type("Lfm2DecoderLayer", (type(layers[2]),), {})
    assert [way.why for way in ways(model)[:3]] == [
        "its feed_forward is a Lfm2MLP",
        "its self_attn is a Clamped",
        "Lfm2DecoderLayer is not in the table",
    ]
    model = model_of("qwen3_5")
    layers = model.model.layers
    layers[1].input_layernorm = layers[0].linear_attn.norm
    layers[0].self_attn = layers[1].self_attn
    assert ways(model)[0].why == "it mixes in several ways"
    assert ways(model)[1].why == "input_layernorm is a Qwen3_5RMSNormGated"


@pytest.mark.parametrize(
    ("name", "options", "index", "why"),
    [
        ("nemotron_h", {"n_group": 2, "topk_group": 1}, 1, "but for its experts: it chooses among 2 groups"),
        ("nemotron_h", {"moe_latent_size": 16}, 1, "but for its experts: its fc1_latent_proj is a Linear"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, 4, "its activation is SiLUActivation"),
        ("bamba", {"hidden_act": "gelu"}, 0, "its feed_forward.act_fn is a GELUActivation"),
        ("bamba", {"mamba_proj_bias": True}, 0, "mamba.in_proj has a bias"),
        ("lfm2", {"conv_bias": True}, 0, "conv.in_proj has a bias"),
        ("falcon_h1", {"mamba_rms_norm": True}, 0, "its mamba.norm is a FalconH1RMSNormGated"),
        ("qwen3_next", {"output_router_logits": True}, 1, "but for its experts: output_router_logits asks its router"),
        ("qwen3_5_moe", {"hidden_act": "gelu"}, 1, "but for its experts: no kernel reads its experts"),
    ],
)
def test_what_a_configuration_asks_for_besides(name: str, options: dict[str, Any], index: int, why: str) -> None:
    model = sc.prepare(families.build(name, **options)[0].to(DEVICE))
    assert ways(model)[index].why == why


def test_keys_with_a_window_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sc.prepare(families.build("lfm2")[0].to(DEVICE))
    kind = next(way.kind for way in ways(model) if "attention" in way.kind)
    assert {way.way for way in ways(model)} == {"whole"}
    monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], window="sliding_window"))
    assert {way.why for way in ways(model) if way.kind == kind} == {"its keys have a window"}


def test_residual_sums_stay_as_wide_as_they_are() -> None:
    model, seen = model_of("mamba2").bfloat16(), []
    model.backbone.norm_f.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    assert model.config.residual_in_fp32 and {way.way for way in ways(model)} == {"whole"}
    want, got = (logits(model, texts(1), kernels=each).float() for each in (False, True))
    assert ((got - want).abs().max() / want.abs().max()).item() < 2e-2
    assert set(seen) == {torch.float32} and not torch.equal(got, want)


@pytest.mark.parametrize(("slack", "back", "lent"), [(1, False, True), (1, True, False), (0, False, False)])
def test_what_a_cache_lends_is_explained(slack: int, back: bool, lent: bool) -> None:
    for name in ("lfm2", "mamba2"):
        model = families.build(name)[0].to(DEVICE)
        cache = sc.StateCache(
            model.config, capacity=32, rows=1, slack=slack, back=back, dtype=torch.float32, device=DEVICE
        )
        lends = lent or (name == "lfm2" and slack == 1)  # which has no recurrence
        assert sc.explain(model, cache)[0].way == ("whole" if lends else "modules")
