"""Milliseconds of one decoding step on a GPU beside the memory floor: statecache and transformers, in one run.

    python benchmarks/gpu_decode.py --model mamba2 --rows 1
    python benchmarks/gpu_decode.py --model qwen3_5 --rows 16 --compiled --json result.json
    python benchmarks/gpu_decode.py --model granite_h --rows 1 --context 32768

The floor is the time that a step's bytes take at the copy bandwidth, measured in the same run: the weights that it
reads (a tied matrix once, an untied embedding not at all, of experts as many as rows choose when each is as likely as
any other), twice the states, and keys and values at the rows' lengths.
One formula for every side. --compiled adds the sides whose warming up takes a minute.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import statecache as sc
from gpu_shapes import SHAPES

PACKAGES = ("torch", "triton", "transformers")
DEVICE = "cuda"
REPEATS = 5  # timings of a side, of which the median counts


def bandwidth(gigabytes: float) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and of a sum, read; over buffers that no cache holds."""
    size = int(gigabytes * 2**30)
    source = torch.randint(0, 127, (size,), dtype=torch.uint8, device=DEVICE)
    target, words = torch.empty_like(source), source.view(torch.float32)
    copying = seconds(lambda: target.copy_(source), 10)
    reading = seconds(words.sum, 10)
    return {"copy": 2 * size / copying, "read": size / reading}


def seconds(run: Callable[[], Any], n: int) -> float:
    """The median over `REPEATS` of what one of n calls in a row takes on the device."""
    for _ in range(3):
        run()
    found = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / n)
    return statistics.median(found)


def step_bytes(model: Any, rows: int, length: int, recurrent_store: str | None = None) -> dict[str, int]:
    """What a step must read and write, at float32 states if no `recurrent_store` keeps them."""
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    for module in model.modules():  # of experts, those that somebody chooses, on average
        if hasattr(module, "has_gate"):
            chosen = 1 - (1 - model.config.num_experts_per_tok / module.num_experts) ** rows
            for weight in module.parameters():
                weights[weight.data_ptr()] *= chosen
    embedding = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight.data_ptr() != embedding.data_ptr():
        del weights[embedding.data_ptr()]
    kept = {"recurrent_store": recurrent_store} if recurrent_store else {}
    sizes = sc.plan(model.config, rows=rows, capacity=length, dtype=model.dtype, **kept).states.by_kind
    return {
        "weights": int(sum(weights.values())),
        "states": 2 * (sizes["conv"] + sizes["recurrent"]),
        "keys": sizes["attention"] + sizes["sliding"],
    }


# ---- sides: each gives a step, and tells how long the first took


class Side:
    """One way to decode. `prompt` (B, P); `capacity` of the cache."""

    def __init__(self, model: Any, prompt: Tensor, capacity: int) -> None:
        self.model, self.prompt, self.capacity = model, prompt, capacity
        accepted = inspect.signature(model.forward).parameters
        self.key = next(name for name in ("cache", "cache_params", "past_key_values") if name in accepted)
        self.positioned = "position_ids" in accepted

    def cache(self) -> Any:
        return StaticCache(config=self.model.config, max_cache_len=self.capacity)

    def ready(self, forward: Any) -> Callable[[], Any]:
        """A step that runs `forward`, after a prefill."""
        rows, length = self.prompt.shape
        cache = self.cache()
        logits = self.model(self.prompt, **{self.key: cache}, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1).clone()
        place = torch.full((rows, 1), length, dtype=torch.long, device=DEVICE)
        given = {"position_ids": place} if self.positioned else {}

        def step() -> None:
            logits = forward(token, **{self.key: cache}, use_cache=True, **given).logits
            token.copy_(logits[:, -1:].argmax(-1))
            place.add_(1)

        return step

    def eager(self) -> Callable[[], Any]:
        return self.ready(self.model)

    def captured(self) -> Callable[[], Any]:
        """A CUDA graph of the eager step."""
        step, side = self.ready(self.model), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def compiled(self) -> Callable[[], Any]:
        """torch.compile with mode="reduce-overhead"."""
        torch._dynamo.reset()
        step = self.ready(torch.compile(self.model.forward, mode="reduce-overhead"))
        for _ in range(4):
            step()
        return step


class Ours(Side):
    """A prepared model on a StateCache, without the decoder."""

    def cache(self) -> Any:
        rows = len(self.prompt)
        return sc.StateCache(
            self.model.config, capacity=self.capacity, rows=rows, dtype=self.model.dtype, device=DEVICE
        )

    def decoder(self, kernels: bool = True, recurrent_store: str | None = None) -> Callable[[], Any]:
        """`sc.Decoder`, with its kernels or without."""
        rows = len(self.prompt)
        if recurrent_store is not None:  # which takes a model that is prepared
            sc.prepare(self.model)
        cache = sc.StateCache(
            self.model.config,
            capacity=self.capacity,
            rows=rows,
            dtype=self.model.dtype,
            device=DEVICE,
            slack=1,
            back=False,
            recurrent_store=recurrent_store,
        )
        decoder = self.made = sc.Decoder(self.model, cache, buckets=[rows], fused=kernels)
        decoder.prefill(self.prompt.tolist())
        decoder.step()
        torch.cuda.synchronize()
        return decoder.step


