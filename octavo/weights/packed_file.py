"""One file of packed tensors, made to be mapped.

    magic, length of the header, SHA-256 of the header | header: JSON | data, from a multiple of 64

The header has the key that the file was written for, the size of all data, and of each tensor the
kind, shape, and place in the data, at a multiple of 64 bytes. What was cut off, or is no such file,
is told by the header alone; the data is as it was written, since a file gets its name only when all
of it is on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from octavo.weights.packed import Packed

_MAGIC = b"OCTAVOPK"
_PREFIX = struct.Struct("<8sQ32s")
_ALIGNMENT = 64  # a cache line, and the widest vector
_MAX_HEADER_BYTES = 64 << 20
_PIECE_BYTES = 8 << 20  # written at once: between two of them, the writer may be stopped


class PackedFileError(Exception):
    """The file is not what was asked for."""


def map_packed(path: Path, key: str) -> tuple[dict[str, Packed], int]:
    """The tensors of a file, mapped read only, and its size in bytes. While one of them lives, the
    file counts as in use (`is_used`).

    Raises:
        PackedFileError: the file is damaged, or was written for another key.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        with contextlib.suppress(OSError):  # not every file system knows locks
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        num_bytes = os.fstat(file.fileno()).st_size
        header, begin = _read_header(file, num_bytes)
        if header.get("key") != key:
            raise PackedFileError("it was written for another key")
        if begin + header["num_bytes"] != num_bytes:
            raise PackedFileError("it is not as long as it should be")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # keeps file and lock
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is the point
        data = torch.frombuffer(mapped, dtype=torch.uint8)[begin:]
    tensors = {}
    for name, (kind, shape, start, length) in header["tensors"].items():
        if not 0 <= start <= start + length <= len(data) or start % _ALIGNMENT:
            raise PackedFileError(f"{name} lies outside")
        tensors[name] = Packed(kind, tuple(shape), data[start : start + length])
    return tensors, num_bytes


def _read_header(file: IO[bytes], num_bytes: int) -> tuple[dict[str, Any], int]:
    """The header, and where the data begins."""
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size:
        raise PackedFileError("it is cut off")
    magic, length, digest = _PREFIX.unpack(prefix)
    if magic != _MAGIC or length > min(num_bytes, _MAX_HEADER_BYTES):
        raise PackedFileError("it is no file of packed weights")
    text = file.read(length)
    if hashlib.sha256(text).digest() != digest:
        raise PackedFileError("its header is damaged")
    header: dict[str, Any] = json.loads(text)
    return header, _aligned(_PREFIX.size + length)


def write_packed(
    file: IO[bytes],
    key: str,
    tensors: Mapping[str, Packed],
    go_on: Callable[[], bool] = lambda: True,
) -> bool:
    """Write the file from its beginning; False if `go_on` said to leave it at that. Copies nothing,
    and lets go of the GIL while it writes.

    Raises:
        OSError: the disk is full, for example.
    """
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = (tensor.kind, tensor.shape, end, tensor.data.nbytes)
        end = _aligned(end + tensor.data.nbytes)
    text = json.dumps({"key": key, "num_bytes": end, "tensors": places}).encode()
    prefix = _PREFIX.pack(_MAGIC, len(text), hashlib.sha256(text).digest())
    file.write((prefix + text).ljust(_aligned(len(prefix) + len(text)), b"\0"))
    for tensor in tensors.values():
        data = memoryview(tensor.data.numpy())  # type: ignore[arg-type]  # it is a buffer
        for start in range(0, len(data), _PIECE_BYTES):
            if not go_on():
                return False
            file.write(data[start : start + _PIECE_BYTES])
        file.write(bytes(_aligned(len(data)) - len(data)))
    return True


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def is_used(path: Path) -> bool:
    """Whether a process on this machine has the file mapped, as far as locks can tell."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
