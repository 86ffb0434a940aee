"""Offloading: states live in host memory, and each layer's are brought to the device ahead of their use.

A tensor that is away keeps its shape and loses its memory: its storage is emptied, and filled again when it comes back,
so that every view of it holds. So stores, rings and leases know nothing of it. On a CPU the same copies are made, from
memory to memory.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from statecache.errors import StepError
from statecache.lease import Lease
from statecache.ring import Ring
from statecache.step import Step

AHEAD = True  # whether the next layers come while one runs
SMALL = 1 << 20  # bytes of a buffer that goes back as it is, whatever was written of it: parts take the host longer
SOON = 1 << 20  # bytes written of a larger layer that the next one waits for, so that its memory is free at once

Span = tuple[int, int]  # positions, from the first to before the last
Told = dict[torch.device, tuple[int, Any, Any]]  # the device in use, a device's stream, and when all before is over


@dataclass(eq=False)
class Home:
    """Where a buffer's entries are while it is away."""

    buffer: Tensor
    host: Tensor
    version: int | None = None  # of the buffer when both were the same; None: they never were
    away: bool = False
    late: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parts of `host`, and what is on its way there
    axis: int = 0  # of the slots
    parts: list[slice] | None = None  # the slots that go back; None: all

    def here(self) -> None:
        """Copy the entries to the device."""
        _copy(self.buffer.data, self.host)  # `data` counts its own versions: a state that came back was not written

    @property
    def going(self) -> int:
        """Bytes that go back."""
        if self.parts is None:
            return self.buffer.nbytes
        return sum(_narrow(self.buffer, self.axis, at).nbytes for at in self.parts)

    def back(self) -> None:
        """Copy the entries that were written to host memory."""
        if self.parts is None:
            _copy(self.host, self.buffer)
            return
        for at in self.parts:
            host, part = _narrow(self.host, self.axis, at), _narrow(self.buffer, self.axis, at)
            if not part.is_cuda:
                _copy(host, part)
                continue
            # an entry here and there: in one piece over the bus, and to its place when it is needed again
            came = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True)
            _copy(came, part.contiguous())
            self.late.append((host, came))


