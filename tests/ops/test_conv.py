"""The convolution against its oracle, its window against slicing."""

import oracles
import pytest
import torch

from statecache.ops import conv

B, C = 3, 6
WIDTHS = [1, 2, 4]


def draw(tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(100 * seed + tokens)
    shapes = (B, tokens, C), (C, width), (C,), (B, C, width - 1)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 17, 40, 300])
def test_chunk_is_the_convolution(tokens: int, width: int) -> None:
    for seed, silu in enumerate((False, True)):
        x, weight, bias, past = draw(tokens, width, seed)
        for b in (bias, None):
            for p in (past, None):
                y, expected = conv.chunk(x, weight, b, p, silu), oracles.conv(x, weight, b, p, silu)
                assert y.shape == x.shape
                torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exporting", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_steps_are_the_convolution(width: int, exporting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    x, weight, bias, past = draw(9, width)
    before = past.clone()
    for b, silu in ((bias, True), (None, False)):
        expected, now = oracles.conv(x, weight, b, past, silu), past
        for t in range(9):
            y, wide = conv.step(x[:, t : t + 1], weight, b, now, silu)
            torch.testing.assert_close(y, expected[:, t : t + 1], rtol=0, atol=1e-12)
            assert torch.equal(wide, torch.cat([now.mT, x[:, t : t + 1]], 1))
            now = wide[:, 1:].mT
    assert torch.equal(past, before)


