"""A model of one's own on `States.one_pass`: it equals itself without a cache, and wrong use is an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import one_pass_oracle
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statecache.errors import (
    DtypeError,
    LayerError,
    RollbackError,
    RowsError,
    ShapeError,
    StateCacheError,
    StepError,
)
from statecache.mask import visible
from statecache.one_pass import OnePass
from statecache.spec import LayerSpec, ModelSpec, StateSpec
from statecache.states import States

D, H, P, K, WINDOW, WORDS = 16, 2, 8, 4, 5, 30
CONV = StateSpec("conv", "conv", (D,), K - 1)
MEMORY = StateSpec("memory", "recurrent", (H, P, P), 1, leased=True)
FULL = tuple(StateSpec(name, "attention", (H, P)) for name in ("key", "value"))
SLIDING = tuple(StateSpec(name, "sliding", (H, P), WINDOW, axis=1) for name in ("key", "value"))  # (R, H, T, P)
SPEC = ModelSpec((LayerSpec(0, "linear", (CONV, MEMORY)), LayerSpec(1, "full", FULL), LayerSpec(2, "sliding", SLIDING)))
STATES = ["0.conv", "0.memory", "1.key", "1.value", "2.key", "2.value"]


class Model(nn.Module):
    """A convolution, a recurrence, full and sliding attention; `now`: one pass of States, None for no cache at all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.conv = nn.Parameter(torch.randn(D, 1, K))
        self.to_qkv = nn.ModuleList(nn.Linear(D, 3 * D) for _ in range(3))

    def forward(self, ids: Tensor, now: OnePass | None = None) -> Tensor:
        x = self.embed(ids)
        padded = F.pad(x, (0, 0, K - 1, 0)) if now is None else now.window("0.conv", x)
        x = x + self.remember(F.silu(F.conv1d(padded.mT, self.conv, groups=D).mT), now)
        for layer, window in ((1, None), (2, WINDOW)):
            x = x + self.attend(x, layer, window, now)
        return self.head(x)

    def qkv(self, x: Tensor, layer: int) -> tuple[Tensor, ...]:
        return self.to_qkv[layer](x).unflatten(-1, (3, H, P)).unbind(2)

    def remember(self, x: Tensor, now: OnePass | None) -> Tensor:
        q, k, v = self.qkv(x, 0)
        state = x.new_zeros(len(x), H, P, P) if now is None else now.read("0.memory")
        real = torch.ones(x.shape[:2], dtype=torch.bool) if now is None else now.real
        seen = []
        for t in range(x.shape[1]):
            taken = real[:, t, None, None, None]
            state *= torch.where(taken, 0.9, 1.0)  # in place: what was read is the caller's own
            state += torch.where(taken, k[:, t, :, :, None] * v[:, t, :, None], 0.0)
            seen.append((q[:, t, :, None] @ state).flatten(1))
        if now is not None:
            now.write("0.memory", state)
        return torch.stack(seen, 1)

    def attend(self, x: Tensor, layer: int, window: int | None, now: OnePass | None) -> Tensor:
        q, k, v = self.qkv(x, layer)
        if layer == 2:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if now is None:
            at = torch.arange(x.shape[1])[None]
            mask = visible(at, at, window)
        else:
            k, v = now.attend(f"{layer}.key", k), now.attend(f"{layer}.value", v)
            mask = now.visible(f"{layer}.key")
        if layer == 1:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Model:
    return Model().double()


def new(**options: Any) -> States:
    return States(SPEC, rows=2, dtype=torch.float64, device="cpu", **options)


def run(model: Model, ids: Tensor, states: States, **choice: Any) -> Tensor:
    with states.one_pass(ids.shape[1], **choice) as now:
        return model(ids, now)


def within(states: States, use: Callable[[OnePass], object], tokens: int = 3) -> None:
    """A pass whose block does this."""
    with states.one_pass(tokens) as now:
        use(now)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"slack": 4}, {"capacity": 24}, {"capacity": 24, "slack": 4}])
