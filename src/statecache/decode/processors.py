"""What changes logits before a token is taken: processors of the caller, and those that a checkpoint asks for.

B rows, T positions, L tokens of a row, V tokens of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from statecache.errors import OptionError

Processor = Callable[[Tensor, Tensor], Tensor]  # ids (1, L) long and logits (1, V) float32 after them: logits

# fields of a generation configuration that change logits, in the order in which transformers applies them
APPLIED = (
    "sequence_bias",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# others that do: always, and where tokens are drawn
REFUSED = (
    "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size",
    "guidance_scale",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "watermarking_config",
)
REFUSED_DRAWN = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
NEUTRAL_AT_ONE = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "typical_p")


def asked(config: Any, names: Sequence[str]) -> dict[str, Any]:
    """Of these fields of a generation configuration those that change something."""
    told = {name: getattr(config, name, None) for name in names}
    return {name: x for name, x in told.items() if x and not (name in NEUTRAL_AT_ONE and x == 1)}


def refused(config: Any, draws: bool) -> str:
    """What a generation configuration asks for that is not applied here, as a list of names."""
    return ", ".join(asked(config, REFUSED + (REFUSED_DRAWN if draws else ())))


def made(settings: dict[str, Any], ends: set[int], prompt: int, device: torch.device) -> list[Processor]:
    """The processors of transformers for these fields of `APPLIED`, for a row whose prompt has so many tokens."""
    from transformers.generation import logits_process as known

    how: dict[str, Callable[[Any], Processor]] = {
        "sequence_bias": known.SequenceBiasLogitsProcessor,
        "repetition_penalty": known.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": known.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda x: known.NoBadWordsLogitsProcessor(x, sorted(ends) or None),
        "min_length": lambda x: known.MinLengthLogitsProcessor(x, sorted(ends), device=str(device)),
        "min_new_tokens": lambda x: known.MinNewTokensLengthLogitsProcessor(
            prompt, x, sorted(ends), device=str(device)
        ),
        "suppress_tokens": lambda x: known.SuppressTokensLogitsProcessor(x, device=str(device)),
        "begin_suppress_tokens": lambda x: known.SuppressTokensAtBeginLogitsProcessor(x, prompt, device=str(device)),
    }
    needs_end = () if ends else ("min_length", "min_new_tokens")
    return [how[name](settings[name]) for name in APPLIED if name in settings and name not in needs_end]


def processed(
    logits: Tensor, rows: Sequence[Sequence[Processor]], tokens: Sequence[list[int]], drafts: Sequence[list[int]]
) -> Tensor:
    """Logits (B, T, V) as the processors of each row leave them, column j after its tokens and its first j drafts.

    So a position gets what it would get without drafts. Raises OptionError for what a processor should not give.
    """
    logits = logits.to(torch.float32, copy=True)
    for b, processors in enumerate(rows):
        for ahead in range(1 + len(drafts[b]) if processors else 0):
            ids = torch.tensor([[*tokens[b], *drafts[b][:ahead]]], device=logits.device)
            scores = logits[b : b + 1, ahead]
            for processor in processors:
                scores = processor(ids, scores)
                if not isinstance(scores, Tensor) or scores.shape != logits[b : b + 1, ahead].shape:
                    came = tuple(scores.shape) if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
                    name = getattr(processor, "__name__", type(processor).__name__)
                    raise OptionError(f"processor {name}: it gave {came}, expected logits (1, {logits.shape[-1]})")
            logits[b, ahead] = scores[0]
    return logits
