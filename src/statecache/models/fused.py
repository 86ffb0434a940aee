"""Layers run by kernels while a step is captured: which way each one goes, and why.

Two ways. *Whole*: the step owns the layer through the table `LAYERS`, from norm to residual, with its linear layers'
weights read where they lie. *In part*: the layer's own modules run, with a kernel for its recurrence and for its norms
where there is one. Any other module, and any linear layer that is hooked, wrapped, quantised or otherwise unusual, goes
its own way inside the captured step.

Nothing of a model changes for good: `by_kernels` sets functions on instances, and takes them away again.

B rows, T tokens of each, E the model's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache import kernels
from statecache.models.cache import StateCache
from statecache.models.decoder import decoder_of, layers_of
from statecache.models.given import layer_states
from statecache.models.mixers import Mixer, Recurrent
from statecache.models.mixers.delta import Delta, joined
from statecache.models.mixers.ssd import SSD
from statecache.models.prepare import borrowed
from statecache.models.prepared import LayerState, Lent, LentKeys
from statecache.models.table import KINDS, layer_types

# RMS norms by class name: what is added to their weight
NORMS = {
    "Mamba2RMSNorm": 0.0,
    "GraniteMoeHybridRMSNorm": 0.0,
    "BambaRMSNorm": 0.0,
    "FalconH1RMSNorm": 0.0,
    "JambaRMSNorm": 0.0,
    "Zamba2RMSNorm": 0.0,
    "NemotronHRMSNorm": 0.0,
    "Lfm2RMSNorm": 0.0,
    "Qwen3NextRMSNorm": 1.0,
    "Qwen3_5RMSNorm": 1.0,
    "Qwen3_5MoeRMSNorm": 1.0,
}
# norms with a gate: whether that comes before
GATED = {
    "MambaRMSNormGated": True,
    "GraniteMoeHybridRMSNormGated": True,
    "BambaRMSNormGated": True,
    "Qwen3NextRMSNormGated": False,
    "Qwen3_5RMSNormGated": False,
    "Qwen3_5MoeRMSNormGated": False,
}


@dataclass(frozen=True)
class Way:
    """How one layer runs in a captured step: "whole", "in part" or "modules"; and why not whole."""

    layer: int
    kind: str
    way: str
    why: str = ""

    def __str__(self) -> str:
        return f"layer {self.layer} ({self.kind}): {self.way}" + (f", {self.why}" if self.why else "")


def explain(model: nn.Module, cache: StateCache | None = None) -> list[Way]:
    """Which way each layer of a model runs in a captured step of `sc.Decoder`, and why, where its weights are now.

    `cache`: the one that it would run on; left out, one that suits kernels. Prints well, a line a layer. Raises
    UnknownLayerError where `prepare` does.
    """
    with borrowed(model):
        found = ways(model)
    if cache is not None and (cache.slack == 0 or cache.states.back):
        why = "its cache lends kernels nothing: make it with slack=1, back=False"
        mixing = [KINDS[kind].mixer for kind in layer_types(decoder_of(model).config)]
        found = [replace(n, way="modules", why=why) if mixes else n for n, mixes in zip(found, mixing, strict=True)]
    return found


def ways(model: nn.Module) -> list[Way]:
    """Which way each layer of a prepared model runs, on the device where its weights are."""
    decoder = decoder_of(model)
    found = []
    for index, (kind, layer) in enumerate(zip(layer_types(decoder.config), layers_of(decoder), strict=True)):
        why = _unavailable(layer)
        made = why or _whole(layer)
        if callable(made):
            found.append(Way(index, kind, "whole"))
            continue
        part = not why and any(_kernel(mixer) is not None for mixer in _mixers(layer))
        found.append(Way(index, kind, "in part" if part else "modules", made))
    return found


@contextmanager
def by_kernels(model: nn.Module) -> Iterator[None]:
    """Have the layers of a prepared model run by kernels within, each the way that `ways` says."""
    decoder, put = decoder_of(model), []

    def stand_in(module: nn.Module, name: str, value: Any) -> None:
        put.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    with ExitStack() as stack:
        stack.callback(_take_away, put)
        for layer in layers_of(decoder):
            if _unavailable(layer):
                continue
            whole = _whole(layer)
            if callable(whole):
                stand_in(layer, "forward", whole)
            for mixer in _mixers(layer):
                kernel = _kernel(mixer)
                if kernel is not None and isinstance(mixer, Recurrent):
                    mixer.kernel = kernel
                    stack.callback(setattr, mixer, "kernel", None)
        for module, forward in _norms(decoder):
            stand_in(module, "forward", forward)
        yield


@contextmanager
def norms_by_kernels(model: nn.Module) -> Iterator[None]:
    """Have the norms of a model run by kernels within: what is worth it for the many tokens of a prompt."""
    put: list[tuple[nn.Module, str, Any]] = []
    try:
        for module, forward in _norms(model):
            put.append((module, "forward", None))
            module.forward = forward
        yield
    finally:
        _take_away(put)


def _norms(model: nn.Module) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """The norms that a kernel can run, and what runs each."""
    for module in model.modules():
        name = type(module).__name__
        if name not in NORMS and name not in GATED:
            continue
        if not ("forward" in vars(module) or _hooked(module) or _unavailable(module)):
            yield module, _norm(module) if name in NORMS else _gated(module)


def _take_away(put: list[tuple[nn.Module, str, Any]]) -> None:
    for module, name, before in reversed(put):
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


# ---- kernels for parts


def _ssd(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    return _ssd_with(mixer, projected, lent)[0]


def _ssd_with(
    mixer: Any, projected: tuple[Tensor, ...], lent: Lent, gate: Tensor | None = None, norm: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same with what follows: see `kernels.ssd_step`."""
    from statecache.kernels import ssd_step

    m, run = mixer.module, ssd_step.step  # type: Any, Any
    weights = m.conv1d.weight, m.conv1d.bias, m.A_log, m.dt_bias, m.D
    held, limits = (lent.ring, lent.state, lent.start, lent.count), (mixer.low, mixer.high)
    more = {"gate": gate, "norm": norm, "log": lent.log}
    return run(*projected, *weights, *held, groups=mixer.query[0], limits=limits, **more)  # type: ignore[no-any-return]


