"""Layers that kernels run whole, from norm to residual sum, through the table `LAYERS`.

A layer's linear layers are read where they lie: nothing is copied or joined. The table says by what names a family
calls what all have in common. A layer is run whole only if every module in it is known here, one of transformers' or
torch's own, and nobody hooks it or runs it otherwise; `whole` says what is not so.

B rows, T tokens of each, E the model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statecache.models.given import layer_states
from statecache.models.mixers import Mixer
from statecache.models.mixers.delta import Delta, interleaved, ordered
from statecache.models.mixers.scan import Scan
from statecache.models.mixers.short_conv import ShortConv
from statecache.models.mixers.ssd import SSD
from statecache.models.parts import (
    GATED,
    NORMS,
    SILU,
    SQUARED,
    WEIGHTLESS,
    alike,
    changed,
    delta,
    eps_of,
    experts_of,
    gated_norm,
    hooked,
    kernel_of,
    mixers_of,
    native,
    plain,
    scan_with,
    short,
    ssd,
    ssd_with,
    unusual,
)
from statecache.models.prepared import LayerState, Lent, LentKeys
from statecache.models.product import Into, handed, normed, product, shaped
from statecache.models.sparse import sparse

# ---- what there is


@dataclass(frozen=True)
class Form:
    """A layer that can run whole: a mixer or attention behind a norm, and behind another norm a gated unit.

    By the names of its modules. before: the norm of the mixer; behind, into and out: that of the unit, what makes gate
    and rest, two linear layers or one, and the linear layer that follows. A layer may have either part alone. family:
    how the names of its classes begin. scale: the attribute that multiplies what is added to the residual sum; wide:
    the one that says whether this is float32. gated: half of what attention's q_proj makes is a gate; squared: the unit
    is no gated one, but the square of what is positive. parallel: it has a mixer and attention behind one norm, and a
    multiplier for each part. experts: what may stand in the unit's place, or beside it, behind the same norm, see
    `sparse`. also: what the layer returns besides, as a tuple; None: what it returns is no tuple.
    """

    before: str
    behind: str = ""
    into: tuple[str, ...] = ()
    out: str = ""
    family: str = ""
    attention: str = "self_attn"
    scale: str = ""
    wide: str = ""
    gated: bool = False
    squared: bool = False
    parallel: bool = False
    experts: str = ""
    also: tuple[None, ...] | None = None


@dataclass(frozen=True)
class Scales:
    """What multiplies in a layer.

    mixed, attended, fed: what mixer, attention and unit add to the residual sum; seen: what attention projects; keys:
    what it projects to keys; gate: that of the unit, before its activation.
    """

    mixed: float = 1.0
    attended: float = 1.0
    fed: float = 1.0
    seen: float = 1.0
    keys: float = 1.0
    gate: float = 1.0

    @staticmethod
    def of(form: Form, layer: Any) -> Scales:
        """Those of a layer."""
        if form.parallel:
            unit = layer.get_submodule(form.out.partition(".")[0])
            added = layer.ssm_out_multiplier, layer.attn_out_multiplier, unit.down_multiplier
            return Scales(*added, layer.attention_in_multiplier, layer.self_attn.key_multiplier, unit.gate_multiplier)
        scale = float(getattr(layer, form.scale)) if form.scale else 1.0
        return Scales(scale, scale, scale)


def _fed(behind: str, unit: str, **given: Any) -> Form:
    """A form with the names that most families have."""
    into = (f"{unit}.gate_proj", f"{unit}.up_proj")
    return Form("input_layernorm", behind, into, f"{unit}.down_proj", **given)


_LFM2 = ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"
LAYERS = {
    "MambaBlock": Form("norm", wide="residual_in_fp32"),
    "FalconMambaBlock": Form("norm", wide="residual_in_fp32"),
    "Mamba2Block": Form("norm", wide="residual_in_fp32"),
    "GraniteMoeHybridDecoderLayer": Form(
        "input_layernorm",
        "post_attention_layernorm",
        ("shared_mlp.input_linear",),
        "shared_mlp.output_linear",
        family="GraniteMoeHybrid",
        scale="residual_multiplier",
        experts="block_sparse_moe",
    ),
    "BambaDecoderLayer": _fed("pre_ff_layernorm", "feed_forward", family="Bamba", also=(None,)),
    "FalconH1DecoderLayer": _fed("pre_ff_layernorm", "feed_forward", family="FalconH1", parallel=True, also=()),
    "JambaMambaDecoderLayer": _fed("pre_ff_layernorm", "feed_forward", family="Jamba", experts="feed_forward"),
    "JambaAttentionDecoderLayer": _fed("pre_ff_layernorm", "feed_forward", family="Jamba", experts="feed_forward"),
    "NemotronHBlock": Form(
        "norm",
        "norm",
        ("mixer.up_proj",),
        "mixer.down_proj",
        family="NemotronH",
        attention="mixer",
        squared=True,
        experts="mixer",
    ),
    "Qwen3_5DecoderLayer": _fed("post_attention_layernorm", "mlp", family="Qwen3_5", gated=True),
    "Qwen3NextDecoderLayer": _fed("post_attention_layernorm", "mlp", family="Qwen3Next", gated=True, experts="mlp"),
    "Qwen3_5MoeDecoderLayer": _fed("post_attention_layernorm", "mlp", family="Qwen3_5Moe", gated=True, experts="mlp"),
    "Lfm2DecoderLayer": Form("operator_norm", "ffn_norm", *_LFM2, family="Lfm2"),
    "Lfm2MoeDecoderLayer": Form("operator_norm", "ffn_norm", *_LFM2, family="Lfm2Moe", experts="feed_forward"),
}
KNOWN = {"Linear", "Conv1d", "Identity", *NORMS, *GATED, *WEIGHTLESS, *SILU, *SQUARED}


def whole(layer: nn.Module, following: nn.Module | None = None) -> Callable[..., Any] | str:
    """What runs a layer whole; or why nothing does. `following`: the norm that takes its sum next, see `first_norm`."""
    form = LAYERS.get(type(layer).__name__)
    if form is None or not native(layer):
        return f"{type(layer).__name__} is not in the table"
    mixers, attention = mixers_of(layer), _attention(form, layer)
    why = _foreign(form, layer, [mixer.module for mixer in mixers])
    if why:
        return why
    if len(mixers) + (attention is not None) > 1 + form.parallel:
        return "it mixes in several ways"
    mixer = next(iter(mixers), None)
    parts = _parts(form, layer, mixer, attention)
    if isinstance(parts, str):
        return parts
    linear, norms = parts
    for path in linear:
        why = unusual(layer.get_submodule(path))
        if why:
            return f"{path} {why}"
    for path in norms:
        name = type(layer.get_submodule(path)).__name__
        if name not in NORMS:
            return f"{path} is a {name}"
    return _run(form, layer, mixer, attention, following)


def first_norm(layer: nn.Module) -> nn.Module | None:
    """The norm that a layer which runs whole begins with, if it is one in a product."""
    form = LAYERS[type(layer).__name__]
    norm: Any = layer.get_submodule(form.before)
    multiplied = mixers_of(layer) or _attention(form, layer) is not None or _feeds(form, layer)
    return norm if multiplied and plain(norm.weight) else None


def apart(layer: nn.Module) -> str:
    """What of a layer that runs whole runs by itself all the same, and why."""
    block = _experts(LAYERS[type(layer).__name__], layer)
    why = None if block is None else sparse(block)
    return f"but for its experts: {why}" if isinstance(why, str) else ""


def _foreign(form: Form, layer: nn.Module, mixed: list[nn.Module]) -> str | None:
    """What in a layer is not as its family made it; None if all is. `mixed`: the modules that mixers stand in for."""
    known = {*KNOWN, f"{form.family}Attention", f"{form.family}MLP"}
    block = _experts(form, layer)
    others = set() if block is None else set(block.modules())  # which `sparse` looks at
    for path, module in layer.named_modules():
        if module in others:
            continue
        name, mixes = type(module).__name__, module in mixed
        if hooked(module) if mixes else changed(module):
            return f"its {path or name} is hooked"
        if module is not layer and not mixes and (name not in known or not native(module)):
            return f"its {path} is a {name}"
    return None


def _parts(form: Form, layer: nn.Module, mixer: Mixer | None, attention: Any) -> tuple[list[str], list[str]] | str:
    """The linear layers and norms that kernels read of a layer, by name; or why they can run none of its parts."""
    linear, norms = list[str](), list[str]()
    if mixer is not None:
        if kernel_of(mixer) is None:
            return f"no kernel runs its {type(mixer.module).__name__}"
        path = next(n for n, module in layer.named_modules() if module is mixer.module)
        linear += [f"{path}.{n}" for n in _projections(mixer)]
        norms.append(form.before)
    if attention is not None:
        linear += [f"{form.attention}.{n}" for n in ("q_proj", "k_proj", "v_proj", _out(attention))]
        by_head = _head_norms(attention)
        if by_head and not alike([getattr(attention, name) for name in by_head]):
            return "its norms of queries and keys differ"
        norms += [form.before, *(f"{form.attention}.{name}" for name in by_head)]
    if _feeds(form, layer):
        unit: Any = layer.get_submodule(form.out.partition(".")[0])
        activation = getattr(unit, "act_fn", getattr(unit, "activation", None))
        if activation is not None and type(activation).__name__ not in (SQUARED if form.squared else SILU):
            return f"its activation is {type(activation).__name__}"
        linear += [*form.into, form.out]
        norms.append(form.behind)
    block = _experts(form, layer)
    if block is not None:
        norms.append(form.behind)
    some = linear or (block is not None and any(experts_of(block)))
    return (linear, norms) if some else "no kernel runs any part of it"


# ---- how they run


def _run(
    form: Form, layer: Any, mixer: Mixer | None, attention: Any, following: nn.Module | None
) -> Callable[..., Any]:
    """What runs a layer of this form whole, and leaves passes that are not for kernels to its own forward.

    following: see `whole`.
    """
    own, before, feeds = layer.forward, layer.get_submodule(form.before), _feeds(form, layer)
    block = _experts(form, layer)
    choose = None if block is None else sparse(block)
    behind = following if block is None else None  # experts take a norm as it is, and hand on nothing
    middle = layer.get_submodule(form.behind) if feeds and block is None else behind
    scales, wide = Scales.of(form, layer), bool(form.wide and getattr(layer, form.wide))

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        lent: Any = None if mixer is None else _lent(mixer, args, kwargs)
        keys = None if attention is None or args else _lent_keys(attention, kwargs)
        refused = (mixer is not None and lent is None) or (attention is not None and keys is None)
        if refused or torch.is_grad_enabled():
            return own(hidden_states, *args, **kwargs)
        x = shaped(hidden_states, -1, hidden_states.shape[-1])
        total = x = x.float() if wide else x
        by = handed(x, before)
        if mixer is not None:
            into = Into(x, scales.mixed, middle if attention is None else None)
            total = MIXES[type(mixer)][0](mixer, by, x, lent, into)
        if attention is not None:
            into, turns = Into(total, scales.attended, middle), kwargs.get("position_embeddings")
            total = _attend(attention, by, x, keys, turns, scales, into, gated=form.gated)
        fed = total
        if feeds:
            total = _feed(form, layer, fed, scales.gate, Into(fed, scales.fed, behind))
        if callable(choose):
            total = choose(layer.get_submodule(form.behind), fed, total, scales.fed)
        elif block is not None:
            norm: Any = layer.get_submodule(form.behind)
            given = normed(norm, fed, norm.weight.dtype).view(hidden_states.shape)
            total = torch.add(total, block(given).flatten(0, 1), alpha=scales.fed)
        total = shaped(total, *hidden_states.shape)
        return total if form.also is None else (total, *form.also)

    return forward


def _feed(form: Form, layer: nn.Module, x: Tensor, scale: float, into: Into) -> Tensor:
    """The unit with the norm before it, added to a residual sum: x (B T, E) to (B T, E). scale: of its gate."""
    from statecache.kernels.norms import squared, unit

    by, weights = handed(x, layer.get_submodule(form.behind)), [_weight(layer, path) for path in form.into]
    if form.squared:
        inside = squared(product(x, weights[0], by=by))
    elif scale != 1.0:
        both = product(x, tuple(weights), by=by)
        both[:, : len(weights[0])] *= scale
        inside = unit(both)
    else:
        inside = product(x, tuple(weights) if len(weights) > 1 else weights[0].chunk(2), by=by, gated=True)
    return product(inside, _weight(layer, form.out), into=into)


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")


def _attention(form: Form, layer: nn.Module) -> Any:
    """The layer's attention; None where it has a mixer, or nothing of the kind."""
    module = getattr(layer, form.attention, None)
    return module if hasattr(module, "q_proj") else None


