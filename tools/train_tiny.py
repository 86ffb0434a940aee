"""Train the two small hybrid models that ship in `src/statecache/tiny`: `story`, and its draft model for speculation.

Reproduce the shipped weights with one command:

    python tools/train_tiny.py all --corpus PATH --work DIR

It runs five steps, each also a command of its own: `tokenise`, `story`, `draft`, `evaluate`, `export`. PATH holds
`train.txt` (or `train.txt.xz`) and `valid.txt`, documents ended by a line `<|endoftext|>`; the text is not in this
repository (src/statecache/tiny/README.md says what it was). DIR takes the token arrays and the checkpoints, and
`export` copies the checkpoints over the shipped ones. A seed fixes every draw; kernels that add in no fixed order
still leave two runs apart in the last digits.

Needs torch >= 2.9 and transformers >= 5.17. On a GPU, install `fla-core`: transformers picks up its fused gated delta
rule, without which training is several times slower. On Hopper GPUs that kernel wants Triton >= 3.7.1. Shapes: B rows,
T window tokens, V vocabulary.
"""

import argparse
import copy
import json
import lzma
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

TINY = Path(__file__).resolve().parents[1] / "src" / "statecache" / "tiny"
END = "<|endoftext|>"
END_ID = 0
VALID_TOKENS = 512  # tokens of one validation window
VALID_WINDOWS = 64

SHARED = {
    "vocab_size": 4096,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
    },
    "tie_word_embeddings": True,
    "bos_token_id": END_ID,
    "eos_token_id": END_ID,
}
STORY = Qwen3_5TextConfig(
    hidden_size=256,
    intermediate_size=632,
    num_hidden_layers=8,
    layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
    linear_num_key_heads=4,
    linear_num_value_heads=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    **SHARED,
)
# Two layers: a draft step must cost a small part of a step of `story`, which a deep narrow model of this size does not.
# The width is that of `story`, whose embedding the draft starts from; the layers are narrow inside to pay for it.
DRAFT = Qwen3_5TextConfig(
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    **SHARED,
)


@dataclass(frozen=True)
class Plan:
    """How one model is trained. Rates are peaks: a linear warm-up, then a straight line to zero."""

    steps: int
    rows: int = 64
    window: int = 1024  # tokens
    warmup: int = 100  # steps
    matrix_rate: float = 4e-3  # Muon: the hidden matrices
    vector_rate: float = 3e-3  # AdamW: embedding, convolutions, norms, gates
    weight_decay: float = 0.5  # of the matrices
    embedding_decay: float = 0.1
    dropout: float = 0.1  # of the embedding and of each residual branch
    ema: float = 0.995
    check: int = 250  # steps between validations
    seed: int = 0


STORY_PLAN = Plan(steps=900, dropout=0.05)
DRAFT_PLAN = Plan(steps=1800, matrix_rate=6e-3, vector_rate=4e-3, weight_decay=0.1, dropout=0.0)


def documents(path: Path) -> list[str]:
    """Read the documents of `path`, or of `path`.xz: stripped, no empty ones."""
    packed = path.with_name(path.name + ".xz")
    text = path.read_text() if path.exists() else lzma.decompress(packed.read_bytes()).decode()
    return [document for part in text.split(END) if (document := part.strip("\n"))]


def tokenise(corpus: Path, work: Path) -> None:
    """Write work/train.npy and work/valid.npy: uint16 ids, one `END_ID` after each document."""
    tokenizer = Tokenizer.from_file(str(TINY / "story" / "tokenizer.json"))
    work.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        encoded = tokenizer.encode_batch_fast(documents(corpus / f"{split}.txt"))
        ids = np.concatenate([np.array([*document.ids, END_ID], dtype=np.uint16) for document in encoded])
        np.save(work / f"{split}.npy", ids)
        print(f"{split}: {len(encoded)} documents, {len(ids)} tokens", flush=True)


def load_ids(work: Path, split: str, device: torch.device) -> Tensor:
    """Load the ids of `split`: (tokens,) long."""
    return torch.from_numpy(np.load(work / f"{split}.npy").astype(np.int64)).to(device)


def validation_windows(ids: Tensor, windows: int = VALID_WINDOWS) -> tuple[Tensor, Tensor]:
    """Cut the head of `ids` into inputs and next-token targets, each (windows, VALID_TOKENS)."""
    count = windows * VALID_TOKENS
    return ids[:count].view(windows, -1), ids[1 : count + 1].view(windows, -1)


