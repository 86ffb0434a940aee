"""Float32 means float32, and every test compiles afresh."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo as dynamo

sys.modules["fla"] = None  # it multiplies in tf32: unprepared models would be no reference


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dynamo.reset()
    dynamo.utils.counters.clear()
    with torch.no_grad():
        yield
