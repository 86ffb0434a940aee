"""A cache that was written to a file goes on from it exactly; a file that is not whole says so."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import signal
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import prepared_oracle as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import draw
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import statecache as sc
from statecache import errors
from statecache.models import file, layout
from statecache.models.decoder import decoder_of
from statecache.models.fingerprint import fingerprint
from statecache.models.table import model_spec
from statecache.storage.store import LARGE, zeros

GOLDEN = Path(__file__).parent / "golden"
PREPARED = ["lfm2", "mamba2", "qwen3_5", "falcon_h1", "gemma3_text"]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def tiny(name: str = "lfm2", prepared: bool = True) -> Any:
    models = oracle.build(name)
    return models.filling if prepared else models.plain


def feed(model: Any, cache: sc.StateCache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with oracle.Precise():
        return model(ids, attention_mask=mask, use_cache=True, **{families.cache_arg(model): cache}).logits


def filled(model: Any, tokens: int = 9, rows: int = 2, **options: Any) -> sc.StateCache:
    cache = sc.StateCache(model.config, **options)
    feed(model, cache, draw(rows, tokens) % 60 + 1)
    return cache


# ---- going on


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize(
    "there",
    [{}, {"slack": 3}, {"capacity": 24}, {"capacity": 24, "slack": 5, "rows": 3, "dtype": "float64", "device": "cpu"}],
    ids=["growing", "slack", "fixed", "all options"],
)
@pytest.mark.parametrize("here", [{}, {"slack": 4}, {"capacity": 20}], ids=["growing", "slack", "fixed"])
def test_a_file_goes_on_as_the_cache_does(name: str, here: Any, there: Any, tmp_path: Path) -> None:
    model = tiny(name)
    cache = filled(model, **here)
    feed(model, cache, torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]))  # rows differ
    cache.save(tmp_path / "rows")
    read = sc.StateCache.load(tmp_path / "rows", model, **there)
    assert read.lengths.tolist()[:2] == [12, 10]
    more = torch.full((read.rows or 0, 2), 11)
    want = feed(model, cache, more[:2])
    got = feed(model, read, more)[:2]
    assert (got - want).abs().max() < 1e-10
    if there.get("slack"):
        read.rollback(2)
        cache = sc.StateCache.load(tmp_path / "rows", model)
        assert (feed(model, read, more)[:2] - feed(model, cache, more[:2])).abs().max() < 1e-10


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize(
    ("here", "there"),
    [({}, {"slack": 3}), ({"slack": 4}, {"capacity": 24}), ({"capacity": 20}, {})],
    ids=["growing, slack", "slack, fixed", "fixed, growing"],
)
def test_a_row_goes_back_to_where_it_was_in_the_cache_and_in_its_file(
    name: str, here: Any, there: Any, tmp_path: Path
) -> None:
    model, path = tiny(name), tmp_path / "rows"
    cache = filled(model, 3, **here)
    forks, points = [cache.fork()], [(1, cache.snapshot(1, point=True))]
    feed(model, cache, torch.tensor([[5, 6], [7, 8]]))
    forks.append(cache.fork())
    points.append((1, cache.snapshot(1, point=True)))
    feed(model, cache, torch.tensor([[9, 10, 11], [12, 13, 14]]))
    save(cache, path, points=points, session={})
    read, described = sc.StateCache.load(path, model, **there), file.describe(path)
    assert all("p0/" + n in described.tensors for n in points[0][1].entries) and described.points[1]["length"] == 5
    again = file.read_points(path, described)
    ids = torch.tensor([[3, 4], [5, 6]])
    for place in (1, 0):
        want = feed(model, forks[place], ids)[1]
        for of, point in ((cache, points[place][1]), (read, again[place])):
            of.admit(1, point)
            assert of.lengths.tolist() == [8, point.length]
            assert (feed(model, of.fork(), ids)[1] - want).abs().max() < 1e-10


def save(cache: sc.StateCache, path: Path, **more: Any) -> None:
    """As `StateCache.save` does, with more to it."""
    file.write(path, cache.states, fingerprint=cache.weights.fingerprint(), **more)


def test_an_unprepared_model_goes_on_with_a_prepared_ones_file(tmp_path: Path) -> None:
    models = oracle.build("qwen3_5")
    cache = filled(models.filling)
    cache.save(tmp_path / "rows")
    read = sc.StateCache.load(tmp_path / "rows", models.plain)  # the same weights
    ids = torch.tensor([[3], [4]])
    assert (feed(models.plain, read, ids) - feed(models.filling, cache, ids)).abs().max() < 1e-8


def test_only_what_rows_hold_is_written(tmp_path: Path) -> None:
    model = tiny()
    for capacity in (16, 4096):
        filled(model, capacity=capacity).save(tmp_path / str(capacity))
    sizes = [(tmp_path / str(capacity)).stat().st_size for capacity in (16, 4096)]
    assert sizes[0] == sizes[1] < 20_000


def test_an_empty_cache_and_an_empty_row(tmp_path: Path) -> None:
    model = tiny()
    sc.StateCache(model.config).save(tmp_path / "empty")
    assert sc.StateCache.load(tmp_path / "empty", model, allow_unverified=True).rows is None
    cache = filled(model)
    cache.reset([1])
    cache.save(tmp_path / "row")
    read = sc.StateCache.load(tmp_path / "row", model)
    assert read.lengths.tolist() == [9, 0]
    ids = torch.tensor([[3, 4], [5, 6]])
    assert (feed(model, read, ids) - feed(model, cache, ids)).abs().max() < 1e-10


def test_tokens_come_along(tmp_path: Path) -> None:
    model = tiny()
    filled(model).save(tmp_path / "rows", tokens=[range(9), range(1, 10)])
    assert [row["tokens"] for row in file.describe(tmp_path / "rows").rows] == [list(range(9)), list(range(1, 10))]
    with pytest.raises(errors.RowsError, match="3 rows"):
        filled(model).save(tmp_path / "rows", tokens=[[1]] * 3)
    with pytest.raises(errors.RowsError, match="holds 9 tokens"):
        filled(model).save(tmp_path / "rows", tokens=[[1], [2]])


@pytest.mark.parametrize("keep", [True, False])
def test_a_prompt_is_compared_with_the_tokens_of_a_file(keep: bool, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    ids = [list(range(9)), [2**40, *range(8)]]
    filled(model).save(path, tokens=ids, keep_tokens=keep)
    for row, held in zip(file.describe(path).rows, ids, strict=True):
        assert row["tokens"] == (held if keep else None)
        assert row["digest"] == hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in held)).hexdigest()
    read = sc.StateCache.load(path, model, tokens=[ids[0], [*ids[1], 3, 4]])
    assert read.lengths.tolist() == [9, 9]
    said = r"holds 9 tokens in row 1, and the {} given for it do not begin with those: read them into a new cache"
    for other in (ids[1][:8], [*ids[1][:8], 9], [*ids[0], 3]):
        with pytest.raises(errors.FileError, match=said.format(len(other))):
            sc.StateCache.load(path, model, tokens=[ids[0], other])
    with pytest.raises(errors.RowsError, match=r"tokens= has 1 rows, and .* 2: give ids for each row"):
        sc.StateCache.load(path, model, tokens=ids[:1])


def test_which_tokens_a_file_holds_may_be_unknown(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    cache = filled(model)
    cache.save(path)
    with pytest.raises(errors.FileError, match="does not say which tokens row 0 holds: save it with tokens="):
        sc.StateCache.load(path, model, tokens=[range(9)] * 2)
    with pytest.raises(errors.OptionError, match=r"keep_tokens=False: .* give them as tokens="):
        cache.save(path, keep_tokens=False)
    old = file.describe(GOLDEN / "lfm2-1.safetensors")  # of ids alone
    old.check_begins("old", [[1, 2, 3, 4, 5, 6]])
    with pytest.raises(errors.FileError, match="do not begin"):
        old.check_begins("old", [[1, 2, 3, 4, 6]])


def test_a_digest_of_other_tokens_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    filled(tiny(), 5, 1).save(path, tokens=[range(5)])
    rewrite(path, lambda told: told["rows"][0].update(tokens=[1, 2, 3, 4, 5]))
    with pytest.raises(errors.FileError, match="the digest of row 0 is of other tokens than it has"):
        file.describe(path)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_rows_of_a_file_are_repeated_before_the_first_pass(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    cache = filled(model)
    cache.save(tmp_path / "rows")
    read = sc.StateCache.load(tmp_path / "rows", model, slack=3)
    for each in (cache, read):
        each.gather([1, 0, 1])
    ids = torch.tensor([[3, 4], [5, 6], [7, 8]])
    assert torch.equal(feed(model, read, ids), feed(model, cache, ids))
    read.rollback(1)
    assert read.lengths.tolist() == [10] * 3


@pytest.mark.parametrize("part", [1, 7, 1 << 20])
def test_the_layout_is_that_of_save_file(part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layout, "PART", part)
    tensors = {
        "b": torch.randn(3, 5, 4).movedim(0, 1),
        "a": torch.randn(6, 2).bfloat16(),
        "c": torch.arange(6).view(2, 3).T,
        "d": torch.zeros(0, 4),
        "e": torch.arange(5, dtype=torch.int8)[::2],
    }
    with (tmp_path / "ours").open("wb") as opened:
        layout.write(opened.fileno(), tensors, lambda sums: {"sums": json.dumps(sums)})
    with safe_open(tmp_path / "ours", "pt") as held:
        sums = json.loads(held.metadata()["sums"])
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", {"sums": json.dumps(sums)})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sums == {name: f"{zlib.crc32(bytes_of(t)):08x}" for name, t in tensors.items()}
    places = {n: torch.full((*t.shape[1:], len(t)), 9, dtype=t.dtype).movedim(-1, 0) for n, t in tensors.items()}
    with (tmp_path / "ours").open("rb") as opened:
        where = layout.header(opened.fileno())
        jobs = {name: (where[name][2], to, to.dtype) for name, to in places.items()}
        assert layout.read(opened.fileno(), jobs) == sums
    assert all(torch.equal(places[name], tensor) for name, tensor in tensors.items())


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def test_a_file_is_read_into_the_rings_that_have_its_entries_in_one_piece(tmp_path: Path) -> None:
    model, path = tiny("qwen3_5"), tmp_path / "rows"
    filled(model).save(path)
    made, described = (
        sc.StateCache(model.config, capacity=16, rows=2, dtype="float64", device="cpu"),
        file.describe(path),
    )
    places = made.states.places(1, 9, described.dtypes(1), torch.device("cpu"))
    rings = {buffer.untyped_storage().data_ptr() for buffer in made.buffers()}
    assert {n.partition(".")[2] for n in places} >= {"key", "value", "recurrent"}
    assert all(to.untyped_storage().data_ptr() in rings for to in places.values())


class Operations(TorchDispatchMode):
    """What torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not LARGE, reason="this system maps no memory")
