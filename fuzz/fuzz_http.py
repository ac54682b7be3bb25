"""What comes in on a socket: request lines, headers, bodies, in pieces, to the routes.

The first byte says how the rest is cut into pieces. Checked beside what `oracle` says: every answer
is whole HTTP with a status that the client caused (no 500), nothing is logged as unexpected, and a
connection keeps no more of a head than its bound.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from typing import Any

from support.live_server import make_state
from uvicorn import Config
from uvicorn.server import ServerState as Connections

from fuzz import oracle
from fuzz.mutators import mutate_bytes, mutate_json
from octavo.config.server import ServerConfig
from octavo.server.app import create_app
from octavo.server.http1 import bounded_protocol

INSTRUMENTED = ("octavo.server",)
MAX_LEN = 16 << 10

_HEADER_BYTES = 4096
_READ_BYTES = 1024
_CONFIG = ServerConfig.from_options(max_header_bytes=_HEADER_BYTES, max_body_bytes=8192)
_LOOP = asyncio.new_event_loop()
_errors: list[str] = []


class _Errors(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _errors.append(self.format(record))


class _Transport:
    """A socket's writing end, in memory."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self._closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 5)}.get(name, default)

    def write(self, data: bytes) -> None:
        if not self._closing:
            self.sent += data

    def close(self) -> None:
        self._closing = True

    abort = close

    def is_closing(self) -> bool:
        return self._closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def _application() -> Any:
    return create_app(make_state(_CONFIG))


_UVICORN = Config(
    _LOOP.run_until_complete(_application()), ws="none", lifespan="off", log_config=None
)
_UVICORN.load()
_PROTOCOL = bounded_protocol(_CONFIG)
for _name in ("uvicorn.error", "octavo.server.errors", "asyncio"):
    logging.getLogger(_name).addHandler(_Errors(logging.ERROR))
    logging.getLogger(_name).propagate = False


def check(data: bytes) -> None:
    _errors.clear()
    with oracle.judged(len(data)):
        sent = _LOOP.run_until_complete(_talk(data[1:], 1 + data[0] if data else 1))
    oracle.expect(not _errors, f"logged: {_errors[:1]}")
    _check_answers(bytes(sent))


async def _talk(data: bytes, num_pieces: int) -> bytearray:
    transport = _Transport()
    connections = Connections()
    protocol: Any = _PROTOCOL(_UVICORN, connections, {}, _LOOP)
    protocol.connection_made(transport)
    size = max(1, min(-(-len(data) // num_pieces), _READ_BYTES))
    for start in range(0, len(data), size):
        if transport.is_closing():
            break
        protocol.data_received(data[start : start + size])
        held = sum(len(name) + len(value) for name, value in protocol.headers or ())
        oracle.expect(held <= _HEADER_BYTES + 2 * _READ_BYTES, f"holds {held} bytes of a head")
        for _ in range(3):
            await asyncio.sleep(0)
    if connections.tasks:  # let what was asked for be answered
        await asyncio.wait(connections.tasks, timeout=0.02)
    protocol.connection_lost(None)
    if connections.tasks:
        await asyncio.wait(connections.tasks, timeout=2)
    oracle.expect(not connections.tasks, "a request outlives its connection")
    return transport.sent


_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(?:[!-~]+: ?[^\r\n]*\r\n)*\r\n")


def _check_answers(sent: bytes) -> None:
    if not sent:
        return
    oracle.expect(_STATUS.match(sent) is not None, f"no HTTP: {sent[:60]!r}")
    for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", sent):
        oracle.expect(status != b"500", "an answer with status 500")


def _request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


_CHAT = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
_HOST = {"host": "x", "content-type": "application/json"}


def seeds() -> list[bytes]:
    """Good and bad requests, alone and one after the other."""
    length = {"content-length": str(len(_CHAT))}
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(_CHAT), _CHAT)
    url = "/v1/chat/completions"
    made = [
        _request("GET", "/health", _HOST) + _request("GET", "/v1/models", _HOST),
        _request("POST", url, _HOST | length | {"x-request-timeout": "5"}, _CHAT),
        _request("POST", url, _HOST | {"transfer-encoding": "chunked"}, chunked),
        _request("POST", url, _HOST | length | {"expect": "100-continue"}, _CHAT),
        _request("POST", url, _HOST | length | {"x-request-id": "a" * 200}, _CHAT),
        _request("POST", "/v1/completions", _HOST | {"content-length": "99999"}, b"{"),
        _request("GET", "/metrics?x=%00", _HOST | {"connection": "close", "authorization": "B x"}),
        _request("GET", "/", {"host": "x", "upgrade": "websocket", "connection": "upgrade"}),
        _request("OPTIONS", "*", _HOST) + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        _request("GET", "/health", _HOST | {f"h{i}": "v" * 90 for i in range(60)}),
        _request("POST", "/tokenize", _HOST | {"content-length": "14"}, b'{"prompt":"a"}'),
    ]
    return [bytes([index * 7 % 40]) + raw for index, raw in enumerate(made)]


_PIECES = (
    *(b"\r\n", b"\n", b"\r\n\r\n", b": ", b" ", b"\0", b"\xff", b"\xc3\x28", b"%", b"HTTP/1.0"),
    *(b"content-length: -1\r\n", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"),
    *(b"content-length: 99999999999999999999\r\n", b"transfer-encoding: gzip, chunked\r\n"),
    *(b"expect: 100-continue\r\n", b"connection: close\r\n", b"connection: keep-alive\r\n"),
    *(b"x-request-timeout: nan\r\n", b"x-request-timeout: 1e-9\r\n", b"x-request-id: \xe9\r\n"),
    *(b"authorization: Bearer \xff\r\n", b"upgrade: h2c\r\n", b"x" * 3000, b"GET / HTTP/1.1\r\n"),
    *(b"POST /v1/completions HTTP/1.1\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n", b"5;x=y\r\n"),
    *(b"/%2e%2e/", b"http://x/health", b"/health/", b"?a=b", b"#"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Put in or take out lines and pieces, change a body, or a blind change."""
    kind = rng.randrange(6)
    head, gap, body = data.partition(b"\r\n\r\n")
    if kind == 0 or not data:
        return mutate_bytes(data, rng)
    if kind == 1 and body:
        return head + gap + mutate_json(body, rng)
    seams = [0, *(match.end() for match in re.finditer(rb"\r\n|[ :/]", data)), len(data)]
    at = max(1, rng.choice(seams))
    if kind == 2:
        return data[:at] + data[rng.choice(seams) :]
    return data[:at] + rng.choice(_PIECES) + data[at:]


def check_seeds() -> None:
    answered = [bool(_LOOP.run_until_complete(_talk(data[1:], 1))) for data in seeds()]
    oracle.expect(answered.count(False) == 1, "more than the one request without its body wait")
