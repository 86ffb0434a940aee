"""prepare and unprepare: exact state operators in a transformers model, and the model as it was.

Nothing of the model is replaced but functions: instances get another `forward`, or are shown another way to attend, and
lose it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from statecache.errors import StepError, UnknownLayerError
from statecache.models.attention import Attending, attention
from statecache.models.forward import Forward, stands_in
from statecache.models.generation import EitherName, Generation
from statecache.models.mixers import MIXERS, Mixer
from statecache.models.table import GROUPED_QUERY, KINDS, layer_types
from statecache.replay import Operators

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Give `model` exact state operators, in place; return it. Weights, names and modules stay. Idempotent.

    Raises UnknownLayerError for a mixer that statecache has no operator for, and changes nothing then.
    """
    decoder = _decoder(model)
    if decoder in _loans:
        _loans[decoder].prepared = True
    if not stands_in(decoder):
        mixers, attending = _mixers(decoder), attention(decoder)
        for module, config in attending:
            vars(module)["config"] = config
        for mixer in mixers.values():
            _stand_in(mixer.module, mixer.forward)
        operators = Operators({f"{layer}.recurrent": mixer.flat for layer, mixer in mixers.items() if _recurs(mixer)})
        _stand_in(decoder, Forward(decoder, _own(decoder), operators).forward)
    for module in model.modules():
        generates = hasattr(module, "_prepare_cache_for_generation") and hasattr(
            module, "prepare_inputs_for_generation"
        )
        if generates and not any(isinstance(_owner(value), Generation) for value in vars(module).values()):
            Generation(module, decoder).install()
    return model


def unprepare(model: Model) -> Model:
    """Take away what `prepare` gave, in place; return the model, which is then as it was.

    Raises StepError while a stream of `generate` uses the model.
    """
    if any(module in _loans for module in model.modules()):
        raise StepError("a stream of generate() still writes with this model: end or close it first")
    for module in model.modules():
        for name, value in list(vars(module).items()):
            owner = _owner(value)
            if isinstance(owner, (Generation, EitherName)):
                delattr(module, name)
            elif isinstance(value, Attending):
                setattr(module, name, value.own)
            elif isinstance(owner, (Mixer, Forward)):
                _restore(module, name, owner)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` has been prepared."""
    return any(stands_in(module) for module in model.modules())


@dataclass
class _Loan:
    """What a model was before the first of the calls that use it now."""

    prepared: bool
    training: list[nn.Module]
    users: int = 0


_loans: WeakKeyDictionary[nn.Module, _Loan] = WeakKeyDictionary()  # by decoder


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Have `model` prepared and in eval mode within, and as it was afterwards.

    Calls that use one model may overlap. What is prepared by its owner meanwhile stays so.
    """
    decoder = _decoder(model)
    loan = _loans.get(decoder)
    if loan is None:
        loan = _Loan(stands_in(decoder), [module for module in model.modules() if module.training])
        prepare(model).eval()
        _loans[decoder] = loan
    loan.users += 1
    try:
        yield
    finally:
        loan.users -= 1
        if not loan.users:
            del _loans[decoder]
            for module in loan.training:
                module.training = True
            if not loan.prepared:
                unprepare(model)


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


def _recurs(mixer: Mixer) -> bool:
    return type(mixer).fold is not Mixer.fold


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
