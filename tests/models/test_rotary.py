"""Rotary factors that change with the length of a row: every pass is exact or refused, in rows alone and together.

The oracle is one forward of the unmodified model over a row alone and whole, without a cache. B rows, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import families
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from tiny_models import draw
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import statecache as sc
from statecache.errors import RotaryError

FIRST = 6  # tokens, the longest row before factors change
BASE = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 2 * j for j in range(8)]}
ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "proportional": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": FIRST},
    "longrope": {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": FIRST},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": FIRST,
    },
}
CHANGING = ("longrope", "dynamic")
NAMES = ("llama", "phi3", "lfm2", "qwen3_5", "falcon_h1")
PHI3 = ("default", "longrope")  # all that its configuration takes
CASES = [(name, kind) for name in NAMES for kind in ROTARY if name != "phi3" or kind in PHI3]
CASES_OF_CHANGE = [(name, kind) for name, kind in CASES if kind in CHANGING]

# before, longrope branched on a tensor and forgot its long factors by layer type; phi3's generate lost the text before
mended = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers' own longrope is at fault there"
)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@cache
def pristine(name: str, kind: str) -> Any:
    """A float64 model that nothing has run: dynamic factors depend on what a module has seen before."""
    sections = {"mrope_section": [3, 3, 2], "mrope_interleaved": True} if name == "qwen3_5" else {}
    parameters = {"rope_type": kind, **BASE, **sections, **ROTARY[kind]}
    changes: dict[str, Any] = {"rope_parameters": parameters, "max_position_embeddings": 64}
    if kind == "dynamic":
        changes["max_position_embeddings"] = FIRST
    if name == "phi3":
        changes["original_max_position_embeddings"] = FIRST
    if name not in families.FAMILIES:
        return tiny_models.build.__wrapped__(name, **changes).double()
    return families.build(name, **changes)[0].double()


def build(name: str, kind: str, prepared: bool = True) -> Any:
    model = copy.deepcopy(pristine(name, kind))
    return sc.prepare(model) if prepared else model


def alone(name: str, kind: str, row: Tensor) -> Tensor:
    """Logits (T, V) of a row (T,) alone and whole. Models compute recurrences, and angles, in float32."""
    return copy.deepcopy(pristine(name, kind))(row[None], use_cache=False).logits[0]


def feed(model: Any, held: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, use_cache=True, **{families.cache_arg(model): held}, **kwargs).logits


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, want.abs().max().item()))


def fixed(rows: int = 1, slack: int = 0) -> dict[str, Any]:
    return {"capacity": 24, "rows": rows, "dtype": torch.float64, "device": "cpu", "slack": slack}


# ---- one row


def test_every_rope_type_is_tried() -> None:
    assert set(ROTARY) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_factors_change_where_two_lengths_rotate_differently(name: str, kind: str) -> None:
    row = draw(1, FIRST + 2)[0]
    parts = alone(name, kind, row[:FIRST])[-1], alone(name, kind, row)[FIRST - 1]
    assert ((parts[0] - parts[1]).abs().max() > 1e-3) == (kind in CHANGING)
    assert (sc.StateCache(pristine(name, kind).config).spec.rotary is not None) == (kind in CHANGING)


@pytest.mark.parametrize("options", [{}, fixed()], ids=["growing", "fixed"])
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_pass_is_exact_or_refused(name: str, kind: str, prepared: bool, options: dict[str, Any]) -> None:
    model, row, held, refused = build(name, kind, prepared), draw(1, 14)[0], 0, []
    cache = sc.StateCache(model.config, **options)
    for end in (3, 5, FIRST, FIRST + 1, FIRST + 3, FIRST + 4, 12, 13):
        part = row[None, held:end]
        places = torch.arange(held, end)[None]  # bamba and its kin count them from zero
        try:
            got = feed(model, cache, part, position_ids=places)
        except RotaryError:
            refused.append(end)
            assert cache.lengths.tolist() == [held]
            cache.reset()
            got = feed(model, cache, row[None, :end])[:, held:]
        same(got[0], alone(name, kind, row[:end])[held:])
        held = end
    changes = {"longrope": [FIRST + 1], "dynamic": [FIRST + 1, FIRST + 3, FIRST + 4, 12, 13]}
    assert refused == changes.get(kind, [])


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize(("name", "kind"), CASES_OF_CHANGE)
def test_what_is_refused_changes_nothing(name: str, prepared: bool, kind: str) -> None:
    model, row = build(name, kind, prepared), draw(1, FIRST)[0]
    cache = sc.StateCache(model.config, slack=3)
    feed(model, cache, row[None, :4])
    before = [buffer.clone() for buffer in cache.buffers()]
    with pytest.raises(RotaryError, match=rf"row 0 holds 4 tokens and the step makes them 7.*\({kind}\).*reset\(\)"):
        feed(model, cache, draw(1, 3, 1))
    assert all(map(torch.equal, before, cache.buffers()))
    # an unprepared model's dynamic factors would be those of the pass that was refused, at six tokens
    same(feed(model, cache, row[None, 4:5])[0], alone(name, kind, row[:5])[4:])


def test_factors_that_are_the_same_do_not_change() -> None:
    config = copy.deepcopy(pristine("llama", "longrope").config)
    config.rope_parameters["long_factor"] = config.rope_parameters["short_factor"]
    assert sc.StateCache(config).spec.rotary is None


@mended
def test_each_layer_type_may_have_factors_of_its_own() -> None:
    parameters = {
        "full_attention": {"rope_type": "longrope", "rope_theta": 10000.0, **ROTARY["longrope"]},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    reference = tiny_models.build.__wrapped__("gemma3_text", rope_parameters=parameters).double()
    for prepared in (False, True):
        model = copy.deepcopy(reference)
        model, row = sc.prepare(model) if prepared else model, draw(1, 9)[0]
        cache = sc.StateCache(model.config)
        same(feed(model, cache, row[None, :FIRST])[0], copy.deepcopy(reference)(row[None, :FIRST]).logits[0])
        with pytest.raises(RotaryError, match="beyond 6 tokens"):
            feed(model, cache, row[None, FIRST:])
        cache.reset()
        feed(model, cache, row[None, :8])
        same(feed(model, cache, row[None, 8:])[0], copy.deepcopy(reference)(row[None]).logits[0, 8:])


def test_a_model_that_rotates_nothing_has_no_factors() -> None:
    parameters = {"rope_type": "longrope", **BASE, **ROTARY["longrope"]}
    for name, option in (
        ("granitemoehybrid", {"position_embedding_type": "nope"}),
        ("zamba2", {"use_mem_rope": False}),
    ):
        config = copy.deepcopy(families.build(name)[1])
        config.update({"rope_parameters": parameters, **option})
        assert sc.StateCache(config).spec.rotary is None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "phi3"])
def test_dynamic_factors_do_not_depend_on_passes_before(name: str) -> None:
    model = build(name, "dynamic")
    for seed, length in enumerate((20, FIRST, 9, 20, 8)):
        row = draw(1, length, seed)[0]
        cache = sc.StateCache(model.config)
        same(feed(model, cache, row[None])[0], alone(name, "dynamic", row))
        same(model(row[None], use_cache=False).logits[0], alone(name, "dynamic", row))


# ---- rows together


@pytest.mark.parametrize(("name", "kind"), CASES_OF_CHANGE)
def test_rows_on_both_sides_are_refused_together_and_exact_apart(name: str, kind: str) -> None:
    model, rows = build(name, kind), [draw(1, n, n)[0] for n in (5, 9)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 9 - len(row) :], mask[b, 9 - len(row) :] = row, 1
    cache = sc.StateCache(model.config, **fixed(rows=2))
    told = r"rows 0 and 1 are 5 and 9 tokens long after the step.*passes of their own"
    with pytest.raises(RotaryError, match=told):
        feed(model, cache, ids, attention_mask=mask)
    with pytest.raises(RotaryError, match=told):
        model(ids, attention_mask=mask, use_cache=False)
    assert cache.alike([5, 9]) == [[0], [1]]
    for b, row in enumerate(rows):
        cache.expect([len(row)], [b])
        same(feed(model, cache, row[None])[0], alone(name, kind, row))
    assert [cache.turned(b, 1) for b in (0, 1)] == [False, kind == "dynamic"]


@pytest.mark.parametrize(("name", "kind"), CASES_OF_CHANGE)
def test_junk_columns_do_not_make_a_pass_longer(name: str, kind: str) -> None:
    model, rows = build(name, kind), [draw(1, n, n)[0] for n in (FIRST, 3)]
    cache = sc.StateCache(model.config)
    feed(model, cache, torch.stack([row[:3] for row in rows])[:, :2])
    cache.expect([1, 0])
    feed(model, cache, torch.stack([rows[0][2:5], rows[1][:3]]))  # the first row ends at 3, its junk at 5
    cache.expect([3, 1])
    got = feed(model, cache, torch.stack([rows[0][3:6], rows[1][[2, 2, 2]]]))
    same(got[0], alone(name, kind, rows[0])[3:])
    same(got[1, :1], alone(name, kind, rows[1])[2:])
    cache.rollback(0)
    cache = sc.StateCache(model.config)
    feed(model, cache, torch.stack([rows[0][:5], rows[0][:5]]))
    cache.expect([1, 1])  # both end at 6, their junk at 8
    same(feed(model, cache, rows[0][5:].expand(2, 3))[0, :1], alone(name, kind, rows[0])[5:])


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("cached", [True, False])
def test_columns_of_pads_do_not_make_a_row_longer(kind: str, cached: bool) -> None:
    model, row = build("llama", kind), draw(1, FIRST)[0]
    ids, mask = torch.cat([torch.zeros(4, dtype=torch.long), row])[None], torch.tensor([[0] * 4 + [1] * FIRST])
    got = model(ids, attention_mask=mask, use_cache=cached).logits[0, 4:]
    same(got, alone("llama", kind, row))


# ---- back, and elsewhere


@pytest.mark.parametrize(("name", "kind"), CASES_OF_CHANGE)
def test_a_row_that_goes_back_keeps_its_factors(name: str, kind: str) -> None:
    model, row = build(name, kind), draw(1, 12)[0]
    cache = sc.StateCache(model.config, slack=9)
    feed(model, cache, row[None, :9])
    cache.rollback(5)
    with pytest.raises(RotaryError, match="row 0 holds 4 tokens and the step makes them 5"):
        feed(model, cache, row[None, 4:5])
    with pytest.raises(RotaryError) if kind == "dynamic" else nullcontext():
        same(feed(model, cache, row[None, 4:8])[0], alone(name, kind, row[:8])[4:])
        cache.rollback(4)
    same(feed(model, cache, row[None, 4:9])[0], alone(name, kind, row[:9])[4:])  # as long as when it was rotated
    cache.rollback(9)
    same(feed(model, cache, row[None, :5])[0], alone(name, kind, row[:5]))


def test_a_row_that_was_read_anew_does_not_go_back_to_a_point_before() -> None:
    model, row = build("phi3", "longrope"), draw(1, 10)[0]
    cache = sc.StateCache(model.config)
    feed(model, cache, row[None, :4])
    point = cache.snapshot(0, point=True)
    cache.reset()
    feed(model, cache, row[None, :8])
    with pytest.raises(RotaryError, match="row 0: its keys have been rotated anew since the point of 4 tokens"):
        cache.admit(0, point)
    same(feed(model, cache, row[None, 8:])[0], alone("phi3", "longrope", row)[8:])


def _fork(model: Any, cache: Any) -> Any:
    return cache.fork()


def _gather(model: Any, cache: Any) -> Any:
    cache.gather([0, 0])
    cache.gather([1])
    return cache


def _snapshot(model: Any, cache: Any) -> Any:
    other = sc.StateCache(model.config, **fixed(slack=8))
    other.admit(0, cache.snapshot(0))
    return other


def _restore(model: Any, cache: Any) -> Any:
    mark = cache.checkpoint()
    feed(model, cache, draw(1, 8, 5))
    cache.restore(mark)
    return cache


def _point(model: Any, cache: Any) -> Any:
    point = cache.snapshot(0, point=True)
    feed(model, cache, draw(1, 8, 5))
    cache.admit(0, point)
    return cache


@pytest.mark.parametrize("way", [_fork, _gather, _snapshot, _restore, _point])
@pytest.mark.parametrize("name", ["phi3", "falcon_h1"])
def test_how_keys_were_rotated_goes_where_they_go(name: str, way: Callable[[Any, Any], Any]) -> None:
    model, row = build(name, "longrope"), draw(1, 10)[0]
    cache = sc.StateCache(model.config, slack=8)
    feed(model, cache, row[None, :8])
    cache.rollback(4)
    cache = way(model, cache)
    with pytest.raises(RotaryError, match="row 0 holds 4 tokens"):
        feed(model, cache, row[None, 4:5])
    same(feed(model, cache, row[None, 4:])[0], alone(name, "longrope", row)[4:])


def test_a_round_keeps_the_factors_of_its_pass() -> None:
    model, row = build("llama", "longrope"), draw(1, 10)[0]
    cache = sc.StateCache(model.config, slack=8)
    with cache.speculate(8) as draft:
        same(feed(model, cache, row[None, :8])[0], alone("llama", "longrope", row[:8]))
        draft.commit(4)
    with pytest.raises(RotaryError, match="row 0 holds 4 tokens"):
        feed(model, cache, row[None, 4:5])
    cache.reset()
    feed(model, cache, row[None, :5])
    with pytest.raises(RotaryError, match="row 0 holds 5 tokens"), cache.speculate(4):
        feed(model, cache, row[None, 5:8])
    same(feed(model, cache, row[None, 5:6])[0], alone("llama", "longrope", row[:6])[5:])


# ---- positions, compiled code


@pytest.mark.parametrize("name", NAMES)
def test_positions_that_lead_to_other_factors_are_refused(name: str) -> None:
    model, row = build(name, "longrope"), draw(1, 8)[0]
    cache = sc.StateCache(model.config)
    with pytest.raises(RotaryError, match=r"position_ids end at 9 .* longest row holds 5 tokens"):
        feed(model, cache, row[None, :5], position_ids=torch.arange(5, 10)[None])
    same(feed(model, cache, row[None, :5], position_ids=torch.arange(5)[None])[0], alone(name, "longrope", row[:5]))


@mended
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_a_compiled_step_is_refused_where_it_could_change_factors(prepared: bool) -> None:
    model, row = build("llama", "longrope", prepared), draw(1, 9)[0]
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    for capacity in (FIRST, FIRST + 1):
        cache = sc.StateCache(model.config, **{**fixed(), "capacity": capacity})
        feed(model, cache, row[None, :3])
        places = {} if prepared else {"position_ids": torch.tensor([[3]])}
        if capacity == FIRST:
            got = step(row[None, 3:4], **{families.cache_arg(model): cache}, **places).logits
            same(got[0], alone("llama", "longrope", row[:4])[3:])
        else:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="make the cache with capacity=6 or less"):
                step(row[None, 3:4], **{families.cache_arg(model): cache}, **places)
        torch._dynamo.reset()


# ---- generate of transformers


def longhand(name: str, kind: str, row: Sequence[int], n: int) -> list[int]:
    """A row and n likeliest tokens more, each by a forward over it alone and whole."""
    ids = list(row)
    for _ in range(n):
        ids.append(int(alone(name, kind, torch.tensor(ids))[-1].argmax()))
    return ids


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_generate_of_transformers_stops_at_the_change(name: str, prepared: bool) -> None:
    model, ids = build(name, "longrope", prepared), draw(1, 3)
    for prompt, new in ((ids, 3), (draw(1, 8), 6)):
        cache = sc.StateCache(model.config)
        got, _ = tiny_models.write(model, cache, prompt, max_new_tokens=new)
        assert got[0].tolist() == longhand(name, "longrope", prompt[0].tolist(), new)
    with pytest.raises(RotaryError, match="row 0 holds 6 tokens and the step makes them 7"):
        tiny_models.write(model, sc.StateCache(model.config), ids, max_new_tokens=8)


@mended
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_phi3_begins_anew_in_generate_of_transformers(prepared: bool) -> None:
    model, ids = build("phi3", "longrope", prepared), draw(1, 3)
    got, _ = tiny_models.write(model, sc.StateCache(model.config), ids, max_new_tokens=8)
    assert got[0].tolist() == longhand("phi3", "longrope", ids[0].tolist(), 8)
