"""Recurrent states at rest, in marks and files, in a byte a number: near what they were, and all else bitwise."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import statecache as sc
from statecache import errors
from statecache.models import file
from statecache.storage import at_rest

NAMES = ["qwen3_5", "mamba2", "jamba", "recurrent_gemma", "minimax", "lfm2"]
OPTIONS: list[dict[str, Any]] = [{}, {"slack": 4}, {"slack": 4, "back": False}, {"capacity": 64, "slack": 2}]
NEAR = 0.01  # of the largest logit, half of the logits: the router of minimax may choose another expert for a token


def prepared(name: str) -> Any:
    return sc.prepare(families.build(name)[0])


def filled(model: Any, tokens: int = 20, **options: Any) -> sc.StateCache:
    cache = sc.StateCache(model.config.get_text_config(), **options)
    tiny.feed(model, cache, tiny.draw(2, tokens), 0)
    return cache


def states(cache: sc.StateCache) -> dict[str, list[Tensor]]:
    """What every state holds, in copies."""
    return {name: [t.clone() for t in state.snapshot()] for name, state in cache.states.items()}


def kinds(cache: sc.StateCache) -> dict[str, str]:
    return {name: state.spec.kind for name, state in cache.states.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mark_brings_recurrent_states_back_near_and_all_else_bitwise(name: str, options: Any) -> None:
    model = prepared(name)
    cache = filled(model, **options)
    mark, whole, before = cache.checkpoint("int8"), cache.checkpoint(), states(cache)
    near = tiny.feed(model, cache, tiny.draw(2, 3), 20)
    cache.restore(mark)
    for state, kept in states(cache).items():
        for was, now in zip(before[state], kept, strict=True):
            if kinds(cache)[state] == "recurrent" and at_rest.rests(was):
                assert torch.equal(now, at_rest.woken("int8", at_rest.rested("int8", was)).to(was.dtype))
                assert not was.any() or not torch.equal(now, was)
            else:
                assert torch.equal(now, was), state
    after = tiny.feed(model, cache, tiny.draw(2, 3), 20)
    assert (after - near).abs().median() < NEAR * near.abs().max()
    cache.restore(whole)
    assert torch.equal(tiny.feed(model, cache, tiny.draw(2, 3), 20), near)
    recurrent = [t.nbytes for n, held in before.items() if kinds(cache)[n] == "recurrent" for t in held]
    assert whole.nbytes - mark.nbytes == sum(recurrent) * 3 // 4  # of float32, a quarter is left


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_such_marks_is_what_they_take(name: str) -> None:
    config = families.build(name)[1].get_text_config()
    for options in OPTIONS:
        model = prepared(name)
        cache = filled(model, rows=2, dtype="float32", device="cpu", **options)
        plan = sc.plan(config, rows=2, dtype="float32", prepared=True, checkpoint_store="int8", **options)
        assert plan.checkpoint == cache.checkpoint("int8").nbytes


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_recurrent_states_back_near_and_all_else_bitwise(name: str, slack: int, tmp_path: Path) -> None:
    model = prepared(name)
    cache = filled(model, slack=slack)
    cache.save(tmp_path / "whole")
    cache.save(tmp_path / "small", recurrent_store="int8")
    whole, small = (file.read(path, file.describe(path)) for path in (tmp_path / "whole", tmp_path / "small"))
    saved = 0
    for was, now in zip(whole, small, strict=True):
        for state, entries in was.entries.items():
            if kinds(cache)[state] == "recurrent" and at_rest.rests(entries):
                assert torch.equal(now.entries[state], at_rest.woken("int8", at_rest.rested("int8", entries)))
                saved += entries.nbytes * 3 // 4
            else:
                assert torch.equal(now.entries[state], entries), state
    sizes = [(tmp_path / path).stat().st_size for path in ("whole", "small")]
    assert abs(sizes[0] - sizes[1] - saved) < 2000  # of the descriptions
    near = tiny.feed(model, cache, tiny.draw(2, 3), 20)
    for options in ({}, {"slack": 5}, {"capacity": 64, "rows": 2, "dtype": "float32", "device": "cpu"}):
        loaded = sc.StateCache.load(tmp_path / "small", model, **options)
        for row, snapshot in enumerate(small):
            for state, entries in loaded.states.snapshot(row).entries.items():
                assert torch.equal(entries, snapshot.entries[state]), state
        assert (tiny.feed(model, loaded, tiny.draw(2, 3), 20) - near).abs().median() < NEAR * near.abs().max()


def test_damage_to_codes_is_found(tmp_path: Path) -> None:
    path, rnd = tmp_path / "rows", random.Random(0)
    filled(prepared("mamba2")).save(path, recurrent_store="int8")
    whole, described = path.read_bytes(), file.describe(path)
    rows = file.read(path, described)
    for _ in range(200):
        made = bytearray(whole)
        made[rnd.randrange(len(made))] ^= 1 << rnd.randrange(8)
        path.write_bytes(made)
        try:
            again = file.read(path, file.describe(path))
        except errors.FileError:
            continue
        assert all(torch.equal(again[0].entries[name], entries) for name, entries in rows[0].entries.items())


def test_a_file_with_a_code_that_is_none_is_refused(tmp_path: Path) -> None:
    from test_files import rewrite

    path = tmp_path / "rows"
    for change in ({"code": "int3"}, {"code": 8}, {"code": "int8", "shape": [1, 4]}):
        filled(prepared("mamba2")).save(path, recurrent_store="int8")
        rewrite(path, lambda told, change=change: told["tensors"]["0/0.recurrent"].update(change))
        with pytest.raises(errors.FileError, match="damaged"):
            file.describe(path)


@pytest.mark.parametrize("store", ["bfloat16", "fp8", "", 8, torch.int8])
def test_another_name_is_refused_and_nothing_is_done(store: Any, tmp_path: Path) -> None:
    cache = filled(prepared("mamba2"))
    said = r"recurrent_store=.*: give None, or 'int8', for what is at rest"
    with pytest.raises(errors.OptionError, match=said):
        cache.checkpoint(store)
    with pytest.raises(errors.OptionError, match=said):
        cache.save(tmp_path / "rows", recurrent_store=store)
    with pytest.raises(errors.OptionError, match=said.replace("recurrent", "checkpoint")):
        sc.plan(prepared("mamba2").config, checkpoint_store=store)
    assert not list(tmp_path.iterdir())


def test_a_golden_file_is_read() -> None:
    golden = Path(__file__).parent / "golden"
    path = golden / "qwen3_5-1-int8.safetensors"
    described = file.describe(path)
    (row,) = file.read(path, described)
    want = json.loads((golden / "qwen3_5-1-int8.json").read_text())
    assert {name: entries.flatten().tolist() for name, entries in row.entries.items() if name in want} == want
    assert {told.get("code") for name, told in described.tensors.items() if "recurrent" in name} == {"int8"}
