"""Kernels for one token of each row, written in Triton. Optional: nothing here is imported where there is no Triton.

Each is one launch, with a plain form elsewhere that is its oracle: see tests/kernels. Sums and products are in float32,
never in tf32; entries and outputs are rounded once, when they are written.
"""

import os
from importlib.util import find_spec

import torch


def available(device: torch.device) -> bool:
    """Whether kernels can run there: with Triton, on a CUDA device, or on a CPU in its interpreter, for tests."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return find_spec("triton") is not None
