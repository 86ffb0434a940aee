"""Programmatic dependent launch: a kernel begins while the one before ends, and waits before it reads what that wrote.

What no kernel of a step writes, as weights, may be read before the wait; so may states that the step before wrote,
since the first kernels of every step are torch's, which begin when all before them is done.
"""

import ctypes
import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

LITTLE = 14  # percent of a processor's first cache
CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT

if os.environ.get("TRITON_INTERPRET") == "1":

    @triton.jit
    def launch():
        """Let the next kernel begin."""

    @triton.jit
    def wait():
        """Wait until all before this kernel is done."""

    @triton.jit
    def fetch(rows, size: tl.constexpr):
        """Have the second cache fetch so many bytes from each of these places on."""

else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    @triton.jit
    def launch():
        """Let the next kernel begin."""
        gdc_launch_dependents()

    @triton.jit
    def wait():
        """Wait until all before this kernel is done."""
        gdc_wait()

    @triton.jit
    def fetch(rows, size: tl.constexpr):
        """Have the second cache fetch so many bytes, a multiple of 16, from each of these places on."""
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [rows, tl.full(rows.shape, size, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def early(device: torch.device) -> dict[str, Any]:
    """The options of a launch: whether it begins early, on devices that can."""
    return {"EARLY": True, "launch_pdl": True} if _can(device) else {"EARLY": False}


@lru_cache
def _can(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def light(kernel: Any) -> None:
    """Have a launched kernel, whose programs share little memory, run beside others of that kind from now on.

    A processor must be idle to divide its first cache into shared memory and the rest in another way, and what the
    driver chooses by itself differs from kernel to kernel.
    """
    if kernel is not None:  # the interpreter gives none
        _divide(kernel.function)


@lru_cache(None)
def _divide(function: int) -> None:
    """What the driver is asked for here, it may as well not give: nothing but time depends on it."""
    ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), CARVEOUT, LITTLE)
