"""What `plan` says a cache takes, beside what it takes."""

from __future__ import annotations

import time
from typing import Any

import families
import pytest
import tiny_models as tiny
import transformers

import statecache as sc
from declared_bytes import declared_bytes
from statecache import errors
from statecache.models.plan import MOST, as_bytes
from statecache.models.ready import promised
from statecache.storage.table import STORES

NAMES = list(families.FAMILIES)
EACH = [*NAMES, *(name for name in tiny.MODELS if tiny.available(name))]
ALONE = ("minimax", "recurrent_gemma")  # take a cache once they are prepared
DTYPES = {"dense": "bfloat16", "paged": "float32", "int8": "bfloat16", "fp8": "float32"}
OPTIONS = [
    {"capacity": 40},
    {"capacity": 40, "slack": 3},
    {"capacity": 6, "slack": 6, "back": False},
    {"slack": 3},
    {},
]


def configuration(name: str) -> Any:
    if name in tiny.MODELS:
        return tiny.build(name).config
    made = families.FAMILIES[name]
    return getattr(transformers, made["config"])(**made["kwargs"])


def new_cache(config: Any, **options: Any) -> sc.StateCache:
    with promised():  # recurrent_gemma has a cache once it is prepared
        return sc.StateCache(config, **options)


def assert_equal(plan: sc.Plan, cache: sc.StateCache) -> None:
    assert plan.states == cache.nbytes()
    assert plan.states.total == sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers())
    assert plan.checkpoint == cache.checkpoint().nbytes


# ---- to the byte


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", EACH)
def test_a_plan_is_what_is_allocated(name: str, store: str) -> None:
    config, dtype = configuration(name), DTYPES[store]
    for options in OPTIONS:
        cache = new_cache(config, rows=3, dtype=dtype, device="cpu", store=store, **options)
        plan = sc.plan(config, rows=3, dtype=dtype, store=store, **options)
        assert_equal(plan, cache)
        if store == "dense" and "capacity" in options:
            assert plan.states == declared_bytes(cache.spec, 3, options["capacity"], dtype, options.get("slack", 0))


@pytest.mark.parametrize("name", [name for name in EACH if name.startswith(("qwen3_5", "mamba", "minimax", "zaya"))])
def test_a_plan_of_rounded_states_is_what_is_allocated(name: str) -> None:
    config, given = configuration(name), {"dtype": "bfloat16", "recurrent_store": "bfloat16"}
    for options in OPTIONS:
        for prepared in (False, True):
            cache = new_cache(config, rows=3, device="cpu", **given, **options)
            if prepared:
                cache.states.keep_logs()
            assert_equal(sc.plan(config, rows=3, prepared=prepared, **given, **options), cache)


def test_a_row_takes_what_one_row_more_takes() -> None:
    config, given = configuration("qwen3_5"), {"capacity": 20, "slack": 3, "dtype": "bfloat16"}
    sizes = [new_cache(config, rows=n, device="cpu", **given).nbytes().by_kind for n in (3, 4)]
    each = sc.plan(config, rows=3, **given).per_row.by_kind
    assert each == {kind: sizes[1][kind] - n for kind, n in sizes[0].items()}


def feed(model: Any, cache: sc.StateCache, passes: tuple[int, ...]) -> list[int]:
    """Lengths after each pass."""
    ids, done = tiny.draw(2, sum(passes)), [0]
    for n in passes:
        tiny.feed(model, cache, ids[:, done[-1] : done[-1] + n], done[-1])
        done.append(done[-1] + n)
    return done[1:]


