"""Our compiled step on a CPU beside llama.cpp's, with the same weights in one process after the other.

    pip install xllamacpp gguf                                   # llama.cpp as wheels; neither is needed elsewhere
    python benchmarks/cpu_llama.py                               # six models: ten minutes
    python benchmarks/cpu_llama.py --only lfm2 --json result.json

The model is written to a GGUF file as its own conversion would: in float32, in float16 and in 8-bit blocks (Q8_0, of
what has 32 columns or more). llama.cpp's server writes greedily from the same ids, and its own timings count; ours are
steps of the code that `sc.Decoder` runs, after the same prompt. "same": of its first tokens in float32, how many are
those of the model here, which says whether both run the same function.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

import statecache as sc
from cpu_compiled import CONTEXT, MODELS, ROOM, by_code, hollow, model_of, ready
from shapes import table, tokens_of, versions
from statecache.cli.measure import cpu_name
from statecache.decode.compiling import compile_step

NEW, TURNS = 128, 3  # tokens of a text, and texts
TYPES = ("F32", "F16", "Q8_0")

# what tensors of a layer are called there, and how they lie; the others lie as they do here
MAMBA = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
ATTENTION = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
NAMES = {
    "mamba": MAMBA,
    "mamba2": MAMBA,
    "granitemoehybrid": {
        **{name.replace("mixer.", "mamba."): there for name, there in MAMBA.items() if name != "norm.weight"},
        **ATTENTION,
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "shared_mlp.output_linear.weight": "ffn_down.weight",
    },
    "qwen3_5": {
        **ATTENTION,
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "mlp.gate_proj.weight": "ffn_gate.weight",
        "mlp.up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
        "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
        "linear_attn.in_proj_z.weight": "attn_gate.weight",
        "linear_attn.in_proj_b.weight": "ssm_beta.weight",
        "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
        "linear_attn.conv1d.weight": "ssm_conv1d.weight",
        "linear_attn.dt_bias": "ssm_dt.bias",
        "linear_attn.A_log": "ssm_a",
        "linear_attn.norm.weight": "ssm_norm.weight",
        "linear_attn.out_proj.weight": "ssm_out.weight",
    },
    "lfm2": {
        **ATTENTION,
        "self_attn.out_proj.weight": "attn_output.weight",
        "self_attn.q_layernorm.weight": "attn_q_norm.weight",
        "self_attn.k_layernorm.weight": "attn_k_norm.weight",
        "operator_norm.weight": "attn_norm.weight",
        "ffn_norm.weight": "ffn_norm.weight",
        "feed_forward.w1.weight": "ffn_gate.weight",
        "feed_forward.w2.weight": "ffn_down.weight",
        "feed_forward.w3.weight": "ffn_up.weight",
        "conv.conv.weight": "shortconv.conv.weight",
        "conv.in_proj.weight": "shortconv.in_proj.weight",
        "conv.out_proj.weight": "shortconv.out_proj.weight",
    },
}
ARCHITECTURES = {"granitemoehybrid": "granitehybrid", "qwen3_5": "qwen35"}
OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm_f.weight": "output_norm.weight",
    "embedding_norm.weight": "token_embd_norm.weight",
}


def kind_of(config: Any) -> str:
    return str(config.model_type).removesuffix("_text")


def turned(weight: Tensor, heads: int) -> Tensor:
    """A projection to keys or queries whose rotated halves are to lie side by side."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def tensors(model: Any) -> dict[str, Tensor]:
    """The weights of a model under the names, and in the form, that llama.cpp reads."""
    config = model.config
    kind, found = kind_of(config), {}
    for name, weight in model.named_parameters():
        path, value = name.split(".", 1)[1], weight.detach().float()
        if not path.startswith("layers."):
            found[OUTER[path]] = value + 1 if kind == "qwen3_5" and "norm" in path else value
            continue
        _, layer, inner = path.split(".", 2)
        if inner == "shared_mlp.input_linear.weight":
            for part, half in zip(("gate", "up"), value.chunk(2), strict=True):
                found[f"blk.{layer}.ffn_{part}.weight"] = half
            continue
        if inner.endswith(("conv1d.weight", "conv.conv.weight")):
            value = value.squeeze(1)
        elif inner.endswith("A_log"):
            value = -value.exp()
        elif kind == "qwen3_5" and "norm" in inner and "linear_attn" not in inner:
            value = value + 1
        if kind in ("mamba2", "granitemoehybrid"):
            if inner.endswith(("A_log", ".D")):
                value = value[:, None]
            elif inner.endswith("mixer.norm.weight") or inner == "mamba.norm.weight":
                value = value[None]
            elif kind == "granitemoehybrid" and inner.endswith("q_proj.weight"):
                value = turned(value, config.num_attention_heads)
            elif kind == "granitemoehybrid" and inner.endswith("k_proj.weight"):
                value = turned(value, config.num_key_value_heads)
        found[f"blk.{layer}.{NAMES[kind][inner]}"] = value
    return found


