"""What `generate` asks of a prepared model: a cache that fits, masks as they came, and only the tokens that are new."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from statecache.models.cache import StateCache
from statecache.models.forward import StandIn, stands_in
from statecache.models.names import cache_name, given_cache, rename
from statecache.models.table import KINDS, layer_types
from statecache.models.wrappers import pictures_of

DRAFTS = 20  # that transformers' assisted decoding makes in a round, where nobody says how many


STOOD_IN = (
    "create_masks_for_generate",
    "_prepare_cache_for_generation",
    "_prepare_position_ids_for_generation",
    "_prefill",
)


class Generation:
    """Methods that stand in for those of one model with `generate`, as long as its decoder is prepared."""

    def __init__(self, model: Any, decoder: nn.Module) -> None:
        self.model, self.decoder = model, decoder
        self.own: dict[str, Any] = {}
        self.cache_name = cache_name(type(model).forward)
        kinds = [KINDS[kind] for kind in layer_types(decoder.config)]
        self.asked = any(kind.attention for kind in kinds)  # whether `generate` asks the cache what it holds

    def install(self) -> None:
        """Put them on the instance."""
        for name in STOOD_IN:
            self.own[name] = getattr(self.model, name, None)
            setattr(self.model, name, getattr(self, name))

    def create_masks_for_generate(self, **kwargs: Any) -> Any:
        """The mask as it came, (B, columns), for `Forward`; None where `generate` feeds what it has just made."""
        if not isinstance(given_cache(kwargs), StateCache) or not stands_in(self.decoder):
            make = self.own["create_masks_for_generate"] or create_masks_for_generate
            return make(**kwargs)
        tokens, mask = kwargs["inputs_embeds"].shape[1], kwargs["attention_mask"]
        if mask is None or (tokens == 1 and not kwargs.get("is_first_iteration")):
            return None
        return mask

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A StateCache, unless the caller brings a cache or asks for one of another kind."""
        config, kind = generation_config, generation_config.cache_implementation
        fits = config.use_cache is not False and kind in (None, "dynamic") and stands_in(self.decoder)
        if model_kwargs.get(self.cache_name) is None and fits:
            slack = 0
            if generation_mode == GenerationMode.ASSISTED_GENERATION or config.is_assistant:
                slack = _drafts(config, self.model.generation_config, max_cache_length)
            model_kwargs[self.cache_name] = StateCache(self.model.config, slack=slack)
            config.cache_implementation = None
        return self.own["_prepare_cache_for_generation"](
            config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """What `Inputs` drops. Those of pictures it has from here, since their sizes go no further."""
        cache, pictures, call = given_cache(model_kwargs), pictures_of(self.model), _CALL.get()
        ours = (cache is None or isinstance(cache, StateCache)) and stands_in(self.decoder)
        if pictures is None or not ours or call is None:
            return self.own["_prepare_position_ids_for_generation"](inputs_tensor, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or not ids.shape[1] else ids
        if not ids.is_floating_point():
            call.columns = 0 if cache is None else int(cache.get_seq_length())
            new = _new(ids, model_kwargs.get("attention_mask"), call.columns).shape[1]
            call.pictures = pictures.behind(ids, new, model_kwargs)
        if cache is None:
            return self.own["_prepare_position_ids_for_generation"](inputs_tensor, model_kwargs)
        return torch.arange(ids.shape[1], device=ids.device)[None]

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Feed the tokens that the cache has not taken in yet, in chunks if asked."""
        model = self.model
        cache, mask = model_kwargs.get(self.cache_name), model_kwargs.get("attention_mask")
        call, width = _CALL.get(), input_ids.shape[1]
        chunked = generation_config.prefill_chunk_size is not None and model_kwargs.get("inputs_embeds") is None
        # some releases feed chunks of what the cache holds, too
        ours = not self.asked or (chunked and is_first_iteration and not (call is not None and call.placed))
        if not isinstance(cache, StateCache) or not stands_in(self.decoder) or not ours:
            return self.own["_prefill"](input_ids, generation_config, model_kwargs, is_first_iteration)
        past = int(cache.get_seq_length())
        input_ids = _new(input_ids, mask, past, getattr(generation_config, "_mask_length", width))
        size = generation_config.prefill_chunk_size or input_ids.shape[1]
        done, outputs = input_ids.shape[1], None
        for chunk in torch.split(input_ids, size, 1):
            done -= chunk.shape[1]
            part = dict(model_kwargs)
            if mask is not None:
                part["attention_mask"] = mask[:, : mask.shape[1] - done]
            inputs = model.prepare_inputs_for_generation(chunk, is_first_iteration=is_first_iteration, **part)
            outputs = model(**inputs, return_dict=True)
        return outputs


class AnyName(StandIn):
    """Stands in for a model's own method, and takes its cache under any name, under which it gives it back as well."""

    def __init__(self, own: Any, name: str) -> None:
        super().__init__(own)
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = rename(kwargs, self.name)
        out = self.unmodified(*args, **kwargs)
        if asked != self.name and isinstance(out, dict) and out.get(self.name) is not None:
            out[asked] = out[self.name]
        return out


@dataclass
class Call:
    """A call of `generate`. placed, masked: whether positions, and a mask, came with it.

    pictures: the positions (A, B, T) of its new tokens, if there are pictures among them; columns: fed before them.
    assistant: the settings of the model that drafts. within: the call that it is part of, of a model that has drafts
    made. slack: what its cache can take back.
    """

    placed: bool
    masked: bool
    assistant: Any
    within: Call | None
    slack: int = 0
    pictures: Tensor | None = None
    columns: int = 0

    def positions(self, cache: StateCache, ids: Tensor) -> Tensor | None:
        """Those of the tokens `ids` (B, T) that the cache takes in next; None where they are the cache's own."""
        if self.pictures is None:
            return None
        done = int(cache.get_seq_length()) - self.columns
        found = self.pictures[..., done : done + ids.shape[1]]
        if found.shape[-1] < ids.shape[1]:  # the prompt is in, and what is generated goes on from it
            self.pictures = None
            return None
        return found.repeat_interleave(len(ids) // found.shape[1], dim=1)


_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


class Generate(AnyName):
    """Stands in for a model's own `generate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        placed, masked = (kwargs.get(name) is not None for name in ("position_ids", "attention_mask"))
        drafting = getattr(kwargs.get("assistant_model"), "generation_config", None)
        before = _CALL.set(Call(placed, masked, drafting, _CALL.get()))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _CALL.reset(before)


def _drafts(config: Any, own: Any, longest: int) -> int:
    """The most tokens that assisted decoding takes back at once: what a round drafted, and one more.

    config: the settings of the call, which are the main model's; own: those of this model. longest: a row of it.
    """
    call = _CALL.get()
    above = call.within if config.is_assistant and call is not None else None
    if above is not None and above.slack:
        return above.slack
    drafting = own if config.is_assistant else config
    if call is not None and call.assistant is not None:
        drafting = call.assistant
    most = max(config.prompt_lookup_num_tokens or 0, drafting.num_assistant_tokens or DRAFTS)
    if "heuristic" in (drafting.num_assistant_tokens_schedule or ""):  # two more after every round that was right
        most = max(4 * most, longest)
    if call is not None:
        call.slack = 1 + most
    return 1 + most


def _new(ids: Tensor, mask: Tensor | None, past: int, seen: int | None = None) -> Tensor:
    """Of ids (B, n) those that the cache, which holds `past` columns, has not taken in yet.

    They are the whole sequence where there are more of them than the cache holds and the mask is no longer than they
    are, or without one `seen`; else only the new ones.
    """
    width = ids.shape[1]
    seen = mask.shape[1] if mask is not None else width if seen is None else seen
    return ids[:, past:] if width > past and seen == width else ids


class Inputs(StandIn):
    """Stands in for `prepare_inputs_for_generation`, which counts positions by columns: the cache knows them by row.

    A mask that nobody gave is a guess, from tokens that look like pads: of what the cache holds it says nothing.
    """

    def __init__(self, own: Any, decoder: nn.Module) -> None:
        super().__init__(own)
        self.decoder = decoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs, call = self.unmodified(*args, **kwargs), _CALL.get()
        if not isinstance(given_cache(inputs), StateCache) or not stands_in(self.decoder):
            return inputs
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not (call is not None and call.placed):
            inputs.pop("position_ids", None)
            found = None if call is None or ids is None else call.positions(given_cache(inputs), ids)
            if found is not None:
                inputs["position_ids"] = found
        if ids is not None and isinstance(mask, Tensor) and mask.dim() == 2 and call is not None and not call.masked:
            inputs["attention_mask"] = mask[:, -ids.shape[1] :]
        return inputs