@pytest.mark.parametrize("exporting", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_tokens_may_have_weights_of_their_own(
    tokens: int, width: int, exporting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: exporting)
    x, _, bias, past = draw(tokens, width)
    weight = torch.randn(B, tokens, C, width, dtype=x.dtype)
    for b, silu in ((bias, True), (None, False)):
        for p in (past, None):
            y, expected = conv.chunk(x, weight, b, p, silu), oracles.conv(x, weight, b, p, silu)
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        now, expected = past, oracles.conv(x, weight, b, past, silu)
        for t in range(tokens):
            y, wide = conv.step(x[:, t : t + 1], weight[:, t : t + 1], b, now, silu)
            torch.testing.assert_close(y, expected[:, t : t + 1], rtol=0, atol=1e-12)
            now = wide[:, 1:].mT


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 17])
def test_window_moves_the_last_inputs(tokens: int, width: int) -> None:
    x, _, _, past = draw(tokens, width)
    for p in (past, None):
        zeros = torch.zeros(B, C, width - 1, dtype=x.dtype)
        wide = torch.cat([zeros if p is None else p, x.transpose(1, 2)], -1)
        assert torch.equal(conv.window(x, p, width), wide[..., tokens:])
        for counts in ((0, tokens, tokens // 2), (min(1, tokens), min(3, tokens), min(2, tokens))):
            got = conv.window(x, p, width, torch.tensor(counts))
            for row, count in enumerate(counts):
                assert torch.equal(got[row], wide[row, :, count : count + width - 1])


HEADS, SIZE = 2, 3  # of the C channels


def second(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight (C, P, V) and bias (C) of a convolution by head."""
    torch.manual_seed(seed)
    return torch.randn(C, SIZE, width, dtype=torch.float64), torch.randn(C, dtype=torch.float64)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("behind", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, conv.FEW, conv.FEW + 1, 40])
def test_chunk_with_a_second_convolution_by_head_is_both(tokens: int, behind: int, width: int) -> None:
    assert HEADS * SIZE == C
    x, weight, bias, past = draw(tokens, width + behind - 1)
    weight, heads = weight[:, :width], second(behind)
    assert conv.span(weight, heads) == width + behind - 1
    for b, then in ((bias, heads), (None, (heads[0], None))):
        for p, silu in ((past, False), (None, True)):
            y, expected = conv.chunk(x, weight, b, p, silu, then), oracles.conv_by_head(x, weight, b, p, silu, then)
            assert y.shape == x.shape
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("behind", [1, 2, 3])
def test_steps_with_a_second_convolution_by_head_are_both(behind: int, width: int) -> None:
    x, weight, bias, past = draw(9, width + behind - 1)
    weight, heads = weight[:, :width], second(behind)
    for b, then, silu in ((bias, heads, True), (None, (heads[0], None), False)):
        expected, now = oracles.conv_by_head(x, weight, b, past, silu, then), past
        for t in range(9):
            y, wide = conv.step(x[:, t : t + 1], weight, b, now, silu, then)
            torch.testing.assert_close(y, expected[:, t : t + 1], rtol=0, atol=1e-12)
            now = wide[:, 1:].mT


def test_window_carries_a_split_sequence() -> None:
    x, weight, bias, past = draw(12, 4)
    whole = conv.chunk(x, weight, bias, past, True)
    for middle in range(13):
        first = conv.chunk(x[:, :middle], weight, bias, past, True)
        second = conv.chunk(x[:, middle:], weight, bias, conv.window(x[:, :middle], past, 4), True)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)


def test_the_result_has_the_dtype_of_x_and_the_window_that_of_past() -> None:
    x, weight, bias, past = draw(40, 4)
    for dtype in (torch.float32, torch.bfloat16):
        assert conv.chunk(x.to(dtype), weight.to(dtype), bias.to(dtype), past.to(dtype), True).dtype == dtype
        y, wide = conv.step(x[:, :1].to(dtype), weight.to(dtype), bias.to(dtype), past.to(dtype), True)
        assert y.dtype == wide.dtype == dtype
        y, _ = conv.step(x[:, :1].to(dtype), weight, bias, past.to(dtype), True)
        assert y.dtype == conv.chunk(x.to(dtype), weight, bias, past.to(dtype), True).dtype == dtype
        for count in (None, torch.tensor([0, 2, 40])):
            assert conv.window(x.to(dtype), past.float(), 4, count).dtype == torch.float32
            assert conv.window(x.to(dtype), None, 4, count).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_autocast_does_not_reach_in(tokens: int, dtype: torch.dtype) -> None:
    given = tuple(x.to(dtype) for x in draw(tokens, 4))
    x, weight, bias, past = given
    heads = tuple(each.to(dtype) for each in second(2))

    def forms() -> list[torch.Tensor]:
        return [
            conv.chunk(*given, True),
            conv.chunk(x, weight, None, None, False),
            *conv.step(x[:, :1], *given[1:], True),
            conv.chunk(x, weight[:, :3], bias, past, False, heads),
            *conv.step(x[:, :1], weight[:, :3], bias, past, False, heads),
        ]

    expected = forms()
    with torch.autocast("cpu", torch.bfloat16):
        got = forms()
    assert all(map(torch.equal, got, expected))
    assert [y.dtype for y in got] == [dtype] * 7


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_gradients_are_those_of_the_convolution(tokens: int) -> None:
    leaves, heads = [x.requires_grad_() for x in draw(tokens, 4)], [x.requires_grad_() for x in second(2)]
    weights = torch.randn(B, tokens, C, dtype=torch.float64)
    x, weight, bias, past = leaves
    both = x, weight[:, :3], bias, past, True, tuple(heads)
    for form, oracle, of in (
        (conv.chunk(*leaves, True), oracles.conv(*leaves, True), leaves),
        (conv.chunk(*both), oracles.conv_by_head(*both), [*leaves, *heads]),
    ):
        for one, other in zip(
            torch.autograd.grad(form, of, weights), torch.autograd.grad(oracle, of, weights), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [2, 40])
def test_chunk_step_and_window_are_one_graph(tokens: int) -> None:
    x, weight, bias, past = draw(tokens, 4)
    count, heads = torch.tensor([0, 1, tokens]), second(2)

    def forward(x, past, count):
        return (
            conv.chunk(x, weight, bias, past, True),
            conv.window(x, past, 4, count),
            conv.window(x, past, 4),
            *conv.step(x[:, :1], weight, bias, past, True),
            conv.chunk(x, weight[:, :3], bias, past, False, heads),
            *conv.step(x[:, :1], weight[:, :3], bias, past, False, heads),
        )

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=False)
    for got, expected in zip(compiled(x, past, count), forward(x, past, count), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
