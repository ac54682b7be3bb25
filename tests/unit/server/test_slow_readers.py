"""Clients that ask for much and read little, over real sockets."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest
from support.fake_engine import fake_info

from octavo.server.http1 import BoundedProtocol

NUM_TOKENS = 4000  # with log-probabilities about 2 kB of events each: more than sockets hold
BODY = {
    "messages": [{"role": "user", "content": "hi"}],
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
}


def ask(server, body=BODY) -> socket.socket:
    """A client with a small receive buffer that has sent its request."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", int(server.url.rsplit(":")[-1])))
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
    sock.sendall(head.encode() + b"\r\n" + content)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Until the last event, or the end of the connection."""
    received = bytearray()
    while chunk := sock.recv(1 << 20):
        received += chunk
        if b"[DONE]" in received[-100:]:
            break
    return bytes(received)


@pytest.fixture
def buffered_bytes(monkeypatch):
    """What all connections of the test's servers hold back."""
    protocols = []
    begin = BoundedProtocol.connection_made
    monkeypatch.setattr(
        BoundedProtocol,
        "connection_made",
        lambda self, transport: (protocols.append(self), begin(self, transport))[1],
    )
    return lambda: sum(p.transport.get_write_buffer_size() for p in protocols if p.transport)


@pytest.fixture
def talkative(start_server):
    def start(**options):
        server = start_server(fake_info(100_000, 200_000), **options)
        server.says("x" * NUM_TOKENS)
        return server

    return start


def test_a_client_that_never_reads_holds_up_nobody_and_costs_little(talkative, buffered_bytes):
    server = talkative()
    socks = [ask(server) for _ in range(3)]
    server.wait_for(lambda: len(server.engine.submitted) == 3 and not server.engine.num_live, 60)
    assert len(server.state.live) == 3  # the engine is through, their readers are not
    # Of 8 MB each, the high-water mark and one write of at most 256 tokens.
    assert 0 < buffered_bytes() < 3 * (64 * 1024 + 256 * 3000)
    server.says("Hello, world!")
    begun = time.monotonic()
    body = {"messages": BODY["messages"]}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert reply.json()["choices"][0]["message"]["content"] == "Hello, world!"
    assert time.monotonic() - begun < 1
    for sock in socks:
        sock.close()
    server.wait_for(lambda: not server.state.live)


def test_what_piled_up_arrives_whole_and_in_order(talkative):
    server = talkative()
    text = "".join(chr(ord("a") + i % 26) for i in range(NUM_TOKENS))
    server.says(text)
    with ask(server) as sock:
        server.wait_for(lambda: server.engine.submitted and not server.engine.num_live, 60)
        received = read_all(sock)
    events = [line[6:] for line in received.decode().splitlines() if line.startswith("data: {")]
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == text
    sizes = [len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]]
    assert sum(sizes) == NUM_TOKENS + 1  # and the end
    assert 100 < max(sizes) <= 256
    assert choices[-1]["finish_reason"] == "stop"


def test_a_client_that_reads_nothing_is_cut_off(talkative):
    server = talkative(write_timeout_s=0.3)
    server.says("x" * 90_000)  # the engine would go on for long
    with ask(server) as sock:
        server.wait_for(lambda: len(server.engine.aborted) == 1, 60)
        server.wait_for(lambda: not server.state.live)
        assert server.state.metrics.finished["abort"] == 1
        assert b"[DONE]" not in read_all(sock)


def test_a_client_that_reads_slowly_is_not(talkative):
    server = talkative(write_timeout_s=0.5)
    with ask(server) as sock:
        received, begun = 0, time.monotonic()
        while time.monotonic() - begun < 1.5:
            received += len(sock.recv(50_000))
            time.sleep(0.02)
        assert not server.engine.aborted
        assert received > 100_000
        assert b"[DONE]" in read_all(sock)


def test_an_unread_answer_does_not_keep_a_connection_for_ever(talkative, buffered_bytes):
    server = talkative(write_timeout_s=0.3)
    with ask(server, BODY | {"stream": False}) as sock:
        server.wait_for(lambda: server.engine.submitted and not server.state.live, 60)
        server.wait_for(lambda: buffered_bytes() > 0, 20)
        server.wait_for(lambda: buffered_bytes() == 0, 20)
        assert len(read_all(sock)) < NUM_TOKENS * 1000
