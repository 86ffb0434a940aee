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


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, the name of the argument that takes its cache, and a model that drafts for it."""

    name: str
    model: Any
    tokenizer: Any
    cache_argument: str
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
    argument = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    assistant = None if settings.draft is None else _load_draft(settings.draft, model)
    return Loaded(settings.model or "embedded", model, tokenizer, argument, assistant)


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


def sampling(config: Any, settings: Settings) -> dict[str, Any]:
    """What `generate` is told about drawing tokens."""
    if settings.temperature is None:
        draw = bool(config.do_sample) or settings.top_p is not None
    else:
        draw = settings.temperature > 0
    if not draw:
        return {"do_sample": False}
    given = {"temperature": settings.temperature, "top_p": settings.top_p}
    return {"do_sample": True, **{name: x for name, x in given.items() if x is not None}}


def drawing(config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The same for `statecache.generate`, which reads nothing of this in the model's configuration itself."""
    if not options["do_sample"]:
        return {"temperature": 0.0}
    # what transformers takes for a value that is set nowhere; it keeps that to itself, so there may be nothing to ask
    unset: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    asked = {name: options.get(name, getattr(config, name)) for name in neutral}
    return {name: unset.get(name, neutral[name]) if x is None else x for name, x in asked.items()}


def check_draftable(config: Any, options: dict[str, Any]) -> None:
    """Raise CommandError where transformers would change logits in ways that `statecache.generate` does not know."""
    names = PROCESSORS + (WARPERS if options["do_sample"] else ())
    told = {name: getattr(config, name, None) for name in names}
    effective = [name for name, x in told.items() if x and not (name in NEUTRAL_AT_ONE and x == 1)]
    if effective:
        raise CommandError(
            f"the checkpoint's generation_config sets {', '.join(effective)}, which drafts would not heed: leave "
            "--lookup and --draft out"
        )


def seeded(settings: Settings) -> int:
    """Start the generators from the seed asked for, else from a fresh one; returns it."""
    seed = torch.seed() % 2**31 if settings.seed is None else settings.seed
    torch.manual_seed(seed)
    return seed
