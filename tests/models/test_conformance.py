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
PATHS = [path for path in [os.environ.get("PYTHONPATH")] if path]
COMPILED = (
    "mamba2",
    "granitemoehybrid",
    "qwen3_5",
    "lfm2",
)  # a compiled step takes minutes: the others in `check-long`
MAMBA_1 = "mamba falcon_mamba jamba zamba"
NO_LFM = ("lfm2", "lfm2_moe", "lfm3")
INKLING = " ".join(f for f in families.FAMILIES if f.startswith("inkling"))
RECUR = " ".join(f for f in families.FAMILIES if f not in (*NO_LFM, *INKLING.split()))
ON_MODULES = " ".join(f for f in families.FAMILIES if f == "recurrent_gemma")
ALL = "*"
QWEN4 = " ".join(f for f in families.FAMILIES if f == "qwen4_exp")  # of later transformers

LATER = "not built yet"
PREPARED_ALONE = "it takes a prepared model"
DROPS = "the model's own code drops its recurrent state when it gets several tokens"
NOT_ASKED = "transformers does not ask cache_params what it holds"
OWN_CACHE = "the model accepts its own cache class alone"
PADS_COUNT = "the model counts pads where it scales by positions"
FULL_MASK = "generate gives sliding layers that convolve the mask of full ones, where it makes the masks"
LOOPS = "the model's own index loops over tokens, by how many each sees"
CLAMP = "the model clamps its time steps in prefill and not in decoding"

NOT_BUILT = [(name, ALL, LATER) for name in ("file_roundtrip", "offloaded", "quantised_attention")]
# of each subject (capabilities, families, why they may fail), alike with transformers 5.17 and 5.23. Every other cell
# passes; those that are not built yet fail, so that this table shrinks when they are.
EXCUSED = {
    "prepared": NOT_BUILT,
    "statecache": [
        *NOT_BUILT,
        ("ragged_turn_padded_*", ALL, PREPARED_ALONE),
        ("right_padded_prompt", ALL, PREPARED_ALONE),
        ("rollback_chunk", RECUR, PREPARED_ALONE),
        ("rollback_ragged", ALL, PREPARED_ALONE),
        ("speculate_and_commit", ALL, PREPARED_ALONE),
        ("any_split_*", MAMBA_1, DROPS),
        ("second_turn_*", MAMBA_1, DROPS),
        ("generate_prefill_in_chunks", MAMBA_1, DROPS),
        ("second_turn_generate_all_ids", "mamba2", NOT_ASKED),
        ("generate_prefill_in_chunks", "mamba2", NOT_ASKED),
        ("forward_without_position_ids", "bamba", "the model counts positions from 0 whatever the cache holds"),
        ("left_padding_growing", "inkling+scaled", PADS_COUNT),
        *[(name, INKLING, FULL_MASK) for name in ("greedy_fixed", "left_padding_fixed", "beams_fixed")],
        ("compiled_step", QWEN4, LOOPS),
        (ALL, "minimax minimax+full0", OWN_CACHE),
        (ALL, ON_MODULES, "the model keeps its states on its modules"),
        (ALL, "zamba2+clamp nemotron_h+clamp", CLAMP),
    ],
}
each_subject = pytest.mark.parametrize("subject", EXCUSED)


def excuse(subject: str, capability: str, family: str) -> str | None:
    """Why this cell may fail; None where it has to pass."""
    for capabilities, names, why in EXCUSED[subject]:
        if fnmatch(capability, capabilities) and (names == ALL or family in names.split()):
            return why
    return None


# a family that is excused altogether has nothing to show
CELLS = [(s, f) for s in EXCUSED for f in families.FAMILIES if not excuse(s, "greedy_growing", f)]


SCRIPT = """
import sys
import matrix

subject, only, skip, backend, limit, *names = sys.argv[1:]
matrix.imports(subject, backend=backend)
for name in names:
    matrix.run_family(name, only.split(",") if only else None, skip.split(","), int(limit))
"""


def run_matrix(
    subject: str, names: list[str], folder: Path, only: str = "", skip: str = "", backend: str = "", limit: int = 150
) -> dict[str, dict[str, dict[str, object]]]:
    """The cells of these families, from a process of their own, which keeps what it writes under `folder`."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", SCRIPT, subject, only, skip, backend, str(limit), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(MATRIX.parent), *PATHS])}
    run = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert run.returncode == 0, run.stderr
    return {name: json.loads((folder / "results" / subject / f"{name}.json").read_text()) for name in names}


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> Iterator[dict[str, Future]]:
    """All families without the compiled step, the two subjects side by side; each test waits for its own."""
    folder = tmp_path_factory.mktemp("matrix")
    with ThreadPoolExecutor(len(EXCUSED)) as pool:
        yield {
            subject: pool.submit(
                run_matrix, subject, [f for s, f in CELLS if s == subject], folder / subject, skip="compiled_step"
            )
            for subject in EXCUSED
        }


@pytest.mark.parametrize(("subject", "family"), CELLS)
def test_family_has_every_capability_that_is_not_excused(subject, family, cells, capfd):
    got = cells[subject].result()[family]
    assert set(got) == set(matrix.CAPS) - {"compiled_step"}
    failed = {name: cell for name, cell in got.items() if cell["status"] != "PASS"}
    with capfd.disabled():
        report(subject, family, {name: cell for name, cell in failed.items() if excuse(subject, name, family)})
    assert {name: cell for name, cell in failed.items() if not excuse(subject, name, family)} == {}
    assert [name for name in got if excuse(subject, name, family) == LATER and got[name]["status"] != "FAIL"] == []


def report(subject: str, family: str, failed: dict[str, dict[str, object]]) -> None:
    """Print the excused cells that do fail, by cause."""
    causes: dict[str, list[str]] = {}
    for name, cell in failed.items():
        causes.setdefault(excuse(subject, name, family) or "", []).append(f"{name} {cell['status']}")
    for cause, names in causes.items():
        print(f"\n  {subject}, {family}: {cause}: {', '.join(names)}", end="")


def compiled_step(subject: str, family: str, folder: Path) -> dict[str, object]:
    """The cell of a compiled step."""
    backend = COMPILER if (subject, family) == ("statecache", "qwen3_5") else "aot_eager"  # one that is built, too
    got = run_matrix(subject, [family], folder / family, only="compiled_step", backend=backend, limit=600)
    return got[family]["compiled_step"]


@each_subject
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_step_is_one_graph(subject, family, tmp_path):
    cell = compiled_step(subject, family, tmp_path)
    assert (cell["status"], cell["note"]) == ("PASS", "graphs=1"), cell


@pytest.mark.long
@each_subject
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in COMPILED])
def test_compiled_step_is_one_graph_in_every_other_family(subject, family, tmp_path):
    cell = compiled_step(subject, family, tmp_path)
    if cell["status"] != "PASS":
        assert excuse(subject, "compiled_step", family), cell


@pytest.mark.parametrize(("capabilities", "names", "why"), [row for table in EXCUSED.values() for row in table])
def test_excuse_names_what_exists(capabilities, names, why):
    assert [name for name in matrix.CAPS if fnmatch(name, capabilities)]
    assert names == ALL or set(names.split()) <= set(families.FAMILIES)
    assert why
