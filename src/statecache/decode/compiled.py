"""A CPU's step as code that torch compiled ahead of time: named by all that it is good for, and made behind the text.

No text waits for it. Steps run plainly until there is code, which a process of its own makes if plain steps took a
second: when this one ends, or beside it once they took twenty. From then on, in every process, steps of that kind run
by it. A file holds machine code for one structure of a model, one shape of a cache, one number of threads, one machine
and the versions of what made it; the tensors of model and cache are its arguments. Where none can be made a note says
why, and steps stay plain.

B rows, V tokens of the model.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import inspect
import io
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import statecache
from statecache.decode.feed import step
from statecache.models.cache import StateCache
from statecache.models.parts import collects, hooked
from statecache.storage.table import Stores

FOLDER = "STATECACHE_COMPILED"  # where code is kept, if this is set; nowhere, if it is empty
WORTH = 1.0  # seconds of plain steps of one kind in this process from which on code is made for them, when it ends
AFTER = 20.0  # and from which on it is made at once, which slows them meanwhile
KEPT = 64  # files, the latest used
TOLERANCE = 1e-4  # of the largest logit, between what is compiled and what is not
OF_FILES = "_name_or_path", "transformers_version"  # in a configuration, of where it comes from
OF_CALLS = "_output_capturing_hooks_installed"  # of a model that was asked for hidden states once
SMALL = 2**16  # bytes of a tensor that goes to the process that compiles as it is; larger ones go without their numbers

_spent: dict[Path, float] = {}  # seconds of plain steps, by the file that would hold their code
_ordered: set[Path] = set()  # files that this process has had made
_waiting: dict[Path, bytes] = {}  # of these, what has yet to be compiled
_making: list[subprocess.Popen[bytes]] = []  # what makes them
_right: set[Path] = set()  # whose code this process has seen to do what the plain step does


def folder() -> Path | None:
    """Where code is kept; None where nobody wants any."""
    given = os.environ.get(FOLDER)
    if given is not None:
        return Path(given) if given else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "statecache" / "compiled"
    except RuntimeError:  # nobody's home
        return None


def compiles(model: nn.Module) -> bool:
    """Whether steps of a model may be compiled: float32 on a CPU, and no function of its modules is anybody's own."""
    if os.name != "posix" or not sys.executable or folder() is None or torch.is_autocast_enabled("cpu"):
        return False
    if _written(type(model)) is None:
        return False
    held = [*model.parameters(), *model.buffers()]
    if any(t.device.type != "cpu" or (t.is_floating_point() and t.dtype != torch.float32) for t in held):
        return False
    return not any(_changed(module) for module in model.modules())


