"""Float32 means float32, and every test compiles afresh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo as dynamo


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dynamo.reset()
    dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
