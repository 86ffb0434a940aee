"""One pass of a model of one's own: every state is read and written in one call, which cannot be got wrong in silence.

R rows of the pass, T new tokens, S keys, w a window, *D the shape of one entry. Time stands at the state's own axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from statecache.errors import DeviceError, DtypeError, LayerError, RowsError, ShapeError, StateCacheError, StepError
from statecache.lease import Lease
from statecache.mask import visible
from statecache.ring import Ring
from statecache.step import Step, offset


class OnePass:
    """What `States.one_pass` gives to its `with` block. Each state is written once, and none may be left out."""

    def __init__(self, held: Mapping[str, Ring | Lease], step: Step, rows: int, device: torch.device) -> None:
        self.tokens, self.over = step.tokens, False
        self._held, self._step, self._rows, self._device = held, step, rows, device
        self._written: dict[str, int] = {}  # how many entries of each were shown

    @property
    def positions(self) -> Tensor:
        """Where each token stands in its row: (R, T), or (1, T) where all rows stand alike."""
        return self._step.places(self._device)

    @property
    def real(self) -> Tensor:
        """Which tokens rows take in, those before a row's count: (R, T) bool. No other may reach a recurrence."""
        real = self._step.takes()
        if real is None:
            return torch.ones(self._rows, self.tokens, dtype=torch.bool, device=self._device)
        return real

    # ---- an entry a token

    def window(self, name: str, new: Tensor) -> Tensor:
        """Put the tokens' entries (R, T, *D) behind the w before them, as a convolution reads: (R, w + T, *D).

        Before a row's first token there are zeros.
        """
        ring = self._ring(name)
        if ring.spec.window is None:
            raise LayerError(f'state "{name}" keeps every entry, and has no window to show: attend() to it')
        self._check(name, ring, new, self._timed(ring))
        seen = torch.cat([ring.past(ring.spec.window, self._step), new], ring.axis)  # before put() overwrites the past
        ring.put(new, self._step)
        self._written[name] = seen.shape[ring.axis]
        return seen

    def attend(self, name: str, new: Tensor) -> Tensor:
        """Put the tokens' entries (R, T, *D); all that these may attend to, in the order of position: (R, S, *D).

        Some are not for every token, and some hold nothing: `visible` is the mask.
        """
        ring = self._ring(name)
        self._check(name, ring, new, self._timed(ring))
        seen = ring.extend(new, self._step, exact=True)
        self._written[name] = seen.shape[ring.axis]
        return seen

    def visible(self, name: str) -> Tensor:
        """Which of the entries that `attend` gave each token may see, as a mask for all heads: (R or 1, 1, T, S)."""
        ring = self._ring(name, again=True)
        if name not in self._written:
            raise StepError(f'state "{name}": attend() first, then ask which of its entries are visible')
        keys = torch.arange(self._written[name], device=self._device)[None]
        if ring.spec.window is not None and ring.wraps:
            keys = keys + offset(torch.as_tensor(self._step.start, device=self._device).view(-1, 1), ring.spec.window)
        return visible(self.positions, keys, ring.spec.window)

    # ---- a state that is overwritten

    def read(self, name: str) -> Tensor:
        """The state after each row's last token, zero before the first: (R, *D), a copy that may be overwritten."""
        lease = self._lease(name)
        return lease.read(self._step).clone()

    def write(self, name: str, state: Tensor) -> None:
        """Put the state (R, *D) after the tokens that each row takes in. The one before is kept for a rollback."""
        lease = self._lease(name)
        assert lease.spec.shape is not None
        self._check(name, lease, state, lease.spec.shape)
        lease.keep(self._step)
        lease.write(state, self._step)
        self._written[name] = 1

    # ---- refusals

    def left(self) -> list[str]:
        """The states that were not written yet."""
        return [name for name in self._held if name not in self._written]

    def _state(self, name: str, again: bool) -> Ring | Lease:
        if self.over:
            raise StepError("this pass is over: begin another with one_pass()")
        if name not in self._held:
            raise LayerError(f'there is no state "{name}": the specification gave {", ".join(self._held)}')
        if name in self._written and not again:
            raise StepError(f'state "{name}" has been written in this pass: read and write each state once')
        return self._held[name]

    def _ring(self, name: str, again: bool = False) -> Ring:
        state = self._state(name, again)
        if isinstance(state, Lease):
            raise LayerError(f'state "{name}" is one entry that is overwritten: read() it, and write() the next')
        return state

    def _lease(self, name: str) -> Lease:
        state = self._state(name, again=False)
        if isinstance(state, Ring):
            raise LayerError(f'state "{name}" has an entry for each token: use window() or attend()')
        return state

    def _timed(self, ring: Ring) -> tuple[int, ...]:
        assert ring.spec.shape is not None
        shape = list(ring.spec.shape)
        shape.insert(ring.axis - 1, self.tokens)
        return tuple(shape)

    def _check(self, name: str, state: Ring | Lease, new: Tensor, expected: tuple[int, ...]) -> None:
        came = f'state "{name}": came'
        if tuple(new.shape[1:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise ShapeError(f"{came} {tuple(new.shape)}, and this pass of {self.tokens} tokens takes (rows, {wanted})")
        if len(new) != self._rows:
            raise RowsError(f"{came} with {len(new)} rows in a pass of {self._rows}")
        if new.dtype != state.dtype:
            raise DtypeError(f"{came} in {new.dtype}, and is kept in {state.dtype}: give it in that dtype")
        if new.device != state.device:
            raise DeviceError(f"{came} on {new.device}, and is kept on {state.device}: move it there")
        if new.requires_grad and torch.is_grad_enabled():
            raise StateCacheError(f"{came} with a gradient, which states do not carry: run under torch.no_grad()")
