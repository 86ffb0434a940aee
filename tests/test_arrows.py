"""Imports point one way, and no file uses a private name of another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import statecache

ROOT = Path(statecache.__file__).parent
# Each may import what stands before it. A package's own order follows it; files of a package that share a line are one
# floor, and do not import each other.
FLOORS = (
    *("errors", "rotary", "spec", "mask", "kernels", "storage", "ops", "step", "ring", "lease", "replay", "clock"),
    *("logs", "offload"),
    *("snapshot", "one_pass", "states", "round", "models", "decode", "cli", "__main__"),
)
OPERATORS = "scan ssd delta kda pooled_index block_index short_conv residual_conv relative lightning rg_lru cca"
INSIDE = {
    "storage": ["changes", "store", "dense pool", "paged coded rounded", "at_rest table"],
    "ops": ["chunks", "conv selective_scan ssd gated_delta rg_lru delay", "lightning"],
    "models": [
        "interface",
        "factors",
        "table checks layers names",
        "layout",
        "registry ready decoder file fingerprint",
        "prepared",
        "unmodified",
        "cache",
        "plan",
        "positions",
        "masks given code",
        "columns",
        "attention",
        "mixers.base",
        f"mixers.{' mixers.'.join(OPERATORS.split())}",
        "mixers.table",
        "mixers",
        "forward",
        "wrappers",
        "generation",
        "prepare",
        "parts",
        "product",
        "sparse",
        "whole",
        "fused",
    ],
    "kernels": [
        "cards",
        "convolve early tokens pointers rows mma weights rehearsal",
        "held",
        "choose linear norms angles attend ssd_step delta_step conv_step scan_step",
        "experts",
        "ssd_fold delta_fold delta_chunk ssd_chunk conv_chunk",
        "lightning_chunk",
    ],
    "decode": [
        "limits request report text draft_length feed processors",
        "compiled",
        "compiling",
        "noise",
        "sampling",
        "drafters",
        "options",
        "prompt",
        "capturing decoder",
        "captured_assistant batch",
        "stream",
        "generate",
    ],
    "cli": [
        "failure report",
        "model",
        "measure writing inspect plot session",
        "generate chat bench plan",
        "demo",
        "app",
    ],
}
NO_TORCH = ("errors", "rotary", "decode.request")
FOREIGN = {
    "torch._C",
    "torch._dynamo",
    "torch._inductor",
    "torch._ops",
    "._schema",
    "._forward_hooks",
    "._forward_pre_hooks",
    "._global_forward_hooks",
    "._global_forward_pre_hooks",
    "torch._foreach_copy_",
    "torch._foreach_zero_",
    "._version",
    "._modules",
    "._parameters",
    "._hf_hook",
    "._attn_implementation",
}  # private names of others


def modules() -> dict[str, ast.Module]:
    """Every module by its name below statecache; `storage.dense`, or `storage` for a package's own file."""
    files = [file for file in ROOT.rglob("*.py") if file.parent != ROOT or file.name != "__init__.py"]
    return {_name(file): ast.parse(file.read_text()) for file in files}


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Every module imported anywhere in a file, for type checkers too, with the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def edges(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of statecache that a file imports."""
    found = set()
    for module, names in imports(tree):
        if module.startswith("statecache."):
            inner = module.removeprefix("statecache.")
            found |= {f"{inner}.{name}" if f"{inner}.{name}" in known else inner for name in names or [""]}
        elif module == "statecache":
            found |= {name for name in names if name in known}
    return found


def floor(module: str) -> tuple[int, int]:
    """The floor of a module, and its floor within its package."""
    package, _, inner = module.partition(".")
    order = [line.split() for line in INSIDE.get(package, [])]
    return FLOORS.index(package), next(
        (n for n, line in enumerate(order) if inner in line), -1 if inner else len(order)
    )


def wrong_arrows(trees: dict[str, ast.Module]) -> list[str]:
    known = set(trees)
    pairs = [(module, target) for module, tree in trees.items() for target in edges(tree, known) if target in known]
    return [
        f"{module} imports {target}"
        for module, target in sorted(pairs)
        if not floor(target) < floor(module) and target != module
    ]


def foreign_names(tree: ast.Module) -> list[str]:
    """Private names that a file takes from others: imported, or asked of anything but itself and what it defines."""
    defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    defined |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = [f"{module}.{name}" for module, names in imports(tree) for name in names if _private(name)]
    found += [module for module, _ in imports(tree) if any(_private(part) for part in module.split("."))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            of = ast.unparse(node.value)
            own = of in ("self", "cls", "super()") or (of in defined and of[0].isupper())
            if not own:
                found.append(f"{of}.{node.attr}")
    return [name for name in found if not any(name.endswith(f) or name.startswith(f) for f in FOREIGN)]


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_every_module_has_a_floor() -> None:
    without = [m for m in modules() if m.partition(".")[0] not in (*FLOORS, "tiny")]
    unordered = [m for m in modules() if m.partition(".")[0] in INSIDE and "." in m and floor(m)[1] == -1]
    assert not without + unordered


def test_imports_point_down() -> None:
    assert not wrong_arrows({m: tree for m, tree in modules().items() if m.partition(".")[0] in FLOORS})


def test_no_file_uses_a_private_name_of_another() -> None:
    found = {module: foreign_names(tree) for module, tree in modules().items()}
    assert not {module: names for module, names in found.items() if names}


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_declares_imports_no_tensors(module: str) -> None:
    if module not in modules():
        pytest.skip(f"there is no {module} yet")
    taken = {name.partition(".")[0] for name, _ in imports(modules()[module])}
    assert "torch" not in taken


PLANTED = {
    "up": ("spec", "from statecache.models.cache import StateCache"),
    "up for a type checker alone": ("ring", "if TYPE_CHECKING:\n    from statecache.states import States"),
    "up inside a function": ("errors", "def f():\n    import statecache.cli.app"),
    "up within a package": ("models.table", "from statecache.models import prepare"),
    "beside": ("ops.conv", "from statecache.ops.ssd import step"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_arrow_is_found(case: str) -> None:
    module, source = PLANTED[case]
    others = {m: ast.Module([], []) for m in ("models.cache", "states", "cli.app", "models.prepare", "ops.ssd")}
    assert len(wrong_arrows({**others, module: ast.parse(source)})) == 1


@pytest.mark.parametrize(
    "source", ["cache._step = None", "from statecache.ring import _slot", "f(Ring()._store)", "a.b._c()"]
)
def test_a_planted_private_name_is_found(source: str) -> None:
    assert foreign_names(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["self._x", "cls._x()", "class A: _x = 1\nA._x", "t._version", "x.__dict__", "torch._dynamo.y"]
)
def test_a_name_of_ones_own_is_allowed(source: str) -> None:
    assert not foreign_names(ast.parse(source))
