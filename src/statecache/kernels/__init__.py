"""Kernels for one token of each row or for many, written in Triton. Optional: nothing here is imported without Triton.

Each has a plain form elsewhere that is its oracle: see tests/kernels. Sums and products are in float32, never in tf32
alone: tensor cores take three products of tf32 for each of float32. Entries and outputs are rounded once, when they are
written.
"""

import os
import warnings
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

from statecache.kernels.cards import DTYPES, able

_refused: set[tuple[str, torch.device]] = set()


def available(device: torch.device) -> bool:
    """Whether kernels can run there: with Triton, on a CUDA device, or on a CPU in its interpreter, for tests."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and _installed()


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None


def serves(kernel: str, *tensors: Tensor | None) -> bool:
    """Whether a kernel of many tokens can take these: plain tensors where it runs, none that a gradient is asked of.

    Not while something traces.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if torch.compiler.is_compiling() or not available(device) or (kernel, device) in _refused or not able(device):
        return False
    wanted = torch.is_grad_enabled()
    return all(type(x) in (Tensor, Parameter) and x.dtype in DTYPES and not (wanted and x.requires_grad) for x in given)


def too_large() -> type[Exception]:
    """What Triton raises where a kernel needs more of a device than this has."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources  # type: ignore[no-any-return]


def refuse(kernel: str, device: torch.device, error: Exception) -> None:
    """Have this kernel serve no more there, and say so."""
    _refused.add((kernel, device))
    warnings.warn(f"the kernel {kernel} does not fit {device}, and its plain form runs: {error}", stacklevel=2)
