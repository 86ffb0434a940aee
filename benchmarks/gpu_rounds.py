"""A speculative round on a GPU beside a plain step of the same decoder, and what drafts gain.

    python benchmarks/gpu_rounds.py --model mamba2 --rows 1
    python benchmarks/gpu_rounds.py --model qwen3_5 --rows 4 --drafts 4 --accepted 0.7 --json result.json
    python benchmarks/gpu_rounds.py --model mamba2 --assistant

A round takes in a token and its drafts, decides which stay, and commits them: one graph. Drafts cost nothing here, and
each stays with a probability, by a seeded coin in place of the model, whose weights are random: it decides too, in the
same time. --assistant: also whole texts by `sc.generate`, with a small model that drafts as many as are worth it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import statecache as sc
from gpu_decode import DEVICE, profiled, seconds, versions
from gpu_shapes import SHAPES, drafting
from statecache.decode.decoder import Decoder

PLAINLY = Decoder._likeliest
CERTAIN = (0x7FFFFFFF << 32) + 0x7FFFFFFF  # above every number, as `kernels.choose` has them; less a token, that token


def decoder(model: Any, rows: int, capacity: int, slack: int) -> sc.Decoder:
    cache = sc.StateCache(
        model.config, capacity=capacity, rows=rows, dtype=model.dtype, device=DEVICE, slack=slack, back=False
    )
    return sc.Decoder(model, cache, buckets=[rows])


def coins(self: Any, logits: Tensor, draft: Any = None) -> Tensor:
    """Find what is likeliest as the decoder does, and then take 1 for it: drafts are coins, 1 where they are good."""
    keys = PLAINLY(self, logits)
    if draft is not None:
        keys[:, :-1, 0].fill_(CERTAIN - 1)
    return keys


def tosses(self: Any, logits: Tensor, draft: Any = None) -> Tensor:
    """Find what is likeliest as the decoder does, and then take the draft for it where the place's coin is good."""
    keys = PLAINLY(self, logits)
    if draft is not None:
        rows, most = len(logits), draft.tokens.shape[1]
        places = self.cache.states.clock.lengths[:rows, None] + torch.arange(1, 1 + most, device=keys.device)
        tokens = draft.tokens[:rows]
        good = tossed(places) % 1000 < 1000 * self.good
        keys[:, :-1, 0] = CERTAIN - torch.where(good, tokens, tokens ^ 1)
    return keys


def tossed(places: Tensor) -> Tensor:
    """A number for each place, as good as random: two rounds of multiplying and shifting."""
    mixed = places
    for factor in (2654435761, 2246822519):
        mixed = mixed * factor & 0xFFFFFFFF
        mixed = mixed ^ mixed >> 15
    return mixed


def rates(model: Any, prompt: list[list[int]], opts: argparse.Namespace) -> dict[str, float]:
    """Tokens a second that `generate` writes, with a model that drafts and without, and what a step of that costs."""
    with torch.device(DEVICE):
        small = AutoModelForCausalLM.from_config(drafting(opts.small), dtype=model.dtype).eval()
    Decoder.good, Decoder._likeliest = opts.accepted, tosses

    def took(new: int, given: dict[str, Any]) -> float:
        runs = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            sc.generate(model, torch.tensor(prompt, device=DEVICE), max_new_tokens=new, **given)
            torch.cuda.synchronize()
            runs.append(time.perf_counter() - began)
        return statistics.median(runs)

    def rate(**given: Any) -> float:  # what two lengths differ by: each text captures anew, the longer no more by then
        return 1024 * opts.rows / (took(1664, given) - took(640, given))

    with decoder(small, opts.rows, opts.context + 2000, 1) as made:
        made.prefill(prompt)
        step = seconds(made.step, opts.rounds)
    return {"assistant_step_ms": step * 1e3, "plain": rate(), "assisted": rate(assistant=small)}


def rounds(made: sc.Decoder, coins: Tensor) -> Tensor:
    """Tokens that each round added, (n, B), where a draft stays if its coin (n, B, K) is 1."""
    return torch.stack([made.check(coin) + 1 for coin in coins])


@torch.no_grad()
def measure(opts: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    Decoder._likeliest = coins
    config = SHAPES[opts.model](opts.small)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, opts.dtype)).eval()
    most, n = opts.drafts, opts.rounds
    prompt = torch.randint(1, config.vocab_size, (opts.rows, opts.context), device=DEVICE).tolist()
    capacity = opts.context + 12 * n * (1 + most)
    with decoder(model, opts.rows, capacity, 1) as made:
        made.prefill(prompt)
        made.step()
        plain = seconds(made.step, n)
    with decoder(model, opts.rows, capacity, 1 + most) as made:
        made.prefill(prompt)
        step = seconds(made.step, n)
        good = (torch.rand(5, n, opts.rows, most, device=DEVICE) < opts.accepted).long()
        began = time.perf_counter()
        rounds(made, good[0, :1])
        torch.cuda.synchronize()
        warm = time.perf_counter() - began
        runs, gains = [], []
        for each in good:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            gains.append(rounds(made, each))
            end.record()
            end.synchronize()
            runs.append(begin.elapsed_time(end) / 1e3 / n)
        took, gained = statistics.median(runs), torch.stack(gains).double().mean().item()
        kernels = profiled(lambda: made.check(good[0, 0]), 60) if opts.profile else []
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": opts.commit,
        "machine": torch.cuda.get_device_name(),
        "versions": versions(),
        "model": opts.model,
        "dtype": opts.dtype,
        "rows": opts.rows,
        "context": opts.context,
        "drafts": most,
        "step_ms": plain * 1e3,
        "step_with_slack_ms": step * 1e3,
        "round_ms": took * 1e3,
        "first_round_s": warm,
        "tokens_a_round": gained,
        "round_in_steps": took / plain,
        "tokens_in_plain": gained * plain / took,
        "kernels": kernels,
        "texts": rates(model, prompt, opts) if opts.assistant else None,
    }


def show(found: dict[str, Any]) -> None:
    print(
        f"{found['model']}, {found['rows']} rows at {found['context']} tokens, {found['drafts']} drafts, "
        f"{found['dtype']}, {found['machine']}: a step {found['step_ms']:.3f} ms, {found['step_with_slack_ms']:.3f} "
        f"with slack, a round {found['round_ms']:.3f} ms = {found['round_in_steps']:.3f} steps; "
        f"{found['tokens_a_round']:.2f} tokens a round, {found['tokens_in_plain']:.2f} x the tokens of steps; "
        f"first round {found['first_round_s']:.1f} s"
    )
    if found["texts"]:
        texts = found["texts"]
        print(
            f"    texts: {texts['plain']:.0f} tokens/s, with an assistant {texts['assisted']:.0f}, "
            f"{texts['assisted'] / texts['plain']:.2f} x; "
            f"its step is {texts['assistant_step_ms'] / found['step_ms']:.3f}"
        )
    for kernel in found["kernels"]:
        print(f"    {kernel['us']:9.1f} us {kernel['calls']:7.1f} x {kernel['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--accepted", type=float, default=0.7, help="the probability that a draft is right")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=60, help="of one timing")
    parser.add_argument("--assistant", action="store_true", help="also texts with a model that drafts")
    parser.add_argument("--profile", action="store_true", help="also what kernels a round runs")
    parser.add_argument("--small", action="store_true", help="a tiny model of the same kind")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    result = measure(opts)
    show(result)
    if opts.json:
        opts.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
