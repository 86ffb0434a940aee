"""The conformance matrix as a test: every family x every capability, and the cells that may fail, by name and cause."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import families
import matrix
import pytest
from tiny_models import COMPILER

MATRIX = Path(matrix.__file__)
COMPILED = (
    "mamba2",
    "granitemoehybrid",
    "qwen3_5",
    "lfm2",
)  # a compiled step takes minutes: the others in `check-long`
MAMBA_1 = "mamba falcon_mamba jamba zamba"
NO_LFM = " ".join(f for f in families.FAMILIES if f not in ("lfm2", "lfm2_moe"))
ALL = "*"

LATER = "not built yet"
DROPS = "the model's own code drops its recurrent state when it gets several tokens"
NOT_ASKED = "transformers does not ask cache_params what it holds"
OWN_CACHE = "the model accepts its own cache class alone"
CLAMP = "the model clamps its time steps in prefill and not in decoding"

# (capabilities, families, why they may fail), alike with transformers 5.17 and 5.23. Every other cell passes.
EXCUSED = [
    ("ragged_turn_padded_*", ALL, LATER),
    ("right_padded_prompt", ALL, LATER),
    ("rollback_chunk", NO_LFM, LATER),
    ("rollback_ragged", ALL, LATER),
    ("speculate_and_commit", ALL, LATER),
    ("prompt_lookup", ALL, LATER),
    ("assisted*", ALL, LATER),
    ("file_roundtrip", ALL, LATER),
    ("offloaded", ALL, LATER),
    ("quantised_attention", ALL, LATER),
    ("any_split_*", MAMBA_1, DROPS),
    ("second_turn_*", MAMBA_1, DROPS),
    ("generate_prefill_in_chunks", MAMBA_1, DROPS),
    ("second_turn_generate_all_ids", "mamba2", NOT_ASKED),
    ("generate_prefill_in_chunks", "mamba2", NOT_ASKED),
    ("forward_without_position_ids", "bamba", "the model counts positions from 0 whatever the cache holds"),
    (ALL, "minimax minimax+full0", OWN_CACHE),
    (ALL, "zamba2+clamp nemotron_h+clamp", CLAMP),
]


def excuse(capability: str, family: str) -> str | None:
    """Why this cell may fail; None where it has to pass."""
    for capabilities, names, why in EXCUSED:
        if fnmatch(capability, capabilities) and (names == ALL or family in names.split()):
            return why
    return None


def run_matrix(family: str, folder: Path, *options: str) -> dict[str, dict[str, object]]:
    """The cells of one family, from a process of their own, which keeps what it writes under `folder`."""
    folder.mkdir(parents=True)
    command = [sys.executable, str(MATRIX), "--subject", "statecache", "--family", family, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results" / "statecache" / f"{family}.json").read_text())


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Iterator[dict[str, Future]]:
    """All families without the compiled step, two at a time; each test waits for its own."""
    folder = tmp_path_factory.mktemp("matrix")
    with ThreadPoolExecutor(2) as pool:
        yield {f: pool.submit(run_matrix, f, folder / f, "--skip", "compiled_step") for f in families.FAMILIES}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_family_has_every_capability_that_is_not_excused(family, cells, capfd):
    got = cells[family].result()
    assert set(got) == set(matrix.CAPS) - {"compiled_step"}
    failed = {name: cell for name, cell in got.items() if cell["status"] != "PASS"}
    with capfd.disabled():
        report(family, {name: cell for name, cell in failed.items() if excuse(name, family)})
    assert {name: cell for name, cell in failed.items() if not excuse(name, family)} == {}


def report(family: str, failed: dict[str, dict[str, object]]) -> None:
    """Print the excused cells that do fail, by cause."""
    causes: dict[str, list[str]] = {}
    for name, cell in failed.items():
        causes.setdefault(excuse(name, family) or "", []).append(f"{name} {cell['status']}")
    for cause, names in causes.items():
        print(f"\n  {family}: {cause}: {', '.join(names)}", end="")


def compiled_step(family: str, folder: Path) -> dict[str, object]:
    """The cell of a compiled step."""
    options = ("--only", "compiled_step", "--limit", "600", "--backend", COMPILER)
    return run_matrix(family, folder / family, *options)["compiled_step"]


@pytest.mark.parametrize("family", COMPILED)
def test_compiled_step_is_one_graph(family, tmp_path):
    cell = compiled_step(family, tmp_path)
    assert (cell["status"], cell["note"]) == ("PASS", "graphs=1"), cell


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in COMPILED])
def test_compiled_step_is_one_graph_in_every_other_family(family, tmp_path):
    cell = compiled_step(family, tmp_path)
    if cell["status"] != "PASS":
        assert excuse("compiled_step", family), cell


@pytest.mark.parametrize(("capabilities", "names", "why"), EXCUSED)
def test_excuse_names_what_exists(capabilities, names, why):
    assert [name for name in matrix.CAPS if fnmatch(name, capabilities)]
    assert names == ALL or set(names.split()) <= set(families.FAMILIES)
    assert why
