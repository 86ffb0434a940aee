"""Kernels of a round against the plain operators in float64: the tokens run ahead, and what is kept of them goes in."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import families
import pytest
import torch
from drawn import DEVICE, NAN, ROUNDED, draw, error, narrowed, normed, strided
from test_layers import SMALL
from test_steps import STARTS, begun, ring_of
from torch import Tensor
from torch.nn import functional as F

import statecache as sc
from statecache.kernels import conv_step, delta_fold, delta_step, scan_step, ssd_fold, ssd_step
from statecache.kernels.pointers import Table
from statecache.models.fused import by_kernels
from statecache.ops import conv, gated_delta, selective_scan, ssd

COUNTS = [9, 0, 2, 5]
SLOTS = 11  # of a log


def convolved(new: Tensor, past: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The plain convolution of the new tokens (B, T, C), in float64."""
    up = [None if t is None else t.double() for t in (new, weight, bias, begun(past, starts))]
    return conv.chunk(*up, silu)  # type: ignore[arg-type]


def logs_of(rows: int, *widths: int) -> list[Tensor]:
    """A log's inputs and gates, poisoned."""
    return [torch.full((rows, SLOTS, width), NAN, device=DEVICE) for width in widths]


def check_written(ring: Tensor, before: Tensor, new: Tensor, starts: Tensor, counts: list[int]) -> None:
    """The tokens that rows take in lie in their slots, and nothing else has changed."""
    want = before.clone()
    for row, (start, n) in enumerate(zip(starts.tolist(), counts, strict=True)):
        for t in range(n):
            want[row, :, (start + t) % ring.shape[-1]] = new[row, t].to(ring.dtype)
    assert torch.equal(ring.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


def kept(y: Tensor, counts: list[int]) -> Tensor:
    """Outputs (B, T, ...) of the tokens that rows take in."""
    return torch.cat([y[row, :n].flatten(1) for row, n in enumerate(counts)])


def folded(fold: Any, state: Tensor, log: list[Tensor], *rest: Any, accepted: list[int], **sizes: int) -> list[Tensor]:
    """The states of two layers after `fold`, of which the second has another state and the same log."""
    states = [state.clone(), state * 2]
    fold(states, [log[0]] * 2, [log[1]] * 2, *rest, torch.tensor(accepted, device=DEVICE), 9, None, **sizes)
    return states


# channels, taps, slots more than are needed, rows, tokens
SHORT = [
    (40, 3, 0, 3, 1),
    (128, 4, 3, 4, 1),
    (130, 3, 0, 1, 1),
    (130, 3, 2, 4, 9),
    (24, 2, 0, 3, 4),
    (30, 4, 1, 2, 7),
    (20, 5, 0, 2, 8),
]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHORT)
def test_a_convolution_by_itself(shape: Any, gated: bool, dtype: torch.dtype, counted: bool) -> None:
    C, K, more, rows, T = shape
    new, past = strided(draw(rows * T, C * (3 if gated else 1), dtype=dtype)), draw(rows, C, K - 1, dtype=dtype)
    weight, bias = draw(C, K, dtype=dtype), None if C == 40 else draw(C, dtype=dtype)
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [min(n, T) for n in COUNTS[:rows]] if counted else [T] * rows
    ring = ring_of(past, starts, K - 1 + T + more)
    entries = new.float().unflatten(0, (rows, T))
    if gated:
        before, gate, x = entries.chunk(3, -1)
        entries = before * x if dtype == torch.float32 else narrowed(before * x)  # as the ring has them
    y = convolved(entries, past, starts, weight, bias, silu=not gated)
    y = y * gate.double() if gated else y

    was, count = ring.clone(), torch.tensor(counts, device=DEVICE) if counted else None
    got = conv_step.step(new, weight, bias, ring, starts, count, silu=not gated, gated=gated).unflatten(0, (rows, T))
    assert got.dtype == dtype
    assert error(kept(got, counts), kept(y, counts)) < (1e-6 if dtype == torch.float32 else ROUNDED)
    assert not any(got[row].any() for row, n in enumerate(counts) if not n)
    check_written(ring, was, entries, starts, counts)


