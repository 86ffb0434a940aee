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


@dataclass(eq=False)
class Now:
    """What a device has been told so far."""

    device: int  # that is in use, which may be another
    compute: Any  # the stream that runs layers
    event: Any  # when it is over


Told = dict[torch.device, Now]


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
    spare: list[Tensor] = field(default_factory=list)  # memory that parts came to, to be used again

    def __post_init__(self) -> None:
        self.device = self.buffer.device  # which torch makes anew whenever it is asked

    def here(self) -> None:
        """Copy the entries to the device."""
        _copy(self.buffer.data, self.host)  # `data` counts its own versions: a state that came back was not written

    @property
    def going(self) -> int:
        """Bytes that go back."""
        if self.parts is None:
            return self.buffer.nbytes
        slots = sum(int(at.stop - at.start) for at in self.parts)
        return self.buffer.nbytes // self.buffer.shape[self.axis] * slots

    def back(self) -> None:
        """Copy the entries that were written to host memory."""
        if self.parts is None:
            self.late.clear()  # of a copy of which another part failed
            _copy(self.host, self.buffer)
            return
        for at in self.parts:
            host, part = _narrow(self.host, self.axis, at), _narrow(self.buffer, self.axis, at)
            if not part.is_cuda:
                _copy(host, part)
                continue
            # an entry here and there: in one piece over the bus, and to its place when it is needed again
            came = self.spare.pop() if self.spare else None
            if came is None or came.shape != part.shape:
                came = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=True)
            _copy(came, part.contiguous())
            self.late.append((host, came))

    def settle(self) -> None:
        """Copy what came back in one piece to its place; it has to be there."""
        for part, came in self.late:
            _copy(part, came)
        self.spare = [came for _, came in self.late]
        self.late.clear()