def _delta(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    from statecache.kernels import delta_step

    m, run = mixer.module, delta_step.step  # type: Any, Any
    weights = m.conv1d.weight, m.conv1d.bias, m.A_log, m.dt_bias
    held = lent.ring, lent.state, lent.start, lent.count
    options = {"key_heads": mixer.query[0], "doubled": mixer.doubled, "log": lent.log}
    return run(*projected, *weights, *held, **options)  # type: ignore[no-any-return]


def _kernel(mixer: Mixer) -> Callable[..., Tensor] | None:
    """The kernel of a mixer's recurrence, if it has one and its weights are where a kernel can read them."""
    m: Any = mixer.module
    if not isinstance(mixer, SSD | Delta) or not mixer.silu or _hooked(m) or _hooked(m.conv1d):
        return None
    if not all(_plain(p) for p in (m.conv1d.weight, m.A_log, m.dt_bias)):
        return None
    return _ssd if isinstance(mixer, SSD) else _delta


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    from statecache.kernels.norms import norm

    offset, eps = NORMS[type(module).__name__], _eps(module)

    def forward(hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return norm(x, module.weight, eps=eps, offset=offset).view(hidden_states.shape)

    return forward


def _gated(module: Any) -> Callable[..., Tensor]:
    from statecache.kernels.norms import norm

    eps, first, group = _eps(module), GATED[type(module).__name__], getattr(module, "group_size", None)

    def forward(hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        width = hidden_states.shape[-1]
        x, by = hidden_states.reshape(-1, width), None if gate is None else gate.reshape(-1, width)
        y = norm(x, module.weight, eps=eps, group=group, gate=by, gate_first=first)
        return y.view(hidden_states.shape)

    return forward


# ---- whole layers


def _product(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    *,
    by: Any = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """A linear layer of x (B, E) with what stands around it, see `kernels.linear`; the library's for many rows.

    `by`: the norm module in front, or `squares` with `eps`, what is left of one; `gated`: the two weights are those of
    a gated unit, whose outputs these are.
    """
    from statecache.kernels.linear import FEW_ROWS, MOST_ROWS, linear
    from statecache.kernels.norms import norm, unit

    eps, offset = (eps, 0.0) if by is None else (_eps(by), NORMS.get(type(by).__name__, 0.0))
    weights = (weight,) if isinstance(weight, Tensor) else weight
    if by is not None and len(x) > FEW_ROWS:  # every program would compute it
        x, by = norm(x, by.weight, eps=eps, offset=offset, dtype=weights[0].dtype), None
    if len(x) <= MOST_ROWS:
        return linear(
            x,
            weights,
            norm=None if by is None else by.weight,
            eps=eps,
            offset=offset,
            squares=squares,
            unit=gated,
            residual=residual,
            scale=scale,
            dtype=None if residual is None else residual.dtype,
        )
    assert squares is None
    y = torch.cat([F.linear(x, each) for each in weights], -1) if len(weights) > 1 else F.linear(x, weights[0])
    y = unit(y) if gated else y
    return y if residual is None else torch.add(residual, y, alpha=scale)


def _mix_ssd(mixer: SSD, by: Any, x: Tensor, lent: Lent, scale: float = 1.0) -> Tensor:
    """A Mamba-2 mixer with the norm before it and the residual sum behind: x (B T, E) to (B T, E)."""
    from statecache.kernels.linear import MOST_ROWS

    m: Any = mixer.module
    z, new, dt = _product(x, m.in_proj.weight, by=by).split_with_sizes(mixer.projected, -1)
    one = getattr(m.norm, "group_size", z.shape[-1]) == z.shape[-1]
    if one and len(x) <= MOST_ROWS and z.dtype != torch.float16:  # which may have no place for what is not normed
        y, squares = _ssd_with(mixer, (new, dt), lent, gate=z, norm=m.norm.weight)
        return _product(y, m.out_proj.weight, squares=squares, eps=_eps(m.norm), residual=x, scale=scale)
    y = _gated(m.norm)(_ssd(mixer, (new, dt), lent), z)
    return _product(y, m.out_proj.weight, residual=x, scale=scale)


def _mamba2(layer: Any) -> Callable[..., Any]:
    mixer, own = _mixers(layer)[0], layer.forward
    assert isinstance(mixer, SSD)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        lent = _lent(mixer, args, kwargs)
        if lent is None:
            return own(hidden_states, *args, **kwargs)
        x = hidden_states.flatten(0, 1)
        x = x.float() if layer.residual_in_fp32 else x
        return _mix_ssd(mixer, layer.norm, x, lent).view(hidden_states.shape)

    return forward


def _granite(layer: Any) -> Callable[..., Any]:
    own, scale, mlp = layer.forward, float(layer.residual_multiplier), layer.shared_mlp
    mixer = next(iter(_mixers(layer)), None)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            return own(hidden_states, *args, **kwargs)
        x = hidden_states.flatten(0, 1)
        if mixer is not None:
            assert isinstance(mixer, SSD)
            lent = _lent(mixer, args, kwargs)
            if lent is None:
                return own(hidden_states, *args, **kwargs)
            x = _mix_ssd(mixer, layer.input_layernorm, x, lent, scale=scale)
        else:
            keys = _lent_keys(layer.self_attn, kwargs)
            if keys is None:
                return own(hidden_states, **kwargs)
            x = _attend(layer.self_attn, layer.input_layernorm, x, keys, kwargs, scale=scale)
        inside = _product(x, mlp.input_linear.weight.chunk(2), by=layer.post_attention_layernorm, gated=True)
        x = _product(inside, mlp.output_linear.weight, residual=x, scale=scale)
        return x.view(hidden_states.shape)

    return forward


def _qwen(layer: Any) -> Callable[..., Any]:
    own, mlp = layer.forward, layer.mlp
    mixer = next(iter(_mixers(layer)), None)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            return own(hidden_states, *args, **kwargs)
        x = hidden_states.flatten(0, 1)
        if mixer is not None:
            lent = _lent(mixer, args, kwargs)
            if lent is None:
                return own(hidden_states, *args, **kwargs)
            x = _mix_delta(mixer, layer.input_layernorm, x, lent)
        else:
            keys = _lent_keys(layer.self_attn, kwargs)
            if keys is None:
                return own(hidden_states, **kwargs)
            x = _attend(layer.self_attn, layer.input_layernorm, x, keys, kwargs, gated=True)
        both = (mlp.gate_proj.weight, mlp.up_proj.weight)
        inside = _product(x, both, by=layer.post_attention_layernorm, gated=True)
        return _product(inside, mlp.down_proj.weight, residual=x).view(hidden_states.shape)

    return forward


def _mix_delta(mixer: Any, by: Any, x: Tensor, lent: Lent) -> Tensor:
    """A gated delta net with the norm before it and the residual sum behind: x (B T, E) to (B T, E)."""
    m: Any = mixer.module
    four = (m.in_proj_qkv.weight, m.in_proj_z.weight, m.in_proj_b.weight, m.in_proj_a.weight)
    qkv, z, b, a = _product(x, four, by=by).split_with_sizes([len(each) for each in four], -1)
    y = _delta(mixer, (qkv, b, a), lent)
    y = _by_head(m.norm, y, z, mixer.inputs[1][1])
    return _product(y, m.out_proj.weight, residual=x)


def _attend(
    m: Any, by: Any, x: Tensor, lent: LentKeys, kwargs: Any, *, scale: float = 1.0, gated: bool = False
) -> Tensor:
    """Attention with the norm before it and the residual sum behind: x (B T, E) to (B T, E). `m`: its module."""
    from statecache.kernels.attend import Norms, attend

    three = (m.q_proj.weight, m.k_proj.weight, m.v_proj.weight)
    q, k, v = _product(x, three, by=by).split_with_sizes([len(each) for each in three], -1)
    norms = None
    if hasattr(m, "q_norm"):
        norms = Norms(m.q_norm.weight, m.k_norm.weight, _eps(m.q_norm), NORMS[type(m.q_norm).__name__])
    turns = kwargs.get("position_embeddings")
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
    return _product(y, m.o_proj.weight, residual=x, scale=scale)


def _by_head(module: Any, y: Tensor, z: Tensor, size: int) -> Tensor:
    """The gated norm of each head of y (B, W), z (B, W) of any stride between rows."""
    from statecache.kernels.norms import norm

    return norm(y, module.weight, eps=_eps(module), group=size, gate=z, gate_first=False)


@dataclass(frozen=True)
class Form:
    """A layer that can run whole. linear: its linear layers by name; norms: those that are folded into them."""

    make: Callable[[Any], Callable[..., Any]]
    linear: tuple[str, ...]
    norms: tuple[str, ...]


SSD_LINEAR = ("in_proj", "out_proj")
ATTENTION_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")
DELTA_LINEAR = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
LAYERS = {
    "Mamba2Block": Form(_mamba2, (), ("norm",)),
    "GraniteMoeHybridDecoderLayer": Form(
        _granite,
        ("shared_mlp.input_linear", "shared_mlp.output_linear"),
        ("input_layernorm", "post_attention_layernorm"),
    ),
    "Qwen3_5DecoderLayer": Form(
        _qwen,
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"),
    ),
}


def _whole(layer: nn.Module) -> Callable[..., Any] | str:
    """What runs a layer whole; or why nothing does."""
    name = type(layer).__name__
    form = LAYERS.get(name)
    if form is None:
        return f"{name} is not in the table"
    if "forward" in vars(layer) or _hooked(layer):
        return f"its {name} is hooked"
    if getattr(layer, "has_experts", False):
        return "it has experts"
    activation = next((m for n, m in layer.named_modules() if n in ("shared_mlp.activation", "mlp.act_fn")), None)
    if activation is not None and type(activation).__name__ not in ("SiLU", "SiLUActivation"):
        return f"its activation is {type(activation).__name__}"
    linear, inner = list(form.linear), _mixers(layer)
    for mixer in inner:
        path = next(n for n, module in layer.named_modules() if module is mixer.module)
        if _kernel(mixer) is None or getattr(mixer, "scaled", False) or not getattr(mixer, "normed", True):
            return f"no kernel runs its {type(mixer.module).__name__}"
        if isinstance(mixer, Delta) and mixer.projections is not joined:
            return f"its {type(mixer.module).__name__} projects in another form"
        own: Any = mixer.module
        if _hooked(own.norm) or type(own.norm).__name__ not in GATED:
            return f"{path}.norm is a {type(own.norm).__name__}, hooked or unknown"
        linear += [f"{path}.{n}" for n in (SSD_LINEAR if isinstance(mixer, SSD) else DELTA_LINEAR)]
    norms, attention = list(form.norms), getattr(layer, "self_attn", None)
    if attention is not None:
        if _hooked(attention) or "forward" in vars(attention):
            return f"its {type(attention).__name__} is hooked"
        linear += [f"self_attn.{n}" for n in ATTENTION_LINEAR]
        norms += [f"self_attn.{n}" for n in ("q_norm", "k_norm") if hasattr(attention, n)]
    for path in linear:
        why = _unusual(layer.get_submodule(path))
        if why:
            return f"{path} {why}"
    for path in norms:
        module = layer.get_submodule(path)
        if type(module).__name__ not in NORMS or _hooked(module) or "forward" in vars(module):
            return f"{path} is a {type(module).__name__}, hooked or unknown"
    return form.make(layer)


def _lent(mixer: Mixer, args: tuple[Any, ...], kwargs: Any) -> Lent | None:
    """The states of a layer's mixer for a kernel; None in a pass that is none for it."""
    states = layer_states(mixer.layer, args, kwargs)
    return states.lend() if isinstance(states, LayerState) else None


def _lent_keys(module: Any, kwargs: Any) -> LentKeys | None:
    """The keys and values of an attention layer for a kernel; None in a pass that is none for it."""
    states = layer_states(module.layer_idx, (), kwargs)
    return states.lend_keys() if isinstance(states, LayerState) else None


def _mixers(layer: nn.Module) -> list[Mixer]:
    """What stands in for modules of a prepared layer."""
    owners = (getattr(vars(module).get("forward"), "__self__", None) for module in layer.modules())
    return [owner for owner in owners if isinstance(owner, Mixer)]


def _eps(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _plain(weight: object) -> bool:
    return type(weight) is nn.Parameter and weight.is_contiguous() and weight.is_floating_point()


def _hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")
    return any(vars(module).get(name) for name in hooks)


def _unusual(module: Any) -> str | None:
    """Why a linear layer's weight is not read where it lies; None where it is."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    if _hooked(module) or "forward" in vars(module):
        return "is hooked"
    bias: Any = module.bias
    if bias is not None:
        return "has a bias"
    if not _plain(module.weight):
        return "has an unusual weight"
    return None


def _unavailable(module: nn.Module) -> str | None:
    """Why no kernel can run there; None where kernels can."""
    device = next((p.device for p in module.parameters()), None)
    if device is None or not kernels.available(device):
        return f"no kernels on {'no device' if device is None else device.type}"
    return None
