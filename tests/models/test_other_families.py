"""Families beyond the conformance matrix: attention and sliding models, and hybrids that are in no table.

The oracle is one forward without a cache.
"""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import tiny_models as tiny
import torch
import torch._dynamo
import transformers
from tiny_models import WINDOW, assert_same, build, draw, feed, feed_all, full, write
from torch import Tensor

import statecache as sc
from declared_bytes import declared_bytes
from statecache import StateCache, errors
from statecache.models.table import model_spec
from statecache.spec import StateSpec

ATTENTION = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "dory"]
ATTENTION = [n for n in ATTENTION if tiny.available(n)]
SLIDING = ["mistral", "mixtral", "qwen3", "gemma2", "gemma3_text", "phi3"]
LISTED = [n for n in families.FAMILIES if "minimax" not in n and "+" not in n]
RENAMED = ["mamba2", "jamba", "zamba", "qwen3_next", "lfm2", "lfm3", "falcon_h1", "zaya", "inkling", "inkling2"]
RENAMED = [n for n in RENAMED if n in families.FAMILIES]
DROPS_STATE = {"jamba", "zamba"}  # their own scan starts from zeros whenever it gets several tokens
BY_COPIES = {"zaya", "mamba2", "jamba", "zamba", "qwen3_next", "falcon_h1"}

CAPACITY = {"growing": None, "fixed": 64}
each_cache = pytest.mark.parametrize("capacity", CAPACITY.values(), ids=CAPACITY)
# where a cache is compileable (StaticCache too), transformers' generate gives inkling's sliding layers the mask of
# its full ones (create_masks_for_generate, "hybrid_sliding")
each_written = pytest.mark.parametrize(
    ("name", "capacity"),
    [
        pytest.param(name, capacity, id=f"{name}-{kind}")
        for name in [*ATTENTION, *RENAMED]
        for kind, capacity in CAPACITY.items()
        if not (name.startswith("inkling") and kind == "fixed")
    ],
)
each_model = pytest.mark.parametrize("name", [*ATTENTION, *RENAMED])


def new_cache(name: str, model: Any, **options: Any) -> StateCache:
    return StateCache(tiny.renamed(model.config) if name in RENAMED else model.config, **options)


# ---- generate


@each_written
def test_greedy_generate_gives_the_logits_of_full_forwards(name: str, capacity: int | None) -> None:
    model, ids = build(name), draw(2, 21)
    for prompt in (ids, ids[:, :1]):
        cache = new_cache(name, model, capacity=capacity)
        sequences, got = write(model, cache, prompt, max_new_tokens=12)
        n = prompt.shape[1]
        assert_same(got, full(model, sequences)[:, n - 1 : -1])
        assert cache.lengths.tolist() == [n + 11] * 2


@each_written
def test_left_padded_rows_get_what_they_would_get_alone(name: str, capacity: int | None) -> None:
    model, lengths = build(name), (21, 9, 3)
    alone = [draw(1, n, seed=n) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (21 - row.shape[1], 0)) for row in alone])
    cache = new_cache(name, model, capacity=capacity)
    sequences, got = write(model, cache, ids, attention_mask=(ids > 0).long(), max_new_tokens=8)
    for row, prompt in enumerate(alone):
        seen = torch.cat([prompt, sequences[row : row + 1, 21:]], 1)
        assert_same(got[row : row + 1], full(model, seen)[:, prompt.shape[1] - 1 : -1])


@pytest.mark.parametrize("length", [3, WINDOW, 13, 30])
@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "zaya"])
def test_layers_show_keys_in_order_of_position(name: str, length: int) -> None:
    model, ids = build(name), draw(2, length)
    theirs = transformers.DynamicCache(config=model.config)
    argument = families.cache_arg(model)
    for cache in (theirs, ours := new_cache(name, model)):
        for part in (ids[:, :2], ids[:, 2:]):
            model(part, use_cache=True, **{argument: cache})
    for got, want in zip(ours.layers, theirs.layers, strict=True):
        assert_same(got.keys, want.keys)
        assert_same(got.values, want.values)


def test_layers_claim_the_states_that_they_have() -> None:
    cache = StateCache(families.build("lfm2")[0].config)
    kinds = [layer.kind for layer in cache.spec.layers]
    assert [len(layer.conv_states) for layer in cache.layers] == [int(kind == "conv") for kind in kinds]
    assert [len(layer.recurrent_states) for layer in cache.layers] == [0] * len(kinds)


