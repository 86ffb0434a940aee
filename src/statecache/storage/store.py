"""Where entries live. A store reads, writes, clears and moves entries by row and slot, and knows nothing of time.

B rows, n entries of a row, C slots, *D the shape of one entry. Tensors carry the entries at the store's own axis; the
comments write them as (B, n, *D).
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 22  # bytes of a buffer in host memory that is zero without being written
ALIGNED = 64  # bytes, as torch aligns what it allocates

# the same for all rows: a slice, or (n,); each row its own: rows (R, 1) and slots (R, n) of R rows
Slots = slice | Tensor | tuple[Tensor, Tensor]


class Store(Protocol):
    """Entries of B rows in C slots each, addressed by slot. Rows beyond those in use are kept, and not shown."""

    slots: int  # C
    shows: bool  # whether what `read` gives of a slice is the entries themselves, to be overwritten in place

    @property
    def plain(self) -> Tensor | None:
        """All entries (B, C, *D) where one tensor has them, in its own dtype, for kernels; None in another form."""
        ...

    def read(self, at: Slots) -> Tensor:
        """The entries at these slots, (B, n, *D), or (R, n, *D) where rows are named. A view if possible."""
        ...

    def write(self, at: Slots, entries: Tensor) -> None:
        """Put entries into these slots. No gradient flows through a store."""
        ...

    def clear(self, rows: Tensor | None = None) -> None:
        """Zero every slot of these rows (R,), or of all."""
        ...

    def taken(self, rows: Tensor, used: int) -> Move:
        """Prepare to keep these rows (n,), in this order, of the first `used` slots; nothing changes before it is made.

        At fixed addresses rows move in place when it is made; else they are copied now.
        """
        ...

    def use(self, rows: int) -> None:
        """Have this many rows in use, from the first on."""
        ...

    def grow(self, slots: int) -> None:
        """Have this many slots; what is held keeps its slot."""
        ...

    def buffers(self) -> list[Tensor]:
        """The tensors that hold it."""
        ...


class Move(Protocol):
    """A change that is ready to be made."""

    def __call__(self) -> None: ...


class MakeStore(Protocol):
    """How a ring or a lease gets its store: (rows, *D) with the slot axis at `axis`; at fixed addresses if `static`."""

    def __call__(
        self,
        rows: int,
        slots: int,
        shape: tuple[int, ...],
        *,
        axis: int,
        dtype: torch.dtype,
        device: torch.device,
        static: bool,
    ) -> Store: ...


def fixed(tensor: Tensor) -> Tensor:
    """Promise torch.compile that this tensor never moves; unpromised, a CUDA graph may copy it or be skipped."""
    if not (torch.compiler.is_compiling() or tensor.is_meta):  # what has no memory has no address
        torch._dynamo.mark_static_address(tensor)
    return tensor


def zeros(*shape: int, dtype: torch.dtype, device: torch.device, static: bool) -> Tensor:
    """A buffer that can be changed in and out of `torch.inference_mode`."""
    if torch.compiler.is_compiling():
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):
        size = math.prod(shape) * dtype.itemsize
        if torch.device(device).type == "cpu" and size >= LARGE:
            form = torch.empty(shape, dtype=dtype, device="meta")
            buffer = torch.empty(0, dtype=dtype).set_(_untouched(size), 0, form.shape, form.stride())
        else:
            buffer = torch.zeros(shape, dtype=dtype, device=device)
    return fixed(buffer) if static else buffer


def _untouched(size: int) -> torch.UntypedStorage:
    """Zeros of so many bytes, whose pages are large, and nobody's before they are written."""
    memory = np.zeros(size + ALIGNED, np.uint8)
    first = -memory.ctypes.data % ALIGNED
    return torch.from_numpy(memory[first : first + size]).untyped_storage()


def revive(buffer: Tensor, static: bool) -> Tensor:
    """A buffer that was copied or read from a pickle, as `zeros` makes them."""
    if buffer.is_inference():
        with torch.inference_mode(False):
            buffer = buffer.clone()
    return fixed(buffer) if static else buffer
