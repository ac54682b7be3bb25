"""What server and engine process say to each other: msgpack, typed, length-prefixed. Never pickle.

The two ends share a socket pair that no other process can open.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import msgspec

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.types import EngineInfo, EngineRequest, StepOutputs

_HEADER = struct.Struct("!I")
HEADER_BYTES = _HEADER.size
MAX_FRAME_BYTES = 1 << 30


class Configure(msgspec.Struct, tag="configure"):
    """Server → engine, first: what to run. The checkpoint has been located already."""

    args: EngineArgs
    checkpoint: Checkpoint


class Add(msgspec.Struct, tag="add"):
    """Server → engine: a checked request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag="abort"):
    """Server → engine: end these; unknown ids are ignored."""

    request_ids: list[int]


class Ping(msgspec.Struct, tag="ping"):
    """Server → engine: answer, whatever the step loop is doing."""


class Shutdown(msgspec.Struct, tag="shutdown"):
    """Server → engine: end now."""


class Ready(msgspec.Struct, tag="ready"):
    """Engine → server, once: requests may come."""

    info: EngineInfo


class Outputs(msgspec.Struct, tag="outputs"):
    """Engine → server, after each step."""

    outputs: StepOutputs


class Pong(msgspec.Struct, tag="pong"):
    """Engine → server: the answer to a `Ping`."""


class Failed(msgspec.Struct, tag="failed"):
    """Engine → server, last: why the process ends. `kind` is the error's class name."""

    kind: str
    message: str


ToEngine = Configure | Add | Abort | Ping | Shutdown
ToServer = Ready | Outputs | Pong | Failed


def _encode_path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot send a {type(value).__name__}")


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise TypeError(f"cannot receive a {kind.__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_path)
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine, dec_hook=_decode_path)
to_server_decoder = msgspec.msgpack.Decoder(ToServer)


def encode_frame(message: ToEngine | ToServer) -> bytes:
    payload = _encoder.encode(message)
    return _HEADER.pack(len(payload)) + payload


def frame_length(header: bytes) -> int:
    """Bytes of the payload that follows. Raises ValueError for an absurd one."""
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes: the stream is out of step")
    return int(length)


def receive(sock: socket.socket) -> ToEngine | None:
    """The next message for the engine, or None at the end of the stream."""
    header = _receive_exactly(sock, HEADER_BYTES)
    if header is None:
        return None
    payload = _receive_exactly(sock, frame_length(header))
    return None if payload is None else to_engine_decoder.decode(payload)


def _receive_exactly(sock: socket.socket, num_bytes: int) -> bytes | None:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return bytes(buffer)