@pytest.mark.parametrize("name", ATTENTION)
@each_cache
def test_beams_are_those_of_a_search_without_a_cache(name: str, capacity: int | None) -> None:
    model, ids = build(name), draw(2, 21)
    options = {
        "max_new_tokens": 8,
        "num_beams": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    want = model.generate(ids, use_cache=False, **options)
    out = model.generate(ids, **{families.cache_arg(model): new_cache(name, model, capacity=capacity)}, **options)
    assert out.sequences.tolist() == want.sequences.tolist()
    assert_same(out.sequences_scores, want.sequences_scores, 1e-3)


@pytest.mark.parametrize("name", ATTENTION)
@each_cache
def test_a_second_turn_goes_on_where_the_first_one_ended(name: str, capacity: int | None) -> None:
    model, cache = build(name), new_cache(name, build(name), capacity=capacity)
    first, _ = write(model, cache, draw(2, 21), max_new_tokens=5)
    ids = torch.cat([first, draw(2, 5, seed=1)], 1)
    sequences, got = write(model, cache, ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert_same(got, full(model, sequences)[:, ids.shape[1] - 1 : -1])


# ---- forwards

SPLITS = [(5, 1, 9, 8, 7, 1, 2, 13), (13, 3), (1, 20, 1, 1, 16), (7, 8, 9)]


@each_model
@each_cache
def test_any_split_gives_the_logits_of_one_forward(name: str, capacity: int | None) -> None:
    model, ids = build(name), draw(2, 46)
    want = full(model, ids)
    for sizes in [(9,)] if name in DROPS_STATE else SPLITS:
        cache = new_cache(name, model, capacity=capacity)
        assert_same(feed_all(model, cache, ids, sizes), want)
        assert cache.lengths.tolist() == [46, 46]
        assert int(cache.get_seq_length()) == 46


@each_model
@each_cache
def test_steps_within_the_slack_roll_back(name: str, capacity: int | None) -> None:
    model, ids, other = build(name), draw(2, 25), draw(2, 9, seed=1)
    cache = new_cache(name, model, capacity=capacity, slack=4)
    feed_all(model, cache, ids, (20,))
    for _ in range(2):  # what was rolled back can be fed and rolled back again
        cache.rollback(3)
        got = feed_all(model, cache, other, (), start=22)
        assert_same(got, full(model, torch.cat([ids[:, :22], other], 1))[:, 22:])
        cache.rollback(4)
        feed_all(model, cache, other[:, 5:], (), start=27)
        with pytest.raises(errors.RollbackError, match="slack=4"):
            cache.rollback(5)
        cache.reset()
        feed_all(model, cache, ids, (20,))


@pytest.mark.parametrize("name", [n for n in [*ATTENTION, *RENAMED] if n not in BY_COPIES])
@each_cache
def test_chunks_within_the_slack_roll_back_into_their_middle(name: str, capacity: int | None) -> None:
    model, ids, other = build(name), draw(2, 25), draw(2, 12, seed=1)
    cache = new_cache(name, model, capacity=capacity, slack=5)
    feed_all(model, cache, ids, (6, 14, 5))
    cache.rollback(3)
    got = feed_all(model, cache, other, (4, 1, 7), start=22)
    assert_same(got, full(model, torch.cat([ids[:, :22], other], 1))[:, 22:])


@each_model
@each_cache
def test_gathered_rows_go_on_as_their_own(name: str, capacity: int | None) -> None:
    model, ids, more = build(name), draw(3, 21), draw(2, 3, seed=1)
    cache = new_cache(name, model, capacity=capacity, slack=2)
    feed_all(model, cache, ids, (21,))
    cache.reorder_cache(torch.tensor([1, 1, 2], dtype=torch.int32))
    cache.gather([2, 1])
    got = feed_all(model, cache, more, (), start=21)
    assert_same(got, full(model, torch.cat([ids[[2, 1]], more], 1))[:, 21:])


@each_model
@each_cache
def test_fork_checkpoint_and_reset_keep_every_course_apart(name: str, capacity: int | None) -> None:
    model, ids, one, two = build(name), draw(2, 21), draw(2, 4, seed=1), draw(2, 4, seed=2)
    cache = new_cache(name, model, capacity=capacity)
    feed_all(model, cache, ids, (21,))
    fork, mark = cache.fork(), cache.checkpoint()
    wants = [full(model, torch.cat([ids, more], 1))[:, 21:] for more in (one, two)]
    assert_same(feed_all(model, cache, one, (), start=21), wants[0])
    assert_same(feed_all(model, fork, two, (), start=21), wants[1])
    cache.restore(mark)
    assert_same(feed_all(model, cache, two, (), start=21), wants[1])
    cache.restore(mark)
    assert_same(feed_all(model, cache, one, (), start=21), wants[0])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    again = draw(2, 19, seed=3)
    assert_same(feed_all(model, cache, again, (17,)), full(model, again))


# ---- windows and capacities


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@each_cache
def test_prompts_around_the_window_are_exact(window: int, capacity: int | None) -> None:
    for name in ("mistral", "gemma3_text"):
        model = build(name, sliding_window=window)
        for prompt in {1, max(window - 1, 1), window, window + 1, 2 * window + 1}:
            for slack in (0, 3):
                ids = draw(2, prompt + 12)
                cache = StateCache(model.config, capacity=capacity, slack=slack)
                assert_same(feed_all(model, cache, ids, (prompt, 1, 3)), full(model, ids))


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize(("capacity", "slack"), [(6, 0), (6, 3), (8, 0), (10, 4), (12, 4)])
def test_a_capacity_that_cuts_the_window_short_refuses_what_it_cannot_hold(
    name: str, capacity: int, slack: int
) -> None:
    model, ids = build(name), draw(2, capacity + 5)
    cache = StateCache(model.config, capacity=capacity, slack=slack)
    assert_same(feed_all(model, cache, ids[:, :capacity], (4,)), full(model, ids[:, :capacity]))
    limited = None if name in ("mistral", "mixtral", "phi3") and capacity >= WINDOW + slack else capacity
    assert model_spec(model.config).full_at(capacity, slack) == limited
    if limited is None:
        assert_same(feed(model, cache, ids[:, capacity:], capacity), full(model, ids)[:, capacity:])
        return
    with pytest.raises(errors.CapacityError, match=f"capacity={capacity}"):
        feed(model, cache, ids[:, capacity:], capacity)
    assert cache.lengths.tolist() == [capacity] * 2
    if slack:
        cache.rollback(slack)
        more = draw(2, slack, seed=1)
        want = full(model, torch.cat([ids[:, : capacity - slack], more], 1))[:, capacity - slack :]
        assert_same(feed(model, cache, more, capacity - slack), want)


# ---- sizes


def storages(thing: Any, seen: set[int] | None = None) -> dict[int, int]:
    """Bytes of every storage reachable from an object, by address."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, str, int, float, torch.dtype, torch.device)):
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        return {id(thing) if storage.data_ptr() == 0 else storage.data_ptr(): storage.nbytes()}
    if isinstance(thing, dict):
        inside = [*thing.keys(), *thing.values()]
    else:
        inside = list(thing) if isinstance(thing, (list, tuple, set, frozenset)) else []
    inside += [*getattr(thing, "__dict__", {}).values()]
    return {at: n for part in inside for at, n in storages(part, seen).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [*ATTENTION, *(n for n in families.FAMILIES if not n.startswith(("minimax", "recurrent_gemma")))]
)
def test_sizes_are_known_before_anything_is_allocated(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    for capacity, slack in ((40, 0), (40, 3), (6, 2)):
        want = declared_bytes(model_spec(model.config), 2, capacity, dtype, slack)
        eager = StateCache(model.config, rows=2, capacity=capacity, slack=slack, dtype=dtype, device="cpu")
        lazy = StateCache(model.config, capacity=capacity, slack=slack)
        assert lazy.nbytes().total == 0
        feed(families.cast(copy.deepcopy(model), dtype), lazy, draw(2, 5), 0)
        for cache in (eager, lazy):
            assert cache.nbytes() == want
            assert sum(storages(cache).values()) == want.total


# ---- compiled


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, when inductor is imported
@pytest.mark.parametrize(
    ("name", "backend"),
    [("mistral", tiny.COMPILER), ("gemma3_text", "aot_eager"), ("mamba2", "eager"), ("zaya", "eager")],
)
def test_one_graph_serves_all_steps_past_the_window(name: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # one layer for inductor, whose C++ compiler takes a minute otherwise
    model, ids = build(name, **({"num_hidden_layers": 1} if backend == "inductor" else {})), draw(2, 26)
    cache = new_cache(name, model, capacity=40)
    feed(model, cache, ids[:, :5], 0)
    addresses = [buffer.data_ptr() for buffer in cache.buffers()]
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    got = [feed(model, cache, ids[:, at : at + 1], at, step) for at in range(5, 26)]
    assert_same(torch.cat(got, 1), full(model, ids)[:, 5:])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses
    assert cache.lengths.tolist() == [26, 26]


# ---- loops

loops = pytest.mark.skipif(not tiny.available("dory"), reason="of later transformers")


@loops
def test_a_loop_has_its_layers_behind_those_of_the_model() -> None:
    config = copy.deepcopy(build("dory").config)  # five layers, of which three run three times
    spec = model_spec(config)
    assert [layer.index for layer in spec.layers] == list(range(11))
    assert [layer.kind for layer in spec.layers[5:]] == [layer.kind for layer in spec.layers[1:4]] * 2
    assert spec.order == (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 4)
    config.n_recurrent_loops = 1
    assert len(model_spec(config).layers) == 5


@loops
@each_cache
def test_a_pass_that_ends_in_a_loop_is_counted(capacity: int | None) -> None:
    model, ids = build("dory", n_output_layers=0, n_recurrent_layers=4), draw(2, 30)
    cache = StateCache(model.config, capacity=capacity, slack=3)
    assert_same(feed_all(model, cache, ids, (5, 1, 9, 8)), full(model, ids))
    assert cache.lengths.tolist() == [30, 30]


@loops
@pytest.mark.parametrize("capacity", [None, 200])
def test_long_texts_in_loops_are_exact_row_by_row(capacity: int | None) -> None:
    plain = build("dory")
    model, ids = sc.prepare(copy.deepcopy(plain)), draw(2, 150)
    want = [full(plain, ids[:1])[0], full(plain, ids[1:, :118])[0]]
    held, done = sc.StateCache(model.config, capacity=capacity, slack=9), [0, 0]
    for counts in ((70, 41), (1, 1), (9, 3), (33, 64), (1, 0), (36, 9)):
        width = max(counts)
        chunk = torch.zeros(2, width, dtype=torch.long)
        mask = torch.arange(width) >= width - torch.tensor(counts)[:, None]
        for row, (start, count) in enumerate(zip(done, counts, strict=True)):
            chunk[row, width - count :] = ids[row, start : start + count]
        with torch.no_grad():
            got = model(chunk, attention_mask=mask.long(), **{families.cache_arg(model): held}).logits
        for row, count in enumerate(counts):
            if count:
                assert_same(got[row, width - count :], want[row][done[row] : done[row] + count])
            done[row] += count
        if counts == (9, 3):
            held.rollback(torch.tensor([9, 2]))
            done = [done[0] - 9, done[1] - 2]
    assert done == held.lengths.tolist() == [141, 116]


@loops
@pytest.mark.parametrize("slack", [0, 3])
def test_loops_that_read_what_the_last_one_kept_find_it(slack: int) -> None:
    """Not what one forward gives, which no cache does there: what transformers' cache gives."""
    model, ids = build("dory", recurrent_kv_cache_mode="last_loop"), draw(2, 30)
    theirs, ours = transformers.DynamicCache(config=model.config), StateCache(model.config, slack=slack)
    sizes = (5, 1, 9, 8)
    assert_same(feed_all(model, ours, ids, sizes), feed_all(model, theirs, ids, sizes))
    with pytest.raises(errors.OptionError, match=r'capacity=64: .*recurrent_kv_cache_mode="per_loop"'):
        StateCache(model.config, capacity=64)
    with pytest.raises(errors.UnknownLayerError, match=r'cache\.layers.*recurrent_kv_cache_mode="per_loop"'):
        sc.prepare(model)


# ---- unknown families


@pytest.mark.parametrize("name", [*RENAMED])
def test_a_family_in_no_table_declares_its_states_at_the_first_write(name: str) -> None:
    model = build(name)
    cache = new_cache(name, model, slack=1)
    with pytest.raises(errors.ConfigError, match="nobody knows their bytes before the first write"):
        sc.plan(tiny.renamed(model.config), capacity=64)
    feed(model, cache, draw(2, 5), 0)
    assert cache.lengths.tolist() == [5, 5]
    if name in RENAMED:
        listed = {name: (state.kind, state.shape) for name, state in model_spec(model.config).states()}
        assert {name: (state.kind, _entry(state)) for name, state in cache.spec.states()} == listed


def _entry(state: StateSpec) -> tuple[int, ...] | None:
    """The shape of an entry; of one input, where a layer cuts its window itself and so a window is what came."""
    return state.shape[:-1] if state.shape and state.kind == "conv" and state.leased else state.shape


@pytest.mark.parametrize("name", ["zaya", "lfm2", "qwen3_next"])
@each_cache
def test_one_layer_of_a_family_in_no_table_is_enough(name: str, capacity: int | None) -> None:
    """Where a pass ends shows only when the next one begins: masks and positions have to know by then."""
    kinds = families.FAMILIES[name]["kwargs"]["layer_types"][:1]
    model, ids = families.build(name, num_hidden_layers=1, layer_types=kinds)[0], draw(2, 20)
    for sizes in ((1, 2, 9, 1, 5), (3, 3), (7,)):
        cache = StateCache(tiny.renamed(model.config), capacity=capacity, slack=2)
        assert_same(feed_all(model, cache, ids, sizes), full(model, ids))
        assert cache.lengths.tolist() == [20, 20]


def test_an_index_that_is_in_no_table_is_refused() -> None:
    config = copy.deepcopy(build("llama").config)
    config.model_type = "somebody_elses"
    config.__dict__["layer_types"] = ["full_attention", "indexed_attention"]
    with pytest.raises(errors.UnknownLayerError, match=r'layer 1 of a "somebody_elses" .*"indexed_attention".*INDEXED'):
        StateCache(config)


@pytest.mark.skipif("qwen4_exp" not in LISTED, reason="of later transformers")
def test_ids_and_positions_are_kept_as_integers_whatever_the_models_dtype() -> None:
    cache = StateCache(build("qwen4_exp").config, rows=2, dtype="bfloat16", device="cpu")
    assert {n: cache.states[n].dtype for n in ("0.conv2", "1.position")} == dict.fromkeys(
        ("0.conv2", "1.position"), torch.int64
    )
    assert cache.states["0.conv1"].dtype == torch.bfloat16
    assert [n for n, _ in cache.spec.states() if n.endswith("position")] == ["1.position"]


@pytest.mark.skipif("qwen4_exp" not in LISTED, reason="of later transformers")
def test_keys_of_an_index_come_after_the_positions() -> None:
    cache = StateCache(build("qwen4_exp").config)
    with pytest.raises(errors.StepError, match=r'state "1.position": keys of the index came before the positions'):
        cache.update_indexer(torch.zeros(2, 3, 16), 1)
    assert cache.rows is None
    with pytest.raises(errors.LayerError, match="position"):
        cache.take_positions(3, torch.zeros(3, 2, 3, dtype=torch.long))


@pytest.mark.skipif("qwen4_exp" not in LISTED, reason="of later transformers")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_pass_that_gave_up_behind_its_ids_has_not_begun(n: int) -> None:
    model, ids = copy.deepcopy(build("qwen4_exp")), draw(2, 12)
    cache, ple = StateCache(model.config), model.model.layers[0].ple

    def give_up(*_: Any) -> None:
        raise InterruptedError

    hook = ple.norm_key.register_forward_hook(give_up)
    with pytest.raises(InterruptedError):
        feed(model, cache, ids[:, 4 : 4 + n], 0)
    hook.remove()
    assert_same(feed_all(model, cache, ids, [n]), full(model, ids))
    assert cache.lengths.tolist() == [12, 12]


def test_an_unknown_layer_type_names_layer_type_and_the_way_out() -> None:
    config = copy.deepcopy(build("llama").config)
    config.model_type = "somebody_elses"
    config.__dict__["layer_types"] = ["full_attention", "holographic"]
    with pytest.raises(errors.UnknownLayerError) as caught:
        StateCache(config)
    for part in ("layer 1", '"holographic"', '"somebody_elses"', "docs/adding_a_layer.md"):
        assert part in str(caught.value)
