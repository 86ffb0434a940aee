"""Run the GPU tests and the prepared matrix, and write down what came of them.

    python tests/gpu/record.py tests/gpu/results/DATE-CARD.json --commit $(git rev-parse --short HEAD)

The matrix takes one family of each operator, without the compiled step: transformers compiles on a GPU by itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
MATRIX = HERE.parent / "conformance" / "matrix.py"
OPERATORS = ("mamba", "mamba2", "falcon_h1", "qwen3_5", "lfm2", "minimax")
PACKAGES = ("torch", "triton", "transformers", "fla-core")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def tests(processes: int) -> dict[str, Any]:
    """Every test of this folder, with how it ended and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            "-m",
            "pytest",
            "-q",
            "tests/gpu",
            "-m",
            "gpu",
            "-p",
            "no:benchmark",
            "-n",
            str(processes),
            f"--junitxml={report}",
        ]
        subprocess.run([sys.executable, *command], check=False, cwd=HERE.parents[1])
        cases = {
            f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": {
                "ended": next((child.tag for child in case if child.tag != "system-out"), "passed"),
                "seconds": round(float(case.get("time", 0)), 1),
            }
            for case in ET.parse(report).iter("testcase")
        }
    passed = sum(case["ended"] == "passed" for case in cases.values())
    return {"passed": passed, "of": len(cases), "cases": cases}


def matrix(families: tuple[str, ...]) -> dict[str, Any]:
    """The prepared matrix of these families side by side; of each how many cells pass, and the others."""
    with tempfile.TemporaryDirectory() as folder:
        base = [sys.executable, MATRIX, "--subject", "prepared", "--device", "cuda", "--skip", "compiled_step"]
        began = time.perf_counter()
        runs = {
            name: subprocess.Popen([*base, "--family", name], cwd=folder, stdout=subprocess.DEVNULL)
            for name in families
        }
        found: dict[str, Any] = {}
        for name, run in runs.items():
            run.wait()
            cells = json.loads(Path(folder, "results", "prepared", f"{name}.json").read_text())
            others = {cell: result for cell, result in cells.items() if result["status"] != "PASS"}
            found[name] = {"passed": len(cells) - len(others), "of": len(cells), "others": others}
        return found | {"seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--families", nargs="*", default=OPERATORS)
    opts = parser.parse_args()
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": opts.commit,
        "machine": torch.cuda.get_device_name(),
        "versions": versions(),
        "tests": tests(opts.processes),
        "matrix": matrix(tuple(opts.families)),
    }
    opts.file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "tests"}, indent=1))
    print(result["tests"]["passed"], "of", result["tests"]["of"], "tests passed")


if __name__ == "__main__":
    main()
