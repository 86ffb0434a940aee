"""The command line in a process of its own, and tiny random checkpoints for it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]


def save_checkpoint(family: str, folder: Path, template: str | None = None, **changes: Any) -> str:
    """A tiny random model of this family with a tokenizer of bytes. `changes`: of its configuration."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate([*SPECIAL, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model, _ = families.build(family, vocab_size=len(tokenizer), **changes)
    model.save_pretrained(folder)
    return str(folder)


def program(*args: str, **options) -> subprocess.Popen[str]:
    code = "from statecache.cli import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *args], **{**pipes, **options})
