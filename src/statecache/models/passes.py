"""Where a forward pass ends. transformers never says so: it is read off the writes of the last layer with a state.

Their order differs from family to family (zamba attends first, falcon_h1 last), so they are counted. How many there are
follows from the table; for a family that is in none, from its first pass, which only the next call shows to be over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statecache.errors import StepError
from statecache.spec import ModelSpec


class Pass:
    """What the layers have written since the pass began."""

    def __init__(self, spec: ModelSpec) -> None:
        self.model = spec.model
        holding = [layer.index for layer in spec.layers if layer.states or layer.open] or [-1]
        self.last = holding[-1]
        self.ends = {holding[0], holding[-1]}  # the layers where a pass begins and ends
        self.attends = self.last >= 0 and any(state.name == "key" for state in spec.layers[self.last].states)
        kind = spec.layers[self.last].kind if self.last >= 0 else ""
        self.like = [n.index for n in spec.layers if n.kind == kind and n.index != self.last]
        self.first: int | None = None  # the layer that begins a pass
        self.due = _due(spec, self.last)  # writes that the last layer makes; None until they have been seen
        self.left = 0  # of them, in this pass
        self.written: set[str] = set()
        self.handed: dict[str, Tensor] = {}  # what a convolution was shown, until it writes

    def begin(self, layer: int) -> None:
        """Start counting. Raises StepError where the pass before has ended too early."""
        self.left = self.due or 0
        if self.first is None:
            self.first = layer
        elif layer == self.last != self.first:
            raise StepError(
                f"layer {layer} writes more states than the layers of its kind before it, so that its pass was thought "
                "to be over: add its states to statecache.models.table.SHAPES (docs/adding_a_layer.md)"
            )

    def wrote(self, layer: int, name: str, counts: bool) -> bool:
        """Take note of a write; whether it was the pass's last. `counts`: if it is one of those that end a pass."""
        if not torch.compiler.is_compiling():
            self.written.add(name)
        if layer != self.last or not counts:
            return False
        if self.due is None:  # a first pass: as many as the layers of its kind before it
            written = len(self._counted(layer))
            if not written or not self.like or written != len(self._counted(self.like[-1])):
                return False
            self.due = self.left = written
            return True
        self.left -= 1
        return self.left == 0

    def _counted(self, layer: int) -> set[str]:
        """The writes of a layer in this pass that are counted."""
        names = {name.split(".")[1] for name in self.written if name.startswith(f"{layer}.")}
        return {name for name in names if not name.startswith("recurrent")} or names

    def over(self) -> bool:
        """Whether a first pass of unknown end, now that another call comes, has ended."""
        if self.due is not None or torch.compiler.is_compiling():
            return False
        counted = self._counted(self.last)
        if self.attends and "key" not in counted:
            return False  # inkling asks for mask sizes inside its layers, between its convolutions and its keys
        self.due = len(counted) or None
        return self.due is not None

    def end(self) -> None:
        """Start afresh. Raises StepError where a layer read its inputs and never wrote."""
        if torch.compiler.is_compiling():
            return
        if self.handed:
            raise StepError(
                f'state "{next(iter(self.handed))}" was read and not written: a "{self.model}" model seems to shift it '
                "in place, which no ring can see: add the model to statecache.models.table.SHIFTS_IN_PLACE"
            )
        self.written.clear()

    def drop(self) -> None:
        """Forget a pass that was interrupted."""
        self.left = 0
        self.written.clear()
        self.handed.clear()


def _due(spec: ModelSpec, last: int) -> int | None:
    if last < 0 or spec.layers[last].open:
        return None
    states = spec.layers[last].states
    attention = any(state.name == "key" for state in states)
    return attention + sum(state.kind == "conv" for state in states) or len(states)
