"""Models around a decoder that make something for it: positions, or masks. In a prepared one the cache has its say.

B rows, T new tokens.
"""

from __future__ import annotations

import dis
import inspect
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from statecache.errors import ConfigError, ShapeError, StepError, UnknownLayerError
from statecache.models.cache import StateCache
from statecache.models.code import forwards
from statecache.models.forward import StandIn, door, stands_in
from statecache.models.interface import NAMES
from statecache.models.masks import Given
from statecache.models.names import given_cache
from statecache.models.positions import upcoming
from statecache.models.table import POSITION
from statecache.models.unmodified import Unmodified

PLACES = "compute_3d_position_ids"  # the method of a wrapper that gives pictures their positions
TYPES = "mm_token_type_ids"  # by which it is told which tokens are a picture's


def wrappers(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules of a model around its decoder that are of another configuration."""
    return [
        module
        for module in model.modules()
        if module is not decoder
        and hasattr(module, "config")
        and module.config is not decoder.config
        and any(inner is decoder for inner in module.modules())
    ]


def makes_masks(wrapper: nn.Module) -> bool:
    """Whether a wrapper makes the masks of its decoder, and hands on those that are made already.

    Raises UnknownLayerError for one that makes them whatever comes, or positions of which nobody can ask it.
    """
    forward = next(forwards(wrapper), None)
    if forward is None:
        return False
    code = forward.__code__
    makes = bool(_masking(code))
    places = any(each.opname.startswith("STORE") and each.argval == "position_ids" for each in dis.Bytecode(code))
    asked = hasattr(wrapper, PLACES) and TYPES in inspect.signature(getattr(wrapper, PLACES)).parameters
    if (makes and "dict" not in code.co_names) or (places and not asked):
        raise UnknownLayerError(
            f"a {type(wrapper).__name__} makes {'masks' if makes else 'positions'} of its own for its decoder, which "
            "are not those of the cache's rows: use the model as it is, with a StateCache or without; it was left so"
        )
    return makes


def _masking(code: CodeType) -> list[str]:
    """The names of what makes masks in a function."""
    return [name for name in code.co_names if name.startswith("create_") and "mask" in name]


def _causal(wrapper: nn.Module) -> bool:
    """Whether the masks that a wrapper makes are those that transformers makes for text."""
    forward = next(forwards(wrapper))
    makers = [forward.__globals__.get(name) for name in _masking(forward.__code__)]
    plain = all(getattr(maker, "__module__", None) == create_causal_mask.__module__ for maker in makers)
    given = {name for each in forward.__code__.co_consts if isinstance(each, tuple) for name in each}
    return plain and not given & {"or_mask_function", "and_mask_function", "block_sequence_ids"}


class Masks(StandIn):
    """Stands in for the forward of a wrapper that makes masks, which would count by columns: the cache's are by row."""

    def __init__(self, own: Any, wrapper: nn.Module, decoder: nn.Module) -> None:
        super().__init__(own)
        self.wrapper, self.decoder, self.causal = wrapper, decoder, _causal(wrapper)
        self.names = [name for name in inspect.signature(own).parameters if name != "kwargs"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the wrapper's own forward, with the caller's mask handed on to the decoder as it came.

        Raises StepError for a picture whose tokens attend to those behind them.
        """
        kwargs.update(zip(self.names, args, strict=False))
        cache = given_cache(kwargs)
        ours = isinstance(cache, StateCache) or (cache is None and door(self.decoder).makes_cache(kwargs))
        if ours:
            if not self.causal and _sees(kwargs):
                raise StepError(
                    f"a picture came, and in a {type(self.wrapper).__name__} its tokens attend to those behind them, "
                    "which the passes of a prepared model do not: take in the picture with a cache of its own before "
                    "statecache.prepare(model), which can go on from there"
                )
            kwargs["attention_mask"] = Given(kwargs.get("attention_mask"))
        return self.unmodified(**kwargs)


def _sees(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a wrapper's call bring a picture."""
    types, encoded = kwargs.get("token_type_ids"), kwargs.get("mm_encoder_outputs") or {}
    seen = kwargs.get("pixel_values") is not None or any(each is not None for each in encoded.values())
    return seen or (types is not None and bool(types.any()))


def pictures_of(model: nn.Module) -> Pictures | None:
    """What stands in for the positions of pictures in a prepared model; None of one that gives them none."""
    found = (vars(module).get(PLACES) for module in model.modules())
    return next((each for each in found if isinstance(each, Pictures)), None)


class Pictures(StandIn):
    """Stands in for what gives pictures their positions, and remembers of the last request where its text went on.

    Here it is asked for those of the new tokens by themselves, and the cache knows where each row goes on.
    """

    def __init__(self, own: Any, wrapper: Any, decoder: nn.Module) -> None:
        super().__init__(own)
        self.wrapper, self.decoder = wrapper, decoder
        self.names = list(inspect.signature(own).parameters)
        moved: Tensor | None = wrapper.rope_deltas  # of the last request before it was prepared
        self.moved = moved is not None and bool(moved.any())

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Positions (A, B, T) of a pass with pictures; None of one without: the cache knows them."""
        kwargs.update(zip(self.names, args, strict=False))
        cache, ids = given_cache(kwargs), kwargs.get("input_ids")
        if not stands_in(self.decoder) or (cache is not None and not isinstance(cache, StateCache)):
            own: Tensor | None = self.unmodified(**kwargs)
            return own
        if cache is not None:
            self._check(cache)
        if ids is None:
            return None
        expected = None if cache is None else cache.expected
        mask, types = kwargs.get("attention_mask"), kwargs.get(TYPES)
        rows, width = ids.shape
        if expected is not None and mask is None:
            counts = torch.as_tensor(expected.count, device=ids.device)
            mask = torch.arange(width, device=ids.device) < counts[:, None]
        if isinstance(mask, Tensor):
            if mask.dim() != 2 and types is not None and bool(types.any()):
                raise ShapeError(
                    f"attention_mask: came {tuple(mask.shape)}, expected ({rows}, {width} or more): where a picture "
                    "stands is counted by a mask of two axes"
                )
            if mask.dim() != 2 or types is None:
                mask = None  # there is no picture
            else:
                mask = mask[:, -width:].bool()
                types = types[:, -width:] * mask
                mask = mask | ~mask.any(1, keepdim=True)  # no token, no position: it could not be asked of none
        asked = {name: None if name in NAMES else value for name, value in kwargs.items()}
        asked.update({"attention_mask": mask, TYPES: types})
        found: Tensor | None = self.unmodified(**asked)
        if found is None or types is None or not bool(types.any()):
            return None
        if cache is None:  # nothing stands before them
            return found
        if POSITION.name not in cache.states.declared:
            raise ConfigError(
                "a picture came, and the cache was made for text alone: it keeps no positions that pictures move; make "
                f"it from the {type(self.wrapper.config).__name__}, which is model.config, and not from its text part"
            )
        start = upcoming(cache, None if expected is None else expected.rows, rows, found.device)
        if bool(start.any()):
            found = self._behind(asked, start.clamp(max=1))
            further = self._behind(asked, start.clamp(max=2))
            if not torch.equal(found, further):
                raise StepError(
                    f"a picture came behind other tokens, and where a {type(self.wrapper).__name__} places it depends "
                    "on more than where the text before it ends: feed the whole text from the first token in one pass"
                )
        return found + start[:, None]

    def _behind(self, asked: dict[str, Any], before: Tensor) -> Tensor:
        """Positions (A, B, T) of what is asked for, from the first of it on, behind `before` (B,) words of text."""
        ids, types, mask, width = asked["input_ids"], asked[TYPES], asked["attention_mask"], int(before.max())
        text = ids.new_zeros(len(ids), width)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        there = torch.arange(width, device=ids.device) >= width - before[:, None]
        more = {"input_ids": torch.cat([text - 1, ids], 1), TYPES: torch.cat([text.to(types.dtype), types], 1)}
        found: Tensor = self.unmodified(**{**asked, **more, "attention_mask": torch.cat([there, real], 1)})
        return ((found[..., width:] - before[:, None]) * real).contiguous()

    def behind(self, ids: Tensor, new: int, given: dict[str, Any]) -> Tensor | None:
        """The same for the `new` last of ids (B, n) in a call of `generate`, from what was `given` to it."""
        asked = {name: given[name] for name in self.names if given.get(name) is not None}
        if asked.get(TYPES) is not None:
            asked[TYPES] = asked[TYPES][:, -new:]
        return self(**{**asked, "input_ids": ids[:, -new:], "inputs_embeds": None})

    def _check(self, cache: StateCache) -> None:
        """Whether the cache knows where its rows go on, if an unprepared model has filled it."""
        writer = cache.writer
        if self.moved and isinstance(writer, Unmodified) and writer.ran and any(cache.lengths.tolist()):
            raise StepError(
                f"the cache was filled by a {type(self.wrapper).__name__} that was not prepared and has seen pictures, "
                "and kept to itself where its rows go on: begin with a new cache, or prepare the model before the "
                "first picture"
            )
