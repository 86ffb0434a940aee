"""Entries in a byte a number, and the scale of each run of numbers with them: int8 and fp8. Lossy.

A run is what one head keeps of one position: the D numbers of an entry's last axis. Its scale is a power of two, from
the exponent of the run's largest number. So what is read is exact in bfloat16, and written again it gives the same
bytes: a slot that gets its own entry back does not drift.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from statecache.storage.changes import Changes
from statecache.storage.dense import Dense
from statecache.storage.store import Move, Slots

BITS = 8  # of an exponent


class Code(Protocol):
    """Runs of numbers as bytes. Bytes of 0 are numbers of 0; a run with anything that is not finite reads as NaN."""

    def width(self, numbers: int) -> int:
        """Bytes of a run of so many numbers."""
        ...

    def encode(self, runs: Tensor) -> Tensor:
        """Floating-point numbers (..., D) as bytes (..., W), int8."""
        ...

    def decode(self, codes: Tensor, numbers: int) -> Tensor:
        """Bytes (..., W) as numbers (..., D), in float32."""
        ...


class Int8:
    """D bytes for D numbers, 8 or more: the exponent's bits are the lowest of the first eight, which keep seven each.

    The error of a number is at most 1/128 of the run's largest; of the first eight at most 1/64.
    """

    def width(self, numbers: int) -> int:
        if numbers < BITS:
            raise ValueError(f"a run of {numbers} numbers has no room for its scale: keep it as it is")
        return numbers

    def encode(self, runs: Tensor) -> Tensor:
        runs = runs.float()
        exponent = _exponent(runs.abs().amax(-1, keepdim=True))
        step = self._step(runs)
        scaled = (runs / _power(exponent - 6)).nan_to_num(0, 0, 0)  # the largest is now 64 or more, and less than 128
        codes = ((scaled / step).round() * step).clamp(step - 128, 128 - step).to(torch.int8)
        bits = (exponent >> torch.arange(BITS, device=runs.device)) & 1
        codes[..., :BITS] |= bits.to(torch.int8)
        return codes

    def decode(self, codes: Tensor, numbers: int) -> Tensor:
        places = torch.arange(BITS, device=codes.device)
        exponent = ((codes[..., :BITS] & 1).int() << places).sum(-1, keepdim=True)
        return (codes & -self._step(codes)) * _scale(exponent, exponent - 6)

    def _step(self, like: Tensor) -> Tensor:
        """How far numbers lie apart: (D,)."""
        step = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
        step[:BITS] = 2
        return step


class Fp8:
    """D numbers in float8_e4m3fn, and a byte for the exponent: D + 1.

    The error of a number is at most 1/16 of it, and 2 ** -17 of the run's largest.
    """

    def width(self, numbers: int) -> int:
        return numbers + 1

    def encode(self, runs: Tensor) -> Tensor:
        runs = runs.float()
        exponent = _exponent(runs.abs().amax(-1, keepdim=True), mantissa=3)
        scaled = (runs / _power(exponent - 7)).nan_to_num(0, 0, 0)  # at most 256, of 448
        return torch.cat(
            [scaled.to(torch.float8_e4m3fn).view(torch.int8), exponent.to(torch.uint8).view(torch.int8)], -1
        )

    def decode(self, codes: Tensor, numbers: int) -> Tensor:
        exponent = codes[..., numbers:].view(torch.uint8).int()
        return codes[..., :numbers].view(torch.float8_e4m3fn).float() * _scale(exponent, exponent - 7)


class Coded:
    """Entries by a code, in `Dense`. What `read` gives is a copy. See `Store`."""

    shows = False
    plain = None

    def __init__(
        self,
        code: Code,
        rows: int,
        slots: int,
        shape: tuple[int, ...],
        *,
        axis: int = 1,
        dtype: torch.dtype,
        device: torch.device,
        static: bool = False,
    ) -> None:
        self.code, self.slots, self.dtype, self.numbers = code, slots, dtype, shape[-1]
        coded = (*shape[:-1], code.width(shape[-1]))
        self.last = axis == len(shape) + 1  # slots stand behind a run's numbers
        self.dense = Dense(rows, slots, coded, axis=axis, dtype=torch.int8, device=device, static=static)

    def read(self, at: Slots) -> Tensor:
        codes = self._turned(self.dense.read(at))
        return self._turned(within(self.code.decode(codes, self.numbers), self.dtype))

    def write(self, at: Slots, entries: Tensor) -> None:
        self.dense.write(at, self._turned(self.code.encode(self._turned(entries.detach()))))

    def _turned(self, entries: Tensor) -> Tensor:
        """Entries, or codes, with slots before a run's numbers, if they stand behind; and back."""
        return entries.transpose(-1, -2) if self.last else entries

    def clear(self, rows: Sequence[int] | None, changes: Changes) -> None:
        self.dense.clear(rows, changes)

    def taken(self, rows: Sequence[int], used: int, changes: Changes) -> Move:
        return self.dense.taken(rows, used, changes)

    def fork(self, used: Sequence[int]) -> Coded:
        return copy.deepcopy(self)

    def use(self, rows: int) -> None:
        self.dense.use(rows)

    def grow(self, slots: int) -> None:
        self.dense.grow(slots)
        self.slots = slots

    def buffers(self) -> list[Tensor]:
        return self.dense.buffers()


def within(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """These numbers, float32, in a dtype: what rounding took beyond the largest that float16 has as that one."""
    if dtype is torch.float16:
        numbers = numbers.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return numbers.to(dtype)


def _exponent(largest: Tensor, mantissa: int = 23) -> Tensor:
    """The biased exponents of numbers >= 0, rounded to so many bits: 0 to 254, int32; 255 for what is not finite."""
    half = 1 << 22 - mantissa if mantissa < 23 else 0
    exponent = (largest.view(torch.int32) + half >> 23).clamp(0, 254)
    return torch.where(largest.isfinite(), exponent, 255)


def _power(exponent: Tensor) -> Tensor:
    """Two to the power of a biased exponent, int32, as far as float32 has it without losing bits."""
    return (exponent.clamp(1, 254).int() << 23).view(torch.float32)


def _scale(exponent: Tensor, scaled: Tensor) -> Tensor:
    return torch.where(exponent == 255, torch.nan, _power(scaled))
