"""A second turn feeds only its new tokens, and gives what one forward over everything would."""

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc

STORY = str(files("statecache") / "tiny/story")

torch.manual_seed(0)
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(STORY, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(STORY)
cache = sc.StateCache(model.config)

fed = []  # how many tokens each forward was given


def count(module, args, kwargs) -> None:
    fed.append(kwargs["input_ids"].shape[1])


model.register_forward_pre_hook(count, with_kwargs=True)

ids = torch.zeros(1, 0, dtype=torch.long)
for turn in ("Once upon a time there was a fox.", " One day the fox met a bear.", " The bear said:"):
    new = tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids
    ids = torch.cat([ids, new], 1)
    fed.clear()
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, cache=cache, min_new_tokens=16, max_new_tokens=16, do_sample=True)
    answer = tokenizer.decode(out[0, ids.shape[1] :])
    print(f"{ids.shape[1]:3} tokens so far, {fed[0]:2} of them read now, 16 written: {answer!r}")
    ids = out

whole = model(input_ids=ids, use_cache=False).logits[0, -1]
last = model(input_ids=ids[:, -1:], cache=cache).logits[0, -1]
print(f"largest difference from one forward over all {ids.shape[1]} tokens: {(whole - last).abs().max():.1e}")
