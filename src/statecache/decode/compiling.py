"""The process that compiles a step: a model without its weights comes in, a file of code or a note goes out.

`python -m statecache.decode.compiling FILE`, the model and the shape of its cache pickled on its standard input.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call
from torch.fx import Graph, Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from statecache.decode.compiled import KEPT, SMALL, inputs, lock_of, note_of, tensors_of
from statecache.decode.feed import step
from statecache.models.cache import StateCache
from statecache.models.fingerprint import Weights

FEW = 8  # rows whose linear layers are sums: so many fit into a processor's registers beside the weights
ASKED: dict[str, Any] = {  # of the compiler
    "reorder_for_locality": False,  # what is read before a ring's write stays before it, which then is in place
    "score_fusion_memory_threshold": 512,  # bytes: loops of different layers that share a few numbers stay apart
    "realize_reads_threshold": 2,  # what all rows of a weight read, as what a norm gives, is made once
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum are one instruction
    "cpp.enable_tiling_heuristics": False,  # a convolution is vectorised, though its taps lie apart
}


class Advance(nn.Module):
    """A step of a model, which is a part of it, over a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, cache: StateCache, ids: Tensor, count: Tensor) -> Tensor:
        """The logits (B, V) after ids (B, 1), of which rows take in `count` (B,)."""
        return step(self.model, cache, ids, count)


class Step(nn.Module):
    """The same as a function of all tensors of model and cache, which it writes to in place. It has no parts."""

    def __init__(self, model: nn.Module, cache: StateCache) -> None:
        super().__init__()
        part, own = Advance(model), cache.states.buffers()
        names = [name for name, _ in tensors_of(part)]

        def run(tensors: Sequence[Tensor], ids: Tensor, count: Tensor) -> Tensor:
            weights, held = tensors[: len(names)], tensors[len(names) :]
            there = copy.deepcopy(cache, {id(old): new for old, new in zip(own, held, strict=True)})
            logits: Tensor = functional_call(part, dict(zip(names, weights, strict=True)), (there, ids, count))
            return logits

        self.run = run

    def forward(self, tensors: Sequence[Tensor], ids: Tensor, count: Tensor) -> Tensor:
        """The logits (B, V)."""
        return self.run(tensors, ids, count)


class Sums(TorchFunctionMode):
    """Linear layers of few rows as sums over products, one a row, which the compiler writes itself: as one loop.

    That reads weights once, as fast as memory gives them; the library's product reads them at a third of that, and of
    several rows it packs them first.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and 0 < args[0].numel() <= FEW * args[0].shape[-1]:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.stack([(weight * rows[n]).sum(-1) for n in range(len(rows))])
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def _write_early(graph: Graph) -> None:
    """Have tensors of the cache written where their new values are made, not at the end: what was read is near then."""
    place: dict[Node, float] = {node: n for n, node in enumerate(graph.nodes)}
    for write in [node for node in graph.nodes if node.target is torch.ops.aten.copy_.default]:
        held, new, *_ = write.args
        last = max([new, *(reader for reader in _readers(held) if reader is not write)], key=place.__getitem__)
        if last.op == "output":  # which gives a view of it
            continue
        last.append(write)
        place[write] = place[last] + 0.5  # what follows this write follows it here


def _readers(node: Node) -> Iterator[Node]:
    """What reads a tensor, or what may be a view of it: all that no operator says to be new."""
    for user in node.users:
        yield user
        kind = user.target
        if not isinstance(kind, OpOverload) or any(value.alias_info is not None for value in kind._schema.returns):
            yield from _readers(user)


@torch.no_grad()
def compile_step(model: nn.Module, options: dict[str, Any], file: Path) -> None:
    """Compile the step of a prepared model over a fixed cache into a file."""
    rows = options["rows"]
    cache = StateCache(model.config, dtype=torch.float32, device="cpu", **options)
    ids, count = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    Advance(model)(cache, ids, count)  # from here on the cache is a prepared model's
    cache.weights = Weights(unknown=True)
    made = file.with_suffix(f".{os.getpid()}.pt2")
    with warnings.catch_warnings(action="ignore"):  # what torch says of its own code
        with Sums():
            exported = torch.export.export(Step(model, cache), (inputs(model, cache), ids, count), strict=False)
        own = {**exported.constants, **exported.state_dict}
        if large := [name for name, value in own.items() if isinstance(value, Tensor) and value.nbytes > SMALL]:
            raise RuntimeError(f"the step has tensors of its own, whose numbers are not here: {large}")
        asked = {**ASKED, "post_grad_custom_post_pass": _write_early}
        torch._inductor.aoti_compile_and_package(exported, package_path=str(made), inductor_configs=asked)
    made.rename(file)


def _wait_for_others() -> None:
    """Run where no other process wants to: the threads of the text that this goes on beside wait for each other."""
    os.nice(19)
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    file = Path(sys.argv[1])
    _wait_for_others()
    try:
        model, options, threads = pickle.load(sys.stdin.buffer)  # noqa: S301 of the process that started this one
        torch.set_num_threads(threads)
        compile_step(model, options, file)
    except BaseException:
        note_of(file).write_text(traceback.format_exc())
        raise
    finally:
        lock_of(file).unlink(missing_ok=True)
    kept = sorted(file.parent.glob("*.pt2"), key=lambda each: each.stat().st_mtime)
    for old in kept[:-KEPT]:
        old.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