@pytest.mark.parametrize("split", [[20], [1] * 20, [7, 1, 4, 1, 1, 6], [2, 18]])
def test_any_split_equals_no_cache(model, options, split):
    ids, states = torch.randint(WORDS, (2, 20)), new(**options)
    close(torch.cat([run(model, part, states) for part in ids.split(split, 1)], 1), model(ids))
    assert states.lengths.tolist() == [20, 20]


def test_a_capacity_shorter_than_window_and_slack_holds_all(model):
    ids, states = torch.randint(WORDS, (2, 7)), new(capacity=7, slack=4)
    close(torch.cat([run(model, part, states) for part in ids.split([1, 3, 1, 2], 1)], 1), model(ids))


@pytest.mark.parametrize("options", [{}, {"capacity": 24}])
def test_a_rollback_goes_to_where_steps_began_in_each_row(model, options):
    ids, states = torch.randint(WORDS, (2, 20)), new(slack=4, **options)
    run(model, ids[:, :10], states)
    for token in (1, 2, 3):
        run(model, torch.full((2, 1), token), states)
    states.rollback(torch.tensor([3, 2]))
    assert states.lengths.tolist() == [10, 11]
    text = [ids[:1], torch.cat([ids[1:, :10], torch.tensor([[1]]), ids[1:, 10:]], 1)]
    got = run(model, ids[:, 10:], states)
    for row, (whole, n) in enumerate(zip(text, (10, 11), strict=True)):
        close(got[row : row + 1], model(whole)[:, n:])


def test_a_rollback_into_a_chunk_is_refused(model):
    states = new(slack=4)
    run(model, torch.randint(WORDS, (2, 10)), states)
    with pytest.raises(RollbackError):
        states.rollback(2)
    assert states.lengths.tolist() == [10, 10]


@pytest.mark.parametrize("options", [{}, {"slack": 4}, {"capacity": 24}])
def test_rows_take_in_their_own_counts(model, options):
    texts, states = torch.randint(WORDS, (2, 20)), new(**options)
    ends, got = ([0, 0], [3, 6], [4, 6], [9, 7], [16, 14]), ([], [])
    for before, after in pairwise(ends):
        count = [b - a for a, b in zip(before, after, strict=True)]
        ids = torch.zeros(2, max(count), dtype=torch.long)
        for row, n in enumerate(count):
            ids[row, :n] = texts[row, before[row] : after[row]]
        logits = run(model, ids, states, count=count)
        for row, n in enumerate(count):
            got[row].append(logits[row, :n])
    assert states.lengths.tolist() == ends[-1]
    for row, n in enumerate(ends[-1]):
        close(torch.cat(got[row])[None], model(texts[row : row + 1, :n]))


def test_a_pass_over_some_rows_leaves_the_others(model):
    ids, states = torch.randint(WORDS, (2, 12)), new(slack=2)
    run(model, ids[:, :6], states)
    close(run(model, ids[1:, 6:], states, rows=[1]), model(ids[1:])[:, 6:])
    assert states.lengths.tolist() == [6, 12]
    close(run(model, ids[:1, 6:], states, rows=[0]), model(ids[:1])[:, 6:])


def test_positions_count_from_each_row(model):
    states = new()
    run(model, torch.randint(WORDS, (2, 3)), states, count=[1, 3])
    with states.one_pass(2, count=[2, 1]) as now:
        assert now.positions.tolist() == [[1, 2], [3, 4]]
        assert now.real.tolist() == [[True, True], [True, False]]
        model(torch.randint(WORDS, (2, 2)), now)


def test_marks_and_copies_come_back(model):
    ids, states = torch.randint(WORDS, (2, 12)), new(slack=2)
    run(model, ids[:, :6], states)
    mark, other = states.checkpoint(), states.fork()
    run(model, ids[:, :3], states)
    states.restore(mark)
    for each in (states, other, pickle.loads(pickle.dumps(other))):
        close(run(model, ids[:, 6:], each), model(ids)[:, 6:])


# ---- wrong use

X, KEY, WIDE = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, 3, D), (2, 3, H, P), (2, H, 3, P)))
STATE = torch.zeros(2, H, P, P, dtype=torch.float64)

