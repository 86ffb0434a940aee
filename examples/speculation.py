"""Write the same text in fewer forward passes: a small model drafts, the large one checks."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import statecache as sc

story, draft = (
    AutoModelForCausalLM.from_pretrained(str(files("statecache") / f"tiny/{name}"), dtype="float32").eval()
    for name in ("story", "draft")
)
tokenizer = AutoTokenizer.from_pretrained(str(files("statecache") / "tiny/story"))

prompts = ["Once upon a time", "There was a little boy who lived near the sea.", "The old king"]
reports = []
plain = sc.generate(story, prompts, tokenizer, max_new_tokens=60, report=reports.append)
drafted = sc.generate(story, prompts, tokenizer, max_new_tokens=60, assistant=draft, report=reports.append)

assert drafted == plain  # each of the three rows drafts, and accepts, at its own pace
for text, report in zip(("plain", "drafted"), reports, strict=True):
    print(f"{text}: {report}")
print(drafted[0])
