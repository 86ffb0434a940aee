"""What kernels run of a layer whose own modules run the rest: its mixer's recurrence or convolution, experts, norms.

A module that is hooked, or that somebody runs otherwise, is left alone, and weights that are not plain parameters.

B rows, T tokens of each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as modules

from statecache import kernels
from statecache.kernels.cards import DTYPES
from statecache.models.mixers import Mixer
from statecache.models.mixers.base import Kernel
from statecache.models.mixers.delta import Delta
from statecache.models.mixers.kda import KDA
from statecache.models.mixers.scan import Scan
from statecache.models.mixers.short_conv import ShortConv
from statecache.models.mixers.ssd import SSD
from statecache.models.prepared import Lent

# RMS norms by class name: what is added to their weight
NORMS = {
    "MambaRMSNorm": 0.0,
    "FalconMambaRMSNorm": 0.0,
    "Mamba2RMSNorm": 0.0,
    "GraniteMoeHybridRMSNorm": 0.0,
    "BambaRMSNorm": 0.0,
    "FalconH1RMSNorm": 0.0,
    "JambaRMSNorm": 0.0,
    "Zamba2RMSNorm": 0.0,
    "NemotronHRMSNorm": 0.0,
    "Lfm2RMSNorm": 0.0,
    "Lfm2MoeRMSNorm": 0.0,
    "Qwen3NextRMSNorm": 1.0,
    "Qwen3_5RMSNorm": 1.0,
    "Qwen3_5MoeRMSNorm": 1.0,
}
# norms with a gate: whether that comes before
GATED = {
    "MambaRMSNormGated": True,
    "GraniteMoeHybridRMSNormGated": True,
    "BambaRMSNormGated": True,
    "NemotronHRMSNormGated": True,
    "Zamba2RMSNormGated": True,
    "Qwen3NextRMSNormGated": False,
    "Qwen3_5RMSNormGated": False,
    "Qwen3_5MoeRMSNormGated": False,
}
WEIGHTLESS = ("FalconMambaWeightlessRMSNorm",)  # norms whose weight is none
SILU, SQUARED = ("SiLU", "SiLUActivation"), ("ReLUSquaredActivation",)  # activations of units, by class name
# what makes the angles that queries and keys are rotated by, of halves that turn with each other
ROTARY = (
    "GraniteMoeHybridRotaryEmbedding",
    "BambaRotaryEmbedding",
    "FalconH1RotaryEmbedding",
    "Zamba2RotaryEmbedding",
    "Lfm2RotaryEmbedding",
    "Lfm2MoeRotaryEmbedding",
    "Qwen3NextRotaryEmbedding",
    "Qwen3_5TextRotaryEmbedding",
    "Qwen3_5MoeTextRotaryEmbedding",
)
# transformers' own implementations of experts, which all give the same
IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")
PLAIN_NORMS = (*WEIGHTLESS, *(name for name, offset in NORMS.items() if not offset))  # to whose weight nothing is added


# ---- norms


def norms_of(model: nn.Module) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """The norms that a kernel can run, and what runs each."""
    for module in model.modules():
        name = type(module).__name__
        if name not in NORMS and name not in GATED:
            continue
        if not (changed(module) or unavailable(module)):
            yield module, _norm(module) if name in NORMS else gated_norm(module)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    from statecache.kernels.norms import norm

    offset, eps = NORMS[type(module).__name__], eps_of(module)

    def forward(hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return norm(x, module.weight, eps=eps, offset=offset).view(hidden_states.shape)

    return forward


def gated_norm(module: Any) -> Callable[..., Tensor]:
    """What runs a norm with a gate, a module of `GATED`."""
    from statecache.kernels.norms import norm

    eps, first, group = eps_of(module), GATED[type(module).__name__], getattr(module, "group_size", None)

    def forward(hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        width = hidden_states.shape[-1]
        x, by = hidden_states.reshape(-1, width), None if gate is None else gate.reshape(-1, width)
        y = norm(x, module.weight, eps=eps, group=group, gate=by, gate_first=first)
        return y.view(hidden_states.shape)

    return forward


# ---- angles


def angles_of(model: nn.Module) -> Iterator[tuple[Any, Callable[..., Any]]]:
    """The modules of `ROTARY` that a kernel can stand in for, and what does.

    Not those whose frequencies change with the length of a row.
    """
    for module in model.modules():
        if type(module).__name__ not in ROTARY or not native(module) or changed(module):
            continue
        held: Any = getattr(module, "inv_freq", None)
        kind = getattr(module, "rope_type", None)
        if not isinstance(held, Tensor) or not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
            continue
        if held.is_contiguous() and kernels.available(held.device):
            yield module, _angles(module)


def _angles(module: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    from statecache.kernels.angles import angles

    own = module.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at = position_ids
        if at.dim() == 3 and at.stride(0) == 0:  # coordinates that are all the same, as those of text
            at = at[0]
        if at.dim() != 2 or args or kwargs or x.dtype not in DTYPES:
            return own(x, position_ids, *args, **kwargs)  # type: ignore[no-any-return]
        return angles(at, module.inv_freq, module.attention_scaling, x.dtype)

    return forward


# ---- experts


def experts_of(model: nn.Module) -> Iterator[tuple[Any, Callable[..., Tensor]]]:
    """The experts that a kernel can run, modules of transformers' interface for them, and what runs each."""
    for module in model.modules():
        if reads_experts(module) and not (changed(module) or unavailable(module)):
            yield module, _experts(module)


