"""What kernels of many tokens share: chunks of a sequence, and gates that say which tokens there are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from statecache.kernels.cards import shared

MOST = 64  # tokens of a chunk
ROOM = 1 << 25  # float32 elements that a launch may leave to the next, for each of its workspaces
AMPLE = 160 << 10  # bytes of a program's own memory that chunks of so many take
SPARE = 512  # programs that a device has room for


@triton.jit
def limit(count, row, T, COUNTED: tl.constexpr):
    """How many of T tokens the row takes in."""
    end = T
    if COUNTED:
        end = tl.minimum(tl.load(count + row).to(tl.int32), T)
    return end


@triton.jit
def gates(gate, token, stride, end):
    """The gates of these tokens, float32; zero from `end` on."""
    return tl.load(gate + token * stride, mask=token < end, other=0.0).to(tl.float32)


@triton.jit
def product(x, y):
    """The matrix product of two, one float32 and one as it was given, to the last places of float32.

    What is bfloat16 multiplies the three bfloat16 numbers that a float32 is the sum of: twice as fast as tf32x3.
    """
    if x.dtype == tl.bfloat16:
        high, middle, low = _thirds(y)
        out = tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low)))
    elif y.dtype == tl.bfloat16:
        high, middle, low = _thirds(x)
        out = tl.dot(high, y, tl.dot(middle, y, tl.dot(low, y)))
    else:
        out = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="tf32x3")
    return out


@triton.jit
def _thirds(x):
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


def block(tokens: int, device: torch.device, size: int) -> int:
    """Tokens of a chunk, of keys or states of this size: a power of two, and as many as products take at least."""
    ample = shared(device) >= AMPLE
    return max(16, min(MOST // (1 if ample else 2) // (1 if size <= 128 else 2), padded(tokens)))


def room(each: int) -> int:
    """Chunks of which a launch may leave `each` elements."""
    return max(1, ROOM // each)


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same without gaps, for which kernels take them."""
    return [None if x is None else x.contiguous() for x in tensors]


def along(x: Tensor) -> Tensor:
    """`x` with its last axis dense, which is what kernels read along."""
    return x if x.stride(-1) == 1 else x.contiguous()


def width(channels: int, heads: int, most: int) -> int:
    """Channels of each of so many heads that a program takes: few of them, while there are processors to spare."""
    return 16 if heads * channels < 16 * SPARE else min(most, padded(channels))


def padded(size: int) -> int:
    """The lanes that hold so many numbers."""
    return max(16, 1 << (size - 1).bit_length())


def cut(chunks: int, programs: int) -> int:
    """Runs of chunks that are taken at once where one run has so many programs: none shorter than eight chunks."""
    return max(1, min(chunks // 8, SPARE // 2 // programs))
