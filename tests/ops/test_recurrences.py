"""Every recurrence against its oracle, in every form it has."""

import pytest
import torch
import torch._dynamo
from recurrences import DECAYS, RECURRENCES, B, Recurrence, draw

from statecache.ops import chunks, delay, gated_delta, rg_lru

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 195]  # around the chunks of 16 and 64, and several of them


@pytest.fixture(params=RECURRENCES)
def recurrence(request: pytest.FixtureRequest) -> Recurrence:
    return RECURRENCES[request.param]


@pytest.fixture(params=["one band", "bands"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "bands":
        monkeypatch.setattr(chunks, "room", lambda x: 5000)  # tokens of selective_scan: 23, chunks of the others: one


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape and got.isfinite().all()
    if got.numel():
        assert (got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_chunk_is_the_recurrence(recurrence: Recurrence, tokens: int, decay: str) -> None:
    for seed, given in ((1, True), (2, False)):
        inputs, state = draw(recurrence, tokens, decay, seed, given)
        y, after, states = recurrence.module.chunk(*inputs, state)
        expected, path = recurrence.expected(inputs, state)
        close(y, expected)
        close(after, path[:, -1])
        assert states is None and after.is_contiguous() and y.dtype == after.dtype == torch.float64


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_rows_stop_at_their_counts_and_show_their_states_on_the_way(
    recurrence: Recurrence, tokens: int, decay: str
) -> None:
    inputs, state = draw(recurrence, tokens, decay)
    count = torch.tensor([0, tokens, tokens - tokens // 3])
    at = torch.tensor([0, 1, 16, 64, tokens // 2, tokens]).clamp(max=tokens).expand(B, -1).clone()
    at[2] = at[2].flip(0)
    y, after, states = recurrence.module.chunk(*inputs, state, count, at)
    expected, path = recurrence.expected(inputs, state)
    rows = torch.arange(B)
    close(after, path[rows, count])
    close(states, path[rows[:, None], at.minimum(count[:, None])])
    assert y.isfinite().all()
    for row in rows:
        close(y[row, : count[row]], expected[row, : count[row]])


def test_no_marks_give_no_states(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 70)
    _, _, states = recurrence.module.chunk(*inputs, state, None, torch.zeros(B, 0, dtype=torch.long))
    assert states is not None and states.shape == (B, 0, *recurrence.state)


def test_states_at_every_position(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 70)
    at = torch.arange(71).expand(B, -1)
    _, _, states = recurrence.module.chunk(*inputs, state, None, at)
    close(states, recurrence.expected(inputs, state)[1])


@pytest.mark.parametrize("middle", [0, 1, 16, 63, 64, 65, 100])
def test_a_sequence_may_be_split_anywhere(recurrence: Recurrence, middle: int) -> None:
    inputs, state = draw(recurrence, 100)
    y, after, _ = recurrence.module.chunk(*inputs, state)
    first, between, _ = recurrence.module.chunk(*recurrence.cut(inputs, slice(0, middle)), state)
    second, end, _ = recurrence.module.chunk(*recurrence.cut(inputs, slice(middle, None)), between)
    close(torch.cat([first, second], 1), y)
    close(end, after)


@pytest.mark.parametrize("exporting", [False, True])
def test_steps_are_the_recurrence(recurrence: Recurrence, exporting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    for decay in DECAYS:
        inputs, state = draw(recurrence, 20, decay)
        expected, path = recurrence.expected(inputs, state)
        for t in range(20):
            y = recurrence.module.step(*recurrence.cut(inputs, t), state)
            close(y, expected[:, t])
            close(state, path[:, t + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_has_the_bits_of_stepping(recurrence: Recurrence, dtype: torch.dtype) -> None:
    for seed in range(3):
        inputs, state = draw(recurrence, 6, seed=seed)
        inputs, state = tuple(x.to(dtype) for x in inputs), state.float()
        stepped, path = state.clone(), [state.clone()]
        for t in range(6):
            recurrence.module.step(*(x.clone() for x in recurrence.cut(inputs, t)), stepped)
            path.append(stepped.clone())
        record = [inputs[i] for i in recurrence.record]
        for count in (None, torch.tensor([0, 4, 6]), torch.tensor([5, 1, 0])):
            folded = state.clone()
            assert recurrence.module.fold(*record, folded, count) is None
            expected = stepped if count is None else torch.stack(path, 1)[torch.arange(B), count]
            assert torch.equal(folded, expected)


@pytest.mark.parametrize("tokens", [1, 6, 65, 130])
def test_idle_tokens_leave_the_state_bit_for_bit(
    recurrence: Recurrence, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, state = draw(recurrence, tokens)
    inputs = recurrence.idle(inputs, torch.ones(B, tokens, dtype=torch.bool))
    inputs, state = tuple(x.float() for x in inputs), state.float()
    before = state.clone()
    at = torch.tensor([[0, 1, tokens]]).expand(B, -1)
    _, after, states = recurrence.module.chunk(*inputs, state, None, at)
    assert torch.equal(after, before) and torch.equal(states, before[:, None].expand_as(states))
    for exporting in (False, True):
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda now=exporting: now)
        recurrence.module.step(*recurrence.cut(inputs, 0), state)
    recurrence.module.fold(*(inputs[i] for i in recurrence.record), state)
    assert torch.equal(state, before)


def test_idle_tokens_between_others_change_nothing(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 150)
    keep = torch.arange(150) % 3 != 1
    _, after, _ = recurrence.module.chunk(*recurrence.idle(inputs, ~keep.expand(B, -1)), state)
    _, expected, _ = recurrence.module.chunk(*recurrence.cut(inputs, keep), state)
    close(after, expected)


def test_chunk_leaves_its_inputs_alone(recurrence: Recurrence) -> None:
    for tokens in (0, 1, 70):
        inputs, state = draw(recurrence, tokens)
        before = [x.clone() for x in (*inputs, state)]
        _, after, _ = recurrence.module.chunk(*inputs, state)
        after.add_(1)
        assert all(map(torch.equal, before, (*inputs, state)))


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_stays_near_float64(recurrence: Recurrence, decay: str) -> None:
    """Of the largest value; strong decays cost most: exponents up to 50 x 64 lose as many units in differences."""
    inputs, state = draw(recurrence, 195, decay)
    y, after, _ = recurrence.module.chunk(*(x.float() for x in inputs), state.float())
    assert y.dtype == after.dtype == torch.float32
    expected, path = recurrence.expected(inputs, state)
    close(y.double(), expected, 1e-5)
    close(after.double(), path[:, -1], 1e-5)


@pytest.mark.parametrize("strong", [20.0, 1e2, 1e4])
@pytest.mark.parametrize("name", [name for name in RECURRENCES if name not in ("lightning", "delay")])
def test_float32_stays_near_float64_where_decays_differ(name: str, strong: float) -> None:
    """Half of a chunk forgets all at once, and in the other half the same heads forget next to nothing.

    Lightning attention has one decay a head, and a delay none.
    """
    recurrence = RECURRENCES[name]
    inputs, state = draw(recurrence, 128, "weak")
    inputs = list(inputs)
    gate = recurrence.gates[0]
    inputs[gate] = inputs[gate].clone()
    inputs[gate][:, 8:40] *= strong / DECAYS["weak"]
    y, after, _ = recurrence.module.chunk(*(x.float() for x in inputs), state.float())
    expected, path = recurrence.expected(tuple(inputs), state)
    close(y[:, 40:].double(), expected[:, 40:], 1e-5)
    close(after.double(), path[:, -1], 1e-5)


def test_narrow_inputs_are_promoted_to_the_states_dtype(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 70)
    inputs = tuple(x.bfloat16() for x in inputs)
    for dtype in (torch.float32, torch.float64):
        y, after, _ = recurrence.module.chunk(*inputs, state.to(dtype))
        wide, expected, _ = recurrence.module.chunk(*(x.to(dtype) for x in inputs), state.to(dtype))
        assert y.dtype == after.dtype == dtype
        assert torch.equal(y, wide) and torch.equal(after, expected)
    y, after, _ = recurrence.module.chunk(*inputs)
    assert y.dtype == after.dtype == torch.float32


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("decay", ["plain", "strong"])
@pytest.mark.parametrize("tokens", [5, 70])
def test_gradients_of_chunk_are_those_of_the_recurrence(recurrence: Recurrence, tokens: int, decay: str) -> None:
    inputs, state = draw(recurrence, tokens, decay)
    leaves = [x.requires_grad_() for x in (*inputs, state) if x.is_floating_point()]
    count, at = torch.tensor([0, tokens, tokens - 2]), torch.tensor([[0, 3], [2, tokens], [4, 1]])
    live = torch.arange(tokens) < count[:, None]

    y, after, states = recurrence.module.chunk(*inputs, state, count, at)
    expected, path = recurrence.expected(recurrence.idle(inputs, ~live), state)
    weights = [torch.randn_like(x) for x in (y, after, states)]
    weights[0] = weights[0] * live.reshape(*live.shape, *[1] * (y.ndim - 2))  # outputs past the count are not defined
    rows = torch.arange(B)
    wanted = expected, path[rows, -1], path[rows[:, None], at.minimum(count[:, None])]
    for got, right in zip(
        torch.autograd.grad([y, after, states], leaves, weights),
        torch.autograd.grad(wanted, leaves, weights),
        strict=True,
    ):
        close(got, right)


def test_forms_that_write_in_place_refuse_gradients(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 2)
    before = state.clone()
    name = recurrence.module.__name__.rpartition(".")[2]
    inputs = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs)
    record = [inputs[i] for i in recurrence.record]
    with pytest.raises(RuntimeError, match=f"{name}.step: .* use chunk for gradients"):
        recurrence.module.step(*recurrence.cut(inputs, 0), state)
    with pytest.raises(RuntimeError, match=f"{name}.fold: .* use chunk for gradients"):
        recurrence.module.fold(*record, state=state)
    assert torch.equal(state, before)
    with torch.no_grad():
        y = recurrence.module.step(*recurrence.cut(inputs, 0), state)
        recurrence.module.fold(*record, state=state)
    assert not y.requires_grad and not torch.equal(state, before)


def test_autocast_does_not_reach_in(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 70)
    inputs, state = tuple(x.float() for x in inputs), state.float()
    token, record = recurrence.cut(inputs, 0), [inputs[i] for i in recurrence.record]
    count, at = torch.tensor([0, 70, 33]), torch.tensor([[0, 70], [64, 5], [1, 2]])

    def forms() -> list[torch.Tensor]:
        stepped, folded = state.clone(), state.clone()
        out = recurrence.module.step(*token, stepped)
        recurrence.module.fold(*record, folded, count)
        return [out, stepped, folded, *recurrence.module.chunk(*inputs, state, count, at)]

    expected = forms()
    with torch.autocast("cpu", torch.bfloat16):
        got = forms()
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # it is on, and still
    assert all(map(torch.equal, got, expected))


def test_a_tensor_without_data_has_the_shapes_of_one_with_data(recurrence: Recurrence) -> None:
    inputs, state = draw(recurrence, 5)
    meta = [x.to("meta") for x in (*inputs, state)]
    for got, expected in zip(recurrence.module.chunk(*meta)[:2], recurrence.module.chunk(*inputs, state), strict=False):
        assert got.is_meta and got.shape == expected.shape


def test_chunk_step_and_fold_are_one_graph(recurrence: Recurrence) -> None:
    torch._dynamo.reset()  # the operators share code, which is compiled a few times at most
    inputs, state = draw(recurrence, 70)
    count, at = torch.tensor([0, 70, 33]), torch.tensor([[0, 70], [64, 5], [1, 2]])
    compiled = torch.compile(recurrence.module.chunk, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, expected in zip(
        compiled(*inputs, state, count, at), recurrence.module.chunk(*inputs, state, count, at), strict=True
    ):
        close(got, expected)

    token, record = recurrence.cut(inputs, 0), [x[:, :3] if x.ndim > 1 else x for x in inputs]
    record = [recurrence.cut(inputs, slice(0, 3))[i] for i in recurrence.record]
    one, other = state.clone(), state.clone()
    compiled = torch.compile(recurrence.module.step, fullgraph=True, backend="aot_eager", dynamic=False)
    close(compiled(*token, one), recurrence.module.step(*token, other))
    compiled = torch.compile(recurrence.module.fold, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(*record, one, count.clamp(max=3))
    recurrence.module.fold(*record, other, count.clamp(max=3))
    close(one, other)


def test_every_module_says_how_exact_it_is(recurrence: Recurrence) -> None:
    want = {"step": "bitwise", "fold": "bitwise", "chunk": "reassociated"}
    if recurrence.module is delay:  # which computes nothing
        want["chunk"] = "bitwise"
    assert want == recurrence.module.EXACTNESS


def test_a_delay_moves_and_changes_no_bit() -> None:
    recurrence = RECURRENCES["delay"]
    inputs, state = draw(recurrence, 70)
    expected, path = recurrence.expected(inputs, state)
    y, after, _ = delay.chunk(*inputs, state)
    assert torch.equal(y, expected) and torch.equal(after, path[:, -1])


def test_a_key_written_again_and_again_at_full_strength() -> None:
    """Beta = 2, one key, no decay: each write is a reflection, the worst system a chunk has to solve."""
    v = torch.randn(1, 130, 1, 3, dtype=torch.float64)
    k = torch.ones(1, 130, 1, 4, dtype=torch.float64)
    g, beta = torch.zeros(1, 130, 1, dtype=torch.float64), torch.full((1, 130, 1), 2.0, dtype=torch.float64)
    y, after, _ = gated_delta.chunk(k, k, v, g, beta)
    state = torch.zeros(1, 1, 4, 3, dtype=torch.float64)
    for t in range(130):
        close(y[:, t], gated_delta.step(k[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state))
    close(after, state)
    narrow, _, _ = gated_delta.chunk(*(x.float() for x in (k, k, v, g, beta)))
    close(narrow.double(), y, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_forgets_begins_anew_bit_for_bit(dtype: torch.dtype) -> None:
    (x, g, c), state = draw(RECURRENCES["rg_lru"], 70)
    x, g, c, state = (tensor.to(dtype) for tensor in (x, g, c, state))
    g[:, 40] = rg_lru.FORGETS
    whole = rg_lru.chunk(x, g, c, 1e6 * state, at=torch.full((B, 1), 41))
    assert torch.equal(whole[2][:, 0], x[:, 40])
    for got, want in zip(whole[:2], rg_lru.chunk(x[:, 40:], g[:, 40:], c[:, 40:])[:2], strict=True):
        close(
            (got[:, 40:] if got.ndim == 3 else got).double(), want.double(), 1e-6 if dtype == torch.float32 else 1e-12
        )
    rg_lru.step(x[:, 40], g[:, 40], c[:, 40], state)
    assert torch.equal(state, x[:, 40])


def test_the_root_of_an_idle_token_has_a_bounded_derivative() -> None:
    """As transformers has it: at most 1,000 where the decay is next to 1, and exact elsewhere."""
    one = torch.ones(4, 1, 1, dtype=torch.float64)
    g = torch.tensor([0.0, -1e-9, -1e-3, -2.0], dtype=torch.float64).view(4, 1, 1).requires_grad_()
    rg_lru.chunk(one, g, one)[1].sum().backward()
    rest = 1 - torch.exp(2 * g.detach())
    close(g.grad, -torch.exp(2 * g.detach()) * (1 / rest.sqrt()).clamp(max=2000))
