"""From what was typed to a model that is ready to run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from statecache.cli.failure import CommandError
from statecache.cli.report import spinner

EMBEDDED = Path(__file__).parents[1] / "tiny" / "story"
EMBEDDED_DRAFT = EMBEDDED.with_name("draft")
# fields of a generation configuration that change logits: always, and where tokens are drawn
PROCESSORS = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "guidance_scale",
    "sequence_bias",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "watermarking_config",
)
WARPERS = ("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
NEUTRAL_AT_ONE = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "typical_p")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Settings:
    """The options of a command that runs a model; None leaves the choice to the model or the machine."""

    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    max_new_tokens: int = 200
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    lookup: int = 0
    draft: str | None = None
    ignore_processors: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and a model that drafts for it."""

    name: str
    model: Any
    tokenizer: Any
    assistant: Any = None


def load(settings: Settings, show: bool = True) -> Loaded:
    """Read tokenizer and weights, onto the device. Raises CommandError where that cannot be done."""
    source, device = find(settings.model), pick_device(settings.device)
    dtype = settings.dtype or ("float32" if device.type == "cpu" else "auto")
    with spinner(f"loading {settings.model or 'the embedded model'} onto {device}", show), reading(source):
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype)
        model = model.to(device).eval()
    assistant = None if settings.draft is None else _load_draft(settings.draft, model)
    return Loaded(settings.model or "embedded", model, tokenizer, assistant)


def _load_draft(draft: str, model: Any) -> Any:
    """The model that drafts, on the device and in the dtype of the one it drafts for."""
    source = str(EMBEDDED_DRAFT) if draft == "tiny" else find(draft)
    with reading(source):
        assistant = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    return assistant.to(model.device).eval()


def load_config(model: str | None) -> Any:
    """The configuration alone."""
    source = find(model)
    with spinner(f"reading the configuration of {model or 'the embedded model'}"), reading(source):
        return transformers.AutoConfig.from_pretrained(source)


def find(model: str | None) -> str:
    """The folder or hub name that transformers is to read."""
    if model is None:
        return str(EMBEDDED)
    if Path(model).is_dir():
        if not Path(model, "config.json").is_file():
            raise CommandError(f'"{model}" holds no config.json: give the folder of a transformers checkpoint')
        return model
    if not HUB_NAME.fullmatch(model):
        raise CommandError(f'there is no folder "{model}": give a checkpoint\'s folder, or a hub name such as org/name')
    return model


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Keep transformers quiet, and make one line of what goes wrong."""
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        told = error.__cause__ if isinstance(error, StrictDataclassError) else error
        cause = next((line.strip() for line in str(told).splitlines() if line.strip()), type(error).__name__)
        if Path(source).is_dir():
            raise CommandError(f'cannot load "{source}": {cause}') from error
        hint = "check the name and the network, or give a folder"
        raise CommandError(f'"{source}" is no folder here and no model that the hub gave ({hint}): {cause}') from error


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else CUDA where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f'no device "{name}" here: leave --device out, or say --device cpu', 2) from error
    return torch.device(name)


def options(config: Any, settings: Settings) -> dict[str, Any]:
    """What `sc.generate` is told: what was typed, else what the model's generation configuration asks for.

    Raises CommandError where that asks for changes to logits that `sc.generate` does not make.
    """
    drawn = drawing(config, settings)
    if not settings.ignore_processors:
        _check_processors(config, draws=drawn["temperature"] > 0)
    seed = torch.seed() % 2**31 if settings.seed is None else settings.seed
    return {"max_new_tokens": settings.max_new_tokens, "lookup": settings.lookup, "seed": seed, **drawn}


def drawing(config: Any, settings: Settings) -> dict[str, Any]:
    """How tokens are drawn: temperature, top_p and top_k."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    draws = config.do_sample or settings.top_p is not None if settings.temperature is None else settings.temperature > 0
    if not draws:
        return {**neutral, "temperature": 0.0}
    # what transformers takes for a value that is set nowhere; it keeps that to itself, so there may be nothing to ask
    unset: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    typed = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": None}
    asked = {name: getattr(config, name) if x is None else x for name, x in typed.items()}
    return {name: unset.get(name, neutral[name]) if x is None else x for name, x in asked.items()}


def _check_processors(config: Any, draws: bool) -> None:
    told = {name: getattr(config, name, None) for name in PROCESSORS + (WARPERS if draws else ())}
    effective = [name for name, x in told.items() if x and not (name in NEUTRAL_AT_ONE and x == 1)]
    if effective:
        raise CommandError(
            f"the checkpoint's generation_config sets {', '.join(effective)}, which statecache does not apply: write "
            "without with --ignore-processors"
        )