class Offloaded(dict[str, "Ring | Lease"]):
    """States by name, of which those of one layer are on the device, and on their way there those of the next.

    Looking a state up brings its layer; the copy began, on a stream of its own, when a layer before it was looked up.
    The layer before goes back on another, as far as it was written: the bus carries both at once, and its memory is
    freed when the next layer is looked up, or at once where little was written, as of a large attention layer, so that
    the next large one has its place. More layers than the next come while all that are there are no larger than
    two of the largest, so that a large one is on its way while small ones run. What is of no layer stays on the device.

    Memory is that of the stream in which layers run. It is taken before a copy to it begins, and freed once that stream
    has waited for the copies that use it: so it goes from layer to layer, however far the host is ahead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: weakref.WeakMethod[Callable[[], Span | None]] | None = None
        self._names: dict[str, list[str]] = {}
        self._homes: dict[str, list[Home]] = {}
        self._next: dict[str, str] = {}  # the layer that was looked up after each
        self._here: list[str] = []
        self.now: str | None = None  # the layer that is in use
        self._written: dict[str, Span | None] = {}  # of layers that are here, the positions written; None: any
        self._streams: dict[tuple[torch.device, bool], Any] = {}  # to a device, and back from it
        self._coming: dict[str, list[tuple[Any, Any]]] = {}  # the stream that uses a layer, and when that has come
        self._going: dict[str, list[tuple[Any, Any]]] = {}  # and when what was written of it is back
        self._owners: dict[tuple[str, torch.device], Any] = {}  # the stream that a layer's memory on a device is of
        self._leaving: list[str] = []  # layers whose memory is freed when they are
        self._sizes: dict[str, int] = {}  # bytes of the layers that have been used
        self._plans: dict[str, list[str]] = {}  # what is to come while each of them is

    # ---- looking up

    def __getitem__(self, name: str) -> Ring | Lease:
        if name in self:
            self.bring(_layer(name))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]

    def items(self) -> Any:
        """Each state with its name, on the device until the next one is asked for."""
        return self._each()

    def values(self) -> Any:
        """Each state, on the device until the next one is asked for."""
        return (state for _, state in self._each())

    def _each(self) -> Iterator[tuple[str, Ring | Lease]]:
        for name in list(self):
            state = self[name]
            self._written[_layer(name)] = None
            yield name, state

    def __setitem__(self, name: str, state: Ring | Lease) -> None:
        layer = _layer(name)
        self.bring(layer)  # what it takes the place of may be on its way
        if name not in self:
            self._names.setdefault(layer, []).append(name)
        super().__setitem__(name, state)

    def clear(self) -> None:
        """Forget every state."""
        self._await()
        streams = self._streams
        super().clear()
        self.__dict__.update({**Offloaded().__dict__, "spans": self.spans, "_streams": streams})

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._await()

    def _await(self) -> None:
        """Have who used the layers wait for all copies, so that nobody gets memory that one of them uses."""
        for copies in (self._coming, self._going):
            for each in copies.values():
                for compute, event in each:
                    compute.wait_event(event)

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloaded:
        other = memo[id(self)] = Offloaded()
        for name, state in self.items():
            other[name] = copy.deepcopy(state, memo)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        self._release()
        for layer in filter(None, self._names):  # all at once: a pickle is written afterwards
            self._fetch(layer, {})
            self._arrive(layer, {})
        return _restored, (dict(dict.items(self)),)

    # ---- coming and going

    def bring(self, layer: str) -> None:
        """Have a layer on the device, and note what is written of it. "" is of what belongs to none."""
        if not layer:
            return
        if layer != self.now:
            if self.now is not None and self._next.get(self.now) != layer:
                self._next[self.now] = layer
                self._plans.clear()
            self.enter(layer)
        span = None if self.spans is None else (self.spans() or (lambda: None))()
        if span is not None and self._written.get(layer, span) is not None:
            low, high = self._written.get(layer) or span
            self._written[layer] = min(low, span[0]), max(high, span[1])

    def enter(self, layer: str) -> None:
        """Have a layer on the device, the next one on its way there, and more for which there is room; no other."""
        if torch.compiler.is_compiling():
            raise StepError("a cache with offload=True copies between the layers of a step: do not compile it")
        self._release()
        told: Told = {}
        self._fetch(layer, told)
        self._arrive(layer, told)
        left, self.now = self.now, layer
        if left in self._here and left not in self._sizes:
            self._resize(left, sum(buffer.nbytes for buffer, _, _ in self._buffers(left)))
        coming = self._ahead(layer)
        for other in [n for n in self._here if n != layer and n not in coming]:
            self._put_away(other, told)
        for other in [n for n in coming if n not in self._here]:
            if other != coming[0] and self._room(other, *self._here, *self._leaving) < 0:
                break  # until what leaves is gone
            self._fetch(other, told)

    def _ahead(self, layer: str) -> list[str]:
        """What is to come while a layer runs: the next, and more while all are no larger than two of the largest."""
        if layer in self._plans:
            return self._plans[layer]
        found: list[str] = []
        following = self._next.get(layer) if AHEAD else None
        while following is not None and following not in (layer, *found):
            if found and self._room(layer, *found, following) < 0:
                break
            found.append(following)
            following = self._next.get(following)
        self._plans[layer] = found
        return found

    def _room(self, *layers: str) -> int:
        """Bytes that these layers leave of twice the largest of all."""
        return 2 * max(self._sizes.values(), default=0) - sum(self._sizes.get(layer, 0) for layer in layers)

    def _resize(self, layer: str, size: int) -> None:
        """A layer has so many bytes from now on."""
        if self._sizes.get(layer) != size:
            self._sizes[layer] = size
            self._plans.clear()

    def _fetch(self, layer: str, told: Told) -> None:
        """Begin to copy a layer's states to the device."""
        if layer not in self._here:
            self._here.append(layer)
        homes = [home for home in self._homes.get(layer, ()) if home.away]
        if not homes:
            return
        if any(home.late for home in homes):
            for _, event in self._going.get(layer, ()):
                event.synchronize()
        for home in homes:
            for part, came in home.late:
                _copy(part, came)
            home.late.clear()
            _fill(home.buffer)
        self._copy_all(layer, homes, told, back=False)
        for home in homes:
            home.away = False
        self._going.pop(layer, None)

    def _arrive(self, layer: str, told: Told) -> None:
        """Have who uses a layer now wait for what is on its way there."""
        for compute, event in self._coming.pop(layer, ()):
            _until_now(compute.device, told)[1].wait_event(event)

    def _release(self) -> None:
        """Free the memory of layers that left, once what was written of them is back."""
        for layer in self._leaving:
            self._free(layer)
        self._leaving.clear()

    def _free(self, layer: str) -> None:
        for compute, event in self._going.get(layer, ()):
            compute.wait_event(event)
        for home in self._homes[layer]:
            if home.away:
                _empty(home.buffer)

    @torch.no_grad()
    def _put_away(self, layer: str, told: Told) -> None:
        """Begin to copy what was written of a layer to host memory; that of the device is freed when it is over."""
        known = {id(home.buffer): home for home in self._homes.get(layer, ())}
        homes, written, span = [], [], self._written.get(layer)
        for buffer, ring, always in self._buffers(layer):
            home = known.get(id(buffer)) or Home(buffer, _host(buffer))
            homes.append(home)
            if not home.away and (always or home.version != buffer._version):
                home.parts = None
                if ring is not None and span is not None and home.version is not None and buffer.nbytes > SMALL:
                    home.axis, home.parts = ring.axis, _parts(ring, span)
                written.append(home)
        self._copy_all(layer, written, told, back=True)
        for home in written:
            home.version = home.buffer._version
        self._homes[layer] = homes
        self._resize(layer, sum(home.buffer.nbytes for home in homes))
        for home in homes:
            home.away = home.buffer.untyped_storage().resizable()  # not what somebody else looks at, as numpy
        self._here.remove(layer)
        self._written.pop(layer, None)
        self._arrive(layer, told)
        self._part(layer, homes, told)
        soon = self._sizes[layer] > SOON >= sum(home.going for home in written)
        if layer in self._going and not soon:
            self._leaving.append(layer)
        else:
            self._free(layer)
            told.clear()  # so that who gets the memory waits for what was written of it, too

    def _part(self, layer: str, homes: list[Home], told: Told) -> None:
        """Where another stream runs layers than when a layer's memory was taken, have that be kept for all it does."""
        for home in homes:
            device = home.buffer.device
            owner = self._owners.get((layer, device))
            if owner is None:
                continue
            _, compute, _ = _until_now(device, told)
            if owner != compute:
                for stream in (compute, self._stream(device, True)):
                    home.buffer.record_stream(stream)

    def _copy_all(self, layer: str, homes: Sequence[Home], told: Told, back: bool) -> None:
        """Copy a layer's states to their devices, or back from them, beside what those do next."""
        for device in {home.buffer.device for home in homes}:
            self._beside(layer, device, [home for home in homes if home.buffer.device == device], told, back)

    def _beside(self, layer: str, device: torch.device, homes: Sequence[Home], told: Told, back: bool) -> None:
        """The same for one device.

        Copies wait for what it was told before, and for the layer's copies the other way, even if nobody used it.
        """
        stream, move = self._stream(device, back), Home.back if back else Home.here
        if stream is None:
            for home in homes:
                move(home)
            return
        current, compute, event = _until_now(device, told)
        if not back:
            self._owners[layer, device] = compute
        stream.wait_event(event)
        for _, other in (self._coming if back else self._going).get(layer, ()):
            stream.wait_event(other)
        torch.cuda.set_stream(stream)  # torch's own context looks the device up again and again, 0.1 ms a layer
        try:
            for home in homes:
                move(home)
        finally:
            torch.cuda.set_stream(compute)
            if current != device.index:
                torch.cuda.set_device(current)
            (self._going if back else self._coming).setdefault(layer, []).append((compute, stream.record_event()))

    def _buffers(self, layer: str) -> Iterator[tuple[Tensor, Ring | None, bool]]:
        """Every tensor of a layer, the ring whose slots it has at the ring's axis, and whether it is always written."""
        mine = (dict.__getitem__(self, name) for name in self._names[layer])
        states: list[tuple[Ring | Lease, bool]] = [(state, True) for state in mine]
        while states:
            state, direct = states.pop(0)
            if isinstance(state, Lease):  # which its model may overwrite by kernels that count no versions
                states += [(other, False) for other in (state.base, state.copies) if other is not None]
                yield from ((buffer, None, direct) for buffer in state.store.buffers())
                continue
            for buffer in state.buffers():
                slots = buffer.dim() > state.axis and buffer.shape[state.axis] == state.capacity
                yield buffer, state if slots else None, False

    def _stream(self, device: torch.device, back: bool) -> Any:
        """The stream on which copies to a device are made, or back from it; None where there is none."""
        if device.type != "cuda":
            return None
        if (device, back) not in self._streams:
            self._streams[device, back] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device, back]


