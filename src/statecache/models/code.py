"""What can be read off the code of a model's forwards: what they ask for, and what they hand on."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType

from torch import nn


def forwards(module: nn.Module) -> Iterator[FunctionType]:
    """The forward of a module's class, and of those that it inherits from, without what decorates them."""
    for cls in type(module).__mro__:
        forward = inspect.unwrap(vars(cls)["forward"]) if "forward" in vars(cls) else None
        if isinstance(forward, FunctionType) and cls is not nn.Module:
            yield forward


@lru_cache
def asked(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in a function's code, and in what is written inside it."""
    return frozenset(code.co_names).union(*[asked(inner) for inner in code.co_consts if isinstance(inner, CodeType)])


def hands_on(forward: FunctionType) -> bool:
    """Whether a function takes any keywords, and uses them."""
    code = forward.__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    keywords = inspect.getargs(code).varkw
    return any(do.argval == keywords for do in dis.get_instructions(code) if do.opname.startswith("LOAD_"))
