"""Kernels run where there is a GPU, else in Triton's interpreter, which is chosen when they are imported.

The tests of other folders, which may share the process, see no kernels on a CPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

TRITON, GPU = find_spec("triton") is not None, torch.cuda.is_available()
collect_ignore_glob = [] if TRITON else ["test_*.py"]

if TRITON and not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    steps = (
        "rehearsal",
        "early",
        "convolve",
        "mma",
        "weights",
        "held",
        "linear",
        "norms",
        "angles",
        "attend",
        "experts",
        "ssd_step",
        "delta_step",
        "conv_step",
        "scan_step",
        "ssd_fold",
        "delta_fold",
    )
    for name in (*steps, "choose", "rows", "tokens", "ssd_chunk", "delta_chunk", "lightning_chunk", "conv_chunk"):
        import_module(f"statecache.kernels.{name}")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have kernels available."""
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
