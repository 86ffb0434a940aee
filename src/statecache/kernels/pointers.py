"""Tables of addresses, by which one launch works on the tensors of many layers."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def table(layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """The addresses of each layer's tensors, (layers, n) long on their device; made once, since they seldom change."""
    return _made(tuple(tuple(tensor.data_ptr() for tensor in each) for each in layers), layers[0][0].device)


@lru_cache(maxsize=64)
def _made(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(addresses, device=device)
