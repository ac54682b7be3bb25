"""Bounds on what one client, or many, can take; and what a browser is allowed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.live_server import LiveServer

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server import listener
from octavo.server.keys import append_entry, new_key

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


def bearer(path: Path, name: str, **options: object) -> dict[str, str]:
    key, entry = new_key(name, ["infer"], **options)  # type: ignore[arg-type]
    append_entry(path, entry)
    return {"authorization": f"Bearer {key}"}


# ---- streams of a key


def test_a_key_has_its_own_number_of_streams(
    start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    small = bearer(path, "small", max_streams=1)
    usual = bearer(path, "usual")
    server = start_server(api_key_file=str(path), max_streams_per_key=2)
    server.engine.hang = True
    with contextlib.ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=20))

        def begin(headers: dict[str, str]) -> None:
            num_live = len(server.state.live_requests)
            sock = stack.enter_context(connect(server))
            body = json.dumps(STREAM).encode()
            lines = ["POST /v1/chat/completions HTTP/1.1", "host: x"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            lines += [f"content-length: {len(body)}", "", ""]
            sock.sendall("\r\n".join(lines).encode() + body)
            server.wait_for(lambda: len(server.state.live_requests) == num_live + 1)

        begin(small)
        begin(usual)
        begin(usual)
        for headers, limit in ((small, 1), (usual, 2)):
            reply = http.post("/v1/chat/completions", json=STREAM, headers=headers)
            assert reply.status_code == 429
            assert reply.headers["retry-after"] == "1"
            assert reply.json()["error"]["code"] == "too_many_streams"
            assert f"{limit} requests" in reply.json()["error"]["message"]
            assert http.get("/v1/models", headers=headers).status_code == 200
    server.engine.hang = False
    server.wait_for(lambda: len(server.state.live_requests) == 0)
    for _ in range(3):  # what is over is not counted
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=small)
        assert reply.status_code == 200


# ---- connections, heads and bodies


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.doors.sock.getsockname()[1]), timeout=10)


def test_beyond_the_connections_that_it_takes_a_server_answers_probes_alone(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(max_connections=4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(4)]
        held[-1].sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[-1].recv(4096).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{server.url}/livez").status_code == 200
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "too_many_connections"
        assert reply.headers["connection"] == "close"
        flood = [stack.enter_context(connect(server)) for _ in range(80)]
        assert flood[-1].recv(10) == b""
        held[0].sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200"), "and those it has are served"
    server.wait_for(
        lambda: httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200
    )


def test_the_limit_of_open_files_is_raised_or_its_lack_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted: list[tuple[int, int]] = []
    monkeypatch.setattr(listener.resource, "getrlimit", lambda what: (1024, 2000))
    monkeypatch.setattr(listener.resource, "setrlimit", lambda what, pair: wanted.append(pair))
    listener.allow_files(100)
    assert wanted == []
    listener.allow_files(1000)
    assert wanted == [(1256, 2000)]
    assert "ulimit" not in caplog.text
    listener.allow_files(4096)
    assert wanted[-1] == (2000, 2000)
    assert "ulimit" in caplog.text


def test_a_lack_of_files_passes(
    start_server: Callable[..., LiveServer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(listener, "_RETRY_ACCEPT_S", 0.1)
    server = start_server()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(server) as early, connect(server) as late:
        early.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert early.recv(4096).startswith(b"HTTP/1.1 200")
        waiting = socket.socket()
        lowest_free = os.dup(0)
        os.close(lowest_free)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            waiting.connect(("127.0.0.1", server.doors.sock.getsockname()[1]))
            server.wait_for(lambda: "cannot take connections" in caplog.text)
            late.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert late.recv(4096).startswith(b"HTTP/1.1 200")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with waiting:
            waiting.settimeout(5)
            waiting.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'"' + b"\\" * 8_000_000,
        b"[1," * 49_000,
        b'{"x":"' + b"[" * 8_000_000,
    ],
    ids=["arrays", "objects", "cut off", "backslashes", "lists", "brackets in a string"],
)
def test_hostile_json_is_refused_quickly(server: LiveServer, body: bytes) -> None:
    begun = time.monotonic()
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, timeout=20)
    assert reply.status_code == 400
    assert time.monotonic() - begun < 1.5


@pytest.mark.parametrize("path", [b"/" + b"a" * 100_000, b"/?" + b"a" * 100_000])
def test_long_urls_are_cut_off(server: LiveServer, path: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(4096).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


@pytest.mark.parametrize("path", [b"//[", b"http://[::1", b"/\xff", b"*", b"x"])
def test_odd_urls_harm_nobody(server: LiveServer, path: bytes) -> None:
    with connect(server) as sock:
        sock.sendall(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(4096).startswith((b"HTTP/1.1 400", b"HTTP/1.1 404"))


def test_the_host_header_means_nothing(server: LiveServer) -> None:
    for host in ("evil.example", "", "a\tb", "[::1", "x" * 1000):
        with connect(server) as sock:
            sock.sendall(f"GET /v1/models/ HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            reply = sock.recv(4096)
        assert reply.startswith(b"HTTP/1.1 404"), "no redirect is made of it"
        assert b"evil" not in reply


# ---- browsers


def test_every_answer_says_that_it_is_private_and_what_it_is(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as http:
        replies = [
            http.get("/livez"),
            http.get("/nothing"),
            http.post("/v1/chat/completions", json=CHAT),
            http.post("/v1/chat/completions", json=STREAM),
            http.post("/v1/chat/completions", content=b"{"),
            http.get("/livez", headers={"x-a": "a" * 100_000}),
        ]
    for reply in replies:
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in reply.headers if name.startswith("access-control")]


PREFLIGHT = {
    "origin": "https://chat.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def test_origins_that_are_named_may_call_and_no_others(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(
        allowed_origins="https://chat.example, http://localhost:3000", api_key="s3cret"
    )
    with httpx.Client(base_url=server.url) as http:
        reply = http.options("/v1/chat/completions", headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in reply.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in reply.headers
        assert http.options("/no/such/route", headers=PREFLIGHT).status_code == 200
        headers = {"origin": "http://localhost:3000", "authorization": "Bearer s3cret"}
        for body in (CHAT, STREAM, {}):
            reply = http.post("/v1/chat/completions", json=body, headers=headers)
            assert reply.status_code == (200 if body else 400)
            assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
            assert "origin" in reply.headers["vary"].lower()
        for origin in ("https://evil.example", "https://chat.example.evil", "null"):
            reply = http.options("/v1/models", headers=PREFLIGHT | {"origin": origin})
            assert reply.status_code == 400
            assert "access-control-allow-origin" not in reply.headers
            reply = http.get("/v1/models", headers=headers | {"origin": origin})
            assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "origins", ["*", "https://*.example", "chat.example", "https://a.example/", "HTTPS://A"]
)
def test_origins_are_exact(origins: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        ServerConfig(allowed_origins=origins)
