"""The process around the app: sockets, signals, HTTP limits, imports, configuration."""

from __future__ import annotations

import asyncio
import inspect
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server import http1
from octavo.server.app import create_app
from octavo.server.listener import bind
from octavo.server.state import sampling_defaults

TESTS = Path(__file__).parents[2]

SERVE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from support.live_server import make_state
from octavo.config.server import ServerConfig
from octavo.server import run

async def main():
    doors = run.Doors.open(ServerConfig(port=0, drain_timeout_s=5.0, drain_grace_s=0.1))

    async def start(starting):
        state = make_state(doors.config)
        state.engine.step_s = 0.03
        return state

    await run.serve(start, doors, lambda state: print(doors.sock.getsockname()[1], flush=True))

loop_factory = None
if sys.argv[2] == "uvloop":
    import uvloop
    loop_factory = uvloop.new_event_loop
with asyncio.Runner(loop_factory=loop_factory) as runner:
    runner.run(main())
print("orderly", flush=True)
"""


def test_app_does_not_import_torch():
    check = (
        "import sys, octavo.server.app, octavo.server.run; "
        "bad = {'torch', 'transformers', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize(("sig", "loop"), [(signal.SIGTERM, "uvloop"), (signal.SIGINT, "asyncio")])
def test_signal_finishes_requests_and_exits_0(sig, loop):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(TESTS), loop], stdout=subprocess.PIPE, text=True
    )
    with process, socket.socket() as sock:
        assert process.stdout is not None
        sock.connect(("127.0.0.1", int(process.stdout.readline())))
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        sock.settimeout(10)
        data = sock.recv(65536)
        process.send_signal(sig)
        while part := sock.recv(65536):
            data += part
        assert data.count(b"data: ") == 15
        assert b"[DONE]" in data
        assert process.stdout.read() == "orderly\n"
        assert process.wait(10) == 0


def exchange(url: str, *parts: bytes) -> bytes:
    """What the server answers to raw bytes, until it closes."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1]))) as sock:
        sock.settimeout(10)
        for part in parts:
            sock.sendall(part)
        data = b""
        while part := sock.recv(65536):
            data += part
        return data


def test_endless_header_is_cut_off(server):
    reply = exchange(server.url, b"GET /health HTTP/1.1\r\nx-a: ", b"a" * 1_000_000)
    assert reply.startswith(b"HTTP/1.1 431")
    assert b"headers_too_large" in reply


def test_many_headers_are_cut_off(server):
    reply = exchange(server.url, b"GET /health HTTP/1.1\r\n", b"x-a: b\r\n" * 100_000)
    assert reply.startswith(b"HTTP/1.1 431")


def test_garbage_gets_openais_shape(server, monkeypatch):
    monkeypatch.setattr(http1, "_LINGER_S", 0.1)
    reply = exchange(server.url, b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(reply.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"


def test_garbage_after_a_request_does_not_answer_it(server):
    """The request's answer comes, and no other: an error before it would be taken for it."""
    server.engine.step_s = 0.05
    body = b'{"prompt": "hi", "max_tokens": 3}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    reply = exchange(server.url, head.encode() + body + b"\x16\x03\x01 no HTTP\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 200")
    assert reply.count(b"HTTP/1.1") == 1


def test_unknown_urls_take_no_thread(new_state):
    async def handlers() -> list[object]:
        return list(create_app(new_state()).exception_handlers.values())

    assert all(map(inspect.iscoroutinefunction, asyncio.run(handlers())))


def test_keep_alive_connections_start_a_new_count(server):
    request = b"GET /livez HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * 30_000 + b"\r\n\r\n"
    last = request.replace(b"host: x", b"host: x\r\nconnection: close")
    reply = exchange(server.url, request, request, request, last)
    assert reply.count(b"HTTP/1.1 200") == 4


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nx-a: "])
def test_silent_clients_are_dropped(start_server, start):
    server = start_server(read_timeout_s=0.3)
    begun = time.monotonic()
    exchange(server.url, start)
    assert time.monotonic() - begun < 5


def test_unfinished_body_times_out(start_server):
    server = start_server(read_timeout_s=0.3)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    assert exchange(server.url, head).startswith(b"HTTP/1.1 408")


def test_taken_port_says_what_to_do(server):
    port = int(server.url.rsplit(":")[-1])
    with pytest.raises(ConfigError, match="--port"):
        bind("127.0.0.1", port)


def test_small_writes_are_not_held_back(server, http):
    """With Nagle's algorithm every answer would wait 40 ms for the client's delayed ACK."""
    begun = time.monotonic()
    for _ in range(50):
        http.get("/livez")
    assert time.monotonic() - begun < 50 * 0.03


def test_options():
    config = ServerConfig.from_options(port=0, served_model_name="a, b")
    assert config.served_names("x") == ("a", "b")
    assert ServerConfig().served_names("m") == ("m",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prot": 1}, "Did you mean 'port'"),
        ({"port": "1"}, "takes int"),
        ({"port": 70_000}, "65535"),
        ({"max_body_bytes": 0}, "at least 1"),
        ({"drain_timeout_s": -1.0}, "0 or more"),
        ({"stall_timeout_s": float("nan")}, "0 or more"),
        ({"api_key": ""}, "non-empty"),
        ({"api_key": "ключ"}, "ASCII"),
        ({"served_model_name": " , "}, "at least one"),
        ({"generation_config": "mine"}, "one of"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        ServerConfig.from_options(**options)


def test_api_key_from_the_environment(monkeypatch):
    monkeypatch.setenv("OCTAVO_API_KEY", "from-env")
    assert ServerConfig.from_options().api_key == "from-env"
    assert ServerConfig.from_options(api_key="own").api_key == "own"


def test_sampling_defaults():
    config = {"temperature": 0.6, "top_p": None, "eos_token_id": 2, "do_sample": True}
    assert sampling_defaults(config) == {"temperature": 0.6}
    with pytest.raises(ConfigError, match="--generation-config"):
        sampling_defaults({"top_p": 7})
