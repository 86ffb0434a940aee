"""What all tests share: the command line, run here; and Triton, imported for its interpreter where there is no GPU.

That cannot be chosen once it is imported, and torch imports it in the course of other tests; these see no kernels on
a CPU.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from weakref import WeakValueDictionary

import pytest
import torch

from statecache.cli import main
from statecache.models import ready

os.environ["STATECACHE_COMPILED"] = ""  # no step is compiled beside a test that does not ask for it

if find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def nobody_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the prepared models that other tests have left behind, which would vouch for one that is not."""
    monkeypatch.setattr(ready, "_ready", WeakValueDictionary())


@pytest.fixture
def statecache(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line here: (exit code, standard output, standard error)."""

    def run(*args: str, stdin: str | None = None, terminal: bool = False) -> tuple[int, str, str]:
        source = io.StringIO(stdin or "")
        source.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "argv", ["statecache", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run
