"""One compiled graph for every step of every request: with a capacity, nothing in the cache ever moves."""

import shutil
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import statecache as sc

warnings.filterwarnings("ignore", module="torch")  # its compiler warns of itself
torch.set_num_threads(1)  # small tensors: more threads mostly wait for each other
torch.manual_seed(0)
torch.set_grad_enabled(False)
config = Qwen3_5TextConfig(  # a gated delta net and an attention layer, random weights: quick to compile
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
)
model = Qwen3_5ForCausalLM(config).eval()
cache = sc.StateCache(config, capacity=128, rows=1, dtype=torch.float32, device="cpu")
addresses = [buffer.data_ptr() for buffer in cache.buffers()]
print(f"allocated before the first token: {cache.nbytes()}")

# inductor writes C++ on a CPU: without a compiler for that, and Python's headers, the graph runs as it was traced
builds = shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()
step = torch.compile(model.forward, fullgraph=True, backend="inductor" if builds else "aot_eager")


def decode(forward, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Continue greedily; return the tokens and the milliseconds that each took."""
    cache.reset()
    logits = model(torch.tensor([prompt]), cache=cache).logits
    written, began = [], time.perf_counter()
    for position in range(len(prompt), len(prompt) + tokens):
        written.append(int(logits[0, -1].argmax()))
        at = torch.tensor([[position]])
        logits = forward(torch.tensor([written[-1:]]), position_ids=at, cache=cache).logits
    return written, 1e3 * (time.perf_counter() - began) / tokens


began = time.perf_counter()
decode(step, [1, 2, 3], 2)
print(f"compiled in {time.perf_counter() - began:.0f} s")

for prompt in ([11, 12, 13, 14], [5] * 40, [200]):
    eager, slow = decode(model.forward, prompt, 32)
    compiled, fast = decode(step, prompt, 32)
    assert compiled == eager
    assert cache.lengths.tolist() == [len(prompt) + 32]
    print(f"prompt of {len(prompt):2}: same 32 tokens; {slow:.1f} ms a token eager, {fast:.1f} ms compiled")

graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(f"graphs: {graphs}")
assert graphs == 1
assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses
print("no buffer has moved")
