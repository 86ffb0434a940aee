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

from statecache.errors import OptionError, StepError, UnknownLayerError
from statecache.models.attention import Attending, attention
from statecache.models.decoder import decoder_of, layers_of
from statecache.models.forward import Forward, StandIn, door, stands_in
from statecache.models.generation import AnyName, Generate, Generation, Inputs
from statecache.models.mixers import MIXERS, Mixer, Recurrent
from statecache.models.table import KINDS, layer_types, model_spec, shares_last
from statecache.models.wrappers import PLACES, Masks, Pictures, makes_masks, wrappers
from statecache.replay import Operators

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """Give `model` exact state operators, in place; return it. Weights, names and modules stay. Idempotent.

    Raises UnknownLayerError for a mixer that statecache has no operator for, and changes nothing then.
    """
    _check(model)
    with _alone():
        _prepare(model)
    return model


def unprepare(model: Model) -> Model:
    """Take away what `prepare` gave, in place; return the model, which is then as it was.

    Raises StepError while a stream of `generate` uses the model.
    """
    _check(model)
    with _alone():
        if any(module in _lent for module in model.modules()):
            raise StepError("a stream of generate() still writes with this model: end or close it first")
        _unprepare(model)
    return model


def is_prepared(model: nn.Module) -> bool:
    """Whether `model` has been prepared."""
    with _alone():
        return any(stands_in(module) for module in model.modules())


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"this is a {type(model).__name__}, and no model: load one with transformers, and give that")


def _prepare(model: nn.Module) -> None:
    decoder = decoder_of(model)
    if decoder in _lent:
        _lent[decoder].prepared = True
    # all that may be refused, before anything is changed
    mixers: list[tuple[int, Mixer]] = []
    attending, forward = [], None
    if not stands_in(decoder):
        if shares_last(decoder.config):
            raise UnknownLayerError(
                "the loops of this model read off cache.layers what the last one kept, row by row alike, so that what "
                'they see depends on how a text is split: set recurrent_kv_cache_mode="per_loop"; the model was left '
                "as it is"
            )
        mixers, attending = _mixers(decoder), attention(decoder)
        operators = Operators({f"{n}.recurrent": mixer for n, mixer in mixers if isinstance(mixer, Recurrent)})
        forward = Forward(decoder, _own(decoder), operators)
    generating = [Generation(module, decoder) for module in model.modules() if _generates(module)]
    around = wrappers(model, decoder)
    placing = [module for module in around if hasattr(module, PLACES) and PLACES not in vars(module)]
    masking = [module for module in around if makes_masks(module) and not isinstance(_own(module), Masks)]
    for module, config in attending:
        vars(module)["config"] = config
    for _, mixer in mixers:
        _stand_in(mixer.module, mixer.forward)
    if forward is not None:
        _stand_in(decoder, forward)
    for wrapper in placing:
        setattr(wrapper, PLACES, Pictures(getattr(wrapper, PLACES), wrapper, decoder))
        door(decoder).whole = wrapper.config
    for wrapper in masking:
        _stand_in(wrapper, Masks(_own(wrapper), wrapper, decoder))
    for generation in generating:
        of = generation.model
        generation.install()
        _stand_in(of, AnyName(_own(of), generation.cache_name))
        of.generate = Generate(of.generate, generation.cache_name)
        of.prepare_inputs_for_generation = Inputs(of.prepare_inputs_for_generation, decoder)


def _unprepare(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            owner = _owner(value)
            if isinstance(owner, Generation):
                delattr(module, name)
            elif isinstance(value, Attending):
                setattr(module, name, value.own)
            elif isinstance(owner, (Mixer, StandIn)):
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
        decoder = decoder_of(model)
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
    decoder = decoder_of(model)
    before = _lent.get(decoder)
    if before is None:  # a collector found model and loan together, and has forgotten the model already
        return
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


def _mixers(decoder: nn.Module) -> list[tuple[int, Mixer]]:
    """What is to stand in for modules of the decoder's layers, each with the index of its layer."""
    config: Any = decoder.config
    specs = model_spec(config).layers
    found: list[tuple[int, Mixer]] = []
    for index, (kind, layer) in enumerate(zip(layer_types(config), layers_of(decoder), strict=True)):
        row = KINDS.get(kind)
        known = [module for module in layer.modules() if type(module).__name__ in MIXERS]
        indexed = any(state.name == "index" for state in specs[index].states)
        if row is not None and (row.mixer or indexed) and known:
            for module in known:
                mixer = MIXERS[type(module).__name__](module, _own(module))
                mixer.layer = index
                found.append((index, mixer))
        elif row is None or row.mixer or indexed:
            mixers = [type(m).__name__ for m in layer.modules() if m is not layer and hasattr(m, "layer_idx")]
            inside = mixers or [type(module).__name__ for module in layer.children()]
            raise UnknownLayerError(
                f'layer {index} ("{kind}") of a {config.model_type} model is a {type(layer).__name__} of '
                f"{', '.join(inside)}, and there is an operator for none of them: add a row to "
                "statecache.models.mixers.MIXERS (docs/adding_a_layer.md); the model was left as it is"
            )
    return found


def _generates(module: nn.Module) -> bool:
    """Whether a module has `generate`, and nothing stands in for it yet."""
    if not hasattr(module, "_prepare_cache_for_generation") or not hasattr(module, "prepare_inputs_for_generation"):
        return False
    return not any(isinstance(_owner(value), Generation) for value in vars(module).values())


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
    if getattr(own, "__func__", None) is getattr(type(module), name, owner):
        delattr(module, name)
    else:
        setattr(module, name, own)
