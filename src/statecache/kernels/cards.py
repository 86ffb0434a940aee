"""What kernels may ask of a device."""

from functools import lru_cache

import torch

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
