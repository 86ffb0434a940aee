"""prepare and unprepare: exact state operators in a transformers model, and the model as it was.

Nothing of the model is replaced but functions: instances get another `forward`, or are shown another way to attend, and
lose it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from statecache.errors import StepError, UnknownLayerError
from statecache.models.attention import Attending, attention
from statecache.models.forward import Forward, stands_in
from statecache.models.generation import EitherName, Generation
from statecache.models.mixers import MIXERS, Mixer, Recurrent
from statecache.models.table import GROUPED_QUERY, KINDS, layer_types
from statecache.replay import Operators

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Give `model` exact state operators, in place; return it. Weights, names and modules stay. Idempotent.

    Raises UnknownLayerError for a mixer that statecache has no operator for, and changes nothing then.
    """
    with _alone():
        _prepare(model)
    return model


def unprepare(model: Model) -> Model:
    """Take away what `prepare` gave, in place; return the model, which is then as it was.

    Raises StepError while a stream of `generate` uses the model.
    """
    with _alone():
        if any(module in _lent for module in model.modules()):
            raise StepError("a stream of generate() still writes with this model: end or close it first")
        _unprepare(model)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` has been prepared."""
    with _alone():
        return any(stands_in(module) for module in model.modules())


def _prepare(model: nn.Module) -> None:
    decoder = _decoder(model)
    if decoder in _lent:
        _lent[decoder].prepared = True
    if not stands_in(decoder):
        mixers, attending = _mixers(decoder), attention(decoder)
        for module, config in attending:
            vars(module)["config"] = config
        for mixer in mixers.values():
            _stand_in(mixer.module, mixer.forward)
        operators = Operators({f"{n}.recurrent": mixer for n, mixer in mixers.items() if isinstance(mixer, Recurrent)})
        _stand_in(decoder, Forward(decoder, _own(decoder), operators).forward)
    for module in model.modules():
        generates = hasattr(module, "_prepare_cache_for_generation") and hasattr(
            module, "prepare_inputs_for_generation"
        )
        if generates and not any(isinstance(_owner(value), Generation) for value in vars(module).values()):
            Generation(module, decoder).install()


def _unprepare(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            owner = _owner(value)
            if isinstance(owner, (Generation, EitherName)):
                delattr(module, name)
            elif isinstance(value, Attending):
                setattr(module, name, value.own)
            elif isinstance(owner, (Mixer, Forward)):
                _restore(module, name, owner)


# ---- loans


@dataclass
class _Before:
    """What a model was before the first of the calls that use it now."""

    prepared: bool
    training: list[nn.Module]
    users: int = 0


class Loan:
    """A model in use, from `lend` to `end`: prepared, and in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model

    def end(self) -> None:
        """Give the model back, which is as it was once nobody else uses it. Idempotent; a finaliser may call it.

        It then never waits: whoever changes models just now, this thread perhaps, does it when that is done.
        """
        _ending.append(self)
        _settle()


_lent: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()  # by decoder
_lock = Lock()  # held by who changes models or loans; a finaliser could come in between where it were reentrant
_ending: deque[Loan] = deque()


@contextmanager
def _alone() -> Iterator[None]:
    """Have models and loans for this thread alone."""
    _settle()
    try:
        with _lock:
            yield
    finally:
        _settle()


def _settle() -> None:
    """End the loans that are to end, unless somebody holds the lock, who then does it afterwards."""
    while _ending and _lock.acquire(blocking=False):
        try:
            while _ending:
                _end(_ending.popleft())
        finally:
            _lock.release()


def lend(model: nn.Module) -> Loan:
    """Have `model` prepared and in eval mode until the loan's end. Calls that use one model may overlap.

    What is prepared by its owner meanwhile stays so. Raises UnknownLayerError where `prepare` does.
    """
    with _alone():
        decoder = _decoder(model)
        before = _lent.get(decoder)
        if before is None:
            before = _Before(stands_in(decoder), [module for module in model.modules() if module.training])
            _prepare(model)
            model.eval()
            _lent[decoder] = before
        before.users += 1
    return Loan(model)


def _end(loan: Loan) -> None:
    model, loan.model = loan.model, None
    if model is None:
        return
    decoder = _decoder(model)
    before = _lent[decoder]
    before.users -= 1
    if not before.users:
        del _lent[decoder]
        for module in before.training:
            module.training = True
        if not before.prepared:
            _unprepare(model)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Have `model` prepared and in eval mode within, and as it was afterwards. See `lend`."""
    loan = lend(model)
    try:
        yield
    finally:
        loan.end()


# ---- parts of a model


def _decoder(model: nn.Module) -> nn.Module:
    """The module that runs the layers, and so is handed the cache."""
    whole: Any = getattr(model, "config", None)
    text = whole.get_text_config(decoder=True) if hasattr(whole, "get_text_config") else None
    for module in model.modules():
        layers, config = getattr(module, "layers", None), getattr(module, "config", None)
        counted = isinstance(layers, nn.ModuleList) and len(layers) == getattr(config, "num_hidden_layers", None)
        if counted and getattr(config, "model_type", None) == getattr(text, "model_type", ""):  # not a vision tower
            return module
    raise UnknownLayerError(
        f"{type(model).__name__} has no list of decoder layers that its configuration counts: prepare() takes a "
        "transformers model, or its decoder"
    )


def _mixers(decoder: nn.Module) -> dict[int, Mixer]:
    config: Any = decoder.config
    layers: Any = decoder.layers
    found: dict[int, Mixer] = {}
    for index, (kind, layer) in enumerate(zip(layer_types(config), layers, strict=True)):
        row = KINDS.get(kind)
        known = [module for module in layer.modules() if type(module).__name__ in MIXERS]
        if row is not None and row.mixer and len(known) == 1:
            module = known[0]
            found[index] = MIXERS[type(module).__name__](module, _own(module))
        elif row is None or row.mixer or config.model_type not in GROUPED_QUERY:
            mixers = [type(m).__name__ for m in layer.modules() if m is not layer and hasattr(m, "layer_idx")]
            inside = mixers or [type(module).__name__ for module in layer.children()]
            raise UnknownLayerError(
                f'layer {index} ("{kind}") of a {config.model_type} model is a {type(layer).__name__} of '
                f"{', '.join(inside)}, and there is an operator for none of them: add a row to "
                "statecache.models.mixers.MIXERS (docs/adding_a_layer.md); the model was left as it is"
            )
    return found


def _owner(value: Any) -> Any:
    """What a method is bound to; else the value itself."""
    return getattr(value, "__self__", value)


# accelerate keeps the forward that its hooks surround under another name
def _slot(module: nn.Module) -> str:
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"


def _own(module: nn.Module) -> Any:
    """The module's own forward."""
    return vars(module).get(_slot(module)) or module.forward


def _stand_in(module: nn.Module, forward: Any) -> None:
    setattr(module, _slot(module), forward)


def _restore(module: nn.Module, name: str, owner: Any) -> None:
    own = owner.unmodified
    if name == "forward" and getattr(own, "__func__", None) is type(module).forward:
        delattr(module, name)
    else:
        setattr(module, name, own)