class Offloaded(dict[str, "Ring | Lease"]):
    """States by name, of which those of one layer are on the device, and on their way there those of the next.

    Looking a state up brings its layer; the copy began, on a stream of its own, when a layer before it was looked up.
    The layer before goes back on another, as far as it was written: the bus carries both at once, and its memory is
    freed when something comes or goes again, or at once where little was written, as of a large attention layer, so
    that the next large one has its place. More layers than the next come while all that are there are no larger than
    two of the largest, so that a large one is on its way while small ones run; and these come and go several at a time,
    half as many bytes as the largest has or more. What is of no layer stays on the device.

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
        self._coming: dict[str, list[Now]] = {}  # who uses a layer, and when that has come
        self._going: dict[str, list[Now]] = {}  # and when what was written of it is back
        self._owners: dict[tuple[str, torch.device], Any] = {}  # the stream that a layer's memory on a device is of
        self._leaving: list[str] = []  # layers whose memory is freed when they are
        self._sizes: dict[str, int] = {}  # bytes of the layers that have been used
        self._capacities: dict[str, list[int]] = {}  # of their rings when they had so many
        self._largest = 0
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
                for over in each:
                    over.compute.wait_event(over.event)

    # ---- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Offloaded:
        other = memo[id(self)] = Offloaded()
        for name, state in self.items():
            other[name] = copy.deepcopy(state, memo)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        self._release()
        for layer in filter(None, self._names):  # all at once: a pickle is written afterwards
            self._fetch([layer], {})
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
        written = None if span is None else self._written.get(layer, span)
        if span is not None and written is not None:
            self._written[layer] = min(written[0], span[0]), max(written[1], span[1])

    def enter(self, layer: str) -> None:
        """Have a layer on the device, the next one on its way there, and more for which there is room; no other.

        Small layers come and go several at a time, between two large ones: what it takes the host is by the copy.
        """
        if torch.compiler.is_compiling():
            raise StepError("a cache with offload=True copies between the layers of a step: do not compile it")
        told: Told = {}
        if self.now in self._here:
            self._measure(self.now)
        coming = self._ahead(layer)
        over = [other for other in self._here if other != layer and other not in coming]
        missing = [other for other in coming if other not in self._here]
        there = layer in self._here and coming[:1] != missing[:1]  # and the next, if it is known
        stays = there and not self._many(over) and not self._many(missing)
        if not stays:
            self._release()
            if layer not in self._here:
                self._fetch([layer], told)
        self._arrive(layer, told)
        self.now = layer
        if not stays:
            self._exchange(coming, over, missing, told)

    def _exchange(self, coming: list[str], over: list[str], missing: list[str], told: Told) -> None:
        """Begin to copy back what is over, large layers first, and then here what is missing, as far as it fits."""
        large = [other for other in over if self._many([other])]
        for others in (*([other] for other in large), [other for other in over if other not in large]):
            if others:
                self._put_away(others, told)
        fitting: list[str] = []
        for other in missing:
            if other != coming[0] and self._room(other, *fitting, *self._here, *self._leaving) < 0:
                break  # until what leaves is gone
            fitting.append(other)
        if fitting:
            self._fetch(fitting, told)

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
        return 2 * self._largest - sum(self._sizes.get(layer, 0) for layer in layers)

    def _many(self, layers: list[str]) -> bool:
        """Whether these layers are half as large as the largest of all."""
        return 2 * sum(self._sizes.get(layer, 0) for layer in layers) >= self._largest

    def _measure(self, layer: str) -> None:
        """Note the bytes of a layer that was used, whose rings may have grown; leases are seen when it leaves."""
        states = (dict.__getitem__(self, name) for name in self._names[layer])
        capacities = [state.capacity for state in states if isinstance(state, Ring)]
        if self._capacities.get(layer) != capacities:
            self._capacities[layer] = capacities
            self._resize(layer, sum(buffer.nbytes for buffer, _, _ in self._buffers(layer)))

    def _resize(self, layer: str, size: int) -> None:
        """A layer has so many bytes from now on."""
        if self._sizes.get(layer) != size:
            self._sizes[layer] = size
            self._largest = max(self._sizes.values())
            self._plans.clear()

    def _fetch(self, layers: list[str], told: Told) -> None:
        """Begin to copy layers' states to the device."""
        moved: dict[str, list[Home]] = {}
        for layer in layers:
            homes = moved[layer] = [home for home in self._homes.get(layer, ()) if home.away]
            if any(home.late for home in homes):
                for over in self._going.get(layer, ()):
                    over.event.synchronize()
            for home in homes:
                if home.late:
                    home.settle()
                _fill(home.buffer)
        self._copy_all(moved, told, back=False)
        for layer, homes in moved.items():
            for home in homes:
                home.away = False
            self._going.pop(layer, None)
        self._here += [layer for layer in layers if layer not in self._here]

    def _arrive(self, layer: str, told: Told) -> None:
        """Have who uses a layer now wait for what is on its way there, and with it for what came in the same copy."""
        for waited in self._coming.pop(layer, ()):
            device = waited.compute.device
            torch.cuda.current_stream(device.index).wait_event(waited.event)
            told.pop(device, None)  # so that what goes back from now on is there
            for others in self._coming.values():
                if waited in others:
                    others.remove(waited)

    def _release(self) -> None:
        """Free the memory of layers that left, once what was written of them is back."""
        self._free(self._leaving)
        self._leaving.clear()

    def _free(self, layers: Sequence[str]) -> None:
        for over in {over for layer in layers for over in self._going.get(layer, ())}:
            over.compute.wait_event(over.event)
        for layer in layers:
            for home in self._homes[layer]:
                if home.away:
                    _empty(home.buffer)

    @torch.no_grad()
    def _put_away(self, layers: Sequence[str], told: Told) -> None:
        """Begin to copy what was written of layers to host memory; that of the device is freed when it is over."""
        moved = {layer: self._written_of(layer) for layer in layers}
        self._copy_all(moved, told, back=True)
        for layer in layers:
            for home in moved[layer]:
                home.version = home.buffer._version
            homes = self._homes[layer]
            self._resize(layer, sum(home.buffer.nbytes for home in homes))
            for home in homes:
                # not what somebody else looks at, as numpy
                home.away = home.buffer.is_cuda or home.buffer.untyped_storage().resizable()
            self._here.remove(layer)
            self._written.pop(layer, None)
            self._arrive(layer, told)
            self._part(layer, homes, told)
        going = sum(home.going for homes in moved.values() for home in homes)
        soon = sum(self._sizes[layer] for layer in layers) > SOON >= going
        if not soon and any(layer in self._going for layer in layers):
            self._leaving += layers
        else:
            self._free(layers)
            told.clear()  # so that who gets the memory waits for what was written of it, too

    def _written_of(self, layer: str) -> list[Home]:
        """What goes back of a layer, whose homes are known from now on."""
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
        self._homes[layer] = homes
        return written

    def _part(self, layer: str, homes: list[Home], told: Told) -> None:
        """Where another stream runs layers than when a layer's memory was taken, have that be kept for all it does."""
        for device in {home.device for home in homes}:
            owner = self._owners.get((layer, device))
            if owner is None:
                continue
            compute = _until_now(device, told).compute
            if owner == compute:
                continue
            for home in homes:
                if home.device == device:
                    for stream in (compute, self._stream(device, True)):
                        home.buffer.record_stream(stream)

    def _copy_all(self, moved: dict[str, list[Home]], told: Told, back: bool) -> None:
        """Copy layers' states to their devices, or back from them, beside what those do next."""
        devices = {home.device for homes in moved.values() for home in homes}
        for device in devices:
            here = moved
            if len(devices) > 1:
                here = {name: [h for h in homes if h.device == device] for name, homes in moved.items()}
            self._beside(device, here, told, back)

    def _beside(self, device: torch.device, moved: dict[str, list[Home]], told: Told, back: bool) -> None:
        """The same for one device.

        Copies wait for what it was told before, and for the layers' copies the other way, even if nobody used them.
        """
        stream, move = self._stream(device, back), Home.back if back else Home.here
        each = [home for homes in moved.values() for home in homes]
        if stream is None:
            for home in each:
                move(home)
            return
        now = _until_now(device, told)
        stream.wait_event(now.event)
        for layer in moved:
            for other in (self._coming if back else self._going).get(layer, ()):
                if back or other.compute != now.compute:  # which has waited for what went before its memory was freed
                    stream.wait_event(other.event)
        torch.cuda.set_stream(stream)  # torch's own context looks the device up again and again, 0.1 ms a layer
        try:
            for home in each:
                move(home)
        finally:
            torch.cuda.set_stream(now.compute)
            if now.device != device.index:
                torch.cuda.set_device(now.device)
            over = Now(now.device, now.compute, stream.record_event())
            for layer, homes in moved.items():
                if homes:
                    (self._going if back else self._coming).setdefault(layer, []).append(over)
                    if not back:
                        self._owners[layer, device] = now.compute

    def _buffers(self, layer: str) -> Iterator[tuple[Tensor, Ring | None, bool]]:
        """Every tensor of a layer, the ring whose slots it has at the ring's axis, and whether it is always written."""
        states: list[tuple[Ring | Lease, bool]] = [(dict.__getitem__(self, name), True) for name in self._names[layer]]
        for state, direct in states:
            if isinstance(state, Lease):  # which its model may overwrite by kernels that count no versions
                states += [(other, False) for other in (state.base, state.copies) if other is not None]
                for buffer in state.store.buffers():
                    yield buffer, None, direct
                continue
            for buffer in state.buffers():
                slots = buffer.dim() > state.axis and buffer.shape[state.axis] == state.capacity
                yield buffer, state if slots else None, False

    def _stream(self, device: torch.device, back: bool) -> Any:
        """The stream on which copies to a device are made, or back from it; None where there is none."""
        found = self._streams.get((device, back))
        if found is None and device.type == "cuda":
            found = self._streams[device, back] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return found


def _until_now(device: torch.device, told: Told) -> Now:
    """What a device had been told when it was first asked for."""
    now = told.get(device)
    if now is None:
        compute = torch.cuda.current_stream(device.index)
        now = told[device] = Now(torch.cuda.current_device(), compute, compute.record_event())
    return now


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
