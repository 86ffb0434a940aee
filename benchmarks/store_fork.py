"""A fork, and a row repeated by `gather`, with "paged" beside "dense", in one run: bytes, time, and decode afterwards.

    python benchmarks/store_fork.py --length 8192

A prepared Qwen3.5 of four layers, one of them full attention, with random weights in float32. CPU, one thread. Bytes
are those of keys and values in the cache and its forks, each tensor once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import statecache as sc
from store_decode import build

STORES = ("dense", "paged")


def attention_bytes(caches: Sequence[sc.StateCache]) -> int:
    """Bytes of keys and values in these caches, tensors that several of them hold once."""
    held = [state for cache in caches for state in cache.states.values() if state.spec.kind == "attention"]
    return sum({id(b): b.nbytes for state in held for b in state.buffers()}.values())


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def show(what: str, times: dict[str, list[float]]) -> None:
    """Medians, and their ratio."""
    dense, paged = (statistics.median(times[name]) for name in STORES)
    print(f"{what:34} dense {dense:8.3f} ms, paged {paged:8.3f} ms, {paged / dense:6.2f} x")


def decode(model: torch.nn.Module, caches: dict[str, sc.StateCache], steps: int) -> dict[str, list[float]]:
    """A token a row, the stores taking turns."""
    times: dict[str, list[float]] = {name: [] for name in STORES}
    for _ in range(steps):
        for name, cache in caches.items():
            one = torch.ones(cache.rows or 1, 1, dtype=torch.long)
            times[name].append(timed(lambda cache=cache, one=one: model(one, past_key_values=cache)))
    return times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="of a row that is repeated")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--times", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = sc.prepare(build())
    prompt = torch.randint(0, 1024, (1, args.length))
    caches = {name: sc.StateCache(model.config, store=name) for name in STORES}
    for cache in caches.values():
        for piece in prompt.split(512, 1):
            model(piece, past_key_values=cache, logits_to_keep=1)
    show("a step", decode(model, caches, args.steps))
    for name, cache in caches.items():
        before, fork = attention_bytes([cache]), cache.fork()
        print(f"{name}: a row takes {before:,} bytes, a fork of it {attention_bytes([cache, fork]) - before:,} more")
        del fork
    show("a fork", {n: [timed(cache.fork) for _ in range(args.times)] for n, cache in caches.items()})
    forks = {name: cache.fork() for name, cache in caches.items()}
    show("a step beside a fork", decode(model, caches, args.steps))
    show("a step of the fork", decode(model, forks, args.steps))
    del forks
    show("a step without it again", decode(model, caches, args.steps))
    times: dict[str, list[float]] = {name: [] for name in STORES}
    repeated: dict[str, sc.StateCache] = {}
    for _ in range(args.times):
        for name, cache in caches.items():
            repeated[name] = cache.fork()
            repeated[name].gather([0])
            times[name].append(timed(lambda of=repeated[name]: of.gather([0] * args.rows)))
    show(f"a row {args.rows} times", times)
    del caches, cache
    for name, each in repeated.items():
        print(f"{name}: {args.rows} rows take {attention_bytes([each]):,} bytes")
    show(f"a step of {args.rows} rows", decode(model, repeated, args.steps))
    for name, each in repeated.items():
        print(f"{name}: after {args.steps} tokens each {attention_bytes([each]):,} bytes")


if __name__ == "__main__":
    main()
