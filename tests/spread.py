"""A model over two devices, as accelerate spreads it: each layer takes what it is given to where it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def spread(model: Any, other: str) -> Any:
    """Move all layers but the first to another device, and what a layer is given after it, as accelerate does."""
    decoder = next(m for m in model.modules() if isinstance(vars(m)["_modules"].get("layers"), nn.ModuleList))

    def bring(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(other), (args, kwargs))

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:  # the first layer's device keeps its own
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    last = [m for name, m in decoder.named_children() if name.startswith(("norm", "final_layernorm", "embedding_norm"))]
    for module in [*decoder.layers[1:], *last, head]:
        module.to(other).register_forward_pre_hook(bring, with_kwargs=True)
    return model
