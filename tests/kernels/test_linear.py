"""The linear layer and the norms against plain PyTorch in float64, on fresh random inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from drawn import HALF, ROUNDED, draw, error, normed, strided
from torch.nn import functional as F

from statecache.kernels import held
from statecache.kernels.linear import TILES, Held, Tile, added, linear
from statecache.kernels.norms import norm, squared, unit

ROWS = [1, 2, 16, 33]
SIZES = [(37, 48), (64, 130)]
FORMS = ["plain", "norm", "unit", "parts"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_linear_with_what_stands_around_it(rows: int, size: Any, dtype: torch.dtype, form: str) -> None:
    got, want = multiplied(rows, size, dtype, form, Tile(16, 32, 4))
    # products of float32 would be 3e-4 off in tf32; of inputs that are rounded after a norm, a unit multiplies two
    assert error(got, want) < (2e-6 if dtype == torch.float32 else 5e-3 * (1 + (form == "unit")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(37, 256), (64, 128)])
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_weights_held_in_registers(rows: int, size: Any, dtype: torch.dtype, form: str) -> None:
    ahead = 1 if size[1] == 256 else 9  # fewer than there are, and more
    got, want = multiplied(rows, size, dtype, form, Held(2, 2, ahead))
    assert error(got, want) < (1e-3 if dtype == torch.float16 else 8e-3) * (1 + (form == "unit"))


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        *itertools.product((1, 3, 10, 20, 40), [(37, 130), (37, 1040)]),
        (10, (3100, 32)),
        (20, (4100, 32)),
        (40, (6200, 32)),
    ],
)
def test_tiles_of_the_table(rows: int, size: Any) -> None:
    outputs, inputs = size
    x = draw(rows, inputs, dtype=HALF) / inputs**0.5
    weights = [draw(outputs, inputs, dtype=HALF) for _ in range(2 if outputs < 64 else 1)]
    want = [x.double() @ weight.double().mT for weight in weights]
    assert error(linear(x, weights[0], dtype=torch.float32), want[0]) < 5e-3
    if len(weights) > 1:
        assert error(linear(x, weights, unit=True, dtype=torch.float32), F.silu(want[0]) * want[1]) < 5e-3


@pytest.mark.parametrize("tile", [tile for _, tile in TILES[held.ROWS]], ids=str)
def test_tiles_of_the_table_in_registers(tile: Held) -> None:
    weights, x = [draw(37, 256, dtype=torch.bfloat16) for _ in range(2)], draw(5, 256)
    given = {"norm": draw(256), "eps": 1e-5, "dtype": torch.float32, "tile": tile}  # x and norm of other dtypes
    want = [normed(x.double(), given["norm"], 1e-5, 0.0) @ weight.double().mT for weight in weights]
    assert error(linear(x, weights[0], **given), want[0]) < 8e-3
    assert error(linear(x, weights, unit=True, **given), F.silu(want[0]) * want[1]) < 2 * 8e-3


def test_few_rows_are_multiplied_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, own = [], Held.takes
    monkeypatch.setattr(Held, "takes", lambda *given: (taken.append(own(*given)), taken[-1])[1])
    weight, x = draw(37, 256, dtype=torch.float16), draw(5, 256, dtype=torch.float16)
    assert error(linear(x, weight, dtype=torch.float32), x.double() @ weight.double().mT) < 1e-3
    assert taken == [True, True]


@pytest.mark.parametrize("sizes", [(20, 33), (16, 3, 40), (33, 16, 1, 7)])
def test_several_weights_share_a_launch_in_registers(sizes: tuple[int, ...]) -> None:
    weights, x = [draw(n, 256, dtype=torch.float16) for n in sizes], draw(7, 256, dtype=torch.float16)
    want = torch.cat([x.double() @ w.double().mT for w in weights], 1)
    for tile in (Held(4, 1, 4), Held(8, 2, 1)):
        assert error(linear(x, weights, dtype=torch.float32, tile=tile), want) < 1e-3


def test_what_registers_cannot_take_is_multiplied_otherwise() -> None:
    weight = draw(40, 128, dtype=HALF)
    for x in (draw(3, 136, dtype=HALF)[:, 2:130], draw(3, 129, dtype=HALF)[:, :128]):
        assert error(linear(x, weight, dtype=torch.float32), x.double() @ weight.double().mT) < 5e-3
        with pytest.raises(AssertionError):
            linear(x, weight, tile=Held(2, 1, 1))
    wide = draw(3, 128, dtype=torch.float64)
    assert error(linear(wide, weight, dtype=torch.float32), wide @ weight.double().mT) < 5e-3
    with pytest.raises(AssertionError):
        linear(draw(9, 128, dtype=HALF), weight, tile=Held(2, 1, 1))


def multiplied(
    rows: int, size: Any, dtype: torch.dtype, form: str, tile: Tile | Held
) -> tuple[torch.Tensor, torch.Tensor]:
    """A product of random numbers with what stands around it, and what it should be."""
    outputs, inputs = size
    weights = [draw(outputs, inputs, dtype=dtype) for _ in range(2 if form == "unit" else 1)]
    x = strided(draw(rows, inputs, dtype=torch.float32 if form == "norm" else dtype), 8)
    by = None if form in ("plain", "parts") else draw(inputs, dtype=dtype)
    squares = draw(rows, 5).abs() if form == "parts" else None
    residual = strided(draw(rows, outputs)) if form == "norm" else None
    offset, scale = (1.0, 0.3) if form == "norm" else (0.0, 1.0)
    each = [normed(x.double(), by, 1e-5, offset) @ weight.double().mT * scale for weight in weights]
    if squares is not None:
        each = [y * (squares.double().sum(1, keepdim=True) / inputs + 1e-5).rsqrt() for y in each]
    want = F.silu(each[0]) * each[1] if form == "unit" else each[0]
    if residual is not None:
        want = want + residual.double()
    got = linear(
        x,
        weights,
        norm=by,
        eps=1e-5,
        offset=offset,
        squares=squares,
        unit=form == "unit",
        residual=residual,
        scale=scale,
        dtype=torch.float32,
        tile=tile,
    )
    assert got.dtype == torch.float32
    return got, want


@pytest.mark.parametrize(
    ("rows", "dtype", "tile"),
    [
        *itertools.product((2, 16, 33), (torch.float32, HALF), (Tile(16, 32, 4),)),
        *itertools.product((2, 5, 8), (torch.bfloat16, torch.float16), (Held(2, 2, 1), Held(2, 1, 9))),
    ],
    ids=str,
)
def test_a_sum_comes_with_what_the_norm_behind_it_needs(rows: int, dtype: torch.dtype, tile: Tile | Held) -> None:
    kept = torch.float32 if rows == 2 else dtype  # of the sum
    weight, residual, by = draw(37, 128, dtype=dtype), strided(draw(rows, 37, dtype=kept)), draw(37, dtype=dtype)
    x, squares = strided(draw(rows, 128, dtype=dtype), 8), draw(rows, 5).abs()
    around = {"squares": squares, "eps": 1e-5, "scale": 0.3, "tile": tile}
    want = linear(x, weight, residual=residual, dtype=kept, **around)
    total, seen, parts = added(x, weight, residual, by, offset=1.0, **around)
    assert torch.equal(total, want)
    close = 1e-6 if dtype == torch.float32 else ROUNDED
    assert seen.dtype == dtype and error(seen, total.double() * (by.double() + 1.0)) < close
    assert len(parts) == rows and error(parts.sum(1), total.double().square().sum(1)) < 1e-6


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes", [(20, 33), (16, 3, 40), (33, 16, 1, 7)])
def test_several_weights_share_a_launch(sizes: tuple[int, ...], rows: int) -> None:
    weights = [draw(n, 48) for n in sizes]
    x, by = draw(rows, 48), draw(48)
    got = linear(x, weights, norm=by, eps=1e-5, tile=Tile(16, 32, 4))
    want = torch.cat([normed(x.double(), by, 1e-5, 0.0) @ w.double().mT for w in weights], 1)
    assert error(got, want) < 2e-6


def test_linear_gives_the_dtype_of_its_weight() -> None:
    assert linear(draw(1, 8), draw(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("first", [True, False, None])
@pytest.mark.parametrize("group", [None, 8, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_groups_with_gates(dtype: torch.dtype, group: int | None, first: bool | None) -> None:
    rows, width = 3, 40
    size = group or width
    x, gate = strided(draw(rows, width, dtype=dtype)), strided(draw(rows, width, dtype=dtype))
    weight = draw(size if group == 5 else width, dtype=dtype)
    seen, by = x.double(), F.silu(gate.double())
    if first:
        seen = seen * by
    by_group = seen.view(rows, -1, size)
    seen = (by_group * (by_group.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).view(rows, width)
    full = weight.double().repeat(width // size) if group == 5 else weight.double()
    want = seen * (full + 1.0)
    if first is False:
        want = want * by
    got = norm(
        x, weight, eps=1e-5, offset=1.0, group=group, gate=None if first is None else gate, gate_first=bool(first)
    )
    assert got.dtype == dtype
    assert error(got, want) < (1e-6 if dtype == torch.float32 else ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units(dtype: torch.dtype) -> None:
    x, close = strided(draw(3, 2 * 520, dtype=dtype)), 1e-6 if dtype == torch.float32 else ROUNDED
    first, second = x.double().chunk(2, 1)
    assert error(unit(x), F.silu(first) * second) < close
    assert error(squared(x), x.double().relu().square()) < close