def test_large_buffers_are_not_written_to_be_zero() -> None:
    with Operations() as seen:
        for size in (LARGE // 4 - 1, LARGE // 4):
            seen.names.clear()
            assert not zeros(size, dtype=torch.float32, device=torch.device("cpu"), static=False).any()
            assert any("zero" in name for name in seen.names) is (size < LARGE // 4)


def test_large_buffers_are_zero_and_as_large_as_they_say() -> None:
    made = zeros(3, 5, LARGE or 64, dtype=torch.bfloat16, device=torch.device("cpu"), static=False)
    assert made.shape == (3, 5, LARGE or 64) and made.data_ptr() % 64 == 0 and not made.is_inference()
    assert made.untyped_storage().nbytes() == made.nbytes and not made[0, ::4, ::4096].any() and not made[-1, -1].any()
    copied = copy.deepcopy(made)
    made[1, 2, 3] = 4
    assert not copied.any() and made.count_nonzero() == 1


# ---- whose


def test_a_fingerprint_tells_models_apart() -> None:
    model = copy.deepcopy(tiny(prepared=False))
    was = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == was
    assert fingerprint(sc.prepare(model)) == was
    weight = model.get_input_embeddings().weight
    weight[-1, -1] += 1
    assert fingerprint(model) != was
    weight[-1, -1] -= 1
    assert fingerprint(model) == was
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 77.0}
    assert fingerprint(model) != was


def test_adapters_count_while_they_are_on() -> None:
    class Adapted(nn.Linear):
        disable_adapters = False

    model = copy.deepcopy(tiny(prepared=False))
    plain = fingerprint(model)
    mlp = next(m for m in model.modules() if isinstance(m, nn.Linear))
    mlp.__class__ = Adapted
    on = fingerprint(model)
    mlp.disable_adapters = True
    assert len({plain, on, fingerprint(model)}) == 3


def test_how_a_model_prints_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(prepared=False)
    was = fingerprint(model)
    monkeypatch.setattr(nn.Module, "__repr__", lambda module: "as another torch prints it")
    assert fingerprint(model) == was


@pytest.mark.parametrize("place", [0, 300_000, -1])
def test_large_tensors_are_looked_at_from_end_to_end(place: int) -> None:
    model = nn.Linear(1000, 600)
    model.config = tiny().config
    was = fingerprint(model)
    starts = [(600_000 - 1024) * n // 15 for n in range(16)]
    model.weight.view(-1)[starts[8] if place == 300_000 else place] += 1
    assert fingerprint(model) != was


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    filled(model).save(path)
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight[3, 3] += 1
    with pytest.raises(errors.FileError, match="other weights"):
        sc.StateCache.load(path, other)
    with pytest.raises(errors.UnverifiedWeights, match="give the model"):
        sc.StateCache.load(path, model.config)
    for taken in (other, model.config):
        assert sc.StateCache.load(path, taken, allow_unverified=True).lengths.tolist() == [9, 9]


def test_a_file_of_unknown_weights_says_so(tmp_path: Path) -> None:
    models, path = oracle.build("lfm2"), tmp_path / "rows"
    filled(models.plain).save(path)
    assert file.describe(path).fingerprint is None
    with pytest.warns(UserWarning, match="whose weights"):
        sc.StateCache.load(path, models.plain)


def test_whose_weights_they_were_is_told_on(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    cache = filled(model)
    for other in (cache.fork(), copy.deepcopy(cache)):
        other.save(path)
        assert sc.StateCache.load(path, model).lengths.tolist() == [9, 9]
    sc.StateCache.load(path, model).save(path)
    assert sc.StateCache.load(path, model).lengths.tolist() == [9, 9]


def test_rows_of_unknown_weights_stay_so(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    filled(model).save(path)
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight[3, 3] += 1
    read = sc.StateCache.load(path, other, allow_unverified=True)
    feed(other, read, torch.tensor([[1], [2]]))
    for cache in (read, read.fork(), copy.deepcopy(read)):
        cache.save(path)
        assert file.describe(path).fingerprint is None


def test_weights_that_change_between_filling_and_saving_are_unknown(tmp_path: Path) -> None:
    model, path = copy.deepcopy(tiny()), tmp_path / "rows"
    cache = filled(model)
    cache.save(path)
    assert file.describe(path).fingerprint is not None
    model.get_input_embeddings().weight[3, 3] += 1
    cache.save(path)
    assert file.describe(path).fingerprint is None
    again = filled(model)
    again.save(path)
    assert file.describe(path).fingerprint is not None
    feed(tiny(), again, torch.tensor([[1], [2]]))  # other weights go on with it
    again.save(path)
    assert file.describe(path).fingerprint is None


def test_weights_that_are_away_are_unknown_and_stop_nothing(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    away = copy.deepcopy(model)
    away.get_input_embeddings().weight = nn.Parameter(away.get_input_embeddings().weight.to("meta"))
    filled(model).save(path)
    alone, after = sc.StateCache(model.config), sc.StateCache.load(path, model)
    for cache in (alone, after):  # by a model whose weights are offloaded, alone and after another
        cache.filled_by(decoder_of(away))
        for same in (cache, cache.fork(), copy.deepcopy(cache)):
            same.save(tmp_path / "other")
            assert file.describe(tmp_path / "other").fingerprint is None
    with pytest.raises(errors.ConfigError, match="allow_unverified"):
        sc.StateCache.load(path, away)


def test_a_file_is_as_readable_as_any(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    (tmp_path / "other").touch()
    filled(model).save(path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    path.chmod(0o640)
    filled(model).save(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_another_model_is_refused(tmp_path: Path) -> None:
    filled(tiny()).save(tmp_path / "rows")
    with pytest.raises(errors.FileError, match="another configuration"):
        sc.StateCache.load(tmp_path / "rows", tiny("mamba2"))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    filled(model).save(path)
    with pytest.raises(errors.RowsError, match="holds 2 rows"):
        sc.StateCache.load(path, model, rows=1, dtype="float64", device="cpu")
    with pytest.raises(errors.CapacityError, match="capacity=4"):
        sc.StateCache.load(path, model, capacity=4)
    with pytest.raises(errors.FileError, match="there is no file"):
        sc.StateCache.load(tmp_path / "none", model)
    cache = filled(model, slack=2)
    with cache.speculate(1), pytest.raises(errors.StepError, match="round is open"):
        cache.save(path)
    with pytest.raises(FileNotFoundError):
        cache.save(tmp_path / "no folder" / "rows")


# ---- damage


def damaged(whole: bytes, rnd: random.Random) -> bytes:
    made = bytearray(whole)
    how = rnd.randrange(6)
    if how == 0:
        return bytes(made[: rnd.randrange(len(made))])
    if how == 1:
        for _ in range(rnd.randint(1, 4)):
            made[rnd.randrange(len(made))] ^= 1 << rnd.randrange(8)
    elif how == 2:  # in the header and the description
        made[rnd.randrange(min(len(made), 4000))] = rnd.randrange(256)
    elif how == 3:
        at, n = rnd.randrange(len(made)), rnd.randint(1, 600)
        made[at : at + n] = bytes(len(made[at : at + n]))
    elif how == 5:  # signs of numbers, which lie at the highest bits of words
        for _ in range(rnd.randint(1, 4)):
            made[8 * rnd.randrange(len(made) // 8) + 7] ^= 128
    else:  # two blocks change places
        n = rnd.choice([8, 64, 256])
        a, b = sorted(rnd.sample(range(len(made) // n), 2))
        made[a * n : a * n + n], made[b * n : b * n + n] = made[b * n : b * n + n], made[a * n : a * n + n]
    return bytes(made)


def test_damage_is_found_whatever_it_is(tmp_path: Path) -> None:
    model, path, rnd = tiny(), tmp_path / "rows", random.Random(0)
    filled(model, 5, 1).save(path)
    whole, described = path.read_bytes(), file.describe(path)
    rows, found = file.read(path, described), 0
    for _ in range(2500):
        made = damaged(whole, rnd)
        path.write_bytes(made)
        try:
            again = file.read(path, file.describe(path))
        except errors.FileError:
            found += 1
        else:  # as white space between the parts of the header
            assert all(torch.equal(again[0].entries[name], entries) for name, entries in rows[0].entries.items())
            assert again[0].length == rows[0].length
    assert found > 2300


def rewrite(path: Path, change: Any) -> None:
    """A file with another description, which fits its digest."""
    with safe_open(path, "pt") as held:
        told = json.loads(held.metadata()["statecache"])
    change(told)
    text = json.dumps(told)
    save_file(load_file(path), path, {"statecache": text, "digest": hashlib.sha256(text.encode()).hexdigest()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(format=2), "another format"),
        (lambda told: told["rows"][0].update(length=10**12), "entries"),
        (lambda told: told["rows"].clear(), "makes no sense"),
        (lambda told: told.update(unknown=1), "makes no sense"),
        (lambda told: told["states"]["1.key"].update(dtype="load"), "makes no sense"),
        (lambda told: told["tensors"].pop("0/1.key"), "other tensors"),
        (lambda told: told["tensors"]["0/1.key"].update(dtype="int64"), "another form"),
        (lambda told: told["tensors"]["0/1.key"].update(checksum="0" * 8), "not what was written"),
    ],
)
def test_a_description_that_lies_is_found(change: Any, said: str, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    filled(model, 5, 1).save(path)
    rewrite(path, change)
    with pytest.raises(errors.FileError, match=said):
        sc.StateCache.load(path, model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["points"][0].update(length=6), "a point of 6 tokens is not of row 0"),
        (lambda told: told["points"][0].update(row=1), "makes no sense"),
        (lambda told: told["points"].clear(), "makes no sense"),
        (lambda told: told["points"][0].update(length=1), "p0/0.conv has .* entries, and its row 1 tokens"),
        (lambda told: told["tensors"].update({"p0/1.key": told["tensors"].pop("0/1.key")}), "belongs to a row"),
        (lambda told: told["tensors"]["p0/0.conv"].update(checksum="0" * 8), "p0/0.conv is not what was written"),
    ],
)
def test_a_point_that_lies_is_found(change: Any, said: str, tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    cache = filled(model, 4, 1)
    point = cache.snapshot(0, point=True)
    feed(model, cache, torch.tensor([[5]]))
    save(cache, path, points=[(0, point)], session={})
    assert torch.equal(file.read_points(path, file.describe(path))[0].entries["0.conv"], point.entries["0.conv"])
    with safe_open(path, "pt") as held:
        metadata = held.metadata()
    told, tensors = json.loads(metadata["statecache"]), load_file(path)
    change(told)
    renamed = {name if name in told["tensors"] else f"p{name}": tensor for name, tensor in tensors.items()}
    text = json.dumps(told)
    save_file(renamed, path, {"statecache": text, "digest": hashlib.sha256(text.encode()).hexdigest()})
    with pytest.raises(errors.FileError, match=said):
        file.read_points(path, file.describe(path))


def test_files_of_rows_alone_say_nothing_of_sessions(tmp_path: Path) -> None:
    filled(tiny(), 4, 1).save(tmp_path / "rows")
    with safe_open(tmp_path / "rows", "pt") as held:
        told = json.loads(held.metadata()["statecache"])
    assert sorted(told) == ["fingerprint", "format", "made_for", "model", "rows", "states", "tensors"]


@pytest.mark.parametrize("what", ["a full disk", "no folder"])
def test_what_cannot_be_written_is_an_error_of_the_system_and_leaves_the_old_file(what: str, tmp_path: Path) -> None:
    cache, path = filled(tiny(), 4, 1), tmp_path / "rows"
    cache.save(path)
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "a full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="No such file" if what == "no folder" else "too large"):
            cache.save(path if what == "a full disk" else tmp_path / "none" / "rows")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [x.name for x in tmp_path.iterdir()] == ["rows"] and path.read_bytes() == whole


def test_another_safetensors_file_is_told(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x")
    with pytest.raises(errors.FileError, match="something else"):
        sc.StateCache.load(tmp_path / "x", tiny())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_signs_that_change_are_seen(dtype: torch.dtype) -> None:
    x = torch.arange(1, 4097).to(dtype)
    was = layout.checksum(x)
    for places in ([3], [3, 9], [0, 1024], [1, 3, 5, 7], slice(None), slice(1, None, 2)):
        y = x.clone()
        y[places] = -y[places]
        assert layout.checksum(y) != was
    assert layout.checksum(x.clone()) == was and layout.checksum(x[:0]) == "00000000"


# ---- a process that ends


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_file(tmp_path: Path) -> None:
    model, path, rnd = tiny(), tmp_path / "rows", random.Random(0)
    cache, longer = filled(model, 5), filled(model, 8)
    cache.save(path)
    lengths = set()
    for _ in range(100):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            longer.save(path)
            os.write(writer, b".")
            while True:
                cache.save(path)
                longer.save(path)
        os.read(reader, 1)
        time.sleep(rnd.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
        lengths.add(sc.StateCache.load(path, model).lengths.tolist()[0])
    assert lengths <= {5, 8} and len(lengths) == 2


def test_a_file_takes_the_place_of_the_old_one_and_is_not_written_over_it(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "rows"
    filled(model, 5).save(path)
    whole = path.read_bytes()
    (tmp_path / "old").hardlink_to(path)
    filled(model, 8).save(path)
    assert (tmp_path / "old").read_bytes() == whole
    assert sc.StateCache.load(path, model).lengths.tolist() == [8, 8]


# ---- other readers


def test_heads_can_be_parted_and_joined(tmp_path: Path) -> None:
    model, path = tiny("minimax"), tmp_path / "rows"
    cache = filled(model)
    cache.save(path)
    described, tensors = file.describe(path), load_file(path)
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        axes = described.states[name.partition("/")[2]]["axes"]
        if "heads" in axes and tensor.shape[1 + axes.index("heads")] % 2 == 0:
            halves = tensor.chunk(2, 1 + axes.index("heads"))
        else:
            halves = (tensor, tensor)
        for part, half in zip(parts, halves, strict=True):
            part[name] = half
    assert any(parts[0][name].shape != tensor.shape for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        axes = described.states[name.partition("/")[2]]["axes"]
        if parts[0][name].shape != tensor.shape:
            tensors[name] = torch.cat([part[name] for part in parts], 1 + axes.index("heads")).contiguous()
    with safe_open(path, "pt") as held:
        metadata = held.metadata()
    save_file(tensors, path, metadata)
    read = sc.StateCache.load(path, model)
    ids = torch.tensor([[3], [4]])
    assert torch.equal(feed(model, read, ids), feed(model, cache, ids))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_convolution_s_blocks_reach_their_heads_alone(name: str) -> None:
    model = sc.prepare(families.build(name)[0])
    found = [(layer, s) for layer in model_spec(model.config).layers for s in layer.states if s.blocks]
    seen = set()
    for layer, spec in found[:3]:
        reached = {s.name: s for s in layer.states if "heads" in file.AXES.get((s.kind, len(s.shape or ())), ())}
        first = 0
        for what, count, width in spec.blocks:
            for n in range(count):
                channels = slice(first + n * width, first + (n + 1) * width)
                changed = _after_noise(model, f"{layer.index}.{spec.name}", channels)
                for other, of in reached.items():
                    heads = changed[f"{layer.index}.{other}"]
                    each = len(heads) // count
                    assert not heads[: n * each].any() and not heads[(n + 1) * each :].any(), (what, n, other)
                    seen |= {(spec.name, what)} if bool(heads.any()) and of.shape[0] > 1 else set()
            first += count * width
    assert {(spec.name, what) for _, spec in found[:3] for what, _, _ in spec.blocks} == seen


@torch.inference_mode()
def _after_noise(model: Any, name: str, channels: slice) -> dict[str, Tensor]:
    """Which heads of every state of a row another token leaves otherwise, once these inputs are: (H,) bool."""
    cache = sc.StateCache(model.config)
    ids = draw(1, 6) % 60 + 1
    key = families.cache_arg(model)
    model(ids[:, :5], use_cache=True, **{key: cache})
    other, row = cache.fork(), cache.snapshot(0)
    entries = {key: entry.clone() for key, entry in row.entries.items()}
    entries[name][:, channels] += 1
    other.admit(0, replace(row, entries=entries))
    for each in (cache, other):
        model(ids[:, 5:], use_cache=True, **{key: each})
    was, now = cache.snapshot(0).entries, other.snapshot(0).entries
    return {key: (now[key][-1] != was[key][-1]).flatten(1).any(1) for key in was if was[key].dim() > 2}


def test_every_axis_has_a_name() -> None:
    for name in families.FAMILIES:
        for _, spec in model_spec(families.build(name)[1]).states():
            assert spec.shape is None or spec.kind == "log" or (spec.kind, len(spec.shape)) in file.AXES, (name, spec)


def test_a_golden_file_is_read(tmp_path: Path) -> None:
    described = file.describe(GOLDEN / "lfm2-1.safetensors")
    (row,) = file.read(GOLDEN / "lfm2-1.safetensors", described)
    want = json.loads((GOLDEN / "lfm2-1.json").read_text())
    assert (described.model, described.lengths, row.tokens) == ("lfm2", [5], (1, 2, 3, 4, 5))
    assert {name: entries.flatten().tolist() for name, entries in row.entries.items()} == want


def test_a_golden_session_is_read_rows_points_and_all() -> None:
    path = GOLDEN / "lfm2-1-session.safetensors"
    described, want = file.describe(path), json.loads((GOLDEN / "lfm2-1-session.json").read_text())
    plain = file.describe(GOLDEN / "lfm2-1.safetensors")
    (row,), (alone,) = file.read(path, described), file.read(GOLDEN / "lfm2-1.safetensors", plain)
    assert all(torch.equal(row.entries[name], entries) for name, entries in alone.entries.items())
    (point,) = file.read_points(path, described)
    assert (point.length, point.point, point.rotated, described.points) == (
        3,
        True,
        0,
        [{"row": 0, "length": 3, "rotated": 0}],
    )
    assert {name: entries.flatten().tolist() for name, entries in point.entries.items()} == want["point"]
    assert described.session == want["session"] and plain.session is None and plain.points == []