def profiled(step: Callable[[], Any], most: int = 12, times: int = 4) -> list[dict[str, Any]]:
    """The kernels of a step, all together and then those that take longest: name, calls, microseconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    found = [e for e in seen.key_averages() if e.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    rows = [{"name": e.key[:80], "calls": e.count / times, "us": e.self_device_time_total / times} for e in found]
    total = {"name": "all", "calls": sum(r["calls"] for r in rows), "us": sum(r["us"] for r in rows)}
    return [total, *rows[:most]]


def versions(*more: str) -> dict[str, str]:
    """Of what runs here, and of these packages."""
    found = {"python": platform.python_version(), "statecache": sc.__version__}
    for name in (*PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@torch.no_grad()
def measure(opts: argparse.Namespace) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = SHAPES[opts.model](opts.small)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, opts.dtype)).eval()
    length = opts.context
    rates = bandwidth(0.25 if opts.small else 2)
    prompt = torch.randint(1, config.vocab_size, (opts.rows, length), device=DEVICE)
    capacity = opts.capacity or length + 64 + (REPEATS + 2) * opts.steps
    moved = step_bytes(model, opts.rows, length)
    floor = sum(moved.values()) / rates["copy"]
    sides: list[tuple[str, type[Side], str, dict[str, Any]]] = [
        ("statecache, captured", Ours, "decoder", {"kernels": False}),
        ("statecache, kernels", Ours, "decoder", {}),
    ]
    if not opts.ours:
        sides.insert(0, ("transformers, captured", Side, "captured", {}))
    if opts.compiled:
        sides.append(("transformers, compiled", Side, "compiled", {}))
        sides.append(("statecache, compiled", Ours, "compiled", {}))
    if opts.recurrent_store:
        kept = {"recurrent_store": opts.recurrent_store}
        sides.append((f"statecache, {opts.recurrent_store} states", Ours, "decoder", kept))
    if opts.only:
        sides = [side for side in sides if opts.only in side[0]]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": opts.commit,
        "machine": torch.cuda.get_device_name(),
        "versions": versions(),
        "model": opts.model,
        "dtype": opts.dtype,
        "rows": opts.rows,
        "context": length,
        "capacity": capacity,
        "bytes": moved,
        "bandwidth": rates,
        "floor_ms": floor * 1e3,
        "sides": {},
    }
    for name, kind, how, given in sides:
        if how != "decoder" and kind is Ours:
            sc.prepare(model)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        try:
            side = kind(model, prompt, capacity)
            step = getattr(side, how)(**given)
            torch.cuda.synchronize()
            warm = time.perf_counter() - began
            took = seconds(step, opts.steps)
            least = sum(step_bytes(model, opts.rows, length, given.get("recurrent_store")).values()) / rates["copy"]
            found: dict[str, Any] = {"ms": took * 1e3, "floors": took / least, "warm_s": warm}
            found["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if opts.profile:
                found["kernels"] = profiled(step)
        except Exception as error:  # a side that fails is told, and the others go on
            if opts.strict:
                raise
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        if hasattr(side, "made"):
            side.made.close()
        sc.unprepare(model)
        result["sides"][name] = found
        step = side = None
        torch.cuda.empty_cache()
    return result


def show(result: dict[str, Any]) -> None:
    rates = result["bandwidth"]
    print(
        f"{result['model']}, {result['rows']} rows at {result['context']} tokens, {result['dtype']}, "
        f"{result['machine']}: floor {result['floor_ms']:.3f} ms (copy {rates['copy'] / 1e12:.2f} TB/s, "
        f"read {rates['read'] / 1e12:.2f} TB/s)"
    )
    for name, found in result["sides"].items():
        if "error" in found:
            print(f"  {name:26} {found['error']}")
            continue
        print(
            f"  {name:26} {found['ms']:8.3f} ms  {found['floors']:6.2f} x floor   first step: {found['warm_s']:.1f} s"
        )
        for kernel in found.get("kernels", []):
            print(f"      {kernel['us']:9.1f} us {kernel['calls']:7.1f} x {kernel['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--capacity", type=int, help="of the cache; as much as is needed, if left out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=40, help="of one timing")
    parser.add_argument("--recurrent-store", help="also the decoder with states in this, such as bfloat16")
    parser.add_argument("--compiled", action="store_true", help="also the sides that torch.compile makes")
    parser.add_argument("--ours", action="store_true", help="without transformers")
    parser.add_argument("--only", help="the sides whose names have this in them")
    parser.add_argument("--profile", action="store_true", help="also what kernels a step runs")
    parser.add_argument("--small", action="store_true", help="a tiny model of the same kind")
    parser.add_argument("--strict", action="store_true", help="end at the first side that fails")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    result = measure(opts)
    show(result)
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
