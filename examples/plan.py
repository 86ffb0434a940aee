"""How much of a card a hybrid takes, before anything is downloaded: rows, tokens, slack, checkpoints."""

import transformers

import statecache as sc

config = transformers.Qwen3NextConfig(dtype="bfloat16")  # or AutoConfig.from_pretrained("org/name")

plan = sc.plan(config, rows=32, capacity=8192)
print(plan)
print(
    f"a row {plan.per_row.total:,} bytes, of which a token {plan.per_token.total:,}; a checkpoint {plan.checkpoint:,}"
)

for store in ("dense", "int8"):
    widest = sc.plan(config, rows=32, budget="24GiB", store=store)
    most = sc.plan(config, capacity=8192, budget="24GiB", store=store)
    print(f"24 GiB, {store}: 32 rows of {widest.capacity:,} tokens, or {most.rows} rows of 8,192")

for prepared in (False, True):
    drafts = sc.plan(config, rows=32, capacity=8192, slack=8, prepared=prepared)
    more = (drafts.states.total - plan.states.total) / plan.states.total
    print(f"slack for 8 tokens, {'prepared' if prepared else 'unprepared'}: {more:.0%} more")

# what is planned is what is allocated
small = {"rows": 2, "capacity": 64, "slack": 2, "dtype": "float32"}
assert sc.plan(config, **small).states == sc.StateCache(config, device="cpu", **small).nbytes()
