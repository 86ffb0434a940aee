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
        self.last = max((layer.index for layer in spec.layers if layer.states or layer.open), default=-1)
        self.due = _due(spec, self.last)  # writes that the last layer makes; None until they have been seen
        self.left = 0  # of them, in this pass
        self.written: set[str] = set()
        self.handed: dict[str, Tensor] = {}  # what a convolution was shown, until it writes

    def begin(self) -> None:
        self.left = self.due or 0

    def wrote(self, layer: int, name: str, counts: bool) -> bool:
        """Take note of a write; whether it was the pass's last. `counts`: if it is one of those that end a pass."""
        if not torch.compiler.is_compiling():
            self.written.add(name)
        if layer != self.last or not counts or self.due is None:
            return False
        self.left -= 1
        return self.left == 0

    def over(self) -> bool:
        """Whether a first pass of unknown end, now that another call comes, has ended."""
        if self.due is not None or torch.compiler.is_compiling():
            return False
        of_last = {name.split(".")[1] for name in self.written if name.startswith(f"{self.last}.")}
        counted = {name for name in of_last if not name.startswith("recurrent")} or of_last
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
