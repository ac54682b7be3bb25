"""Where a flight recording lies: two nameless files in memory, which the server process opens and
still holds when the engine that wrote them is gone.

The engine writes them in turn; each begins with all that is needed to go on from there, so that the
other can be overwritten. They hold the token ids of live requests: dumps are for their owner alone.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

_MAX_DUMPS = 10
_SUFFIX = ".flight"
_LENGTH = struct.Struct("!I")
_SERIAL = struct.Struct("!Q")
_INT32 = struct.Struct("<i")
_SETTING_OUT = 2  # frames that every file has; the third is a step
_encoder = msgspec.msgpack.Encoder()


class _Request(msgspec.Struct):
    request_id: int


class _Tenant(msgspec.Struct):
    row: int
    request: _Request


class _Start(msgspec.Struct, tag="start"):
    pass


class _Rows(msgspec.Struct, tag="rows"):
    rows: list[_Tenant]


class _Planned(msgspec.Struct, tag="plan"):
    """As much of a plan as tells who is in it; `recording.Planned` is all of it."""

    step: int
    arrays: dict[str, bytes]
    admitted: list[_Tenant]

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """Row, first position, number of positions."""
        columns = (self.arrays[name] for name in ("rows", "starts", "chunk_lens"))
        numbers = ([n for (n,) in _INT32.iter_unpack(column)] for column in columns)
        return zip(*numbers, strict=True)


class _Ran(msgspec.Struct, tag="result"):
    step: int


_decoder = msgspec.msgpack.Decoder(_Start | _Rows | _Planned | _Ran)


class End(msgspec.Struct, tag="end"):
    """The last record of a dump, by the server: what it knows of the death."""

    cause: str
    at: str


Span = tuple[int, int]


def preamble(serial: int) -> bytes:
    """The beginning of a file: which of the two is the older."""
    return _SERIAL.pack(serial)


def frame_of(record: Any) -> bytes:
    payload = _encoder.encode(record)
    return _LENGTH.pack(len(payload)) + payload


def frames_of(data: bytes) -> Iterator[memoryview]:
    """The payloads that are there in full: a writer may have died in the middle of one."""
    position, view = 0, memoryview(data)
    while position + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            return
        yield view[position : position + length]
        position += length


class Tape:
    """The two files of one engine process."""

    def __init__(self) -> None:
        """Raises OSError."""
        self.fds: list[int] = []
        try:
            for _ in range(2):
                self.fds.append(_nameless_file())
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)

    def in_flight(self) -> dict[int, Span]:
        """What was running, by request id: the positions, from and to, that the steps which had
        begun and not ended were to compute.
        """
        parts = sorted(_read(fd) for fd in self.fds)
        records = [_decoder.decode(frame) for _, part in parts for frame in frames_of(part)]
        done = {record.step for record in records if isinstance(record, _Ran)}
        tenants: dict[int, int] = {}  # request ids by row
        found: dict[int, Span] = {}
        for record in records:
            if isinstance(record, _Rows):
                tenants |= {tenant.row: tenant.request.request_id for tenant in record.rows}
            elif isinstance(record, _Planned):
                tenants |= {tenant.row: tenant.request.request_id for tenant in record.admitted}
                if record.step not in done:
                    for row, start, length in record.chunks():
                        if (request_id := tenants.get(row)) is not None:
                            first, _ = found.get(request_id, (start, start))
                            found[request_id] = (first, start + length)
        return found

    def dump(self, folder: Path, cause: str) -> Path | None:
        """Write what is there to a new file in `folder`; None if no step was recorded.

        Raises:
            OSError: the folder or the file cannot be written.
        """
        parts = []
        for _, part in sorted(_read(fd) for fd in self.fds):
            frames = list(frames_of(part))
            if len(frames) > _SETTING_OUT:
                parts.append(frames)
        if not parts:
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        path = folder / f"{at.replace(' ', '-').replace(':', '')}-{os.getpid()}-{_token()}{_SUFFIX}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                for frame in (frame for frames in parts for frame in frames):
                    file.write(_LENGTH.pack(len(frame)) + frame)
                file.write(frame_of(End(cause, at)))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        for old in sorted(folder.glob(f"*{_SUFFIX}"))[:-_MAX_DUMPS]:
            old.unlink(missing_ok=True)
        return path


def _token() -> str:
    """Tells dumps of one second apart, in order."""
    return f"{time.monotonic_ns():020}"


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("octavo-flight")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _read(fd: int) -> tuple[int, bytes]:
    """Serial and content; serial 0 for a file that was never begun."""
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    if len(data) < _SERIAL.size:
        return 0, b""
    return _SERIAL.unpack_from(data)[0], data[_SERIAL.size :]
