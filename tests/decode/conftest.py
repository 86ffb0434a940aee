"""The embedded pair of models, and drafting at all costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import statecache.tiny
from statecache.decode.draft_length import DraftLength

TINY = Path(statecache.tiny.__file__).parent


def load(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def story() -> Any:
    return load("story")


@pytest.fixture(scope="session")
def draft() -> Any:
    return load("draft")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY / "story")


@pytest.fixture
def marked(tokenizer: Any) -> Any:
    """The same tokenizer, one of whose words is special: texts leave it out."""

    class Marked:
        all_special_tokens, all_special_ids = ("<|the|>",), (816,)

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

        def decode(self, ids: list[int], **options: Any) -> str:
            return tokenizer.decode([n for n in ids if n not in self.all_special_ids], **options)

    return Marked()


@pytest.fixture
def always_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many drafts as there is room for, whether they pay or not."""
    monkeypatch.setattr(DraftLength, "length", lambda length: length.most)
