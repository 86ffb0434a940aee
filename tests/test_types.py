"""What a type checker says of code that uses the package: precise types, and no name that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import statecache as sc

PROGRAM = """
from collections.abc import Callable
from typing import Any

from torch import Tensor

import statecache as sc

def use(model: Any, tokenizer: Any, ids: Tensor, flag: bool, tell: Callable[[sc.Report], None]) -> None:
    reveal_type(sc.generate(model, "a", tokenizer, lookup=3, report=tell))
    reveal_type(sc.generate(model, ["a", "b"], tokenizer))
    reveal_type(sc.generate(model, [{"role": "user", "content": "a"}], tokenizer))
    reveal_type(sc.generate(model, [[{"role": "user", "content": "a"}]], tokenizer))
    reveal_type(sc.generate(model, ids))
    reveal_type(sc.generate(model, "a", tokenizer, stream=True))
    reveal_type(sc.generate(model, ids, stream=True))
    reveal_type(sc.generate(model, ids, stream=flag))
    public: tuple[type, ...] = (sc.Report, sc.Mark, sc.Round, sc.States, sc.ModelSpec, sc.errors.SlackError)
    sc.StateCashe(model.config)
    sc.generate(model, ids, max_tokens=3)
"""
# torch itself takes mypy a minute
TORCH = "from typing import Any\nclass Tensor: ...\ndef __getattr__(name: str) -> Any: ...\n"
REVEALED = ["str", "list[str]", "str", "list[str]", "Tensor", "Stream[str]", "Stream[list[Any]]", "Any"]


def test_calls_have_precise_types_and_typos_are_found(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("transformers", "torch", "jinja2"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n{skipped}[mypy-torch]\nfollow_imports = silent\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.pyi").write_text(TORCH)
    environment = {**os.environ, "MYPYPATH": f"{tmp_path}:{Path(sc.__file__).parents[1]}"}
    options = ["--strict", "--no-error-summary", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    options += ["--config-file", str(tmp_path / "mypy.ini")]
    command = [sys.executable, "-m", "mypy", *options, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path).stdout
    revealed = [re.sub(r"\b(\w+\.)+", "", kind) for kind in re.findall(r'Revealed type is "(.*)"', out)]
    assert revealed == REVEALED
    errors = [line for line in out.splitlines() if "program.py" in line and ": error:" in line]
    assert len({line.split(":")[1] for line in errors}) == 2, out
    assert '"StateCashe"' in errors[0]
    assert '"max_tokens"' in errors[1]


@pytest.mark.parametrize("name", sc.__all__)
def test_every_public_name_is_there_and_told_to_type_checkers(name: str) -> None:
    assert getattr(sc, name) is not None
    assert re.search(rf" import {name} as {name}\n", Path(sc.__file__).read_text())