def _until_now(device: torch.device, told: Told) -> tuple[int, Any, Any]:
    """The device in use, this one's stream, and when all is over that it was told before it was first asked for."""
    if device not in told:
        compute = torch.cuda.current_stream(device.index)
        told[device] = torch.cuda.current_device(), compute, compute.record_event()
    return told[device]


def _layer(name: str) -> str:
    layer, dot, _ = name.partition(".")
    return layer if dot else ""


def _restored(states: dict[str, Ring | Lease]) -> Offloaded:
    made = Offloaded()
    for name, state in states.items():
        made[name] = state
    return made


def _host(buffer: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu", pin_memory=buffer.is_cuda)


def _parts(ring: Ring, span: Span) -> list[slice] | None:
    """The slots of these positions; None where they are all of the ring's."""
    first, n = span[0], span[1] - span[0]
    return None if n >= ring.capacity else Step(0, 0).runs(first, n, ring.capacity)


def _narrow(buffer: Tensor, axis: int, at: slice) -> Tensor:
    return buffer.narrow(axis, at.start, at.stop - at.start)


def _fill(buffer: Tensor) -> None:
    """Give a buffer its memory."""
    buffer.untyped_storage().resize_(buffer.nbytes)


def _empty(buffer: Tensor) -> None:
    """Take a buffer's memory away."""
    buffer.untyped_storage().resize_(0)


def _copy(to: Tensor, what: Tensor) -> None:
    to.copy_(what, non_blocking=True)
