"""Explore a continuation and take it back: the cache is then what it was, to the last bit."""

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc

STORY = str(files("statecache") / "tiny/story")

torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STORY)

cache = sc.StateCache(model.config, slack=16)
start = tokenizer("Once upon a time there was a little girl who", return_tensors="pt").input_ids
logits = model(start, cache=cache).logits[0, -1]
print(f"{cache.lengths.item()} tokens in, {cache.nbytes()}")


def explore(first: int, steps: int = 10) -> str:
    """Greedy text that begins with token `first`; afterwards the cache is as it was."""
    tokens = [first]
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens[-1:]]), cache=cache).logits[0, -1].argmax()))
    cache.rollback(steps)
    return tokenizer.decode(tokens)


for first in logits.topk(4).indices.tolist():
    print(f"  ...{explore(first)}")

once = explore(int(logits.argmax()))
assert explore(int(logits.argmax())) == once
print(f"{cache.lengths.item()} tokens in, as before")

try:
    cache.rollback(3)  # into the middle of the prompt, which came as one chunk
except sc.errors.RollbackError as error:
    print(f"refused: {error}")
