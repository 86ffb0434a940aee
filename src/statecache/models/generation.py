"""What `generate` asks of a prepared model: a cache that fits, masks as they came, and only the tokens that are new."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statecache.models.cache import StateCache


class Generation:
    """Methods that stand in for those of one model with `generate`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.own: dict[str, Any] = {}

    def install(self) -> None:
        """Put them on the instance."""
        names = ["create_masks_for_generate", "_prepare_cache_for_generation"]
        if "mamba" in type(self.model).__name__.lower():  # whose cache has a name that `generate` half knows
            names += ["forward", "generate", "_prefill"]
        for name in names:
            self.own[name] = getattr(self.model, name, None)
            setattr(self.model, name, getattr(self, name))

    def create_masks_for_generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Tensor | None:
        """The mask of the new tokens, (B, T), for the door; None where `generate` feeds what it has just made."""
        tokens = inputs_embeds.shape[1]
        if attention_mask is None or (tokens == 1 and not is_first_iteration):
            return None
        return attention_mask[:, -tokens:]

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """A StateCache, unless the caller brings a cache or asks for one of another kind."""
        name = "cache_params" if "mamba" in type(self.model).__name__.lower() else "past_key_values"
        kind = generation_config.cache_implementation
        if model_kwargs.get(name) is None and generation_config.use_cache is not False and kind in (None, "dynamic"):
            model_kwargs[name] = StateCache(self.model.config.get_text_config(decoder=True))
            generation_config.cache_implementation = None
        return self.own["_prepare_cache_for_generation"](
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    # ---- models whose cache goes by another name

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """As the model's own, with the cache under either name."""
        if past_key_values is not None:
            kwargs["cache_params"] = past_key_values
        return self.own["forward"](*args, **kwargs)

    def generate(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """As the model's own, with the cache under either name."""
        if past_key_values is not None:
            kwargs["cache_params"] = past_key_values
        return self.own["generate"](*args, **kwargs)

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
        past = 0 if cache is None else int(cache.get_seq_length())
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
