"""How a model of transformers rotates keys, where that changes with the length: from its configuration, and in a pass.

`rope_type` "longrope" and "dynamic" do, all others rotate a position alike in rows of any length.

B rows, T new tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from statecache.errors import RotaryError
from statecache.rotary import Rotary

PAIRS = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))  # phimoe scales keys as well as turning them


def rotary(config: Any) -> Rotary | None:
    """How the rotary factors of a decoder with this configuration change with the length; None where they do not."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    unused = getattr(config, "position_embedding_type", "rope") != "rope" or not getattr(config, "use_mem_rope", True)
    if unused or not isinstance(parameters, Mapping):
        return None
    nested = [each for each in parameters.values() if isinstance(each, Mapping)]  # by layer type
    kinds: list[str] = []
    once: set[int] = set()
    always: int | None = None
    for each in nested or [parameters]:
        kind = each.get("rope_type") or each.get("type") or "default"
        if "dynamic" in kind:
            always = config.max_position_embeddings
        elif _switches(kind, each):
            once.add(each.get("original_max_position_embeddings") or config.max_position_embeddings)
        else:
            continue
        kinds.append(kind)
    return Rotary(", ".join(dict.fromkeys(kinds)), tuple(sorted(once)), always) if kinds else None


def _switches(kind: str, parameters: Mapping[str, Any]) -> bool:
    """Whether there is one set of factors for short rows and another one for long ones."""
    asked = PAIRS if kind == "longrope" else PAIRS[1:] if kind != "default" else ()
    return any(parameters.get(short) != parameters.get(long) for short, long in asked)


# ---- in a pass of a prepared model


def check_places(changes: Rotary, places: Tensor, end: int | None) -> None:
    """Raise RotaryError unless positions that came with a pass (..., B, T) lead to the factors of its longest row.

    `end`: how long that is afterwards; None in compiled or captured code, where positions cannot be looked at.
    """
    if end is None:
        raise RotaryError(f"position_ids came with a compiled or captured step, and {changes.told}: leave them out")
    wanted = changes.shortest(end)
    for last in places.amax(-1).flatten().tolist():
        if changes.shortest(last + 1) != wanted:
            raise RotaryError(
                f"position_ids end at {last} in a row of a pass after which the longest row holds {end} tokens, but "
                f"{changes.told}, which a model reads off positions: leave them out, and the cache counts them"
            )


def restart(modules: Iterable[tuple[nn.Module, str]]) -> None:
    """Have dynamic factors depend on the next pass alone: their modules go on from the longest pass they have seen."""
    for module, prefix in modules:
        own: Any = module
        if isinstance(getattr(own, f"{prefix}max_seq_len_cached", None), Tensor):
            inverse, original = getattr(own, f"{prefix}inv_freq"), getattr(own, f"{prefix}original_inv_freq")
            own.register_buffer(f"{prefix}inv_freq", original.to(inverse.device), persistent=False)
            setattr(own, f"{prefix}max_seq_len_cached", own.original_max_seq_len)


def dynamic(decoder: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules with dynamic factors, with what stands before the names of these."""
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            kinds = {"": kinds}
        if isinstance(kinds, Mapping) and hasattr(module, "original_max_seq_len"):
            for layer, kind in kinds.items():
                if "dynamic" in kind:
                    yield module, f"{layer}_" if layer else ""