def training_windows(ids: Tensor, rows: int, window: int, seed: int) -> Iterator[Tensor]:
    """Yield (B, T + 1) batches without end; each epoch cuts the text at a new random offset, in a new order."""
    draw = torch.Generator().manual_seed(seed)
    span = torch.arange(window + 1, device=ids.device)
    while True:
        offset = int(torch.randint(window, (), generator=draw))
        starts = torch.arange(offset, len(ids) - window, window)
        starts = starts[torch.randperm(len(starts), generator=draw)].to(ids.device)
        for batch in starts[: len(starts) // rows * rows].split(rows):
            yield ids[batch[:, None] + span]


def build(config: Qwen3_5TextConfig, seed: int) -> Qwen3_5ForCausalLM:
    """Initialise a model: branches start at zero, time steps as in Mamba (arXiv:2312.00752), log-uniform in 1e-3..1e-1.

    The default start (A up to 16, a time step near one) forgets all within a token or two.
    """
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config)
    for name, module in model.named_modules():
        if name.endswith(("out_proj", "o_proj", "down_proj")):
            nn.init.zeros_(module.weight)
        if name.endswith("linear_attn"):
            step = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
            module.dt_bias.data.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) == step
            module.A_log.data.uniform_(1, 16).log_()
    # Set after construction: a padding id known earlier would keep the end token's embedding from learning.
    model.config.pad_token_id = END_ID
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=END_ID
    )
    return model


