"""Rows of many buffers change places in one launch: a program reads what all of them have in its columns, then writes.

k rows of a buffer (B, *D), n of them move.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.cards import upload

PIECE = 16  # bytes that move together
MOST = 256  # rows that a program holds at once
SIZE = 8192  # words of four bytes that a program holds at once, of all rows
PROGRAMS = 256  # for one buffer


@triton.jit
def _take(table, n, BN: tl.constexpr, BC: tl.constexpr):
    row, buffer = tl.arange(0, BN), table + 2 * n + tl.program_id(1) * 3
    moves = row < n
    to, source = tl.load(table + row, mask=moves, other=0), tl.load(table + n + row, mask=moves, other=0)
    data = tl.multiple_of(tl.load(buffer).to(tl.pointer_type(tl.int32)), 16)
    stride, width = tl.load(buffer + 1) * 4, tl.load(buffer + 2) * 4
    for first in range(tl.program_id(0) * BC, width, tl.num_programs(0) * BC):
        at = first + tl.arange(0, BC)
        inside = moves[:, None] & (at < width)[None, :]
        seen = tl.load(data + source[:, None] * stride + at[None, :], mask=inside)
        tl.debug_barrier()  # all of a column is read before any of it is written
        tl.store(data + to[:, None] * stride + at[None, :], seen, mask=inside)


def takes(held: Tensor, rows: Sequence[int]) -> bool:
    """Whether the kernel can move rows of `held` (B, *D) so: each in one piece of memory, of whole 16 bytes."""
    row = held[0]
    sizes = held.data_ptr(), held.stride(0) * held.itemsize, row.nbytes
    return len(rows) <= MOST and row.nbytes > 0 and row.is_contiguous() and not any(size % PIECE for size in sizes)


def take(buffers: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Have the first k of the rows of each buffer be what the k `rows` were, in place. Any shapes and dtypes."""
    moved = [(to, row) for to, row in enumerate(rows) if to != row]
    if not moved:
        return
    sizes = [(held.data_ptr(), held.stride(0) * held.itemsize // PIECE, held[0].nbytes // PIECE) for held in buffers]
    table = [*(to for to, _ in moved), *(row for _, row in moved), *(size for each in sizes for size in each)]
    block = triton.next_power_of_2(len(moved))
    columns = SIZE // block
    programs = min(PROGRAMS, max(triton.cdiv(width * PIECE // 4, columns) for *_, width in sizes))
    with torch.cuda.device_of(buffers[0]):
        there = upload(table, buffers[0].device)
        _take[(programs, len(buffers))](there, len(moved), BN=block, BC=columns, num_warps=8)
