"""What a lossy store costs the embedded model: bits per token of held-back text, and greedy tokens beside exact ones.

    python benchmarks/quality.py                    # all of it: some minutes on one thread
    python benchmarks/quality.py --quick            # every code path, in seconds
    python benchmarks/quality.py --only int8 --json result.json
    python benchmarks/quality.py --marks            # recurrent states at rest, in int8

Bits: texts are fed token by token, so all that a token reads of those before it went through the store. After a context
of c tokens stand the bits of the next 128, and how many more they are than with the exact cache, of the same tokens.
The text decides that, one token at a time, so it is noisy; what it comes to over all texts that the exact model could
write is the divergence of the two distributions, in bits, which no choice of text makes negative.

Greedy: the first c tokens of a text are fed as one prompt, as `generate` does, and the exact cache goes on with 500
tokens, each the likeliest. Those are fed to the store's cache one by one, and a token agrees where it is the likeliest
there, too. Up to the first that does not, a text written with the store is the same. `first difference`: how many
tokens that is, the median of the texts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc
import statecache.tiny
from shapes import table, versions
from statecache.cli.measure import cpu_name

TEXT = Path(__file__).with_name("held_back.txt")
STORY = Path(statecache.tiny.__file__).parent / "story"
END = "<|endoftext|>"
EXACT = "dense"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "paged": {"store": "paged"},
    "int8": {"store": "int8"},
    "fp8": {"store": "fp8"},
    "bfloat16 states": {"recurrent_store": "bfloat16"},
    "int8, bfloat16 states": {"store": "int8", "recurrent_store": "bfloat16"},
}


@dataclass(frozen=True)
class Cell:
    """What one way gave after one context. more: bits than the exact cache, `error`: its standard error over texts.

    divergence: from the exact distributions, in bits a token. agree: the part of the greedy tokens; first: tokens
    before the first difference, the median; same: texts without.
    """

    way: str
    context: int
    bits: float
    more: float
    error: float
    divergence: float
    agree: float
    first: float
    same: int


def texts(tokenizer: Any, rows: int, tokens: int) -> Tensor:
    """The held-back text in pieces of so many tokens: (rows, tokens). Documents end as the model was taught."""
    ids = tokenizer(TEXT.read_text().replace(f"\n{END}\n", END), verbose=False)["input_ids"]
    assert len(ids) >= rows * tokens, f"{TEXT.name} has {len(ids)} tokens, and {rows * tokens} are asked for"
    return torch.tensor(ids[: rows * tokens]).view(rows, tokens)


def expected(model: Any, ids: Tensor, way: dict[str, Any], at: list[int]) -> Tensor:
    """The bits (B, n, V) that each token would take at these n positions of `ids` (B, ...), fed one by one."""
    cache, found = sc.StateCache(model.config, **way), []
    for position in range(1, max(at) + 1):
        logits = model(ids[:, position - 1 : position], cache=cache).logits
        if position in at:
            found.append(logits[:, -1].log_softmax(-1) / -math.log(2))
    return torch.stack(found, 1)


def bits(each: Tensor, ids: Tensor, at: list[int]) -> Tensor:
    """Those that the tokens at these positions took: (B, n), in float64."""
    return each.double().gather(2, ids[:, at, None])[..., 0]


def divergence(exact: Tensor, other: Tensor) -> float:
    """Kullback-Leibler, from what was exactly expected (B, n, V) to another, the mean in bits."""
    each = [(2.0**-p * (q - p)).sum(-1).mean() for p, q in zip(exact.double(), other.double(), strict=True)]
    return torch.stack(each).mean().item()


def likeliest(model: Any, prompt: Tensor, way: dict[str, Any], new: int, fed: Tensor | None = None) -> Tensor:
    """The likeliest tokens (B, new) behind a prompt (B, c), each behind the tokens `fed` (B, new), None: its own."""
    cache, found = sc.StateCache(model.config, **way), []
    logits = model(prompt, cache=cache, logits_to_keep=1).logits
    for at in range(new):
        found.append(logits[:, -1].argmax(-1))
        logits = model((found[-1] if fed is None else fed[:, at])[:, None], cache=cache).logits
    return torch.stack(found, 1)


def until(alike: Tensor) -> list[int]:
    """How many tokens of each row (B, n) stand before the first that is not alike."""
    return alike.long().cumprod(1).sum(1).tolist()  # type: ignore[no-any-return]


def resumed(model: Any, ids: Tensor, context: int, behind: int, store: str | None) -> Tensor:
    """The bits (B, n, V) of the n tokens behind a context, read before a mark in this store was taken and restored."""
    cache = sc.StateCache(model.config)
    found = [model(ids[:, :context], cache=cache, logits_to_keep=1).logits]
    cache.restore(cache.checkpoint(store))
    after = range(context, context + behind - 1)
    found += [model(ids[:, at : at + 1], cache=cache).logits for at in after]
    return torch.cat(found, 1).log_softmax(-1) / -math.log(2)


@torch.inference_mode()
def marks(model: Any, ids: Tensor, opts: argparse.Namespace) -> str:
    """What a restored mark costs whose recurrent states were kept in int8, as a table."""
    rows = []
    for c in opts.contexts:
        exact, near = (resumed(model, ids, c, opts.behind, store) for store in (None, "int8"))
        at = list(range(c, c + opts.behind))
        more = (bits(near, ids, at) - bits(exact, ids, at)).mean(1)
        alike = (near.argmin(-1) == exact.argmin(-1)).double().mean().item()
        error = more.std().item() / math.sqrt(len(more))
        rows.append([f"{c:,}", f"{more.mean():+.5f} ({error:.5f})", f"{divergence(exact, near):.6f}", f"{alike:.2%}"])
    return table(["context", "more than exact", "divergence", "likeliest tokens that agree"], rows)


@torch.inference_mode()
def measure(model: Any, ids: Tensor, opts: argparse.Namespace) -> list[Cell]:
    """Every way, after every context; the exact one first."""
    began, prompts, cells = time.perf_counter(), ids[: opts.texts], []
    behind = [list(range(c, c + opts.behind)) for c in opts.contexts]
    at = sorted({position for each in behind for position in each})
    exact = expected(model, ids, WAYS[EXACT], at)
    written = {c: likeliest(model, prompts[:, :c], WAYS[EXACT], opts.new) for c in opts.contexts}
    for name in [EXACT, *opts.only]:
        way = WAYS[name]
        found = exact if name == EXACT else expected(model, ids, way, at)
        for c, each in zip(opts.contexts, behind, strict=True):
            places = [at.index(position) for position in each]
            here, there = found[:, places], exact[:, places]
            took = bits(here, ids, each)
            more = (took - bits(there, ids, each)).mean(1)
            text = written[c]
            alike = likeliest(model, prompts[:, :c], way, opts.new, text) == text
            first = until(alike)
            cells.append(
                Cell(
                    name,
                    c,
                    took.mean().item(),
                    more.mean().item(),
                    more.std().item() / math.sqrt(len(more)),
                    divergence(there, here),
                    alike.double().mean().item(),
                    statistics.median(first),
                    first.count(opts.new),
                )
            )
        print(f"{name}: {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    return cells


def report(cells: list[Cell], opts: argparse.Namespace) -> str:
    names = ", ".join(f"{name} {version}" for name, version in versions().items())
    said = (
        f"{opts.rows} texts, {opts.behind} tokens behind each context; greedy: {opts.texts} texts of {opts.new} tokens."
    )
    head = [
        "store",
        "context",
        "bits a token",
        "more than exact",
        "divergence",
        "tokens that agree",
        "first difference",
        "same texts",
    ]
    rows = [
        [
            c.way,
            f"{c.context:,}",
            f"{c.bits:.4f}",
            f"{c.more:+.5f} ({c.error:.5f})",
            f"{c.divergence:.6f}",
            f"{c.agree:.2%}",
            f"{c.first:g}",
            f"{c.same} of {opts.texts}",
        ]
        for c in cells
    ]
    return "\n".join([f"{names}; {cpu_name()}, float32.", "", said, "", table(head, rows)])


def as_json(cells: list[Cell], opts: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(opts, name) for name in ("rows", "behind", "texts", "new", "threads", "commit")}
    return {"versions": versions(), "cpu": cpu_name(), **given, "cells": [asdict(c) for c in cells]}


def options(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short contexts, few tokens")
    parser.add_argument("--only", action="append", choices=list(WAYS)[1:], help="this store; may be given again")
    parser.add_argument("--marks", action="store_true", help="only what a mark in int8 costs that is restored")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens before what is measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--commit", default="", help="written into the result")
    opts = parser.parse_args(args)
    opts.only = opts.only or list(WAYS)[1:]
    opts.contexts = opts.contexts or ([8, 16] if opts.quick else [128, 256, 512, 1024])
    opts.rows, opts.behind = (2, 8) if opts.quick else (18, 128)
    opts.texts, opts.new = (2, 12) if opts.quick else (8, 500)
    return opts


def main() -> None:
    opts = options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(opts.threads)
    model = sc.prepare(AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32).eval())
    ids = texts(AutoTokenizer.from_pretrained(STORY), opts.rows, max(opts.contexts) + opts.behind)
    if opts.marks:
        print(marks(model, ids, opts))
        return
    cells = measure(model, ids, opts)
    print(report(cells, opts))
    if opts.json:
        opts.json.write_text(json.dumps(as_json(cells, opts), indent=1) + "\n")


if __name__ == "__main__":
    main()