class Ahead:
    """The code of one cache's steps, from when there is some. `step` gives None until then."""

    def __init__(self, model: nn.Module, cache: StateCache) -> None:
        self.model, self.cache = model, cache
        self._folder = folder() if compiles(model) and _dense(cache) else None  # None: steps stay plain
        self._file: Path | None = None  # known from the first step on, since passes change the form of a new cache
        self._code: Any = None
        self._inputs: list[Tensor] = []

    def step(self, ids: Tensor, count: Tensor) -> Tensor | None:
        """Run a step over ids (B, 1), of which rows take in `count` (B,): its logits (B, V), or None without code."""
        if self._code is None and self._folder is not None:
            self._look(self._folder, ids, count)
        if self._code is None:
            return None
        logits: Tensor = self._code.run([*self._inputs, ids, count])[0]
        self.cache.states.moved()
        return logits

    def spent(self, seconds: float) -> None:
        """Say how long a plain step took. Has code made, once that is worth it."""
        if self._folder is None or self._file is None:
            return
        spent = _spent[self._file] = _spent.get(self._file, 0.0) + seconds
        if spent > WORTH and self._file not in _ordered:
            _ordered.add(self._file)
            order(self._file, self.model, self.cache)
        if spent > AFTER and self._file in _waiting:
            _start(self._file)

    def _look(self, folder: Path, ids: Tensor, count: Tensor) -> None:
        """Take the code, if it is there and right."""
        file = self._file = self._file or folder / f"{name_of(self.model, self.cache)}.pt2"
        if not _there(file):
            if _there(note_of(file)):
                self._folder = None
            return
        _making[:] = [each for each in _making if each.poll() is None]
        try:
            code = load_code(file)
            if file not in _right and not self._agrees(code, ids, count):
                raise RuntimeError("its logits are not those of the plain step")
        except (RuntimeError, OSError) as error:
            self._folder = None
            warnings.warn(f"a compiled step is not used, {file}: {error}", stacklevel=2)
            return
        _right.add(file)
        with contextlib.suppress(OSError):  # a folder of somebody else's
            os.utime(file)
        self._code, self._inputs = code, inputs(self.model, self.cache)

    def _agrees(self, code: Any, ids: Tensor, count: Tensor) -> bool:
        """Whether two steps by the code give what two plain ones do. On copies: the cache stays as it is."""
        twins = self.cache.fork(), self.cache.fork()
        held = inputs(self.model, twins[1])
        for _ in range(2):
            want, got = step(self.model, twins[0], ids, count), code.run([*held, ids, count])[0]
            if not bool((got - want).abs().max() <= TOLERANCE * want.abs().max()):
                return False
        return True


def inputs(model: nn.Module, cache: StateCache) -> list[Tensor]:
    """What code takes before ids (B, 1) and count (B,): the tensors of a model and of a cache."""
    return [*(t.detach() for _, t in tensors_of(model)), *cache.states.buffers()]


def being_made() -> bool:
    """Whether this process has code made, now or when it ends, that is not there yet."""
    return any(not _there(file) and not _there(note_of(file)) for file in _ordered)


# ---- what code is good for


def name_of(model: nn.Module, cache: StateCache) -> str:
    """The digest of all that code for this model's steps on this cache depends on."""
    digest = hashlib.sha256()
    for line in (*_circumstances(), *_structure(model), *_shapes(cache)):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:32]


def _circumstances() -> Iterator[str]:
    yield from _machine()
    yield f"threads {torch.get_num_threads()}"
    yield _source()


@lru_cache
def _machine() -> tuple[str, ...]:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    versions = [f"{package.__name__} {package.__version__}" for package in (torch, transformers)]
    return (*versions, sys.platform, platform.machine(), torch.backends.cpu.get_cpu_capability(), flags)


