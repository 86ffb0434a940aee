"""Angles of positions against the modules that they stand in for."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from drawn import DEVICE

import statecache as sc
from statecache.kernels import angles as kernel_angles
from statecache.kernels.angles import angles
from statecache.models.decoder import decoder_of
from statecache.models.fused import by_kernels
from statecache.models.parts import ROTARY, angles_of

POSITIONS = [0, 1, 31, 4096, 131071, 1 << 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 5, 32, 64])
def test_angles_are_cosines_and_sines(size: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([POSITIONS, POSITIONS[::-1]], device=DEVICE)
    frequencies = 10000.0 ** -torch.arange(0, 1, 1 / size, device=DEVICE)[:size]
    turn = (positions[..., None].float() * frequencies).double().repeat(1, 1, 2)
    got = angles(positions.T.contiguous().T, frequencies, 1.5, dtype)
    for one, want in zip(got, (turn.cos(), turn.sin()), strict=True):
        assert one.dtype == dtype and one.shape == want.shape
        assert (one.double() - 1.5 * want).abs().max() < (1e-6 if dtype == torch.float32 else 1e-3)


def rotary_of(model: Any) -> Any:
    return next(module for module in decoder_of(model).modules() if type(module).__name__ in ROTARY)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "qwen3_next", "bamba", "falcon_h1", "lfm2", "lfm2_moe"])
def test_a_kernel_gives_what_the_module_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sc.prepare(families.build(name)[0].to(DEVICE))
    module, x = rotary_of(model), torch.zeros(2, 3, 8, device=DEVICE)
    module.inv_freq, module.attention_scaling = module.inv_freq * 1.1, 1.3  # not what the configuration gives
    at = torch.tensor([[3, 70, 999], [0, 1, 2]], device=DEVICE)
    taken: list[Any] = []
    monkeypatch.setattr(kernel_angles, "angles", lambda *args: (taken.append(args), angles(*args))[1])
    given = [at]
    if "Qwen3_5" in type(module).__name__:  # it takes three coordinates
        given = [at.expand(3, -1, -1), at + torch.tensor([[[0]], [[5]], [[9]]], device=DEVICE)]
    for places in given:
        want = module(x, places)
        with by_kernels(model):
            got = module(x, places)
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and torch.allclose(one, other, atol=1e-6)
    assert len(taken) == 1 and "forward" not in vars(module)  # coordinates that may differ are the module's


def test_frequencies_that_change_and_modules_that_are_hooked_are_left_alone() -> None:
    model = families.build("lfm2")[0].to(DEVICE)
    assert len(list(angles_of(model))) == 1
    module = rotary_of(model)
    for kind in ("dynamic", "longrope"):
        module.rope_type = kind
        assert not list(angles_of(model))
    module.rope_type = "yarn"
    assert len(list(angles_of(model))) == 1
    handle = module.register_forward_hook(lambda *_: None)
    assert not list(angles_of(model))
    handle.remove()
    module.forward = lambda *_: None
    assert not list(angles_of(model))
