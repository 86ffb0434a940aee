"""Programmatic dependent launch: a kernel begins while the one before ends, and waits before it reads what that wrote.

What no kernel of a step writes, as weights, may be read before the wait; so may states that the step before wrote,
since the first kernels of every step are torch's, which begin when all before them is done.
"""

import os
from functools import lru_cache
from typing import Any

import torch
import triton

if os.environ.get("TRITON_INTERPRET") == "1":

    @triton.jit
    def launch():
        """Let the next kernel begin."""

    @triton.jit
    def wait():
        """Wait until all before this kernel is done."""

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


def early(device: torch.device) -> dict[str, Any]:
    """The options of a launch: whether it begins early, on devices that can."""
    return {"EARLY": True, "launch_pdl": True} if _can(device) else {"EARLY": False}


@lru_cache
def _can(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