@pytest.mark.parametrize(
    ("name", "prepared"),
    [*((name, True) for name in NAMES), *((name, False) for name in NAMES if not name.startswith(ALONE))],
)
def test_a_plan_is_what_passes_leave(name: str, prepared: bool) -> None:
    model = families.build(name)[0]
    if prepared:
        sc.prepare(model)
    # unprepared, some take one token at a time on top of others
    passes, kept = (5, 1, 66, 80) if prepared else (66, 1), {"dtype": "float32", "device": "cpu"}
    options: dict[str, Any] = {"slack": 3, "store": "paged" if prepared else "dense"}
    grown, at_once = sc.StateCache(model.config, **options), sc.StateCache(model.config, rows=2, **kept, **options)
    fixed = sc.StateCache(model.config, capacity=200, **options)
    for cache in (grown, at_once, fixed):
        lengths = feed(model, cache, passes)
    for cache, where in (
        (grown, {"lengths": lengths}),
        (at_once, {"lengths": [0, *lengths]}),
        (fixed, {"capacity": 200}),
    ):
        assert_equal(sc.plan(model.config, rows=2, prepared=prepared, **where, **options), cache)


def test_how_a_cache_grew_is_seen() -> None:
    config = configuration("lfm2")
    sizes = [sc.plan(config, lengths=n).states.total for n in (300, range(100, 301), (1, 300))]
    assert sizes[1] < sizes[0] and sizes[2] < sizes[0]  # at once there are slots for a quarter more


def test_layers_that_share_keys_are_planned_as_they_grow() -> None:
    model = tiny.build("dory", recurrent_kv_cache_mode="last_loop")
    cache = sc.StateCache(model.config)
    assert_equal(sc.plan(model.config, rows=2, lengths=feed(model, cache, (5, 100))), cache)
    with pytest.raises(errors.OptionError, match="capacity=40: the loops of this dory model"):
        sc.plan(model.config, capacity=40)


# ---- per token


@pytest.mark.parametrize("store", ["dense", "paged"])
@pytest.mark.parametrize("name", EACH)
def test_a_token_takes_what_the_capacity_grows_by(name: str, store: str) -> None:
    config = configuration(name)
    plan = sc.plan(config, slack=2, store=store)
    less, more = (sc.plan(config, slack=2, store=store, capacity=n).states.by_kind for n in (256, 512))
    for kind, n in plan.per_token.by_kind.items():
        assert 0 <= 256 * n - (more[kind] - less[kind]) < 256
        assert kind == "attention" or not n


# ---- budgets


@pytest.mark.parametrize("store", ["dense", "paged"])
@pytest.mark.parametrize("name", ["lara_mini", "kimi_linear", "zaya", "llama"])
def test_a_budget_is_used_up(name: str, store: str) -> None:
    config, given = configuration(name), {"slack": 2, "store": store, "checkpoints": 2, "weights": True}
    for n, over in ((5, 0), (123_457, 7)):
        budget = sc.plan(config, rows=4, capacity=n, **given).total + over
        widest = sc.plan(config, rows=4, budget=budget, **given)
        assert widest.fits and widest.rows == 4
        at = {"rows": 4, **given}
        assert sc.plan(config, capacity=widest.capacity, **at).total == widest.total <= budget
        assert sc.plan(config, capacity=widest.capacity + 1, **at).total > budget
    most = sc.plan(config, capacity=50, budget="8MiB", **given)
    assert most.rows > 4 and most.total <= 2**23
    assert sc.plan(config, capacity=50, rows=most.rows + 1, **given).total > 2**23


def test_rows_are_looked_for_at_given_lengths() -> None:
    config = configuration("qwen3_5")
    most = sc.plan(config, lengths=range(100, 301), budget="1MiB")
    assert most.rows > 1 and most.total <= 2**20 < most.total + most.per_row.total
    assert most.capacity is None


def test_without_rows_and_capacity_one_row_gets_all_tokens() -> None:
    widest = sc.plan(configuration("llama"), budget="10MB")
    assert widest.rows == 1 and widest.capacity
    assert 10**7 - widest.per_token.total < widest.total <= 10**7


def test_what_does_not_grow_has_no_end() -> None:
    widest = sc.plan(configuration("mamba2"), rows=2, budget="1MiB")
    assert widest.capacity == MOST and widest.per_token.total == 0


