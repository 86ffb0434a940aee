"""The conformance matrix as a test: every family x every capability, and the cells that may fail, by name and cause."""

import json
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatch

import families
import matrix
import pytest
import torch
import transformers
from tiny_models import COMPILER

COMPILED = ("mamba2", "granitemoehybrid", "qwen3_5", "lfm2")  # it takes long: the others in `check-long`
MAMBA_1 = "mamba falcon_mamba jamba zamba"
NO_LFM = ("lfm2", "lfm2_moe", "lfm3")
INKLING = " ".join(f for f in families.FAMILIES if f.startswith("inkling"))
RECUR = " ".join(f for f in families.FAMILIES if f not in (*NO_LFM, *INKLING.split()))
ON_MODULES = " ".join(f for f in families.FAMILIES if f == "recurrent_gemma")
ALL = "*"
QWEN4 = " ".join(f for f in families.FAMILIES if f == "qwen4_exp")  # of later transformers

PREPARED_ALONE = "it takes a prepared model"
DROPS = "the model's own code drops its recurrent state when it gets several tokens"
NOT_ASKED = "transformers does not ask cache_params what it holds"
OWN_CACHE = "the model accepts its own cache class alone"
PADS_COUNT = "the model counts pads where it scales by positions"
FULL_MASK = "generate gives sliding layers that convolve the mask of full ones, where it makes the masks"
LOOPS = "the model's own index loops over tokens, by how many each sees"
CLAMP = "the model clamps its time steps in prefill and not in decoding"

# random weights choose experts, or entries of an index, by differences that rounding turns, as in int8 (2 ** -7 of the
# largest number), mostly in bfloat16 (2 ** -9) too: errors are then 0.1 to 0.5, and mostly below 0.02 where none turns
TIES = ("lara_mini", "kimi_linear", "glm5_next", "inkling2", "inkling2_loop", "minimax+full0")
TIES = " ".join(f for f in families.FAMILIES if f in TIES)
ROUNDED = ("quantised_attention", TIES, "rounding turns a choice")
# of each subject (capabilities, families, why they may fail), alike with transformers 5.17 and 5.24: all others pass
EXCUSED = {
    "prepared": [ROUNDED],
    "statecache": [
        ROUNDED,
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


# whose operators and kinds of layer another family has, too
ALIKE = ("falcon_mamba", "jamba", "bamba", "nemotron_h", "zamba", "zamba2", "qwen3_next", "qwen3_5_moe", "olmo_hybrid")
ALIKE += ("lfm2_moe", "zamba2+clamp", "nemotron_h+clamp", "minimax+full0")
# a family that is excused altogether has nothing to show
CELLS = [
    pytest.param(s, f, marks=[pytest.mark.alike] * (f in ALIKE))
    for s in EXCUSED
    for f in families.FAMILIES
    if not excuse(s, "greedy_growing", f)
]


@pytest.fixture
def run(subject, tmp_path, monkeypatch) -> Iterator[Callable[..., dict[str, dict[str, object]]]]:
    """The matrix, for cells of one family, in this process; what it sets there is taken back."""
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr(matrix, "OUT", str(tmp_path))
    level = transformers.logging.get_verbosity()

    def cells(family: str, only=None, skip=(), backend="aot_eager") -> dict[str, dict[str, object]]:
        matrix.imports(subject, backend=backend)
        matrix.run_family(family, only, skip, 600 if only else 150)
        return json.loads((tmp_path / subject / f"{family}.json").read_text())

    with torch.no_grad():
        yield cells
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize(("subject", "family"), CELLS)
def test_family_has_every_capability_that_is_not_excused(subject, family, run, capfd):
    got = run(family, skip=["compiled_step"])
    assert set(got) == set(matrix.CAPS) - {"compiled_step"}
    failed = {name: cell for name, cell in got.items() if cell["status"] != "PASS"}
    with capfd.disabled():
        report(subject, family, {name: cell for name, cell in failed.items() if excuse(subject, name, family)})
    assert {name: cell for name, cell in failed.items() if not excuse(subject, name, family)} == {}


def report(subject: str, family: str, failed: dict[str, dict[str, object]]) -> None:
    """Print the excused cells that do fail, by cause."""
    causes: dict[str, list[str]] = {}
    for name, cell in failed.items():
        causes.setdefault(excuse(subject, name, family) or "", []).append(f"{name} {cell['status']}")
    for cause, names in causes.items():
        print(f"\n  {subject}, {family}: {cause}: {', '.join(names)}", end="")


@each_subject
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_step_is_one_graph(subject, family, run):
    cell = run(family, ["compiled_step"])["compiled_step"]
    assert (cell["status"], cell["note"]) == ("PASS", "graphs=1"), cell


@pytest.mark.long
@each_subject
def test_compiled_step_is_built(subject, run):
    cell = run("qwen3_5", ["compiled_step"], backend=COMPILER)["compiled_step"]
    assert (cell["status"], cell["note"]) == ("PASS", "graphs=1"), cell


@pytest.mark.long
@each_subject
@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in COMPILED])
def test_compiled_step_is_one_graph_in_every_other_family(subject, family, run):
    cell = run(family, ["compiled_step"])["compiled_step"]
    if cell["status"] != "PASS":
        assert excuse(subject, "compiled_step", family), cell


@pytest.mark.parametrize(("capabilities", "names", "why"), [row for table in EXCUSED.values() for row in table])
def test_excuse_names_what_exists(capabilities, names, why):
    assert [name for name in matrix.CAPS if fnmatch(name, capabilities)]
    assert names == ALL or set(names.split()) <= set(families.FAMILIES)
    assert why
