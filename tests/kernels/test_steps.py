"""Each kernel of a mixer's step against the plain operators, on fresh random inputs, in float64 where these can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drawn import DEVICE, NAN, ROUNDED, draw, error, narrowed, strided
from torch import Tensor
from torch.nn import functional as F

from statecache.kernels import delta_step, ssd_step
from statecache.ops import conv, gated_delta, ssd


def ring_of(past: Tensor, starts: Tensor, slots: int) -> Tensor:
    """A ring (B, C, S) that holds the inputs `past` (B, C, K - 1) before `starts` (B,), and poison elsewhere."""
    ring = torch.full((*past.shape[:2], slots), NAN, dtype=past.dtype, device=past.device)
    taps = past.shape[-1]
    for row, start in enumerate(starts.tolist()):
        for n in range(taps):
            position = start - taps + n
            if position >= 0:
                ring[row, :, position % slots] = past[row, :, n]
    return ring


def begun(past: Tensor, starts: Tensor) -> Tensor:
    """What a convolution reads of `past`: zeros before the first token."""
    position = starts[:, None] - past.shape[-1] + torch.arange(past.shape[-1], device=past.device)
    return torch.where((position >= 0)[:, None], past, 0)


def convolved(new: Tensor, past: Tensor, starts: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """The plain convolution of one token, in float64."""
    up = [None if t is None else t.double() for t in (new[:, None], weight, bias, begun(past, starts))]
    return conv.step(up[0], up[1], up[2], up[3], silu)[0][:, 0]  # type: ignore[arg-type]


def check_ring(ring: Tensor, before: Tensor, new: Tensor, starts: Tensor, counts: list[int]) -> None:
    """The token's inputs lie in its slot, and nothing else has changed."""
    want = before.clone()
    for row, (start, n) in enumerate(zip(starts.tolist(), counts, strict=True)):
        if n:
            want[row, :, start % ring.shape[-1]] = new[row]
    assert torch.equal(ring.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))


STARTS = [0, 1, 2, 9, 4, 13]
# heads, head size, groups, state size, taps, slots, rows
SHAPES = [(2, 16, 1, 16, 4, 4, 3), (4, 24, 2, 20, 4, 7, 2), (3, 64, 1, 128, 2, 2, 1), (2, 5, 2, 3, 3, 5, 4)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_ssd_step_is_the_plain_operators(shape: Any, dtype: torch.dtype, counted: bool) -> None:
    H, P, G, N, K, slots, rows = shape
    channels = H * P + 2 * G * N
    new, dt = strided(draw(rows, channels, dtype=dtype)), strided(draw(rows, H, dtype=dtype))
    weight, bias = draw(channels, K, dtype=dtype), None if H == 3 else draw(channels, dtype=dtype)
    A_log, dt_bias, D = (draw(H, dtype=dtype) for _ in range(3))
    past, state = draw(rows, channels, K - 1, dtype=dtype), draw(rows, H, P, N)
    limits = (0.1, 0.8) if G == 2 else (0.0, float("inf"))
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [n % 2 for n in range(rows)] if counted else [1] * rows
    ring, silu = ring_of(past, starts, slots), H != 4

    x = convolved(new, past, starts, weight, bias, silu)
    x, B, C = x.split([H * P, G * N, G * N], -1)
    x, B, C = x.view(rows, H, P), B.view(rows, G, N), C.view(rows, G, N)
    step = F.softplus(dt.double() + dt_bias.double()).clamp(*limits)
    want = state.double()
    y = (ssd.step(x, step, -A_log.double().exp(), B, C, want) + x * D.double()[:, None]).flatten(1)
    gate = strided(draw(rows, H * P, dtype=dtype)) if G == 1 else None
    if gate is not None:
        y *= F.silu(gate.double())

    before, held = ring.clone(), state.clone()
    count = torch.tensor(counts, device=DEVICE) if counted else None
    given = (new, dt, weight, bias, A_log, dt_bias, D, ring, held, starts, count)
    norm = draw(H * P, dtype=dtype) if H not in (3, 4) else None
    got, squares = ssd_step.step(*given, groups=G, silu=silu, limits=limits, gate=gate, norm=norm)
    exact = dtype == torch.float32
    alive = [row for row, n in enumerate(counts) if n]
    if norm is not None:
        assert squares is not None and not squares[[row for row, n in enumerate(counts) if not n]].any()
        assert not alive or error(squares.sum(1)[alive], y.square().sum(1)[alive]) < 1e-5
        y = y * norm.double()
    if alive:
        assert error(got[alive], y[alive]) < (1e-5 if exact else ROUNDED)
        assert error(held[alive], want[alive]) < 1e-5
    for row, n in enumerate(counts):
        if not n:
            assert torch.equal(held[row], state[row])
            assert not got[row].any()
    check_ring(ring, before, new, starts, counts)


# key heads, key size, value heads, value size, taps, slots, rows
DELTAS = [(1, 16, 2, 16, 4, 4, 3), (2, 24, 4, 20, 4, 7, 2), (1, 128, 1, 128, 2, 2, 1), (2, 3, 2, 40, 3, 5, 4)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", DELTAS)
def test_delta_step_is_the_plain_operators(shape: Any, dtype: torch.dtype, counted: bool) -> None:
    J, K, H, V, taps, slots, rows = shape
    channels = 2 * J * K + H * V
    new = strided(draw(rows, channels, dtype=dtype))
    b, a = strided(draw(rows, H, dtype=dtype)), strided(draw(rows, H, dtype=dtype))
    weight, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype) if H == 4 else None
    A_log, dt_bias = draw(H, dtype=dtype), draw(H, dtype=dtype)
    past, state = draw(rows, channels, taps - 1, dtype=dtype), draw(rows, H, K, V)
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [(n + 1) % 2 for n in range(rows)] if counted else [1] * rows
    ring, silu, doubled = ring_of(past, starts, slots), H != 4, H == 4

    q, k, v = convolved(new, past, starts, weight, bias, silu).split([J * K, J * K, H * V], -1)
    q, k, v = q.view(rows, J, K), k.view(rows, J, K), v.view(rows, H, V)
    g = -F.softplus(a.double() + dt_bias.double()) * A_log.double().exp()
    want = state.double()
    y = gated_delta.step(q, k, v, g, b.double().sigmoid() * (2 if doubled else 1), want)

    before, held = ring.clone(), state.clone()
    count = torch.tensor(counts, device=DEVICE) if counted else None
    got = delta_step.step(
        new, b, a, weight, bias, A_log, dt_bias, ring, held, starts, count, key_heads=J, silu=silu, doubled=doubled
    )
    exact = dtype == torch.float32
    alive = [row for row, n in enumerate(counts) if n]
    assert error(got[alive], y.flatten(1)[alive]) < (2e-5 if exact else ROUNDED)
    assert error(held[alive], want[alive]) < 2e-5
    for row, n in enumerate(counts):
        if not n:
            assert torch.equal(held[row], state[row])
            assert not got[row].any()
    check_ring(ring, before, new, starts, counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 4, 3), (3, 24, 4, 2), (1, 128, 2, 1)])  # heads, size, taps, rows
