"""The layout of a safetensors file, written from tensors where they lie and read into them: a length, a header, data.

What is not contiguous is put in order a part at a time, in memory that stays in the processor's cache, where its
checksum is computed, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

try:
    from zlib_ng.zlib_ng import crc32  # ten times as fast
except ImportError:
    from zlib import crc32

PART = 1 << 19  # bytes copied, summed and written at a time
LARGE = 1 << 24  # bytes of a tensor that is brought to the disk while others are put in order
ALONE = (1 << 15) - 1  # numbers that torch copies without threads of its own, which would be in each other's way
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes, as which numpy knows any number
CPU = torch.device("cpu")
ALIGNED = 8  # bytes: where tensors begin
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Metadata = Callable[[Mapping[str, str]], Mapping[str, str]]


def write(handle: int, tensors: Mapping[str, Tensor], metadata: Metadata) -> None:
    """Write tensors to an empty file. metadata: of the checksums by name, as long a text whatever they are.

    The header is written last, since it has the checksums; what is not yet on the disk then is for the caller to sync.
    Waits for the tensors' devices. Raises OSError.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so each is aligned
    ends, size = dict[str, int](), 0
    for name in order:
        ends[name] = size = size + tensors[name].nbytes

    def headed(sums: Mapping[str, str]) -> bytes:
        told: dict[str, object] = {"__metadata__": metadata(sums)}
        for name in order:
            tensor, end = tensors[name], ends[name]
            offsets = [end - tensor.nbytes, end]
            told[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        return len(text).to_bytes(8, "little") + text

    first = len(headed(dict.fromkeys(order, "0" * 8)))
    jobs = [(handle, first + ends[name] - tensors[name].nbytes, tensors[name]) for name in order]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as threads:  # of which some wait for the disk
        sums = dict(zip(order, threads.map(_put, jobs), strict=True))
    _write_at(handle, memoryview(headed(sums)), 0)


def header(handle: int) -> dict[str, tuple[str, list[int], int]]:
    """Of each tensor its dtype by the format's name, its shape, and where in the file it begins.

    Raises ValueError, KeyError or TypeError for a file of another form.
    """
    n = int.from_bytes(os.pread(handle, 8, 0), "little")
    told = json.loads(os.pread(handle, n, 8))
    return {
        name: (tensor["dtype"], tensor["shape"], 8 + n + tensor["data_offsets"][0])
        for name, tensor in told.items()
        if name != "__metadata__"
    }


def read(handle: int, tensors: Mapping[str, tuple[int, Tensor, torch.dtype]]) -> dict[str, str]:
    """Fill tensors, in any dtype, device and order in memory, from places in a file: their checksums there.

    tensors: by name, the place of each, the tensor, and the dtype in the file. Raises OSError where the file ends.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda job: _take(handle, *job), tensors.values())
        return dict(zip(tensors, found, strict=True))


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes in order, in hexadecimal."""
    found = 0
    for part in _parts(tensor.cpu()):
        found = crc32(part, found)  # lets go of Python's lock
    return f"{found:08x}"


def _put(job: tuple[int, int, Tensor]) -> str:
    """Write a tensor's bytes at a place of the file. Their checksum."""
    handle, at, tensor = job
    found = 0
    for part in _parts(tensor.cpu()):
        found = crc32(part, found)
        _write_at(handle, part, at)
        at += len(part)
    if tensor.nbytes >= LARGE:
        os.fsync(handle)
    return f"{found:08x}"


def _take(handle: int, at: int, to: Tensor, dtype: torch.dtype) -> str:
    """Fill a tensor from a place of the file. The checksum of the bytes there."""
    found = 0
    if not to.numel():
        return f"{found:08x}"
    direct = to.is_contiguous() and to.dtype == dtype and to.device.type == "cpu"
    n = max(1, PART // (to[0].numel() * dtype.itemsize))
    buffer = torch.empty(0 if direct else min(n, len(to)), *to.shape[1:], dtype=dtype)
    with torch.no_grad():
        for part in torch.split(to, n):
            came = part if direct else buffer[: len(part)]
            data = _bytes(came.view(-1).view(torch.uint8))
            _read_at(handle, data, at)
            found, at = crc32(data, found), at + len(data)
            if not direct:
                _copy(part, came)
    return f"{found:08x}"


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in order, a part at a time, which is good until the next is asked for."""
    if not tensor.numel():
        return
    with torch.no_grad():
        if tensor.is_contiguous():
            flat = tensor.detach().view(-1).view(torch.uint8)
            yield from (_bytes(flat[at : at + PART]) for at in range(0, len(flat), PART))
            return
        n = max(1, PART // tensor[0].nbytes)
        buffer = torch.empty(min(n, len(tensor)), *tensor.shape[1:], dtype=tensor.dtype)
        for part in torch.split(tensor, n):
            came = buffer[: len(part)]
            _copy(came, part)
            yield _bytes(came.view(-1).view(torch.uint8))


def _copy(to: Tensor, what: Tensor) -> None:
    """Copy on this thread alone."""
    if to.dtype == what.dtype and to.device == what.device == CPU:
        there, came = (each.detach().view(WHOLE[each.itemsize]).numpy() for each in (to, what))
        there[...] = came  # numpy starts no threads
        return
    n = max(1, ALONE // to[0].numel()) if to.device == CPU else len(to)
    for part, place in zip(torch.split(what, n), torch.split(to, n), strict=True):
        place.copy_(part)


def _bytes(flat: Tensor) -> memoryview:
    return flat.numpy().data


def _write_at(handle: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done


def _read_at(handle: int, data: memoryview, at: int) -> None:
    while data:
        done = os.preadv(handle, [data], at)
        if not done:
            raise OSError("it is cut short")
        data, at = data[done:], at + done
