"""Triton, where it is there without a GPU, is imported for its interpreter, which cannot be chosen once it is imported.

Torch imports it in the course of other tests; these see no kernels on a CPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import torch

if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]