def test_delta_step_with_a_decay_for_each_channel(shape: Any, dtype: torch.dtype) -> None:
    H, K, taps, rows = shape
    new, weight = strided(draw(rows, 3 * H * K, dtype=dtype)), draw(3 * H * K, taps, dtype=dtype)
    past, state = draw(rows, 3 * H * K, taps - 1, dtype=dtype), draw(rows, H, K, K)
    g, beta = strided(-draw(rows, H * K).exp()), strided(draw(rows, H).sigmoid().to(dtype))
    starts = torch.tensor(STARTS[:rows], device=DEVICE)
    counts = [(n + 1) % 2 for n in range(rows)]
    ring = ring_of(past, starts, taps + 1)
    q, k, v = convolved(new, past, starts, weight, None, True).view(rows, 3, H, K).unbind(1)
    want = state.double()
    y = gated_delta.step(q, k, v, g.double().view(rows, H, K), beta.double(), want)
    before, held, count = ring.clone(), state.clone(), torch.tensor(counts, device=DEVICE)
    got = delta_step.step(new, beta, g, weight, None, None, None, ring, held, starts, count, key_heads=H)
    alive = [row for row, n in enumerate(counts) if n]
    assert error(got[alive], y.flatten(1)[alive]) < (2e-5 if dtype == torch.float32 else ROUNDED)
    assert error(held[alive], want[alive]) < 2e-5
    assert all(torch.equal(held[row], state[row]) for row, n in enumerate(counts) if not n)
    check_ring(ring, before, new, starts, counts)


@pytest.mark.parametrize("kernel", ["ssd", "delta"])
def test_a_state_in_bfloat16_is_computed_on_in_float32_and_rounded(kernel: str) -> None:
    rows, start = 3, torch.tensor([5], device=DEVICE)
    given = [draw(rows, 48), draw(rows, 1), draw(rows, 1), draw(48, 4), None, draw(1), draw(1), draw(1)]
    ring, state = draw(rows, 48, 4), draw(rows, 1, 16, 16, dtype=torch.bfloat16)
    got, held = [], [state.clone(), state.float()]
    for each in held:
        if kernel == "ssd":
            got.append(ssd_step.step(*given[:2], *given[3:], ring.clone(), each, start, None, groups=1)[0])
        else:
            got.append(delta_step.step(*given[:7], ring.clone(), each, start, None, key_heads=1))
    assert torch.equal(*got) and torch.equal(held[0], narrowed(held[1])) and not torch.equal(held[0], state)


@pytest.mark.parametrize("kernel", ["ssd", "delta"])
def test_one_start_may_serve_all_rows(kernel: str) -> None:
    start, rows = torch.tensor([5], device=DEVICE), 2
    each = start.expand(rows).contiguous()
    got = []
    if kernel == "ssd":
        given = [draw(rows, 48), draw(rows, 1), draw(48, 4), None, draw(1), draw(1), draw(1)]
        ring, state = draw(rows, 48, 4), draw(rows, 1, 16, 16)
        got = [ssd_step.step(*given, ring.clone(), state.clone(), s, None, groups=1)[0] for s in (start, each)]
    else:
        given = [draw(rows, 48), draw(rows, 1), draw(rows, 1), draw(48, 4), None, draw(1), draw(1)]
        ring, state = draw(rows, 48, 4), draw(rows, 1, 16, 16)
        got = [delta_step.step(*given, ring.clone(), state.clone(), s, None, key_heads=1) for s in (start, each)]
    assert torch.equal(*got)
