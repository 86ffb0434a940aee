"""What kernels may ask of a device, and how numbers come to it."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache
def able(device: torch.device) -> bool:
    """Whether tensor cores take the products that kernels ask for, in bfloat16 and tf32, and as instructions."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def shared(device: torch.device) -> int:
    """Bytes of memory that the threads of one program may share; more than any card has where there is none."""
    if device.type != "cuda":
        return 1 << 30
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)


def upload(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """These integers, nested lists or not, on a device; the host waits for nothing that it does."""
    held = torch.tensor(numbers, dtype=torch.long, device="cpu", pin_memory=device.type == "cuda")
    return held.to(device, non_blocking=True)