def _feeds(form: Form, layer: nn.Module) -> bool:
    """Whether the layer has the unit of its form."""
    name, _, inner = form.out.partition(".")
    return hasattr(getattr(layer, name, None), inner)


def _experts(form: Form, layer: nn.Module) -> Any:
    """The layer's experts with what chooses them; None where it has none."""
    module = getattr(layer, form.experts, None) if form.experts else None
    return module if module is not None and hasattr(module, "experts") and native(module) else None


def _head_norms(attention: nn.Module) -> list[str]:
    """The norms of each head of queries and keys, by name, if there are some."""
    return [name for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm") if hasattr(attention, name)]


def _out(attention: nn.Module) -> str:
    return "o_proj" if hasattr(attention, "o_proj") else "out_proj"


def _lent(mixer: Mixer, args: tuple[Any, ...], kwargs: Any) -> Lent | None:
    """The states of a layer's mixer for a kernel; None in a pass that is none for it."""
    states = layer_states(mixer.layer, args, kwargs)
    return states.lend() if isinstance(states, LayerState) else None


def _lent_keys(module: Any, kwargs: Any) -> LentKeys | None:
    """The keys and values of an attention layer for a kernel; None in a pass that is none for it."""
    states = layer_states(module.layer_idx, (), kwargs)
    return states.lend_keys() if isinstance(states, LayerState) else None


def _mix_ssd(mixer: Any, by: Any, x: Tensor, lent: Lent, into: Into) -> Tensor:
    """A Mamba-2 mixer with the norm before it, added to a residual sum: x (B T, E) to (B T, E)."""
    from statecache.kernels.linear import MOST_ROWS

    m: Any = mixer.module
    projected = product(x, m.in_proj.weight, by=by, scale=m.ssm_in_multiplier if mixer.scaled else 1.0)
    if mixer.scaled:
        projected *= m.mup_vector.flatten()
    z, new, dt = projected.split_with_sizes(mixer.projected, -1)
    if not mixer.normed:
        y, _ = ssd_with(mixer, (new, dt), lent, gate=z)
        return product(y, m.out_proj.weight, into=into)
    one = getattr(m.norm, "group_size", z.shape[-1]) == z.shape[-1]
    if one and len(x) <= MOST_ROWS and z.dtype != torch.float16:  # which may have no place for what is not normed
        y, squares = ssd_with(mixer, (new, dt), lent, gate=z, norm=m.norm.weight)
        return product(y, m.out_proj.weight, squares=squares, eps=eps_of(m.norm), into=into)
    y = gated_norm(m.norm)(ssd(mixer, (new, dt), lent), z)
    return product(y, m.out_proj.weight, into=into)


def _mix_delta(mixer: Any, by: Any, x: Tensor, lent: Lent, into: Into) -> Tensor:
    """The same of a gated delta net."""
    from statecache.kernels.norms import norm

    m: Any = mixer.module
    weights = [getattr(m, name).weight for name in _projections(mixer)[:-1]]
    projected = product(x, tuple(weights), by=by).split_with_sizes([len(each) for each in weights], -1)
    if mixer.projections is interleaved:
        parts = ordered(m, *(each.unsqueeze(1) for each in projected))
        qkv, z, b, a = (part.flatten(1) for part in parts)
    else:
        qkv, z, b, a = projected
    y = delta(mixer, (qkv, b, a), lent)
    y = norm(y, m.norm.weight, eps=eps_of(m.norm), group=mixer.inputs[1][1], gate=z, gate_first=False)
    return product(y, m.out_proj.weight, into=into)


def _mix_short(mixer: Any, by: Any, x: Tensor, lent: Lent, into: Into) -> Tensor:
    """The same of a gated short convolution."""
    m: Any = mixer.module
    y = short(mixer, (product(x, m.in_proj.weight, by=by),), lent)
    return product(y, m.out_proj.weight, into=into)


def _mix_scan(mixer: Any, by: Any, x: Tensor, lent: Lent, into: Into) -> Tensor:
    """The same of a Mamba-1 mixer."""
    m: Any = mixer.module
    new, z = product(x, m.in_proj.weight, by=by).chunk(2, -1)
    y = scan_with(mixer, (new,), lent, lambda x: product(x, m.x_proj.weight), gate=z)
    return product(y, m.out_proj.weight, into=into)


Mix = Callable[[Any, Any, Tensor, Lent, Into], Tensor]
# what runs each kind of mixer between two residual sums, and its linear layers by name
MIXES: dict[type[Mixer], tuple[Mix, tuple[str, ...]]] = {
    SSD: (_mix_ssd, ("in_proj", "out_proj")),
    Delta: (_mix_delta, ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")),
    ShortConv: (_mix_short, ("in_proj", "out_proj")),
    Scan: (_mix_scan, ("in_proj", "x_proj", "out_proj")),
}


def _projections(mixer: Any) -> tuple[str, ...]:
    """The linear layers of a mixer by name, the last that of its output."""
    if getattr(mixer, "projections", None) is interleaved:
        return "in_proj_qkvz", "in_proj_ba", "out_proj"
    return MIXES[type(mixer)][1]


def _attend(m: Any, by: Any, x: Tensor, lent: Any, turns: Any, scales: Scales, into: Into, *, gated: bool) -> Tensor:
    """Attention, `m` its module, with the norm before it, added to a residual sum: x (B T, E) to (B T, E).

    turns: cosines and sines (B or 1, T, R), or None; `gated`: by half of q.
    """
    from statecache.kernels.attend import Norms, attend

    three = (m.q_proj.weight, m.k_proj.weight, m.v_proj.weight)
    projected = product(x, three, by=by, scale=scales.seen)
    q, k, v = projected.split_with_sizes([len(each) for each in three], -1)
    if scales.keys != 1.0:
        k *= scales.keys
    norms, by_head = None, [getattr(m, name) for name in _head_norms(m)]
    if by_head:
        of_q, of_k = by_head
        norms = Norms(of_q.weight, of_k.weight, eps_of(of_q), NORMS[type(of_q).__name__])
    angles = None if turns is None else tuple(each.expand(len(lent.keys), -1, -1).flatten(0, 1) for each in turns)
    y = attend(
        q,
        k,
        v,
        lent.keys,
        lent.values,
        lent.start,
        lent.count,
        scale=m.scaling,
        norms=norms,
        angles=angles,
        gated=gated,
    )
    return product(y, getattr(m, _out(m)).weight, into=into)
