"""Read a prompt once, continue it in n ways side by side, and keep the likeliest."""

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc

STORY = str(files("statecache") / "tiny/story")
N, TOKENS = 4, 24

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STORY)

prompt = tokenizer("The old king looked at his three sons and said", return_tensors="pt").input_ids
cache = sc.StateCache(model.config)
logits = model(prompt, cache=cache).logits[:, -1]

cache.gather([0] * N)  # keys, convolutions and recurrent states of the one row, n times
logits = logits.expand(N, -1)
print(f"one prefill of {prompt.shape[1]} tokens, then {cache.rows} rows: {cache.nbytes()}")

tokens, score = [], torch.zeros(N)
for _ in range(TOKENS):
    chances = (logits / 0.8).softmax(-1)
    token = chances.multinomial(1)  # (N, 1)
    score += logits.log_softmax(-1).gather(1, token)[:, 0]
    tokens.append(token)
    logits = model(token, cache=cache).logits[:, -1]

for row, text in enumerate(tokenizer.batch_decode(torch.cat(tokens, 1))):
    print(f"{score[row] / TOKENS:6.2f} a token: {text!r}")

best = int(score.argmax())
cache.gather([best])  # the others are dropped; the conversation can go on from here
print(f"row {best} is kept: {cache.lengths.tolist()} tokens in, {cache.nbytes()}")
