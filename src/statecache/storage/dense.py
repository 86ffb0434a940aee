"""Entries in one tensor, as they come."""

from __future__ import annotations

import torch
from torch import Tensor

Slots = slice | Tensor  # the same for all rows: a slice, or (n,); each row its own: (B, n)


def fixed(tensor: Tensor) -> Tensor:
    """Promise torch.compile that this tensor never moves; unpromised, a CUDA graph may copy it or be skipped."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


def zeros(*shape: int, dtype: torch.dtype, device: torch.device, static: bool) -> Tensor:
    """A buffer that can be changed in and out of `torch.inference_mode`."""
    if torch.compiler.is_compiling():
        return torch.zeros(shape, dtype=dtype, device=device)
    with torch.inference_mode(False):
        buffer = torch.zeros(shape, dtype=dtype, device=device)
    return fixed(buffer) if static else buffer


def keep_rows(buffer: Tensor, rows: Tensor, static: bool) -> Tensor:
    """These rows (n,) of a buffer, in this order: in place if it never moves, else in another."""
    if static:
        buffer[: len(rows)] = buffer.index_select(0, rows)
        return buffer
    with torch.inference_mode(False):
        return buffer.index_select(0, rows)


def revive(buffer: Tensor, static: bool) -> Tensor:
    """A buffer that was copied or read from a pickle, as `zeros` makes them."""
    if buffer.is_inference():
        with torch.inference_mode(False):
            buffer = buffer.clone()
    return fixed(buffer) if static else buffer


class Dense:
    """(B, C, *D), with the slot axis C moved to `axis`; at a fixed address if `static`."""

    def __init__(
        self,
        rows: int,
        slots: int,
        shape: tuple[int, ...],
        *,
        axis: int = 1,
        dtype: torch.dtype,
        device: torch.device,
        static: bool = False,
    ) -> None:
        self.axis, self.static = axis, static
        full = (rows, *shape[: axis - 1], slots, *shape[axis - 1 :])
        self._hold(zeros(*full, dtype=dtype, device=device, static=static))

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        rows = self.rows
        self._hold(revive(self.data, self.static))
        self.use(rows)

    def _hold(self, data: Tensor) -> None:
        self.data, self.slots = data, data.shape[self.axis]
        self.use(data.shape[0])

    def use(self, rows: int) -> None:
        """Have this many rows in use, from the first on."""
        self.rows = rows
        self._all = self.data if rows == self.data.shape[0] else self.data[:rows]

    def all(self) -> Tensor:
        """Every slot of the rows in use; a view."""
        return self._all

    def read(self, at: Slots) -> Tensor:
        """The entries at these slots, time at `axis`. A view where the slots are a slice."""
        if isinstance(at, slice):
            return self._all.narrow(self.axis, at.start, at.stop - at.start)
        if at.dim() == 1:
            return self._all.index_select(self.axis, at)
        return self._all[self._index(at)].movedim(1, self.axis)

    def write(self, at: Slots, entries: Tensor) -> None:
        """Put entries, time at `axis`, into these slots. No gradient flows through a store."""
        if entries.requires_grad:
            entries = entries.detach()
        if isinstance(at, slice):
            self.read(at).copy_(entries)
        elif at.dim() == 1:
            self._all.index_copy_(self.axis, at, entries)
        else:
            self._all[self._index(at)] = entries.movedim(self.axis, 1)

    def _index(self, at: Tensor) -> tuple[Tensor | slice, ...]:
        row = torch.arange(len(at), device=at.device)[:, None]
        if self.axis == 1:
            return row, at
        # a slice between two index tensors moves both to the front: (B, n, *D)
        return (row, *[slice(None)] * (self.axis - 1), at)

    # ---- between steps

    def clear(self) -> None:
        """Zero every slot."""
        self.data.zero_()

    def grow(self, slots: int) -> None:
        """Move to a tensor of this many slots; what is held keeps its slot."""
        shape = (*self.data.shape[: self.axis], slots, *self.data.shape[self.axis + 1 :])
        wider = zeros(*shape, dtype=self.data.dtype, device=self.data.device, static=self.static)
        wider.narrow(self.axis, 0, self.slots).copy_(self.data)
        rows = self.rows
        self._hold(wider)
        self.use(rows)

    def take(self, rows: Tensor, used: int) -> None:
        """Keep these rows (n,), in this order, of the first `used` slots; in place if the tensor never moves."""
        if self.static:
            keep_rows(self.data.narrow(self.axis, 0, used), rows, static=True)
        else:
            self._hold(keep_rows(self.data, rows, static=False))
        self.use(len(rows))

    def load(self, entries: Tensor) -> None:
        """Put back what `all` once showed, perhaps when there were fewer slots."""
        self.read(slice(0, entries.shape[self.axis])).copy_(entries)
