"""What mixers share: they stand in for a module's forward, and bind an operator of `ops` to the module's weights.

A mixer holds the module that it stands in for, and uses its weights, norms and projections as they are, called as
modules, so that hooks, quantised layers and sharded weights keep working. What never changes it reads once, when it is
made; weights may change at any time.

B rows, T new tokens, n entries of a log, E the model's width, *D a recurrence's state. Time is axis 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from statecache import kernels
from statecache.kernels.pointers import Table
from statecache.models.given import layer_states
from statecache.models.prepared import LayerState, Lent, Stateless, lent_log
from statecache.replay import Log, Together
from statecache.step import Step

Shapes = tuple[tuple[int, ...], ...]
Chunked = tuple[Tensor, Tensor, Tensor | None]
# from a mixer, what its projections made of few tokens (B T, ...), and both states to what the gate takes (B T, W)
Kernel = Callable[[Any, tuple[Tensor, ...], Lent], Tensor]


class Mixer:
    """Stands in for `module.forward`. `unmodified` is what it replaced, for caches of another kind.

    `layer`: which of the decoder's layers it is in, as `prepare` says; not every module knows.
    """

    convolutions: ClassVar[tuple[str, ...]] = ("conv1d",)  # submodules whose weights are used without a call
    asks: ClassVar[tuple[str, ...]] = ()  # what `mix` takes of the module's other arguments, by name
    layer: int
    kernel: Kernel | None = None  # what few tokens are left to, while a step is captured

    def __init__(self, module: nn.Module, unmodified: Any) -> None:
        self.module, self.unmodified = module, unmodified
        self.inside = 0  # calls of a hooked module's forward that are under way

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix hidden_states (B, T, E) along time."""
        states = layer_states(self.layer, args, kwargs)
        if states is None:
            return self.unmodified(hidden_states, *args, **kwargs)
        asked = tuple(map(kwargs.get, self.asks))
        module = self.module
        hooked = "_hf_hook" in vars(module)
        for name in self.convolutions:
            hooked = hooked or "_hf_hook" in vars(getattr(module, name))
        if hooked:
            with self._inside():
                return self.mix(hidden_states, states, *asked)
        return self.mix(hidden_states, states, *asked)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The forward of a hooked module: its own weights are there, and its convolutions' are brought."""
        self.inside += 1
        try:
            with ExitStack() as brought:
                for name in self.convolutions:
                    module = getattr(self.module, name)
                    if "_hf_hook" in vars(module):  # a graph takes no context that does nothing
                        brought.enter_context(_awake(module))
                yield
        finally:
            self.inside -= 1

    def weights(self) -> AbstractContextManager[None]:
        """With the module's weights, also outside of its forward."""
        return nullcontext() if self.inside else awake(self.module)

    def by_kernel(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor | None:
        """What the kernel makes of what the projections did; None in a pass that it is not for."""
        lent = None if self.kernel is None else states.lend()
        if self.kernel is None or lent is None:
            return None
        flat = tuple([part.flatten(0, 1) for part in projected])
        return self.kernel(self, flat, lent).view(*projected[0].shape[:2], -1)

    def mix(self, hidden_states: Tensor, states: LayerState | Stateless, *asked: Any) -> Any:
        """From hidden_states (B, T, E) and what it `asks` for to what the module returns."""
        raise NotImplementedError


class Recurrent(Mixer):
    """A mixer with a recurrence: `advance` runs it, and the cache steps it over its log. See `statecache.replay`."""

    operator: ClassVar[Operator]
    inputs: Shapes  # of what the operator takes of one token, part by part, in the order of `operator.taken`
    query: tuple[int, ...]  # what it asks of the state
    gates: Shapes  # the last of these: where all gates are 0 there is no token
    constant: Derived | None = None  # what the operator needs of the weights
    folded: ClassVar[tuple[str, ...]] = ()  # weights that `operator.folding` reads
    sizes: tuple[tuple[str, int], ...] = ()  # and what it is told besides

    def advance(self, projected: tuple[Tensor, ...], states: LayerState | Stateless) -> Tensor:
        """Take in T tokens: from what the projections made of them, (B, T, ...) each, to what the gate takes (B, T, W).

        The one seam for kernels: here is all that new tokens bring, with both states of the layer. By default the
        states convolve, then recur; a fused kernel replaces this, for one token or a few, and nothing else.
        """
        raise NotImplementedError

    def chunk(
        self,
        taken: tuple[Tensor, ...],
        query: Tensor,
        state: Tensor | None,
        count: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run over `taken`, the inputs and gates (B, T, *shape), and `query` (B, T, ...) from `state` (B, *D) on.

        Returns the outputs (B, T, ...), the state after `count` (B,) tokens, and those after `at` (B, m): (B, m, *D).
        Runs outside of a forward too: brings an offloaded module's weights.
        """
        with self.weights():
            arguments = self._arguments(taken, query, anew=True)
            return self.operator.chunk(arguments, state, count=count, at=at)

    def step(self, taken: tuple[Tensor, ...], query: Tensor, state: Tensor) -> Tensor:
        """Take one token into `state` (B, *D) in place: `taken` (B, *shape), `query` (B, ...); the output (B, ...).

        Without gradients, which is not checked here.
        """
        arguments = self._arguments(taken, query)
        step, device = self.operator.module.step, state.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            step = step.__wrapped__  # its guard, against gradients and autocast, would cost a call a token
        return step(**arguments, state=state)  # type: ignore[no-any-return]

    def fold(self, taken: tuple[Tensor, ...], state: Tensor, count: Tensor | None) -> None:
        """Step `state` (B, *D) in place over the first `count` (B,) of n entries `taken` (B, n, *shape), None for all.

        Runs outside of a forward too: brings an offloaded module's weights.
        """
        with torch.no_grad(), self.weights():
            self.operator.module.fold(**self._arguments(taken, None), state=state, count=count)

    def together(self, log: Log) -> Together | None:
        """See `replay.Gathering`: one launch for all layers that are alike, where a kernel can."""
        kernel, state, kept = self.operator.folding, log.state.store.plain, lent_log(log)
        weights = [getattr(self.module, name) for name in self.folded]
        if not kernel or state is None or kept is None or "_hf_hook" in vars(self.module):
            return None
        if not kernels.serves(kernel, state, *kept, *weights) or not all(w.is_contiguous() for w in weights):
            return None
        alike = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in (state, *kept, *weights))
        return Folding(kernel, self.sizes, alike)

    def _arguments(self, taken: tuple[Tensor, ...], query: Tensor | None, anew: bool = False) -> dict[str, Tensor]:
        arguments = dict(zip(self.operator.taken, taken, strict=True))
        if query is not None and self.operator.query:
            arguments[self.operator.query] = query
        if self.constant is not None:
            arguments[self.operator.constant] = self.constant(self.module, anew)
        return arguments


@dataclass(frozen=True)
class Operator:
    """A module of `statecache.ops` with chunk, step and fold, and what these call their arguments.

    `taken`: the inputs and gates of a token, in the order of the log; `query`: what it asks of the state, or "";
    `constant`: what all tokens share, or ""; `kernel`: a module of `statecache.kernels` with the same chunk, or "";
    `folding`: one that folds the states of several layers, or "".
    """

    module: ModuleType
    taken: tuple[str, ...]
    query: str = ""
    constant: str = ""
    kernel: str = ""
    folding: str = ""

    def chunk(self, arguments: dict[str, Tensor], state: Tensor | None, **more: Tensor | None) -> Chunked:
        """The operator's chunk of these arguments: by the kernel where it can, else the plain one."""
        taken = tuple(arguments.values())
        kept = state is None or state.dtype is torch.float32
        if self.kernel and kept and taken[0].shape[1] and kernels.serves(self.kernel, *taken, state):
            from statecache.kernels.rehearsal import rehearsed, rehearsing

            run = partial(import_module(f"statecache.kernels.{self.kernel}").chunk, **arguments, state=state, **more)
            try:
                made = rehearsed(run, self._form(taken, state, *more.values()))
                if not rehearsing():  # else the state is to be what the plain form says, which a cache takes
                    return made  # type: ignore[no-any-return]
            except kernels.too_large() as error:
                kernels.refuse(self.kernel, taken[0].device, error)
        return self.module.chunk(**arguments, state=state, **more)  # type: ignore[no-any-return]

    def _form(self, taken: tuple[Tensor, ...], *more: Tensor | None) -> tuple[Any, ...]:
        """What the kernel's parts are compiled for, but for what rows decide: few forms for many numbers of tokens."""
        given = tuple((x.dtype, x.shape[2:]) for x in taken)
        return self.kernel, taken[0].device, taken[0].shape[1].bit_length(), given, *(x is None for x in more)


@dataclass(frozen=True)
class Folding:
    """Takes a round's tokens into the states of layers that are `alike`, by a module of `statecache.kernels`."""

    kernel: str
    sizes: tuple[tuple[str, int], ...]
    alike: tuple[Any, ...]
    table: Table = field(default_factory=Table, compare=False)

    def __call__(self, layers: Sequence[tuple[Any, Log]], step: Step, most: int, count: Tensor | None) -> None:
        """See `replay.Log.accept`."""
        states, inputs, gates = [], [], []
        for _, log in layers:
            held, kept = log.state.store.plain, lent_log(log)
            assert held is not None and kept is not None
            states.append(held.squeeze(1))
            inputs.append(kept[0])
            gates.append(kept[1])
        device = states[0].device
        here = step.on(device)
        weights = zip(*([getattr(mixer.module, name) for name in mixer.folded] for mixer, _ in layers), strict=True)
        fold = import_module(f"statecache.kernels.{self.kernel}").fold
        count = None if count is None else count.to(device)
        given = states, inputs, gates, *map(list, weights), here.starts_on(device), count, most, here.rows
        fold(*given, table=self.table, **dict(self.sizes))


class Derived:
    """What an operator needs of one weight, as A of A_log: computed when the weight has changed, not for every token.

    It has changed where it is another tensor, lies elsewhere, or was written to, as autograd counts. A write that
    autograd does not count, through `.data` or by a fused optimizer, is seen at the next pass of several tokens.
    Nothing is kept where a gradient is wanted, of a module whose weights come and go, or in a graph.
    """

    def __init__(self, name: str, compute: Callable[[Tensor], Tensor]) -> None:
        self.name, self.compute = name, compute
        self._kept: tuple[Tensor, tuple[Any, ...], Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy belongs to a copy of the weight
        return type(self), (self.name, self.compute)

    def __call__(self, module: nn.Module, anew: bool = False) -> Tensor:
        """The tensor for this module's weight. `anew`: computed in any case."""
        weight: Tensor = getattr(module, self.name)
        if torch.compiler.is_compiling():
            return self.compute(weight)
        if (
            type(weight) is not nn.Parameter  # a subclass may have no memory to compare
            or weight.is_inference()  # which counts no writes
            or (weight.requires_grad and torch.is_grad_enabled())
            or (weight.is_cuda and torch.cuda.is_current_stream_capturing())
            or "_hf_hook" in vars(module)
        ):
            self._kept = None
            return self.compute(weight)
        stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None  # which orders what is read there
        key = weight._version, weight.data_ptr(), weight.dtype, stream
        kept = self._kept
        if kept is not None and not anew and kept[0] is weight and kept[1] == key:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            value = self.compute(weight)
        self._kept = weight, key, value, weight.detach()  # the last: lest its memory is given to another
        return value


def decay(A_log: Tensor) -> Tensor:
    """A < 0 of the recurrences, in float32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def awake(module: nn.Module) -> AbstractContextManager[None]:
    """With an offloaded module's weights, which accelerate brings only where the module itself is called."""
    return _awake(module) if "_hf_hook" in vars(module) else nullcontext()


@contextmanager
def _awake(module: Any) -> Iterator[None]:
    module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        module._hf_hook.post_forward(module, ())
