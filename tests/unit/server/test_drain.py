"""The end of a server: nothing that it took is lost, and what must be cut off is told so."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable

import httpx
import pytest
from starlette.responses import PlainTextResponse
from support.balancer import Balancer
from support.live_server import LiveServer

from octavo.config.server import ServerConfig
from octavo.server.listener import Listener, bind
from octavo.server.starting import Front

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


def port_of(server: LiveServer) -> int:
    return int(server.url.rsplit(":")[-1])


class Reader:
    """One request in a thread; its outcome when it is over."""

    def __init__(self, server: LiveServer, body: dict[str, object]) -> None:
        self.status = 0
        self.text = ""
        self._server, self._body = server, body
        self._thread = threading.Thread(target=self._run)
        num_live = len(server.state.live_requests)
        self._thread.start()
        server.wait_for(lambda: len(server.state.live_requests) > num_live)

    def _run(self) -> None:
        with httpx.Client(base_url=self._server.url, timeout=20) as http:
            reply = http.post("/v1/chat/completions", json=self._body)
            self.status, self.text = reply.status_code, reply.text

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


def test_during_the_grace_all_is_served_but_the_server_is_not_ready(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(drain_grace_s=0.6)
    with httpx.Client(base_url=server.url) as kept:
        assert "connection" not in kept.get("/readyz").headers
        begun = time.monotonic()
        server.ask_to_stop(with_grace=True)
        server.wait_for(lambda: server.state.draining)
        for client in (kept, httpx.Client(base_url=server.url)):
            reply = client.get("/readyz")
            assert reply.status_code == 503
            assert reply.headers["connection"] == "close"
            assert client.get("/livez").status_code == 200
            reply = client.post("/v1/chat/completions", json=STREAM)
            assert reply.status_code == 200
            assert reply.headers["connection"] == "close"
            client.close()
        assert time.monotonic() - begun < 0.6
    server.wait_for(lambda: server.num_cut == 0)
    assert 0.6 < time.monotonic() - begun < 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/livez")


def test_a_kept_connection_is_answered_once_more_after_the_listener_has_closed(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(drain_timeout_s=5.0)
    server.says("x" * 200)
    server.engine.step_s = 0.02
    with httpx.Client(base_url=server.url, timeout=20) as kept:
        kept.get("/livez")
        running = Reader(server, STREAM)
        server.ask_to_stop()
        server.wait_for(lambda: _refuses(port_of(server)))
        reply = kept.post("/v1/chat/completions", json=CHAT | {"max_tokens": 3})
        assert reply.json()["choices"][0]["message"]["content"] == "xxx"
        assert reply.headers["connection"] == "close"
    server.engine.step_s = 0.0
    running.join()
    assert running.text.endswith("data: [DONE]\n\n")
    server.wait_for(lambda: server.num_cut == 0)


def _refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionError:  # reset, in the very moment of closing
        return True
    return False


@pytest.mark.parametrize("by", ["timeout", "second signal", "second signal in the grace"])
def test_what_is_cut_off_is_told_so(start_server: Callable[..., LiveServer], by: str) -> None:
    server = start_server(drain_timeout_s=0.3 if by == "timeout" else 20.0, drain_grace_s=10.0)
    server.engine.hang = True
    waiting = Reader(server, CHAT)
    server.engine.hang = False
    server.says("x" * 200)
    server.engine.step_s = 0.05
    streaming = Reader(server, STREAM)
    time.sleep(0.2)
    begun = time.monotonic()
    server.ask_to_stop(with_grace=by.endswith("grace"))
    if by != "timeout":
        server.wait_for(lambda: server.state.draining)
        server.ask_to_stop()
    streaming.join()
    waiting.join()
    assert time.monotonic() - begun < 3
    assert waiting.status == 503
    assert json.loads(waiting.text)["error"]["code"] == "aborted"
    assert streaming.status == 200
    assert '"x"' in streaming.text
    event = streaming.text.rstrip("\n").split("data: ")[-1]
    assert json.loads(event)["error"]["code"] == "aborted"
    assert "[DONE]" not in streaming.text
    server.wait_for(lambda: server.num_cut == 2)


def test_a_second_signal_with_nothing_running_cuts_nothing(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(drain_grace_s=10.0)
    begun = time.monotonic()
    server.ask_to_stop(with_grace=True)
    server.ask_to_stop()
    server.wait_for(lambda: server.num_cut == 0)
    assert time.monotonic() - begun < 3


def test_idle_connections_do_not_hold_up_the_end(start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    with socket.create_connection(("127.0.0.1", port_of(server))) as silent:
        silent.settimeout(5)
        begun = time.monotonic()
        server.ask_to_stop()
        server.wait_for(lambda: server.num_cut == 0)
        assert time.monotonic() - begun < 2
        assert silent.recv(1) == b""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_connections_that_wait_to_be_accepted_are_not_reset(loop: str) -> None:
    """A connection is complete, and its request sent, before the server calls accept()."""

    async def app(scope, receive, send):
        await PlainTextResponse("hello")(scope, receive, send)

    async def main() -> list[bytes]:
        sock = bind("127.0.0.1", 0)
        listener = Listener(Front(app), ServerConfig(), sock, None)
        listener.open()
        address = sock.getsockname()
        clients = [socket.create_connection(address, timeout=10) for _ in range(20)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await listener.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        replies = [await asyncio.to_thread(client.recv, 4096) for client in clients]
        await listener.close()
        for client in clients:
            client.close()
        return replies

    factory = None
    if loop == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        replies = runner.run(main())
    assert len(replies) == 20
    assert all(reply.startswith(b"HTTP/1.1 200") for reply in replies)


def test_a_rolling_restart_behind_a_balancer_loses_nothing(
    start_server: Callable[..., LiveServer],
) -> None:
    def start(port: int = 0) -> LiveServer:
        server = start_server(port=port, drain_grace_s=0.4)
        server.engine.step_s = 0.004
        return server

    first = [start(), start()]
    ports = [port_of(server) for server in first]

    async def ask(http: httpx.AsyncClient, done: asyncio.Event) -> int:
        num_answers = 0
        while not done.is_set():
            stream = num_answers % 2 == 0
            reply = await http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert reply.status_code == 200
            if stream:
                assert reply.text.endswith("data: [DONE]\n\n")
            else:
                assert reply.json()["choices"][0]["message"]["content"] == "Hello, world!"
            num_answers += 1
        return num_answers

    def busy(server: LiveServer) -> None:
        server.wait_for(lambda: len(server.engine.submitted) > 10)

    def restart(server: LiveServer) -> LiveServer:
        server.ask_to_stop(with_grace=True)
        server.wait_for(lambda: server.num_cut is not None)
        assert server.num_cut == 0
        return start(port_of(server))

    async def main() -> None:
        done = asyncio.Event()
        async with Balancer(ports) as balancer:
            async with httpx.AsyncClient(base_url=balancer.url, timeout=20) as http:
                workers = [asyncio.create_task(ask(http, done)) for _ in range(8)]
                second = []
                for server in first:
                    await asyncio.to_thread(busy, server)
                    second.append(await asyncio.to_thread(restart, server))
                    await asyncio.to_thread(busy, second[-1])
                done.set()
                answers = await asyncio.gather(*workers)
            assert balancer.num_lost == 0
            assert sum(balancer.num_sent.values()) == sum(answers) > 40

    asyncio.run(main())
