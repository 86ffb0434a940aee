"""Codes of eight bits and more a number beside that of "int8": on families that choose, and on the embedded model.

    python benchmarks/codes.py                # minutes
    python benchmarks/codes.py --prompts 1    # the prompts of the conformance matrix alone

Of each family that the matrix excuses from `quantised_attention`, with keys and values as each code reads them: the
error of that cell, of how many prompts it is more than a tenth, and the median of the others. Beside them stands the
model itself in bfloat16, without a cache. Of the embedded model: the root mean square of the errors of keys, values and
the first attention's output, in thousandths of theirs, and the divergence of `quality.py` behind 256 tokens.

Only "int8" is a store. The others are what it might have been: `scale` in float32, four bytes a run more; `mse`, the
scale of the least squared error of 33; `two ends`, a scale and a zero; `+n bits`, a scale with so many bits behind the
power of two, in the same bytes; `hadamard`, the numbers of a run mixed before.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "conformance"))

import matrix

import quality
import statecache as sc
from quality import AutoModelForCausalLM, AutoTokenizer
from statecache.storage import table
from statecache.storage.coded import Int8
from statecache.storage.rounded import Rounded

FAMILIES = ("lara_mini", "kimi_linear", "glm5_next", "inkling2", "inkling2_loop", "minimax+full0")
LEAST = 1e-30  # of a scale


class Read(Rounded):
    """Entries as a code reads them."""

    plain = None

    def __init__(self, code: Callable[[Tensor], Tensor], *size: Any, **options: Any) -> None:
        super().__init__(torch.float32, *size, **options)
        self.code = code

    def write(self, at: Any, entries: Tensor) -> None:
        self.dense.write(at, self.code(entries.detach().float()))


def int8(x: Tensor) -> Tensor:
    return Int8().decode(Int8().encode(x), x.shape[-1])


def scale(x: Tensor, bits: int = 8) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def mse(x: Tensor) -> Tensor:
    largest, best, kept = x.abs().amax(-1, keepdim=True).clamp(min=LEAST), torch.inf, x
    for part in torch.linspace(0.7, 1.02, 33):
        step = largest * part / 127
        seen = (x / step).round().clamp(-127, 127) * step
        off = (seen - x).square().sum(-1, keepdim=True)
        kept, best = torch.where(off < best, seen, kept), off.clamp(max=best)
    return kept


def two_ends(x: Tensor) -> Tensor:
    least = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - least).clamp(min=LEAST) / 255
    return ((x - least) / step).round() * step + least


def finer(x: Tensor, more: int) -> Tensor:
    """Whose scale is the next of 2 ** more in every power of two, and has its bits in the first eight numbers."""
    wanted = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / 127
    power = wanted.log2().floor().exp2()
    step = power * (wanted / power * 2**more).ceil() / 2**more
    each = torch.ones(x.shape[-1])
    each[:8] = 2
    return ((x / step / each).round() * each).clamp(-128, 127) * step


def hadamard(x: Tensor) -> Tensor:
    mixed = torch.ones(1, 1)
    while len(mixed) < x.shape[-1]:
        mixed = torch.cat([torch.cat([mixed, mixed], 1), torch.cat([mixed, -mixed], 1)])
    if len(mixed) != x.shape[-1]:
        return scale(x)
    return scale(x @ mixed / len(mixed) ** 0.5) @ mixed / len(mixed) ** 0.5


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "int8": int8,
    "int8, +1 bit": partial(finer, more=1),
    "int8, +2 bits": partial(finer, more=2),
    "scale": scale,
    "mse": mse,
    "two ends": two_ends,
    "hadamard": hadamard,
    "scale, 9 bits": partial(scale, bits=9),
    "scale, 10 bits": partial(scale, bits=10),
    "bfloat16": lambda x: x.bfloat16().float(),
}


def use(code: str) -> None:
    """Have the store "int8" read as this code does."""
    table.STORES["int8"] = table.Kind(partial(Read, CODES[code]), "lossy", least=8)


def families(prompts: int) -> None:
    whole = "model in bfloat16"
    over, cells = dict.fromkeys([*CODES, whole], 0), dict.fromkeys([*CODES, whole], 0)
    for family in FAMILIES:
        c, errors = matrix.Ctx(family), {}
        drawn = [matrix.draw(2, 21, torch.Generator().manual_seed(7 + n)) for n in range(prompts)]  # the cell's first
        for code in CODES:
            use(code)
            errors[code] = []
            for c.p in drawn:
                errors[code].append(matrix.quantised_attention(c)[1])
        half, texts = matrix.FAM.cast(matrix.build(family)[0], torch.bfloat16), [c.greedy(ids, 6) for ids in drawn]
        errors[whole] = [matrix.rel(half(ids, use_cache=False).logits[:, 20:-1], c.ref(ids)[:, 20:-1]) for ids in texts]
        print(f"{family}\n  {'':18s} the cell   over 0.1   the others")
        for name, each in errors.items():
            more, below = [e for e in each if e >= 0.1], [e for e in each if e < 0.1]
            over[name], cells[name] = over[name] + len(more), cells[name] + (each[0] >= 0.1)
            others = f"{statistics.median(below):.4f}" if below else "-"
            print(f"  {name:18s} {each[0]:8.4f}   {len(more):3d} / {prompts}   {others}", flush=True)
    for name, n in over.items():
        print(f"{name:18s} {n:3d} of {prompts * len(FAMILIES)} prompts over 0.1, and {cells[name]} of the cells")


def embedded() -> None:
    model = sc.prepare(AutoModelForCausalLM.from_pretrained(quality.STORY, dtype=torch.float32).eval())
    ids, at = quality.texts(AutoTokenizer.from_pretrained(quality.STORY), 12, 352), list(range(256, 352))
    outputs: list[Tensor] = []
    attention = next(m for name, m in model.named_modules() if name.endswith("self_attn"))
    attention.register_forward_hook(lambda module, given, made: outputs.append(made[0].clone()))

    def fed(**way: str) -> tuple[Tensor, Tensor]:
        outputs.clear()
        return quality.expected(model, ids, way, at), torch.cat(outputs, 1)

    def off(seen: Tensor, exact: Tensor) -> float:
        return 1e3 * ((seen - exact).norm() / exact.norm()).item()

    cache = sc.StateCache(model.config)
    model(ids, cache=cache)
    held = {
        kind: [cache.held(int(name.partition(".")[0]), kind) for name in cache.states if name.endswith(f".{kind}")]
        for kind in ("key", "value")
    }
    exact, attended = fed()
    print(f"{'':18s} keys  values  output  divergence, millionths of a bit")
    for name, code in CODES.items():
        use(name)
        found, seen = fed(store="int8")
        errors = (off(*(torch.cat([f(t).flatten() for t in held[kind]]) for f in (code, lambda t: t))) for kind in held)
        print(
            f"{name:18s} {' '.join(f'{e:6.2f}' for e in errors)}  {off(seen, attended):6.2f}"
            f"  {1e6 * quality.divergence(exact, found):6.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12)
    opts = parser.parse_args()
    matrix.imports("prepared")
    families(opts.prompts)
    embedded()


if __name__ == "__main__":
    main()
