"""From what was typed to a model that is ready to run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

import statecache as sc
from statecache.cli.failure import CommandError
from statecache.cli.report import spinner
from statecache.decode.limits import MOST_DRAFTS
from statecache.decode.processors import refused
from statecache.errors import UnknownLayerError
from statecache.models.decoder import decoder_of
from statecache.models.fingerprint import fingerprint

EMBEDDED = Path(__file__).parents[1] / "tiny" / "story"
EMBEDDED_DRAFT = EMBEDDED.with_name("draft")
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
    top_k: int | None = None
    stop: tuple[str, ...] = ()
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

    @cached_property
    def fingerprint(self) -> str:
        """Whose weights they are. Looked at once: no command changes them."""
        return fingerprint(decoder_of(self.model))


def load(settings: Settings, show: bool = True) -> Loaded:
    """Read tokenizer and weights, onto the device, and prepare the model. Raises CommandError where that cannot be."""
    source = find(settings.model)
    with spinner("reading the tokenizer", show), reading(source):
        transformers.AutoConfig.from_pretrained(source)  # what is wrong with it is no fault of the tokenizer's
        tokenizer = _load_tokenizer(source)
    model = prepared(load_model(settings, show), settings.model or "embedded")
    assistant = None if settings.draft is None else _load_draft(settings.draft, model)
    return Loaded(settings.model or "embedded", model, tokenizer, assistant)


def load_model(settings: Settings, show: bool = True) -> Any:
    """The model as it is, on its device. Raises CommandError where it cannot be read."""
    source, device = find(settings.model), pick_device(settings.device)
    dtype = settings.dtype or ("float32" if device.type == "cpu" else "auto")
    with spinner(f"loading {settings.model or 'the embedded model'} onto {device}", show), reading(source):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.to(device).eval()


def _load_tokenizer(source: str) -> Any:
    """The model's tokenizer. Where a folder has none, transformers may make one that knows no word."""
    cause: ValueError | None = None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        if tokenizer("a", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except ValueError as error:
        cause = error
    raise CommandError(
        f'"{source}" has no tokenizer that transformers can read: save the model\'s own there, with '
        f'tokenizer.save_pretrained("{source}")'
    ) from cause


def _load_draft(draft: str, model: Any) -> Any:
    """The model that drafts, on the device and in the dtype of the one it drafts for."""
    source = str(EMBEDDED_DRAFT) if draft == "tiny" else find(draft)
    with reading(source):
        assistant = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
    return prepared(assistant.to(model.device).eval(), draft)


def prepared(model: Any, name: str) -> Any:
    """The model with exact state operators, before anything is written with it."""
    try:
        return sc.prepare(model)
    except UnknownLayerError as error:
        raise CommandError(f'cannot write with "{name}", which prepare() does not take: {error}') from error


def drafts(loaded: Loaded, settings: Settings) -> bool:
    """Whether anything drafts."""
    return settings.lookup > 0 or loaded.assistant is not None


def most_drafts(loaded: Loaded, settings: Settings) -> int:
    """How many tokens a round may draft."""
    return MOST_DRAFTS if drafts(loaded, settings) else 0


def captured(loaded: Loaded, settings: Settings, how: dict[str, Any]) -> bool:
    """Whether `sc.generate`, told this, writes by a decoder on a cache that never moves, if there is one."""
    drawn = loaded.assistant is not None and how["temperature"] > 0
    return not drawn and not (drafts(loaded, settings) and how.get("stop"))


def slack_of(loaded: Loaded, settings: Settings) -> int:
    """How many tokens a cache is to take back: drafts, where there are any."""
    most = most_drafts(loaded, settings)
    return 1 + most if most else 0


def new_cache(loaded: Loaded, settings: Settings) -> Any:
    """An empty cache for the model."""
    return sc.StateCache(loaded.model.config, slack=slack_of(loaded, settings))


def tokens_held(cache: Any) -> int:
    """How many tokens a cache of one row has taken in. Columns count more, once the row has been read anew."""
    return int(sum(cache.lengths.tolist()))


def load_config(model: str | None) -> Any:
    """The configuration alone, also from its file."""
    source = model if model is not None and Path(model).is_file() else find(model)
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
        if Path(source).exists():
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
    more: dict[str, Any] = {"processors": []} if settings.ignore_processors else {}
    if settings.stop:
        more["stop"] = list(settings.stop)
    return {"max_new_tokens": settings.max_new_tokens, "lookup": settings.lookup, "seed": seed, **more, **drawn}


def drawing(config: Any, settings: Settings) -> dict[str, Any]:
    """How tokens are drawn: temperature, top_p and top_k."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    asks = settings.top_p is not None or settings.top_k is not None
    draws = config.do_sample or asks if settings.temperature is None else settings.temperature > 0
    if not draws:
        return {**neutral, "temperature": 0.0}
    # what transformers takes for a value that is set nowhere; it keeps that to itself, so there may be nothing to ask
    unset: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    typed = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    asked = {name: getattr(config, name) if x is None else x for name, x in typed.items()}
    return {name: unset.get(name, neutral[name]) if x is None else x for name, x in asked.items()}


def _check_processors(config: Any, draws: bool) -> None:
    if names := refused(config, draws):
        raise CommandError(
            f"the checkpoint's generation_config sets {names}, which statecache does not apply: write without with "
            "--ignore-processors"
        )
