"""Experts of a layer that runs whole, with what chooses them and what every token shares, through the table `BLOCKS`.

A block is run so only if every module in it is known here, one of transformers' own, and nobody hooks it or runs it
otherwise; else it runs by itself, behind the norm.

T tokens, E channels, N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statecache.models.parts import SILU, SQUARED, changed, native, plain, reads_experts, unusual, up_of
from statecache.models.product import Into, like, normed, product


@dataclass(frozen=True)
class Block:
    """Experts by the names of their modules.

    router: what chooses; softmax: whether its scores are the softmax of its outputs, or their logistic function; wide:
    whether those are float32; normed: whether shares are divided by their sum and `eps`, or the router's attribute that
    says so; scale: its attribute that multiplies them; bias: what is added to scores where experts are compared alone.
    into, out: linear layers of a unit that every token goes through; gate: the linear layer of its gate.
    """

    router: str
    softmax: bool = True
    wide: bool = False
    normed: bool | str = True
    eps: float = 0.0
    scale: str = ""
    bias: str = ""
    into: tuple[str, ...] = ()
    out: str = ""
    gate: str = ""


_QWEN: Any = {
    "into": ("shared_expert.gate_proj", "shared_expert.up_proj"),
    "out": "shared_expert.down_proj",
    "gate": "shared_expert_gate",
}
_SIGMOID: Any = {"softmax": False, "normed": "norm_topk_prob", "scale": "routed_scaling_factor"}
BLOCKS = {
    "GraniteMoeHybridMoE": Block("router"),
    "JambaSparseMoeBlock": Block("router", normed=False),
    "Qwen3NextSparseMoeBlock": Block("gate", normed="norm_topk_prob", **_QWEN),
    "Qwen3_5MoeSparseMoeBlock": Block("gate", **_QWEN),
    "Lfm2MoeSparseMoeBlock": Block("gate", eps=1e-6, bias="expert_bias", **_SIGMOID),
    "NemotronHMoE": Block(
        "gate",
        wide=True,
        eps=1e-20,
        bias="gate.e_score_correction_bias",
        into=("shared_experts.up_proj",),
        out="shared_experts.down_proj",
        **_SIGMOID,
    ),
}

# what runs a block behind its norm, x (T, E), added to a residual sum (T, E) times a scale
Sparse = Callable[[Any, Tensor, Tensor, float], Tensor]


def sparse(block: Any) -> Sparse | str:
    """What runs experts with what chooses them; or why they run by themselves."""
    form = BLOCKS.get(type(block).__name__)
    if form is None or not native(block):
        return f"{type(block).__name__} is not in the table"
    why = _foreign(form, block)
    if why is not None:
        return why
    router, experts = getattr(block, form.router), block.experts
    groups = getattr(router, "num_group", 1)
    if groups not in (None, 1):
        return f"it chooses among {groups} groups"
    if not plain(router.weight) or getattr(router, "bias", None) is not None:
        return f"its {form.router} has an unusual weight"
    if not reads_experts(experts):
        return "no kernel reads its experts"
    if getattr(experts.config, "output_router_logits", False):
        return "output_router_logits asks its router"
    modules = dict(block.named_modules())
    for path in (*form.into, *filter(None, (form.out, form.gate))):
        why = unusual(modules[path]) if path in modules else "is not there"
        if why is not None:
            return f"its {path} {why}"
    if form.out:
        act = type(modules[form.out.partition(".")[0]].act_fn).__name__
        if act not in (SILU if len(form.into) > 1 else SQUARED):
            return f"its activation is {act}"
    return _run(form, block)


def _foreign(form: Block, block: nn.Module) -> str | None:
    """What in a block is not as its family made it; None if all is."""
    paths = ("experts", form.router, form.out, form.gate)
    known = {path.partition(".")[0] for path in paths if path}
    for name, module in block.named_children():
        if name not in known and type(module) is not nn.Identity:
            return f"its {name} is a {type(module).__name__}"
    for path, module in block.named_modules():
        if changed(module):
            return f"its {path or type(module).__name__} is hooked"
        if not native(module):
            return f"its {path} is a {type(module).__name__}"
    return None


def _run(form: Block, block: Any) -> Sparse:
    from statecache.kernels.experts import Shared, crowded, experts, route
    from statecache.kernels.linear import FEW_ROWS

    router, own = getattr(block, form.router), block.experts
    chosen = getattr(router, "top_k", None) or block.top_k
    normalised = getattr(router, form.normed) if isinstance(form.normed, str) else form.normed
    scale = float(getattr(router, form.scale)) if form.scale else 1.0
    holder, _, name = form.bias.rpartition(".")

    def forward(by: Any, x: Tensor, residual: Tensor, added: float) -> Tensor:
        weight, up, down = router.weight, up_of(own), own.down_proj
        if len(x) > FEW_ROWS:  # every program would compute the norm
            x, by = normed(by, x, up.dtype), None
        shared = [block.get_submodule(path).weight for path in (*form.into, *filter(None, [form.gate]))]
        inner = sum(len(each) for each in shared[: len(form.into)])
        if form.wide or not shared:
            logits = product(x, weight, by=by, dtype=torch.float32 if form.wide else None)
            both = product(x, tuple(shared), by=by) if shared else None
        else:
            logits, both = product(x, (weight, *shared), by=by).tensor_split([len(weight)], -1)
        bias = getattr(block.get_submodule(holder), name, None) if name else None
        given: Any = {"normed": normalised, "eps": form.eps, "scale": scale, "bias": bias}
        if both is not None:
            given["shared"] = Shared(both[:, :inner], len(form.into) > 1, both[:, inner:] if form.gate else None)
        index, share, inside = route(logits, chosen, softmax=form.softmax, **given)
        if both is not None:
            residual = product(inside, block.get_submodule(form.out).weight, into=Into(residual, added))
        if crowded(index, up):
            x = x if by is None else normed(by, x, up.dtype)
            return torch.add(residual, own(x, index, share if form.wide else share.to(x.dtype)), alpha=added)
        return experts(x, up, down, index, share, gated=own.has_gate, **like(by), residual=residual, scale=added)

    return forward
