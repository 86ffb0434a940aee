"""Tables of addresses, by which one launch works on the tensors of many layers."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Table:
    """The addresses of each layer's tensors, on their device: made anew where they have changed.

    A captured launch reads it at every replay, so that it must live as long as they.
    """

    def __init__(self) -> None:
        self._addresses: list[list[int]] = []
        self._made: Tensor | None = None

    def of(self, layers: Sequence[Sequence[Tensor]]) -> Tensor:
        """(layers, n) long, for n tensors of each layer."""
        addresses = [[tensor.data_ptr() for tensor in each] for each in layers]
        if self._made is None or addresses != self._addresses:
            with torch.inference_mode(False):
                self._made = torch.tensor(addresses, device=layers[0][0].device)
            self._addresses = addresses
        return self._made
