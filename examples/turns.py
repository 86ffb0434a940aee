"""A chat with two people at once: their turns differ in length, and neither sees the other's padding."""

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc

story = str(files("statecache") / "tiny/story")
model = sc.prepare(AutoModelForCausalLM.from_pretrained(story, dtype="float32").eval())
tokenizer = AutoTokenizer.from_pretrained(story)
cache = sc.StateCache(model.config, slack=4)

turns = [
    ["Once upon a time there was a fox", "The sea was cold."],
    [" who", " A small boat came over the water, and in it"],
]
with torch.no_grad():
    for turn in turns:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in turn]
        width = max(map(len, ids))
        batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        logits = model(batch, cache=cache, attention_mask=mask).logits
    print("tokens that each row holds:", cache.lengths.tolist())

    # each row beside itself alone
    for row in range(2):
        whole = [t for turn in turns for t in tokenizer(turn[row], add_special_tokens=False)["input_ids"]]
        alone = model(torch.tensor([whole]), use_cache=False).logits[0, -1]
        together = logits[row, int(mask[row].sum()) - 1]
        print(f"row {row} differs from itself alone by {(alone - together).abs().max():.0e}")
        assert torch.allclose(alone, together, atol=1e-4)
