"""What a newer transformers changes of what statecache stands on.

    python tools/check_next.py                # the transformers that is installed

Prints a line for each difference to the tables of `statecache.models.interface` and `statecache.models.table`; the exit
status is the number of those that need a change in statecache, at most 100.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "statecache was tested with")
    import statecache
from statecache.models.interface import CALLS, FUNCTIONS, NAMES, NOT_OURS, TESTED
from statecache.models.table import KINDS, NOT_KEPT, SHAPES

ROOT = Path(transformers.__file__).parent
ASKERS = ("models/*/modeling_*.py", "generation/*.py", "masking_utils.py", "modeling_utils.py")
KEEPERS = {"update_conv_state", "update_recurrent_state", "set_linear_cache"}


@functools.cache
def asked() -> dict[str, set[str]]:
    """Every name that is asked of something called a cache, with the models and files that do."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in (file for pattern in ASKERS for file in ROOT.glob(pattern)):
        who = file.parent.name if file.parent.parent.name == "models" else file.name
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _name(node.value) in NAMES:
                found[node.attr].add(who)
    return found


def _name(node: ast.AST) -> str | None:
    return getattr(node, "id", None) or getattr(node, "attr", None)


def differences() -> Iterator[str]:
    """What has to change in statecache before it is what its tables say."""
    names = asked()
    for name in sorted(names.keys() - CALLS.keys() - NOT_OURS):
        yield f"new call: .{name} is asked of a cache in {_some(names[name])}: add it to StateCache and CALLS"
    for name in CALLS:
        if not hasattr(statecache.StateCache, name) and name != "layers":
            yield f"CALLS names .{name}, which StateCache does not have"
    public = {name for name in dir(transformers.Cache) if not name.startswith("_")}
    for name in sorted(
        name for name in public if getattr(statecache.StateCache, name) is getattr(transformers.Cache, name)
    ):
        yield f"new method: transformers.Cache.{name} is inherited, and sees no state of ours"
    for path, parameters in FUNCTIONS.items():
        yield from _missing(path, parameters)
    for kind in sorted(set(ALLOWED_LAYER_TYPES) - KINDS.keys() - NOT_KEPT.keys()):
        yield f'new layer type: "{kind}": add a row to statecache.models.table.KINDS, or to NOT_KEPT'
    known = {model.removesuffix("_text") for model, _ in SHAPES}
    for model in sorted({model for call in KEEPERS for model in names.get(call, ())} - known):
        yield f"new family: {model} keeps a state of its own: add its shapes to statecache.models.table.SHAPES"
    newest = Version(transformers.__version__).release[:2] >= Version(TESTED[1]).release
    for model, _ in SHAPES if newest else ():
        if model not in CONFIG_MAPPING and model not in _text_types():
            yield f"{model} is in SHAPES, and no configuration of this transformers has that model_type"


def _text_types() -> set[str]:
    """Model types of the configurations within others."""
    return {
        part.model_type
        for config in CONFIG_MAPPING.values()
        for part in (getattr(config, "sub_configs", None) or {}).values()
        if hasattr(part, "model_type")
    }


def _missing(path: str, parameters: tuple[str, ...]) -> Iterator[str]:
    module, *rest = path.split(".")
    while True:
        try:
            found: Any = importlib.import_module(f"transformers.{module}")
            if not rest or hasattr(found, rest[0]):
                break
        except ImportError:
            yield f"transformers.{module} is gone"
            return
        module, rest = f"{module}.{rest[0]}", rest[1:]
    for name in rest:
        if not hasattr(found, name):
            yield f"transformers.{path} is gone"
            return
        found = getattr(found, name)
    taken = inspect.signature(found).parameters if parameters else {}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for name in parameters:
        if name not in taken and not open_ended:
            yield f"transformers.{path} takes no {name}= any more"


def _some(names: set[str]) -> str:
    first = sorted(names)[:6]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def main() -> None:
    lines = list(differences())
    print(f"transformers {transformers.__version__}: {len(lines)} differences to what statecache stands on")
    for line in lines:
        print(f"- {line}")
    sys.exit(min(len(lines), 100))


if __name__ == "__main__":
    main()