def describe(writer: Any, config: Any) -> None:
    """What llama.cpp asks of a configuration."""
    kind, layers = kind_of(config), config.num_hidden_layers
    attends = [each == "full_attention" for each in getattr(config, "layer_types", None) or [""] * layers]
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_vocab_size(config.vocab_size)
    eps = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_epsilon", None) or config.norm_eps
    writer.add_layer_norm_rms_eps(eps)
    if kind in ("mamba", "mamba2"):
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.expand * config.hidden_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank if kind == "mamba" else config.num_heads)
        if kind == "mamba2":
            writer.add_ssm_group_count(config.n_groups)
        return
    writer.add_feed_forward_length(
        config.shared_intermediate_size if kind == "granitemoehybrid" else config.intermediate_size
    )
    writer.add_head_count(config.num_attention_heads)
    heads = config.num_key_value_heads
    writer.add_head_count_kv(heads if kind == "qwen3_5" else [heads if each else 0 for each in attends])
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "granitemoehybrid":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_ssm_conv_kernel(config.mamba_d_conv)
        writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
        writer.add_ssm_state_size(config.mamba_d_state)
        writer.add_ssm_time_step_rank(config.mamba_n_heads)
        writer.add_ssm_group_count(config.mamba_n_groups)
    elif kind == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
        writer.add_full_attention_interval(attends.index(True) + 1)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_group_count(config.linear_num_key_heads)


def write(model: Any, kept: str, path: Path) -> None:
    """A GGUF file of the model, its matrices in `kept`."""
    import gguf

    kind = kind_of(model.config)
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind))
    describe(writer, model.config)
    writer.add_tokenizer_model("llama")  # of tokens that only the server's replies would show
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    named += [f"t{n}" for n in range(len(named), model.config.vocab_size)]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_list(named)
    writer.add_token_scores([0.0] * len(named))
    writer.add_token_types([*types, *[gguf.TokenType.NORMAL] * (len(named) - len(types))])
    wanted = gguf.GGMLQuantizationType[kept]
    for name, value in tensors(model).items():
        held = numpy.ascontiguousarray(value.numpy())
        matrix = name.endswith(".weight") and value.dim() == 2 and "conv" not in name and "ssm_norm" not in name
        if matrix and kept != "F32" and (kept != "Q8_0" or held.shape[-1] % 32 == 0):
            writer.add_tensor(name, gguf.quants.quantize(held, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(path: str, ids: list[int], threads: int) -> dict[str, Any]:
    """Milliseconds of a token, text by text, and the first text's tokens, by llama.cpp in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, ROOM["capacity"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity, params.warmup, params.cache_prompt = 0, True, False
    server = xllamacpp.Server(params)
    asks = {
        "prompt": ids,
        "n_predict": NEW,
        "max_tokens": NEW,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_tokens": True,
        "verbose": True,
    }
    replies = [server.handle_completions(asks) for _ in range(TURNS)]
    timings = [reply["timings"] for reply in replies]
    return {
        "ms": [each["predicted_per_token_ms"] for each in timings],
        "prompt_ms": [each["prompt_ms"] for each in timings],
        "tokens": replies[0]["__verbose"]["tokens"],
    }


def theirs(path: Path, ids: list[int], threads: int) -> dict[str, Any]:
    """The same, by a process of its own."""
    command = [sys.executable, __file__, "--serve", str(path), "--threads", str(threads)]
    done = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(shape: str, threads: int) -> dict[str, Any]:
    plain, model = model_of(shape, quick=False), sc.prepare(model_of(shape, quick=False))
    prompt = tokens_of(model, CONTEXT)
    want = sc.generate(plain, prompt, max_new_tokens=32)[0, CONTEXT:].tolist()
    cache, one = ready(model, 1), tokens_of(model, 1)
    linear = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    inputs = [torch.randn(1, 1, module.in_features) for module in linear]
    found: dict[str, Any] = {"shape": shape}
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder, "step.pt2")
        compile_step(hollow(model), {"rows": 1, **ROOM}, code)
        step = by_code(code, model, cache, one)
        for _ in range(3):
            step()
        for name, run in (
            ("statecache", step),
            ("linear layers", lambda: [module(x) for module, x in zip(linear, inputs, strict=True)]),
        ):
            taken = []
            for _ in range(NEW):
                start = time.perf_counter()
                run()
                taken.append((time.perf_counter() - start) * 1e3)
            found[name] = taken
        for kept in TYPES:
            path = Path(folder, f"{kept}.gguf")
            write(plain, kept, path)
            found[kept] = theirs(path, prompt[0].tolist(), threads)
            path.unlink()
    got = found["F32"]["tokens"][: len(want)]
    found["same"] = next((n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(got))
    found["of"] = len(want)
    return found


def report(cells: list[dict[str, Any]]) -> str:
    head = ["shape", "statecache, ms", *(f"llama.cpp {kept}, ms" for kept in TYPES), "F32 / statecache", "same"]
    rows = []
    for cell in cells:
        ours = statistics.median(cell["statecache"])
        each = {kept: statistics.median(cell[kept]["ms"]) for kept in TYPES}
        times = [f"{ours:.2f}", *(f"{each[kept]:.2f}" for kept in TYPES)]
        rows.append([cell["shape"], *times, f"{each['F32'] / ours:.2f}", f"{cell['same']} of {cell['of']}"])
    return table(head, rows)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=MODELS, help="this shape; may be given again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--json", type=Path)
    opts = parser.parse_args()
    if opts.serve:
        print(json.dumps(serve(opts.serve, json.load(sys.stdin), opts.threads)))
        return
    torch.set_num_threads(opts.threads)
    cells = []
    for shape in opts.only or MODELS:
        cells.append(measure(shape, opts.threads))
        print(report(cells[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(report(cells))
    if opts.json:
        held = {**versions(), "xllamacpp": version("xllamacpp"), "gguf": version("gguf")}
        opts.json.write_text(
            json.dumps({"versions": held, "cpu": cpu_name(), "commit": opts.commit, "cells": cells}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