def test_a_plan_over_its_budget_says_so() -> None:
    over = sc.plan(configuration("lfm2"), rows=4, capacity=100, budget=1000)
    assert not over.fits and over.budget == 1000
    assert sc.plan(configuration("lfm2"), rows=4, capacity=100, budget=over.total).fits


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(5, 5), ("5", 5), ("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("1.5KiB", 1536), ("2MB", 2 * 10**6), ("7B", 7)],
)
def test_sizes_are_read(size: int | str, wanted: int) -> None:
    assert as_bytes(size) == wanted


@pytest.mark.parametrize("size", ["", "GiB", "-1", -1, "1e9", "3 Gi", True, 2.5, "1.5.2GB"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"budget=.*give bytes, or a size such as"):
        sc.plan(configuration("lfm2"), budget=size)


# ---- weights


@pytest.mark.parametrize("name", ["llama", "lfm2", "qwen3_5", "gemma2", "glm5_next"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_model(name: str, tied: bool) -> None:
    if name not in EACH:
        return  # of a newer transformers
    model = tiny.build(name) if name in tiny.MODELS else families.build(name, tie_word_embeddings=tied)[0]
    kept = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()] if t.numel()}
    assert sc.plan(model.config, weights=True).weights == sum(t.nbytes for t in kept.values())
    half = sc.plan(model.config, weights=True, dtype="bfloat16")
    integers = sum(t.nbytes for t in kept.values() if not t.is_floating_point())
    assert 2 * (half.weights - integers) == sum(t.nbytes for t in kept.values()) - integers
    assert half.total == half.states.total + half.weights


def test_quantised_weights_are_refused() -> None:
    config = transformers.LlamaConfig(quantization_config={"quant_method": "fp8"})
    with pytest.raises(errors.OptionError, match="quantised"):
        sc.plan(config, weights=True)


# ---- the rest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "rows=0"),
        ({"capacity": 3, "slack": 4}, "slack=4 is more than capacity=3"),
        ({"store": "cloud"}, "store='cloud'"),
        ({"checkpoints": -1}, "checkpoints=-1"),
        ({"lengths": []}, "lengths="),
        ({"lengths": (3, -1)}, "lengths="),
        ({"lengths": 3, "capacity": 4}, "leave one out"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"device": "nowhere"}, "device='nowhere'"),
        ({"budget": 10, "rows": 2}, "budget=10: 2 rows of 1 token need"),
        ({"budget": 10, "weights": True}, "budget=10: the weights alone take [0-9,]+ bytes: give more$"),
        ({"budget": "300KiB", "weights": True, "capacity": 5000}, "1 row of 5,000 tokens and the weights need"),
        ({"budget": 10, "checkpoints": 2}, "1 row of 1 token and 2 checkpoints need"),
        ({"budget": 10, "capacity": 20}, "budget=10: 1 row of 20 tokens need"),
        ({"rows": 2, "capacity": 2**62}, "more bytes than can be counted"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.OptionError, match=says):
        sc.plan(configuration("llama"), **options)


def test_unknown_shapes_are_one_clear_error() -> None:
    with pytest.raises(errors.ConfigError, match=r'layer 0 of bloom \(".*"\): the table does not know the shapes'):
        sc.plan(transformers.BloomConfig())


def test_an_offloaded_cache_takes_as_many_bytes() -> None:
    config = configuration("qwen3_5")
    cache = sc.StateCache(config, rows=2, dtype="float32", device="cpu", offload=True)
    assert sc.plan(config, rows=2, offload=True).states == cache.nbytes()


@pytest.mark.parametrize("config", [transformers.Qwen3NextConfig, transformers.Zamba2Config, transformers.LlamaConfig])
def test_a_plan_takes_less_than_a_second(config: Any) -> None:
    made = config()
    before = time.process_time()
    sc.plan(made, rows=32, slack=8, budget="24GiB")
    sc.plan(made, capacity=8192, slack=8, budget="24GiB")
    assert time.process_time() - before < 1
