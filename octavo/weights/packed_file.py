"""One file of packed tensors, made to be mapped.

    magic, length of the header, SHA-256 of the header | header: JSON | data, from a multiple of 64

The header has the key that the file was written for, the seconds that it saves, the size of all
data, and of each tensor the kind, shape, and place in the data, at a multiple of 64 bytes. What was
cut off, or is no such file, is told by the header alone; the data is as it was written, since a
file gets its name only when all of it is on disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from octavo.weights.packed import Packed

_MAGIC = b"OCTAVOPK"
_PREFIX = struct.Struct("<8sQ32s")
_ALIGNMENT = 64  # a cache line, and the widest vector
_MAX_HEADER_BYTES = 64 << 20
# Written at once: between two of them the writer may be stopped, and what it has written goes to
# the disk, so that it never waits long for that.
_PIECE_BYTES = 32 << 20
_LOCK_TRIES = 5  # while another process tries whether the file is in use


class PackedFileError(Exception):
    """The file is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a file holds, read only. While one of the tensors lives, the file counts as in use
    (`is_used`).
    """

    tensors: dict[str, Packed]
    num_bytes: int  # of the file
    saved_s: float  # what it took to pack them


def map_packed(path: Path, key: str) -> Mapped:
    """Map a file.

    Raises:
        PackedFileError: the file is damaged, or another user's, or was written for another key.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _hold(file)
        header, begin = check_packed(file, key)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # keeps file and lock
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # that is the point
        data = torch.frombuffer(mapped, dtype=torch.uint8)[begin:]
    tensors = {}
    try:
        for name, (kind, shape, start, length) in header["tensors"].items():
            if not 0 <= start <= start + length <= len(data) or start % _ALIGNMENT:
                raise PackedFileError(f"{name} lies outside")
            tensors[name] = Packed(kind, tuple(shape), data[start : start + length])
        return Mapped(tensors, len(mapped), float(header["saved_s"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackedFileError(f"its header makes no sense: {error!r}") from error


def _hold(file: IO[bytes]) -> None:
    """Count the file as in use, where the file system knows locks."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            return
        else:
            return


def check_packed(file: IO[bytes], key: str) -> tuple[dict[str, Any], int]:
    """The header of a file that is whole and was written for this key, and where its data begins.

    Raises:
        PackedFileError: it is not.
    """
    stat = os.fstat(file.fileno())
    # Whoever can write to it could have this process compute anything, or die.
    if stat.st_uid not in (0, os.geteuid()) or stat.st_mode & 0o022:
        raise PackedFileError("other users can write to it")
    header, begin = _read_header(file, stat.st_size)
    if not isinstance(header, dict) or header.get("key") != key:
        raise PackedFileError("it was written for another key")
    if begin + header.get("num_bytes", 0) != stat.st_size:
        raise PackedFileError("it is not as long as it should be")
    return header, begin


def _read_header(file: IO[bytes], num_bytes: int) -> tuple[Any, int]:
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
    try:
        return json.loads(text), _aligned(_PREFIX.size + length)
    except ValueError as error:
        raise PackedFileError("its header is no JSON") from error


def write_packed(
    file: IO[bytes],
    key: str,
    tensors: Mapping[str, Packed],
    go_on: Callable[[], bool] = lambda: True,
    *,
    saved_s: float = 0.0,
) -> bool:
    """Write the file from its beginning, and to the disk; False if `go_on` said to leave it at
    that. Copies nothing, and lets go of the GIL while it writes.

    Raises:
        OSError: the disk is full, for example.
    """
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = (tensor.kind, tensor.shape, end, tensor.data.nbytes)
        end = _aligned(end + tensor.data.nbytes)
    header = {"key": key, "saved_s": saved_s, "num_bytes": end, "tensors": places}
    text = json.dumps(header).encode()
    prefix = _PREFIX.pack(_MAGIC, len(text), hashlib.sha256(text).digest())
    file.write((prefix + text).ljust(_aligned(len(prefix) + len(text)), b"\0"))
    for tensor in tensors.values():
        data = memoryview(tensor.data.numpy())  # type: ignore[arg-type]  # it is a buffer
        for start in range(0, len(data), _PIECE_BYTES):
            if not go_on():
                return False
            file.write(data[start : start + _PIECE_BYTES])
            if len(data) > _PIECE_BYTES:
                _sync(file)
        file.write(bytes(_aligned(len(data)) - len(data)))
    _sync(file)
    return True


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def is_used(path: Path) -> bool:
    """Whether a process on this machine has the file mapped; yes, where locks cannot tell."""
    try:
        with path.open("r+b") as file:  # network file systems lock what can be written only
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