@lru_cache
def _source() -> str:
    """A digest of our own code."""
    digest = hashlib.sha256()
    for file in sorted(Path(inspect.getfile(statecache)).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _structure(model: nn.Module) -> Iterator[str]:
    """What a model is but for its weights: modules, what they are told, and shapes."""
    config: Any = model.config
    told = config.to_dict().items()
    yield repr(sorted((key, value) for key, value in told if key not in OF_FILES))
    yield repr(config._attn_implementation)
    first: dict[int, str] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        yield f"{place} {_called(type(module))} {first.setdefault(id(module), place)}"
        for key, value in sorted(vars(module).items()):
            if key == OF_CALLS:
                continue
            if isinstance(value, (bool, int, float, str, type(None))):
                yield f"{key} {value!r}"
            elif isinstance(value, Tensor):
                yield f"{key} {value.dtype} {_digest(value)}"
            elif inspect.isroutine(value) or isinstance(value, type):
                yield f"{key} {_called(value)}"
    for place, tensor in tensors_of(model):
        yield f"{place} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"
    written = _written(type(model))
    yield hashlib.sha256(written.read_bytes() if written else b"").hexdigest()


def _shapes(cache: StateCache) -> Iterator[str]:
    states = cache.states
    yield f"{states.made_for} {states.rows} {states.capacity} {states.slack} {states.back}"
    yield from (f"{tuple(t.shape)} {t.stride()} {t.dtype}" for t in states.buffers())


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _written(kind: type) -> Path | None:
    """The file that a class is written in; None where it is in none, as in a notebook."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Path(file) if file and _there(Path(file)) else None


def _called(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _changed(module: nn.Module) -> bool:
    """Whether somebody hooks a module, or has put a function of his own on it."""
    own = vars(module).get("forward")
    of = getattr(own, "__self__", own)
    return hooked(module) or (own is not None and not type(of).__module__.startswith("statecache."))


# ---- files


def _there(file: Path) -> bool:
    """Whether there is such a file, as far as this process may know."""
    try:
        return file.is_file()
    except OSError:
        return False


def note_of(file: Path) -> Path:
    """Where it says why there is no such file."""
    return file.with_suffix(".why")


def lock_of(file: Path) -> Path:
    """Where it says which process compiles it."""
    return file.with_suffix(".lock")


def _dense(cache: StateCache) -> bool:
    """Whether a cache is of the form that the process which compiles makes."""
    return cache.states.store == Stores() and not cache.states.offload


def load_code(file: Path) -> Any:
    """What runs a file of code: what `torch._inductor.aoti_load_package` wraps, after seconds of importing."""
    from torch._C import _aoti

    return _aoti.AOTIModelPackageLoader(str(file), "model", False, 1, -1)


def order(file: Path, model: nn.Module, cache: StateCache) -> None:
    """Have the step compiled, by a process of its own, when this one ends if not before."""
    packed = io.BytesIO()
    try:
        Hollow(packed).dump((model, _options(cache), torch.get_num_threads()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        _say(file, f"the model cannot be pickled: {error}")
        return
    _waiting[file] = packed.getvalue()


def _say(file: Path, why: str) -> None:
    """Note why there is no such file, if that can be written."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note_of(file).write_text(f"{why}\n")


def _start(file: Path) -> None:
    """Have what waits for it compiled, unless another process is at it."""
    packed, lock = _waiting.pop(file), lock_of(file)
    if _there(lock):
        if not _alive(lock):
            _say(file, "the process that compiled it ended without a word")
            lock.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):  # there is nowhere to keep it
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.write_text(str(_process(file, packed).pid))


@atexit.register
def _start_all() -> None:
    for file in list(_waiting):
        _start(file)


class _Beside(subprocess.Popen[bytes]):
    """A process that goes on when this one ends, which is nothing to warn of."""

    def __del__(self) -> None:
        pass


def _process(file: Path, packed: bytes) -> _Beside:
    """What compiles it, which goes on when this process ends."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    with tempfile.TemporaryFile() as given:
        given.write(packed)
        given.seek(0)
        process = _Beside(
            [sys.executable, "-m", "statecache.decode.compiling", str(file)],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), FOLDER: "", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        )
    _making.append(process)
    return process


def _options(cache: StateCache) -> dict[str, Any]:
    states = cache.states
    return {"rows": states.rows, "capacity": states.capacity, "slack": states.slack, "back": states.back}


def _alive(lock: Path) -> bool:
    try:
        os.kill(int(lock.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


class Hollow(pickle.Pickler):
    """Pickles a model without its weights."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return _weight, (value.shape, value.stride(), value.dtype, value.requires_grad)
        if isinstance(value, Tensor) and value.nbytes > SMALL:
            return torch.empty_strided, (tuple(value.shape), value.stride(), value.dtype)
        if collects(value):
            return _collects_nothing, ()
        return NotImplemented


def _collects_nothing() -> Any:
    """A hook that does what one that collects does in a step: nothing."""
    return _ignore


def _ignore(*given: Any) -> None:
    pass


def _weight(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, learns: bool) -> nn.Parameter:
    """A parameter of any numbers: of memory that nobody has touched."""
    return nn.Parameter(torch.empty_strided(shape, stride, dtype=dtype), learns)
