"""Where entries live. A store reads, writes, clears and moves entries by row and slot, and knows nothing of time.

B rows, n entries of a row, C slots, *D the shape of one entry. Tensors carry the entries at the store's own axis; the
comments write them as (B, n, *D).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from statecache.storage.changes import Changes

if sys.platform == "linux":
    from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

# bytes of a buffer in host memory that is zero without being written, 0 for none: those that malloc would map as well.
# torch's zeros wake its threads, which spin for a while on cores that others need then, as those that read a file
LARGE = 1 << 17 if sys.platform == "linux" else 0

Span = tuple[int, list[slice]]  # a row, and slots of it in runs


class Places(NamedTuple):
    """Slots (R, n) of rows (R, 1), each row its own. `known` gives them on the host, where it knows them."""

    rows: Tensor
    slots: Tensor
    known: Callable[[], list[Span]] | None = None


Slots = slice | Tensor | Places  # the same for all rows: a slice, or (n,)


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

    def clear(self, rows: Sequence[int] | None, changes: Changes) -> None:
        """Zero every slot of these rows, None for all, with `changes` at the latest."""
        ...

    def taken(self, rows: Sequence[int], used: int, changes: Changes) -> Move:
        """Prepare to keep these rows, in this order, of the first `used` slots; nothing changes before it is made.

        At fixed addresses rows move in place when it is made; else all is ready, copied or shared, with `changes`,
        which are made before.
        """
        ...

    def fork(self, used: Sequence[int]) -> Self:
        """Another store with the rows in use, of the first `used` slots of each; what one writes the other never sees.

        It may share memory with this one, which a deep copy does not.
        """
        ...

    def use(self, rows: int) -> None:
        """Have this many rows in use, from the first on."""
        ...

    def grow(self, slots: int) -> None:
        """Have this many slots; what is held keeps its slot."""
        ...

    def buffers(self) -> list[Tensor]:
        """The tensors that hold it. One with as many slots at `axis` as there are has them there."""
        ...


def whole(store: Store) -> Tensor:
    """All entries of the rows in use, (B, C, *D): themselves, in the dtype that they are kept in, or copies of them."""
    held = store.plain
    return store.read(slice(0, store.slots)) if held is None else held


def put_back(store: Store, entries: Tensor, axis: int, changes: Changes) -> None:
    """Put what `whole` gave (B, n, *D) into the first slots, whose axis this is, with `changes` at the latest."""
    held, n = store.plain, entries.shape[axis]
    if held is None:
        store.write(slice(0, n), entries)
    else:
        changes.copy(held.narrow(axis, 0, n), entries)


class Move(Protocol):
    """A change that is ready to be made, with `changes` at the latest."""

    def __call__(self, changes: Changes) -> None: ...


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
        if LARGE and torch.device(device).type == "cpu" and size >= LARGE:
            buffer = _untouched(size).view(dtype).view(shape)
        else:
            buffer = torch.zeros(shape, dtype=dtype, device=device)
    return fixed(buffer) if static else buffer


def _untouched(size: int) -> Tensor:
    """Zeros of so many bytes, which take no memory before they are written: then in large pages."""
    memory = mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):  # of a system without
        memory.madvise(MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def revive(buffer: Tensor, static: bool) -> Tensor:
    """A buffer that was copied or read from a pickle, as `zeros` makes them."""
    if buffer.is_inference():
        with torch.inference_mode(False):
            buffer = buffer.clone()
    return fixed(buffer) if static else buffer
