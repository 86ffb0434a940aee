"""Saving and loading a cache beside safetensors' own save_file and load_file of the same tensors.

    python benchmarks/files.py                  # 8,192 tokens in one row
    python benchmarks/files.py --tokens 512     # every code path, in seconds

Each round does all of them, in an order drawn anew, on the same file system; a figure is the median over rounds, and a
ratio the median of the ratios within a round: safetensors' time divided by that of statecache, 0.8 or more being the
target. Before each, what nobody holds any more is freed, since a cache, unlike a tensor, is freed when Python collects
it; what comes first after something large was freed gets memory that is warm. `save_file` syncs nothing and `load_file`
maps the file without reading it, so each also stands with what makes it comparable: syncs and a rename, and a copy of
every tensor. What is loaded was just written, so that its pages are in memory. Memory that a virtual machine never had
comes from its host, page by page, in up to four times as long as a load takes: so much is touched once before.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import statecache as sc
from statecache.cli.measure import cpu_name
from statecache.models.file import describe, read
from statecache.models.layout import checksum
from statecache.snapshot import Snapshot
from statecache.storage.store import zeros


def filled(config: Any, tokens: int) -> sc.StateCache:
    """A cache with one row of so many tokens, of random entries."""
    cache = sc.StateCache(config, rows=1, dtype="float32", device="cpu")
    entries = {}
    for name, state in sc.StateCache(config, slack=1).spec.states():
        assert state.shape is not None
        n = tokens if state.window is None else state.window
        entries[name] = torch.randn(n, *state.shape)
    cache.admit(0, Snapshot(tokens, entries, cache.made_for))
    return cache


def synced(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """`save_file` as a cache is saved: beside its place, synced, renamed, and the folder synced."""
    beside = path.with_name("beside")
    save_file(tensors, beside)
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def touch(size: int) -> None:
    """Have the machine bring so many bytes of memory, in large pages, as caches have them."""
    zeros(size, dtype=torch.uint8, device=torch.device("cpu"), static=False).fill_(1)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    # eight layers, of which two attend
    config = transformers.Qwen3_5TextConfig(num_hidden_layers=8, num_key_value_heads=8, head_dim=128)
    touch(3 << 30)
    cache = filled(config, given.tokens)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        cache.save(ours)
        (row,) = read(ours, describe(ours))
        tensors = {name: t.clone() for name, t in row.entries.items()}
        save_file(tensors, theirs)

        def load() -> Any:
            return sc.StateCache.load(ours, config, allow_unverified=True)

        timed: dict[str, Callable[[], Any]] = {
            "save": lambda: cache.save(ours),
            "save_file": lambda: save_file(tensors, theirs),
            "save_file, synced": lambda: synced(tensors, theirs),
            "load": load,
            "load_file": lambda: load_file(theirs),
            "load_file, copied": lambda: [t.clone() for t in load_file(theirs).values()],
            "checksums": lambda: [checksum(t) for t in tensors.values()],
        }
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(given.rounds):
            for name, run in random.sample([*timed.items()], len(timed)):
                gc.collect()
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
    ratios = {
        f"{other} / {mine}": statistics.median(b / a for a, b in zip(seconds[mine], seconds[other], strict=True))
        for mine, other in (pair for m in ("save", "load") for pair in ((m, n) for n in timed if n.startswith(f"{m}_")))
    }
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    print(f"{cpu_name()}, torch {torch.__version__}: {size / 2**20:.0f} MiB, {given.tokens:,} tokens")
    for name, median in medians.items():
        print(f"  {name:20s} {1e3 * median:9.1f} ms  {size / median / 1e9:6.2f} GB/s")
    for name, ratio in ratios.items():
        print(f"  {name:28s} {ratio:.2f}  {'PASS' if ratio >= 0.8 else 'MISS'}")
    if given.json:
        given.json.write_text(json.dumps({"bytes": size, "seconds": medians, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