WRONG: list[tuple[Callable[[OnePass], object], type[StateCacheError], str]] = [
    (lambda now: now.window("conv", X), LayerError, r'there is no state "conv": the specification gave 0.conv, 0.mem'),
    (lambda now: now.window("1.key", KEY), LayerError, r'state "1.key" keeps every entry, and has no window to show'),
    (lambda now: now.window("0.memory", STATE), LayerError, r'state "0.memory" is one entry that is overwritten: read'),
    (lambda now: now.attend("0.memory", STATE), LayerError, r'state "0.memory" is one entry that is overwritten'),
    (lambda now: now.read("0.conv"), LayerError, r'state "0.conv" has an entry for each token: use window\(\) or atte'),
    (lambda now: now.write("1.key", KEY), LayerError, r'state "1.key" has an entry for each token'),
    (
        lambda now: now.window("0.conv", X[:, :2]),
        ShapeError,
        r'"0.conv": came \(2, 2, 16\), .* 3 tokens takes \(rows, 3',
    ),
    (lambda now: now.attend("2.key", KEY), ShapeError, r'"2.key": came \(2, 3, 2, 8\), .* takes \(rows, 2, 3, 8\)'),
    (lambda now: now.attend("1.key", KEY[:1]), RowsError, r'state "1.key": came with 1 rows in a pass of 2'),
    (
        lambda now: now.write("0.memory", STATE.float()),
        DtypeError,
        r"came in torch.float32, and is kept in torch.float64",
    ),
    (lambda now: now.attend("1.key", KEY.to("meta")), StateCacheError, r"came on meta, and is kept on cpu: move it"),
    (lambda now: now.visible("1.key"), StepError, r'state "1.key": attend\(\) first, then ask which of its entries'),
]


@pytest.mark.parametrize(("use", "error", "says"), WRONG)
def test_wrong_use_is_refused_and_changes_nothing(model, use, error, says):
    ids, states = torch.randint(WORDS, (2, 9)), new(slack=2)
    run(model, ids[:, :6], states)
    before = [buffer.clone() for buffer in states.buffers()]
    with pytest.raises(error, match=says):
        within(states, use)
    assert all(map(torch.equal, before, states.buffers()))
    close(run(model, ids[:, 6:], states), model(ids)[:, 6:])


AGAIN: list[Callable[[OnePass], object]] = [
    lambda now: (now.write("0.memory", STATE), now.read("0.memory")),
    lambda now: (now.write("0.memory", STATE), now.write("0.memory", STATE)),
    lambda now: (now.window("0.conv", X), now.window("0.conv", X)),
    lambda now: (now.attend("1.key", KEY), now.attend("1.key", KEY)),
]


def torn(states: States) -> None:
    """The states refuse all until they are reset."""
    for use in (lambda: states.one_pass(1).__enter__(), lambda: states.rollback(1), states.checkpoint):
        with pytest.raises(StepError, match=r"was interrupted, .* reset\(\), or restore\(\) a mark"):
            use()


@pytest.mark.parametrize("use", AGAIN)
def test_a_state_is_written_once(model, use):
    states = new(slack=2)
    with pytest.raises(StepError, match=r"has been written in this pass: read and write each state once"):
        within(states, use)
    torn(states)


def write_all(now: OnePass, but: str) -> None:
    for name, new in zip(STATES, (X, STATE, KEY, KEY, WIDE, WIDE), strict=True):
        if name != but:
            {"0.conv": now.window, "0.memory": now.write}.get(name, now.attend)(name, new)


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_was_left_out_is_told(name):
    states = new(slack=2)
    with pytest.raises(StepError, match=rf"the pass wrote no state {name}: each is written once, by every pass"):
        within(states, lambda now: write_all(now, name))
    torn(states)


def interrupted(now: OnePass) -> None:
    now.window("0.conv", X)
    raise KeyboardInterrupt


@pytest.mark.parametrize("mark", [False, True])
def test_an_exception_after_a_write_tears_the_pass(model, mark):
    ids, states = torch.randint(WORDS, (2, 9)), new(slack=2)
    run(model, ids[:, :6], states)
    marked = states.checkpoint()
    with pytest.raises(KeyboardInterrupt):
        within(states, interrupted)
    torn(states)
    if mark:
        states.restore(marked)
        close(run(model, ids[:, 6:], states), model(ids)[:, 6:])
    else:
        states.reset()
        close(run(model, ids, states), model(ids))


