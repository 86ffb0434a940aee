"""Kernels for one token of each row or for many, written in Triton. Optional: nothing here is imported without Triton.

Each has a plain form elsewhere that is its oracle: see tests/kernels. Sums and products are in float32, never in tf32
alone: tensor cores take three products of tf32 for each of float32. Entries and outputs are rounded once, when they are
written.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether kernels can run there: with Triton, on a CUDA device, or on a CPU in its interpreter, for tests."""
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (device.type == "cuda" or interpreted) and find_spec("triton") is not None


def serves(*tensors: Tensor | None) -> bool:
    """Whether a kernel can take these tensors in: plain ones where kernels run, none that a gradient is asked of.

    Not while something traces.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or not available(given[0].device):
        return False
    wanted = torch.is_grad_enabled()
    return all(type(x) in (Tensor, Parameter) and x.dtype in DTYPES and not (wanted and x.requires_grad) for x in given)