def reads_experts(module: Any) -> bool:
    """Whether a kernel reads a module's experts where they lie: weights by expert, outputs first, without biases."""
    gated = getattr(module, "has_gate", None)
    if gated is None or not native(module):
        return False
    act, own = getattr(module, "act_fn", None), getattr(type(module), "_apply_gate", None)
    if gated and (not module.is_concatenated or getattr(own, "__name__", "") != "_default_apply_gate"):
        return False
    if getattr(getattr(module, "config", None), "_experts_implementation", None) not in IMPLEMENTATIONS:
        return False  # but somebody's own
    others = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    if any(getattr(module, name, False) for name in others):
        return False
    known = type(act).__name__ in (SILU if gated else SQUARED) or (gated and act is F.silu)
    return known and plain(up_of(module)) and plain(module.down_proj)


def up_of(module: Any) -> Any:
    """The weights into a module's experts."""
    return module.gate_up_proj if module.has_gate else module.up_proj


def _experts(module: Any) -> Callable[..., Tensor]:
    from statecache.kernels.experts import crowded, experts

    own = module.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        up = up_of(module)
        if crowded(top_k_index, up) or torch.is_grad_enabled():
            return own(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        return experts(hidden_states, up, module.down_proj, top_k_index, top_k_weights, gated=module.has_gate)

    return forward


# ---- mixers


def mixers_of(layer: nn.Module) -> list[Mixer]:
    """What stands in for modules of a prepared layer."""
    owners = (getattr(vars(module).get("forward"), "__self__", None) for module in layer.modules())
    return [owner for owner in owners if isinstance(owner, Mixer)]


def ssd(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    return ssd_with(mixer, projected, lent)[0]


def ssd_with(
    mixer: Any, projected: tuple[Tensor, ...], lent: Lent, gate: Tensor | None = None, norm: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same with what follows: see `kernels.ssd_step`."""
    from statecache.kernels import ssd_step

    m, run = mixer.module, ssd_step.step  # type: Any, Any
    weights = m.conv1d.weight, m.conv1d.bias, m.A_log, m.dt_bias, m.D
    held, limits = (lent.ring, lent.state, lent.start, lent.count), (mixer.low, mixer.high)
    more = {"gate": gate, "norm": norm, "log": lent.log}
    return run(*projected, *weights, *held, groups=mixer.query[0], limits=limits, **more)  # type: ignore[no-any-return]


def delta(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    from statecache.kernels import delta_step

    m, run = mixer.module, delta_step.step  # type: Any, Any
    weights = m.conv1d.weight, m.conv1d.bias, m.A_log, m.dt_bias
    held = lent.ring, lent.state, lent.start, lent.count
    options = {"key_heads": mixer.query[0], "doubled": mixer.doubled, "log": lent.log}
    return run(*projected, *weights, *held, **options)  # type: ignore[no-any-return]


def kda(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    from statecache.kernels import delta_step

    conv, (qkv, g, beta) = mixer.module.conv1d, projected
    held: Any = lent.ring, lent.state, lent.start, lent.count
    given = qkv, beta, g.flatten(1), conv.weight, conv.bias, None, None
    return delta_step.step(*given, *held, key_heads=mixer.query[0], log=lent.log)


def short(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    from statecache.kernels import conv_step

    conv, (new,) = mixer.module.conv, projected
    held = lent.ring, lent.start, lent.count
    return conv_step.step(new, conv.weight.squeeze(1), conv.bias, *held, gated=True)


def scan(mixer: Any, projected: tuple[Tensor, ...], lent: Lent) -> Tensor:
    """See `Kernel`."""
    return scan_with(mixer, projected, lent, mixer.module.x_proj)


def scan_with(
    mixer: Any,
    projected: tuple[Tensor, ...],
    lent: Lent,
    project: Callable[[Tensor], Tensor],
    gate: Tensor | None = None,
) -> Tensor:
    """The same with what `project` makes of the convolution's outputs, and with a gate: see `kernels.scan_step`."""
    from statecache.kernels import conv_step, scan_step

    m, (new,) = mixer.module, projected
    weights = m.conv1d.weight.squeeze(1), m.conv1d.bias
    x = conv_step.step(new, *weights, lent.ring, lent.start, lent.count, silu=True)
    norms, each = None, [getattr(m, name) for name in mixer.norms]
    if each:
        weighted = type(each[0]).__name__ not in WEIGHTLESS
        norms = scan_step.Norms(eps_of(each[0]), tuple(norm.weight for norm in each) if weighted else None)
    own: Any = (m.dt_proj.weight, m.dt_proj.bias, m.A_log, m.D)
    held: Any = (lent.state, lent.start, lent.count)
    return scan_step.step(x, project(x), *own, *held, gate=gate, norms=norms, log=lent.log)


# the kernel of each kind of mixer, and what it reads besides the convolution's weight: weights, and those of modules
KERNELS: dict[type[Mixer], tuple[Kernel, tuple[str, ...], tuple[str, ...]]] = {
    SSD: (ssd, ("A_log", "dt_bias", "D"), ()),
    Delta: (delta, ("A_log", "dt_bias"), ()),
    KDA: (kda, (), ()),
    ShortConv: (short, (), ()),
    Scan: (scan, ("A_log", "D"), ("dt_proj",)),
}


def kernel_of(mixer: Mixer) -> Kernel | None:
    """The kernel of a mixer, if it has one, and reads plain weights of modules that nobody hooks or runs otherwise."""
    made = KERNELS.get(type(mixer))
    if made is None or not getattr(mixer, "silu", True) or hooked(mixer.module):
        return None
    kernel, own, read = made
    m: Any = mixer.module
    read_of: list[Any] = [getattr(m, name, None) for name in (*mixer.convolutions, *read)]
    if any(type(module) not in (nn.Conv1d, nn.Linear) or changed(module) for module in read_of):
        return None
    norms = [getattr(m, name) for name in getattr(mixer, "norms", ())]
    if norms and not (alike(norms) and type(norms[0]).__name__ in PLAIN_NORMS):
        return None
    weights = [getattr(m, name) for name in own]
    weights += [w for module in read_of for w in (module.weight, module.bias) if w is not None]
    return kernel if all(map(plain, weights)) else None


# ---- what is left alone


def eps_of(norm: Any) -> float:
    """What a norm adds to the mean of squares."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def alike(norms: Sequence[Any]) -> bool:
    """Whether a kernel can take these norms for one: of one class, one eps, and with plain weights."""
    first = norms[0]
    same = all(type(norm) is type(first) and eps_of(norm) == eps_of(first) and not changed(norm) for norm in norms)
    return same and all(type(norm).__name__ in WEIGHTLESS or plain(norm.weight) for norm in norms)


def native(module: nn.Module) -> bool:
    """Whether a module's class is transformers' or torch's own."""
    return type(module).__module__.partition(".")[0] in ("transformers", "torch")


def unusual(module: Any) -> str | None:
    """Why a linear layer's weight is not read where it lies; None where it is."""
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}"
    bias: Any = module.bias
    if bias is not None:
        return "has a bias"
    return None if plain(module.weight) else "has an unusual weight"


def plain(weight: object) -> bool:
    """Whether a kernel can read this weight where it lies."""
    return type(weight) is nn.Parameter and weight.is_contiguous() and weight.dtype in DTYPES


def hooked(module: nn.Module) -> bool:
    """Whether somebody hooks a module, or all modules: not transformers itself, see `collects`."""
    if "_hf_hook" in vars(module) or modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return True
    hooks = (hook for name in ("_forward_hooks", "_forward_pre_hooks") for hook in vars(module)[name].values())
    return not all(map(collects, hooks))


def collects(hook: object) -> bool:
    """Whether a hook is one of those that transformers leaves in a model that was once asked for hidden states.

    They collect what a call asks for, and do nothing in one that asks for nothing.
    """
    return inspect.isfunction(hook) and hook.__module__ == "transformers.utils.output_capturing"


def changed(module: nn.Module) -> bool:
    """Whether somebody hooks a module, or runs it otherwise."""
    return hooked(module) or "forward" in vars(module)


def unavailable(module: nn.Module) -> str | None:
    """Why no kernel can run there; None where kernels can."""
    device = next((p.device for p in module.parameters()), None)
    if device is None or not kernels.available(device):
        return f"no kernels on {'no device' if device is None else device.type}"
    return None