BETWEEN: list[Callable[[States], object]] = [
    lambda states: states.rollback(1),
    lambda states: states.reset(),
    lambda states: states.reset([0]),
    lambda states: states.checkpoint(),
    lambda states: states.fork(),
    lambda states: states.gather([0]),
    lambda states: states.open(1),
    lambda states: states.one_pass(1).__enter__(),
]


@pytest.mark.parametrize("use", BETWEEN)
def test_nothing_between_steps_is_done_within_a_pass(model, use):
    states = new(slack=2)
    run(model, torch.randint(WORDS, (2, 6)), states)
    mark = states.checkpoint()
    for each in (use, lambda states: states.restore(mark)):
        with pytest.raises(StepError, match=r"a pass is under way: leave its `with` block first"):
            within(states, lambda now, each=each: each(states))
    assert bool(states.capabilities["step"])


def test_a_pass_that_is_over_is_over(model):
    states = new()
    with states.one_pass(2) as now:
        model(torch.randint(WORDS, (2, 2)), now)
    for use in (lambda: now.read("0.memory"), lambda: now.attend("1.key", KEY), lambda: now.visible("1.key")):
        with pytest.raises(StepError, match=r"this pass is over: begin another with one_pass\(\)"):
            use()


def test_a_gradient_is_refused(model):
    with torch.enable_grad(), pytest.raises(StateCacheError, match=r"with a gradient, .* run under torch.no_grad\(\)"):
        run(model, torch.randint(WORDS, (2, 3)), new())


def made(spec: Sequence[StateSpec], **options: Any) -> States:
    return States(ModelSpec((LayerSpec(0, "mine", tuple(spec)),)), **options)


def test_states_that_cannot_be_kept_are_refused():
    given = {"rows": 1, "dtype": torch.float32, "device": "cpu"}
    log = StateSpec("memory", "recurrent", (2,), 1, leased=True, logged=True)
    for states, says in (
        (made([CONV]), r"one_pass\(\) needs states that are allocated: make them with rows=, dtype= and device="),
        (made([log], **given), r'state "0.memory" belongs to a log, which one_pass\(\) does not keep'),
        (made([StateSpec("key", "attention")], **given), r'state "0.key" was declared without a shape'),
    ):
        with pytest.raises(StepError, match=says), states.one_pass(1):
            pass


def test_a_window_stands_along_the_axis_of_its_state() -> None:
    spec = ModelSpec((LayerSpec(0, "conv", (StateSpec("conv", "conv", (D,), K - 1, axis=1),)),))
    states, x = States(spec, rows=2, dtype=torch.float64, device="cpu"), torch.randn(2, D, 9, dtype=torch.float64)
    for start, end in pairwise((0, 2, 7, 9)):
        with states.one_pass(end - start) as now:
            seen = now.window("0.conv", x[..., start:end])
        assert torch.equal(seen, F.pad(x, (K - 1, 0))[..., start : end + K - 1])


@pytest.mark.parametrize("capacity", [None, 32])
def test_attention_is_shown_what_is_there_and_no_more(capacity: int | None) -> None:
    states, x = new(capacity=capacity), torch.randn(2, 9, H, P, dtype=torch.float64)
    for start, end in pairwise((0, 2, 7, 9)):
        with states.one_pass(end - start) as now:
            now.window("0.conv", torch.zeros(2, end - start, D, dtype=torch.float64))
            now.write("0.memory", now.read("0.memory"))
            for name in ("key", "value"):
                assert torch.equal(now.attend(f"1.{name}", x[:, start:end]), x[:, :end])
                near = x[:, max(0, start - WINDOW + 1) : end]
                assert torch.equal(now.attend(f"2.{name}", x[:, start:end].transpose(1, 2)), near.transpose(1, 2))


@pytest.mark.parametrize("seed", range(20))
def test_passes_by_chance_show_what_rows_were_given(seed: int) -> None:
    one_pass_oracle.run(oracle.core("statecache"), seed)