def add_dropout(model: nn.Module, rate: float) -> None:
    """Drop the embedding's and each residual branch's output at `rate` while training, through forward hooks."""

    def drop(module: nn.Module, _: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    for name, module in model.named_modules():
        if rate and name.endswith(("embed_tokens", "out_proj", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def shifted_conv(hidden_states: Tensor, weight: Tensor, bias: None, activation: str, **_) -> Tensor:
    """Compute the causal depthwise convolution and SiLU as shifted products: (B, D, T), (D, K) -> (B, D, T).

    The compiler fuses these; the library convolution's backward pass is a slow kernel of its own.
    """
    kernel, length = weight.shape[-1], hidden_states.shape[-1]
    padded = F.pad(hidden_states, (kernel - 1, 0))
    weight = weight.to(hidden_states.dtype)
    return F.silu(sum(padded[..., i : i + length] * weight[:, i, None] for i in range(kernel)))


def make_optimisers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Give the hidden matrices to Muon and the rest to AdamW; only matrices and the embedding decay."""
    matrices, tables, vectors = [], [], []
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            tables.append(weight)
        else:
            (matrices if weight.ndim == 2 and min(weight.shape) >= 32 else vectors).append(weight)
    groups = [
        {"params": tables, "weight_decay": plan.embedding_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=plan.vector_rate, betas=(0.9, 0.98)),
    ]


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """Score the next token after each of `inputs` (B, T): logits (B, T, V), bfloat16 arithmetic on a GPU."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
        return model(input_ids=inputs, use_cache=False).logits


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the negative log-likelihood of `targets` (B, T) in nats a token; logits (B, T, V)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def teacher_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Average KL(teacher || model) in nats a token; both logits (B, T, V)."""
    logits, teacher = (x.float().flatten(0, 1).log_softmax(-1) for x in (logits, teacher))
    return F.kl_div(logits, teacher, reduction="batchmean", log_target=True)


def train(
    model: Qwen3_5ForCausalLM,
    ids: Tensor,
    plan: Plan,
    out: Path,
    loss: Callable[[Tensor, Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    score: Callable[[nn.Module], float],
) -> None:
    """Train on `ids` and keep in `out` the bfloat16 weights of the average that has the lowest `score`.

    `target` maps a (B, T + 1) batch to what `loss` compares the logits (B, T, V) with.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema))
    add_dropout(model, plan.dropout)
    if ids.is_cuda:
        loss = torch.compile(loss)
        for layer in model.model.layers:
            layer.compile()
    optimisers = make_optimisers(model, plan)
    rate = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / plan.warmup, (plan.steps - step) / (plan.steps - plan.warmup))
        )
        for optimiser in optimisers
    ]
    best, began, seen = math.inf, time.monotonic(), []
    model.train()
    batches = training_windows(ids, plan.rows, plan.window, plan.seed)
    for step, batch in zip(range(1, plan.steps + 1), batches, strict=False):
        value = loss(predict(model, batch[:, :-1]), target(batch))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimisers, *rate):
            each.step()
        model.zero_grad()
        average.update_parameters(model)
        seen.append(value.detach())
        if step % plan.check == 0 or step == plan.steps:
            rounded = copy.deepcopy(average.module).to(torch.bfloat16)
            valid = score(copy.deepcopy(rounded).float().eval())
            if valid < best:
                best = valid
                rounded.save_pretrained(out)
            epoch = step * plan.rows * plan.window / len(ids)
            print(
                f"{out.name} step {step} epoch {epoch:.1f} train {torch.stack(seen).mean():.4f} valid {valid:.4f}"
                f" best {best:.4f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
            seen.clear()


def train_story(work: Path, plan: Plan, device: torch.device) -> None:
    """Train the main model on the text."""
    inputs, targets = validation_windows(load_ids(work, "valid", device))
    model = build(STORY, plan.seed).to(device)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return float(text_loss(predict(model, inputs), targets))

    train(model, load_ids(work, "train", device), plan, work / "story", text_loss, lambda batch: batch[:, 1:], score)


def train_draft(work: Path, plan: Plan, device: torch.device) -> None:
    """Train the draft model to give the main model's distributions over the same text."""
    teacher = AutoModelForCausalLM.from_pretrained(work / "story", dtype=torch.float32).to(device).eval()
    inputs, _ = validation_windows(load_ids(work, "valid", device))
    model = build(DRAFT, plan.seed).to(device)
    model.model.embed_tokens.weight.data.copy_(teacher.model.embed_tokens.weight)
    model.model.norm.weight.data.copy_(teacher.model.norm.weight)

    @torch.no_grad()
    def target(batch: Tensor) -> Tensor:
        return predict(teacher, batch[:, :-1])

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return float(teacher_loss(predict(model, inputs), predict(teacher, inputs)))

    train(model, load_ids(work, "train", device), plan, work / "draft", teacher_loss, target, score)


@torch.no_grad()
def evaluate(work: Path, folder: Path, windows: int) -> dict[str, float]:
    """Measure the saved weights of `folder` in float32 on the CPU: losses in nats a token, agreements as fractions.

    The losses are over the first `windows` validation windows, without carry; the checkpoints were chosen by the first
    64. There too, `agreement` counts equal first choices of the two models, and `overlap` is one minus the total
    variation of their distributions: the chance that a token sampled from the draft is accepted. `agreement_greedy` is
    over the main model's own greedy continuations, 128 tokens after each of 32 validation prompts of 64 tokens.
    """
    inputs, targets = validation_windows(load_ids(work, "valid", torch.device("cpu")), windows)
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for name in ("story", "draft")
    }
    report = {f"{name}_parameters": model.num_parameters() for name, model in models.items()}
    seen = {"story_loss": [], "draft_loss": [], "agreement": [], "overlap": []}
    for x, y in zip(inputs.split(8), targets.split(8), strict=True):
        logits = {name: model(input_ids=x, use_cache=False).logits for name, model in models.items()}
        for name in models:
            seen[f"{name}_loss"].append(F.cross_entropy(logits[name].mT, y, reduction="none"))
        seen["agreement"].append((logits["story"].argmax(-1) == logits["draft"].argmax(-1)).float())
        seen["overlap"].append(torch.minimum(logits["story"].softmax(-1), logits["draft"].softmax(-1)).sum(-1))
    report |= {name: float(torch.cat(values).mean()) for name, values in seen.items()}
    prompts = inputs[:: max(windows // 32, 1)][:32, :64]
    text = models["story"].generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=128, max_new_tokens=128
    )
    greedy = models["draft"](input_ids=text[:, :-1], use_cache=False).logits.argmax(-1)
    report["agreement_greedy"] = float((greedy == text[:, 1:])[:, 63:].float().mean())
    return report


def export(work: Path) -> None:
    """Copy the two checkpoints of `work` over the shipped ones; the shipped tokenizer stays."""
    for name in ("story", "draft"):
        for file in ("config.json", "generation_config.json", "model.safetensors"):
            (TINY / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work / name / file, TINY / name / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tokenise", "story", "draft", "evaluate", "export", "all"])
    parser.add_argument("--work", type=Path, required=True, help="folder for token arrays and checkpoints")
    parser.add_argument("--corpus", type=Path, help="folder of train.txt and valid.txt (tokenise)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shipped", action="store_true", help="evaluate the shipped weights, not those of --work")
    parser.add_argument("--windows", type=int, default=VALID_WINDOWS, help="validation windows to evaluate; 495 is all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the plan")
    arguments = parser.parse_args()
    work, device = arguments.work, torch.device(arguments.device)
    changes = dict(change.split("=", 1) for change in arguments.set)
    story_plan, draft_plan = (
        replace(plan, **{name: type(getattr(plan, name))(value) for name, value in changes.items()})
        for plan in (STORY_PLAN, DRAFT_PLAN)
    )
    if device.type == "cuda":
        modeling_qwen3_5.causal_conv1d_fn = shifted_conv
        torch.set_float32_matmul_precision("high")
    steps = ["tokenise", "story", "draft", "evaluate", "export"] if arguments.step == "all" else [arguments.step]
    for step in steps:
        if step == "tokenise":
            if arguments.corpus is None:
                parser.error("tokenise needs --corpus PATH")
            tokenise(arguments.corpus, work)
        elif step == "story":
            train_story(work, story_plan, device)
        elif step == "draft":
            train_draft(work, draft_plan, device)
        elif step == "evaluate":
            folder = TINY if arguments.shipped else work
            print(json.dumps(evaluate(work, folder, arguments.windows), indent=2))
        else:
            export(work)


if __name__ == "__main__":
    main()