def test_a_round_between_gates_is_its_steps() -> None:
    C, T, start = 64, 4, torch.tensor([0], device=DEVICE)
    new, weight = draw(T, 3 * C, dtype=torch.float16), draw(C, 3, dtype=torch.float16)
    rings = [torch.zeros(1, C, 2 + T, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    whole = conv_step.step(new, weight, None, rings[0], start, None, gated=True)
    steps = [conv_step.step(new[t : t + 1], weight, None, rings[1], start + t, None, gated=True) for t in range(T)]
    assert torch.equal(whole, torch.cat(steps)) and torch.equal(*rings)


# channels, rank, state size, rows, tokens; 0 tokens: one, and no log
SCAN = [
    (40, 5, 16, 3, 0),
    (32, 8, 4, 4, 0),
    (20, 66, 16, 2, 0),
    (40, 5, 16, 3, 4),
    (33, 4, 3, 4, 9),
    (16, 80, 16, 1, 4),
    (24, 4, 8, 2, 7),
]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SCAN)
def test_a_selective_scan_steps_or_runs_ahead(shape: Any, dtype: torch.dtype, counted: bool) -> None:
    W, R, N, rows, tokens = shape
    T = max(tokens, 1)
    x, low = strided(draw(rows * T, W, dtype=dtype)), strided(draw(rows * T, R + 2 * N, dtype=dtype))
    gate = strided(draw(rows * T, W, dtype=dtype)) if N == 16 else None
    weight, bias = draw(W, R, dtype=dtype) / R**0.5, None if W == 32 else draw(W, dtype=dtype)
    A_log, D, state = draw(W, N), draw(W, dtype=dtype), draw(rows, W, N)
    norms, of = None, [draw(n, dtype=dtype) for n in (R, N, N)]
    if W in (33, 40):
        norms = scan_step.Norms(1e-5, (of[0], of[1], of[2]) if W == 40 else None)
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [min(n, T) for n in COUNTS[:rows]] if counted else [T] * rows

    parts = low.double().unflatten(0, (rows, T)).split([R, N, N], -1)
    if norms is not None:
        each = of if norms.weights else [torch.ones_like(n) for n in of]
        parts = tuple(normed(part, n, 1e-5, 0.0) for part, n in zip(parts, each, strict=True))
    rank, B, C = parts
    dt = F.softplus(rank @ weight.double().mT + (0.0 if bias is None else bias.double()))
    A, seen = -A_log.double().exp()[None], x.double().unflatten(0, (rows, T))
    want, after, states = [], state.double().unsqueeze(1), []
    for t in range(T):
        given = [each[:, t].unsqueeze(1) for each in (seen, dt)]
        want.append(selective_scan.step(*given, A, B[:, t, None], C[:, t, None], after)[:, 0])
        states.append(after[:, 0].clone())
    y = torch.stack(want, 1) + seen * D.double()
    y = y if gate is None else y * F.silu(gate.double()).unflatten(0, (rows, T))

    held, log = state.clone(), logs_of(rows, W + N, W) if tokens else None
    if log is not None:
        log[0] = log[0].to(dtype)
    count = torch.tensor(counts, device=DEVICE) if counted else None
    more = {"gate": gate, "norms": norms, "log": None if log is None else (log[0], log[1])}
    got = scan_step.step(x, low, weight, bias, A_log, D, held, starts, count, **more).unflatten(0, (rows, T))
    assert error(kept(got, counts), kept(y, counts)) < (1e-5 if dtype == torch.float32 else ROUNDED)
    for row, n in enumerate(counts):
        if not n:
            assert not got[row].any()
        if log is None and n:
            assert error(held[row], states[0][row]) < 1e-5
        else:
            assert torch.equal(held[row], state[row])
    if log is not None:
        inputs, gates = ([*torch.full((rows, SLOTS, n), NAN, device=DEVICE)] for n in (W + N, W))
        for row, (start, n) in enumerate(zip(starts.tolist(), counts, strict=True)):
            at = [(start + t) % SLOTS for t in range(n)]
            inputs[row][at], gates[row][at] = torch.cat([seen, B], -1)[row, :n].float(), dt[row, :n].float()
        for kept_of, wanted in zip(log, (inputs, gates), strict=True):
            close = 1e-5 if kept_of.dtype == torch.float32 else ROUNDED
            torch.testing.assert_close(kept_of.float(), torch.stack(wanted), equal_nan=True, atol=1e-5, rtol=close)


def test_time_steps_are_exact_however_small() -> None:
    x = torch.linspace(-40, 30, 141, device=DEVICE)
    start, none = torch.tensor([0], device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    given = torch.ones(1, 141, device=DEVICE), none, torch.zeros(141, 1, device=DEVICE), x, draw(141, 1), draw(141)
    log = logs_of(1, 142, 141)
    scan_step.step(*given, torch.zeros(1, 141, 1, device=DEVICE), start, None, log=(log[0], log[1]))
    want = F.softplus(x.double())
    off = (log[1][0, 0].double() - want) / want
    # a GPU's exponential is of its argument times log2(e), which is rounded
    assert (off.abs() < 2**-22 + x.double().abs() * 2**-24).all()


def test_a_round_of_an_offloaded_cache_gives_what_one_on_the_device_gives() -> None:
    model = sc.prepare(families.build("mamba2", num_hidden_layers=4)[0].to(DEVICE))
    ids, out = torch.randint(1, 90, (1, 14), generator=torch.Generator().manual_seed(5)).to(DEVICE), []
    for offload in (False, True):
        cache = sc.StateCache(model.config, slack=5, back=False, offload=offload)
        with torch.no_grad():
            model(ids[:, :9], cache_params=cache)
            with cache.speculate(4) as ahead:
                model(ids[:, 9:13], cache_params=cache)
                ahead.commit(2)
            out.append(model(ids[:, 11:12], cache_params=cache).logits)
    assert torch.allclose(*out, atol=1e-5)


# heads, head size, groups, state size, taps, rows, tokens
SSD = [
    (2, 16, 1, 16, 4, 3, 4),
    (4, 24, 2, 20, 4, 2, 9),
    (3, 64, 1, 128, 2, 1, 2),
    (2, 5, 2, 3, 3, 4, 5),
    (2, 8, 1, 8, 4, 2, 7),
]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SSD)
def test_ssd_runs_ahead_and_folds_what_is_kept(shape: Any, dtype: torch.dtype, counted: bool) -> None:
    H, P, G, N, K, rows, T = shape
    channels = H * P + 2 * G * N
    new, dt = strided(draw(rows * T, channels, dtype=dtype)), strided(draw(rows * T, H, dtype=dtype))
    weight, bias = draw(channels, K, dtype=dtype), None if H == 3 else draw(channels, dtype=dtype)
    A_log, dt_bias, D = (draw(H, dtype=dtype) for _ in range(3))
    past, state = draw(rows, channels, K - 1, dtype=dtype), draw(rows, H, P, N)
    limits = (0.1, 0.8) if G == 2 else (0.0, float("inf"))
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [min(n, T) for n in COUNTS[:rows]] if counted else [T] * rows
    ring, silu = ring_of(past, starts, K - 1 + T), H != 4

    by_token = new.unflatten(0, (rows, T))
    x, B, C = convolved(by_token, past, starts, weight, bias, silu).split([H * P, G * N, G * N], -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    step = F.softplus(dt.double().unflatten(0, (rows, T)) + dt_bias.double()).clamp(*limits)
    A = -A_log.double().exp()
    want, states = [], [state.double()]
    for t in range(T):
        states.append(states[-1].clone())
        want.append(ssd.step(x[:, t], step[:, t], A, B[:, t], C[:, t], states[-1]))
    y = (torch.stack(want, 1) + x * D.double()[:, None]).flatten(2)
    gate = strided(draw(rows * T, H * P, dtype=dtype)) if G == 1 else None
    if gate is not None:
        y *= F.silu(gate.double()).unflatten(0, (rows, T))

    before, held = ring.clone(), state.clone()
    log = logs_of(rows, H * P + G * N, H)
    count = torch.tensor(counts, device=DEVICE) if counted else None
    given = (new, dt, weight, bias, A_log, dt_bias, D, ring, held, starts, count)
    norm = draw(H * P, dtype=dtype) if H not in (3, 4) else None
    got, squares = ssd_step.step(*given, groups=G, silu=silu, limits=limits, gate=gate, norm=norm, log=(log[0], log[1]))
    got = got.unflatten(0, (rows, T))
    if norm is not None:
        assert squares is not None
        sums = squares.sum(1, keepdim=True).unflatten(0, (rows, T))
        assert error(kept(sums, counts), kept(y.square().sum(-1, keepdim=True), counts)) < 1e-5
        y = y * norm.double()
    exact = dtype == torch.float32
    assert error(kept(got, counts), kept(y, counts)) < (1e-5 if exact else ROUNDED)
    assert not any(got[row].any() for row, n in enumerate(counts) if not n)
    assert torch.equal(held, state)
    check_written(ring, before, by_token, starts, counts)

    accepted = [max(0, n - row) for row, n in enumerate(counts)]
    both = folded(ssd_fold.fold, state, log, [A_log] * 2, starts, accepted=accepted, groups=G)
    for scale, after in zip((1, 2), both, strict=True):
        for row, n in enumerate(accepted):
            doubled = state[row : row + 1].double() * (scale - 1)  # the recurrence is linear in its state
            for t in range(n):
                doubled = doubled * (step[row : row + 1, t] * A).exp()[..., None, None]
            assert error(after[row], states[n][row] + doubled[0]) < 1e-5
            assert n or torch.equal(after[row], state[row] * scale)


# key heads, key size, value heads, value size, taps, rows, tokens
DELTAS = [
    (1, 16, 2, 16, 4, 3, 4),
    (2, 24, 4, 20, 4, 2, 9),
    (1, 128, 1, 128, 2, 1, 2),
    (2, 3, 2, 40, 3, 4, 5),
    (1, 8, 2, 8, 4, 2, 7),
]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", DELTAS)
def test_the_delta_rule_runs_ahead_and_folds_what_is_kept(shape: Any, dtype: torch.dtype, counted: bool) -> None:
    J, K, H, V, taps, rows, T = shape
    channels = 2 * J * K + H * V
    new = strided(draw(rows * T, channels, dtype=dtype))
    b, a = strided(draw(rows * T, H, dtype=dtype)), strided(draw(rows * T, H, dtype=dtype))
    weight, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype) if H == 4 else None
    A_log, dt_bias = draw(H, dtype=dtype), draw(H, dtype=dtype)
    past, state = draw(rows, channels, taps - 1, dtype=dtype), draw(rows, H, K, V)
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [min(n, T) for n in COUNTS[:rows]] if counted else [T] * rows
    ring, silu, doubled = ring_of(past, starts, taps - 1 + T), H != 4, H == 4

    by_token = new.unflatten(0, (rows, T))
    q, k, v = convolved(by_token, past, starts, weight, bias, silu).split([J * K, J * K, H * V], -1)
    q, k, v = q.unflatten(-1, (J, K)), k.unflatten(-1, (J, K)), v.unflatten(-1, (H, V))
    g = -F.softplus(a.double() + dt_bias.double()).unflatten(0, (rows, T)) * A_log.double().exp()
    beta = b.double().sigmoid().unflatten(0, (rows, T)) * (2 if doubled else 1)
    want, states = [], [state.double()]
    for t in range(T):
        states.append(states[-1].clone())
        want.append(gated_delta.step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], states[-1]))
    y = torch.stack(want, 1)

    before, held = ring.clone(), state.clone()
    log = logs_of(rows, J * K + H * V, 2 * H)
    count = torch.tensor(counts, device=DEVICE) if counted else None
    given = (new, b, a, weight, bias, A_log, dt_bias, ring, held, starts, count)
    got = delta_step.step(*given, key_heads=J, silu=silu, doubled=doubled, log=(log[0], log[1]))
    got = got.unflatten(0, (rows, T))
    exact = dtype == torch.float32
    assert error(kept(got, counts), kept(y, counts)) < (2e-5 if exact else ROUNDED)
    assert not any(got[row].any() for row, n in enumerate(counts) if not n)
    assert torch.equal(held, state)
    check_written(ring, before, by_token, starts, counts)

    accepted = [max(0, n - row) for row, n in enumerate(counts)]
    first, second = folded(delta_fold.fold, state, log, starts, accepted=accepted, key_heads=J)
    other = state.double() * 2
    for row, n in enumerate(accepted):
        one = slice(row, row + 1)
        for t in range(n):
            gated_delta.step(q[one, t], k[one, t], v[one, t], g[one, t], beta[one, t], other[one])
        assert error(first[row], states[n][row]) < 2e-5
        assert error(second[row], other[row]) < 2e-5
        assert n or torch.equal(first[row], state[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decay_for_each_channel_is_written_down(dtype: torch.dtype) -> None:
    rows, T, H, K, taps = 3, 4, 2, 24, 3
    new, weight = strided(draw(rows * T, 3 * H * K, dtype=dtype)), draw(3 * H * K, taps, dtype=dtype)
    past, state = draw(rows, 3 * H * K, taps - 1, dtype=dtype), draw(rows, H, K, K)
    g, beta = strided(-draw(rows * T, H * K).exp()), strided(draw(rows * T, H).sigmoid().to(dtype))
    starts, counts = torch.tensor(STARTS[:rows], device=DEVICE), [4, 0, 2]
    ring, by_token = ring_of(past, starts, taps - 1 + T), new.unflatten(0, (rows, T))
    q, k, v = convolved(by_token, past, starts, weight, None, True).view(rows, T, 3, H, K).unbind(2)
    decays, strengths = g.unflatten(0, (rows, T)), beta.unflatten(0, (rows, T)).float()
    want, held = [], state.double()
    for t in range(T):
        decay = decays[:, t].double().view(rows, H, K)
        want.append(gated_delta.step(q[:, t], k[:, t], v[:, t], decay, strengths[:, t].double(), held))
    before, kept_state, log = ring.clone(), state.clone(), logs_of(rows, 2 * H * K, H * K + H)
    given = (new, beta, g, weight, None, None, None, ring, kept_state, starts, torch.tensor(counts, device=DEVICE))
    got = delta_step.step(*given, key_heads=H, log=(log[0], log[1])).unflatten(0, (rows, T))
    close = 2e-5 if dtype == torch.float32 else ROUNDED
    assert error(kept(got, counts), kept(torch.stack(want, 1), counts)) < close
    assert torch.equal(kept_state, state)
    check_written(ring, before, by_token, starts, counts)
    for row, n in enumerate(counts):
        at = (starts[row] + torch.arange(n, device=DEVICE)) % SLOTS
        assert torch.equal(log[1][row, at], torch.cat([decays[row, :n], strengths[row, :n]], -1))
        assert error(log[0][row, at, : H * K], k[row, :n].flatten(1)) < close or not n


@pytest.mark.parametrize("kernel", ["ssd", "delta"])
def test_a_fold_takes_some_rows_and_one_number_for_all(kernel: str) -> None:
    state, log = draw(4, 2, 16, 16), [draw(4, SLOTS, 2 * 16 + 16), draw(4, SLOTS, 2 if kernel == "ssd" else 4)]
    log[1] = log[1].sigmoid() * (1 if kernel == "ssd" else -0.1)
    weights: list[Any] = [[draw(2)]] if kernel == "ssd" else []
    fold, sizes = (ssd_fold.fold, {"groups": 1}) if kernel == "ssd" else (delta_fold.fold, {"key_heads": 1})
    starts = torch.tensor([5, 3], device=DEVICE)
    rows, counts = torch.tensor([2, 0], device=DEVICE), torch.tensor([3, 3], device=DEVICE)
    some, whole = state.clone(), state.clone()
    fold([some], [log[0]], [log[1]], *weights, starts, None, 3, rows, **sizes)
    places, every = torch.tensor([3, 0, 5, 0], device=DEVICE), torch.tensor([3, 0, 3, 0], device=DEVICE)
    fold([whole], [log[0]], [log[1]], *weights, places, every, 4, None, **sizes)
    assert torch.equal(some, whole)
    assert not torch.equal(some[[0, 2]], state[[0, 2]])
    again = state.clone()
    fold([again], [log[0]], [log[1]], *weights, starts, counts, 4, rows, **sizes)
    assert torch.equal(some, again)


def test_a_table_stays_while_its_layers_stay_where_they_are() -> None:
    table, layers = Table(), [[draw(2), draw(3)], [draw(2), draw(3)]]
    made = table.of(layers)
    assert made.tolist() == [[tensor.data_ptr() for tensor in each] for each in layers]
    for _ in range(100):
        Table().of([[draw(1)]])
    assert table.of(layers) is made
    assert table.of(layers[::-1]).tolist() == made.tolist()[::-1]


SLOW = () if DEVICE == "cuda" else pytest.mark.long  # in the interpreter


@pytest.mark.parametrize("unseen", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(
    "name",
    [
        "mamba2",
        "granitemoehybrid",
        "qwen3_5",
        "lfm2",
        "qwen3_5_moe",
        "kimi_linear",
        *(pytest.param(n, marks=SLOW) for n in ("mamba", "bamba", "falcon_h1")),
    ],
)
def test_rounds_by_kernels_give_what_modules_give(name: str, unseen: bool) -> None:
    model, _ = families.build(name, **SMALL.get(name, {}))
    sc.prepare(model.to(DEVICE))
    ids = torch.randint(1, 90, (3, 14), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    key, counts, accepted = families.cache_arg(model), [4, 3, 0], [2, 3, 0]

    def run(kernels: bool) -> tuple[Tensor, list[int]]:
        kept = {"dtype": torch.float32, "device": DEVICE}
        cache = sc.StateCache(model.config, capacity=32, slack=5, back=False, rows=3, **kept)
        out = []
        with torch.no_grad():
            cache.expect([9, 8, 9])
            model(ids[:, :9], **{key: cache})
            for _ in range(2):
                with by_kernels(model) if kernels else nullcontext(), cache.speculate(4, unseen=unseen) as ahead:
                    cache.expect(torch.tensor(counts, device=DEVICE) if unseen else counts)
                    logits = model(ids[:, 9:13], **{key: cache}).logits
                    ahead.commit(torch.tensor(accepted, device=DEVICE) if unseen else accepted)
                out += [logits[row, :n] for row, n in enumerate(counts)]
            out.append(model(ids[:, 13:], **{key: cache}).logits.flatten(0, 1))
        assert len(cache.states.logs._gathered) <= 1  # what a graph of a round would read stays with its cache
        return torch.cat(out), cache.lengths.tolist()

    (want, lengths), (got, same) = run(kernels=False), run(kernels=True)
    assert lengths == same == [14, 15, 10]
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
    assert not torch.equal(got, want)  # kernels did run
