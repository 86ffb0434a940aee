"""What `generate` asks of a prepared model: a cache that fits, masks as they came, and only the tokens that are new."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMode
from transformers.masking_utils import create_masks_for_generate

from statecache.models.cache import StateCache
from statecache.models.forward import stands_in

DRAFTS = 20  # that transformers' assisted decoding makes in a round, where nobody says how many


class Generation:
    """Methods that stand in for those of one model with `generate`, as long as its decoder is prepared."""

    def __init__(self, model: Any, decoder: nn.Module) -> None:
        self.model, self.decoder = model, decoder
        self.own: dict[str, Any] = {}
        self.renamed = "mamba" in type(model).__name__.lower()  # its cache has a name that `generate` half knows
        self.cache_name = "cache_params" if self.renamed else "past_key_values"

    def install(self) -> None:
        """Put them on the instance."""
        for name in ["create_masks_for_generate", "_prepare_cache_for_generation"] + self.renamed * ["_prefill"]:
            self.own[name] = getattr(self.model, name, None)
            setattr(self.model, name, getattr(self, name))
        for name in self.renamed * ["forward", "generate"]:
            setattr(self.model, name, EitherName(getattr(self.model, name)))

    def create_masks_for_generate(self, *, past_key_values: Any = None, **kwargs: Any) -> Any:
        """The mask of the new tokens, (B, T), for `Forward`; None where `generate` feeds what it has just made."""
        if not isinstance(past_key_values, StateCache) or not stands_in(self.decoder):
            make = self.own["create_masks_for_generate"] or create_masks_for_generate
            return make(past_key_values=past_key_values, **kwargs)
        tokens, mask = kwargs["inputs_embeds"].shape[1], kwargs["attention_mask"]
        if mask is None or (tokens == 1 and not kwargs.get("is_first_iteration")):
            return None
        return mask[:, -tokens:]

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
            if generation_mode == GenerationMode.ASSISTED_GENERATION:  # which takes back what it drafted
                slack = 1 + max(config.prompt_lookup_num_tokens or 0, config.num_assistant_tokens or DRAFTS)
            model_kwargs[self.cache_name] = StateCache(self.model.config.get_text_config(decoder=True), slack=slack)
            config.cache_implementation = None
        return self.own["_prepare_cache_for_generation"](
            config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Feed the tokens that the cache has not taken in yet, in chunks if asked.

        Ids are the whole sequence where there are more of them than the cache holds and the mask is no longer than
        they are; else only the new ones.
        """
        model = self.model
        cache, mask = model_kwargs.get("cache_params"), model_kwargs.get("attention_mask")
        if not isinstance(cache, StateCache) or not stands_in(self.decoder):
            return self.own["_prefill"](input_ids, generation_config, model_kwargs, is_first_iteration)
        past = int(cache.get_seq_length())
        if input_ids.shape[1] > past and (mask is None or mask.shape[1] == input_ids.shape[1]):
            input_ids = input_ids[:, past:]
        size = generation_config.prefill_chunk_size or input_ids.shape[1]
        done, outputs = input_ids.shape[1], None
        for chunk in torch.split(input_ids, size, 1):
            done -= chunk.shape[1]
            part = dict(model_kwargs)
            if mask is not None:
                part["attention_mask"] = mask[:, : mask.shape[1] - done]
            inputs = model.prepare_inputs_for_generation(chunk, is_first_iteration=is_first_iteration, **part)
            outputs = model(**inputs, return_dict=True)
            model_kwargs["cache_params"] = outputs.cache_params
        return outputs


class EitherName:
    """A model's own method, which takes its cache as `cache_params`, with `past_key_values` as another name for it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["cache_params"] = past_key_values
        return self.own(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method, and the other name: `generate` reads there what a model takes."""
        own = inspect.signature(self.own)
        *taken, last = own.parameters.values()
        other = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [other, last] if last.kind is inspect.Parameter.VAR_KEYWORD else [last, other]
        return own.replace(parameters=[*taken, *rest])
