"""Every call of `generate` that makes no sense, and what is said of it."""

from __future__ import annotations

import families
import pytest
import torch

import statecache as sc
from statecache import errors


def test_nonsense_is_refused_before_anything_is_computed(tokenizer, monkeypatch):
    tiny, other = (families.build("mamba2", seed=seed)[0] for seed in (0, 1))
    rows = torch.tensor([[5, 6, 7], [8, 9, 10]])
    words, _ = families.build("mamba2", vocab_size=50)
    lfm, _ = families.build("lfm2")
    small, held = sc.StateCache(lfm.config, capacity=8, slack=1), sc.StateCache(tiny.config)
    sc.generate(tiny, rows, max_new_tokens=2, cache=held)

    class Speechless:  # a tokenizer that makes no text
        def __call__(self, text, **_): ...

    text = {"prompt": "a", "tokenizer": tokenizer}
    refused = [
        (errors.OptionError, "temperature='hot': give 0", {"temperature": "hot"}),
        (errors.OptionError, "temperature=None: give 0", {"temperature": None}),
        (errors.OptionError, "temperature=True: give 0", {"temperature": True}),
        (errors.OptionError, "top_p='1': give a probability", {"top_p": "1"}),
        (errors.OptionError, "top_p=True: give a probability", {"top_p": True}),
        (errors.OptionError, "seed=1.5: give an integer from -2**63 to 2**64 - 1, or None", {"seed": 1.5}),
        (errors.OptionError, "seed=True: give an integer", {"seed": True}),
        (errors.OptionError, f"seed={2**64}: give an integer", {"seed": 2**64}),
        (errors.OptionError, f"seed={-(2**63) - 1}: give an integer", {"seed": -(2**63) - 1}),
        (errors.OptionError, "temperature=[1.0]: 1 values came for 2 rows; give one", {"temperature": [1.0]}),
        (errors.OptionError, "top_k=(1, 2, 3): 3 values came for 2 rows", {"top_k": (1, 2, 3)}),
        (errors.OptionError, "top_p=2: give a probability", {"top_p": [1.0, 2]}),
        (errors.OptionError, "seed=[1]: 1 values came for 2 rows", {"seed": [1]}),
        (errors.OptionError, "seed='a': give an integer", {"seed": [1, "a"]}),
        (errors.OptionError, "stop=3.5: give token ids, or strings", {"stop": 3.5}),
        (errors.OptionError, "stop=b'a': give token ids, or strings", {"stop": b"a"}),
        (errors.OptionError, "stop=101: the model has ids 0..100: give one", {"stop": 101}),
        (errors.OptionError, "stop=[3, -1]: the model has ids 0..100", {"stop": [3, -1]}),
        (errors.OptionError, "report: came a list, expected a function that takes the Report", {"report": []}),
        (errors.OptionError, "cache: came a dict, expected a StateCache", {**text, "cache": {}}),
        (errors.OptionError, "tokenizer: came a str, expected the model's tokenizer", {**text, "tokenizer": "gpt"}),
        (errors.OptionError, "tokenizer: came a Speechless, expected", {**text, "tokenizer": Speechless()}),
        (errors.OptionError, "a Mamba2Model gives no logits: give the model with its", {"model": tiny.backbone}),
        (errors.OptionError, "a Mamba2Model gives no logits: give the model", {"assistant": tiny.backbone}),
        (errors.OptionError, "lookup=65: every run of up to that many tokens is kept, in memory", {"lookup": 65}),
        (errors.OptionError, 'prompt: a BatchEncoding came; give its ["input_ids"]', {"prompt": tokenizer("a")}),
        (errors.OptionError, 'prompt: a dict came; give its ["input_ids"]', {"prompt": {"input_ids": rows}}),
        (errors.OptionError, "prompt: a NoneType came; give a text", {**text, "prompt": None}),
        (errors.OptionError, "prompt: a int came; give a text", {**text, "prompt": 5}),
        (errors.OptionError, "prompt 'a\\ud83d': character 1 is half of one (a lone", {**text, "prompt": "a\ud83d"}),
        (
            errors.OptionError,
            "prompt: ids 2529..2529, and the model has ids 0",
            {**text, "prompt": "Once"},
        ),
        (errors.OptionError, "temperature=-1: give 0", {"temperature": -1}),
        (errors.OptionError, "top_p=0: give a probability", {"top_p": 0}),
        (errors.OptionError, "top_k=-2: give the number of tokens", {"top_k": -2}),
        (errors.OptionError, "max_new_tokens=0: give an integer of at least 1", {"max_new_tokens": 0}),
        (errors.OptionError, "lookup=-1: give an integer of at least 0", {"lookup": -1}),
        (
            errors.OptionError,
            "lookup=2 and assistant= are two ways to draft: give one",
            {"lookup": 2, "assistant": other},
        ),
        (errors.OptionError, "assistant: came a str, expected a transformers model", {"assistant": "other"}),
        (errors.ConfigError, "the assistant has 50 tokens, the model 101: give one with", {"assistant": words}),
        (errors.OptionError, "stop='.': to find a string among ids takes their tokenizer", {"stop": "."}),
        (errors.OptionError, "stop='': give token ids, or strings that are not empty", {"stop": ""}),
        (errors.OptionError, "stop=[1.5]: give token ids, or strings", {"stop": [1.5]}),
        (errors.OptionError, "cache: came a dict, expected a StateCache", {"cache": {}}),
        (errors.OptionError, "prompt: came torch.float32 (2, 3), expected integers", {"prompt": rows.float()}),
        (errors.OptionError, "prompt: came torch.int64 (0,), expected integers", {"prompt": rows[0, :0]}),
        (
            errors.OptionError,
            "prompt: ids 5..101, and the model has ids 0..100: is the tokenizer another",
            {"prompt": torch.tensor([[5, 101]])},
        ),
        (errors.OptionError, "a text prompt takes the model's tokenizer: give tokenizer=", {"prompt": "a"}),
        (errors.OptionError, "prompt: a list came; give a text, a list of texts", {"prompt": []}),
        (errors.OptionError, "prompt '' has no token: give at least one word", {"prompt": "", "tokenizer": tokenizer}),
        (
            errors.OptionError,
            "stream=True with 2 texts",
            {"prompt": ["a", "b"], "tokenizer": tokenizer, "stream": True},
        ),
        (errors.OptionError, "generate takes a transformers model, not a str", {"model": "gpt"}),
        (errors.RowsError, "1 prompts came for a cache of 2 rows", {"prompt": rows[:1], "cache": held}),
        (errors.SlackError, "a round feeds a token and its drafts", {"cache": held, "lookup": 2}),
        (
            errors.CapacityError,
            "row 0 holds 0 tokens, its prompt brings 3 and 6 more are to come: make the cache with capacity=9 or more",
            {"model": lfm, "cache": small, "max_new_tokens": 7},
        ),
    ]
    ran = []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: ran.append(1))
    for kind, message, options in refused:
        given = {"model": tiny, "prompt": rows, "max_new_tokens": 4, **options}
        with pytest.raises(kind) as error:
            sc.generate(**given)
        assert str(error.value).startswith(message)
        assert isinstance(error.value, errors.StateCacheError)
    assert not ran
