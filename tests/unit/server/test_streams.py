"""What happens when a stream does not go well: clients that leave, engines that fail."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest

from octavo.server.app import create_app

USER = [{"role": "user", "content": "hi"}]
CHAT = {"model": "fake", "messages": USER}


def test_wire_format(server, http):
    reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0][6:])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_leaving_a_stream_aborts(server, path, n):
    server.says("x" * 200)
    server.engine.step_s = 0.01
    body = {"stream": True, "n": n, "max_tokens": 150}
    body |= {"messages": USER} if "chat" in path else {"prompt": "a"}
    with (
        httpx.Client(base_url=server.url) as client,
        client.stream("POST", path, json=body) as reply,
    ):
        next(reply.iter_lines())
    server.wait_for(lambda: len(server.engine.aborted) == n)
    server.wait_for(lambda: not server.state.live)


def test_leaving_before_the_first_token_aborts(server):
    server.engine.hang = True
    for stream in (True, False):
        server.engine.aborted.clear()
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url) as client:
            client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, timeout=0.2)
        server.wait_for(lambda: len(server.engine.aborted) == 1)
    assert server.state.metrics.finished["abort"] >= 2


def test_leaving_in_the_middle_of_the_body(server, http):
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":")[-1]))) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert len(server.engine.submitted) == 1


def test_slow_reader_gets_merged_updates(new_state):
    """While a chunk is on its way nothing is pulled; what piles up is tokens, not chunks."""

    async def main() -> list[bytes]:
        state = new_state()
        state.engine.reply = lambda request: state.tokenizer.encode("y" * 100)
        request = [{"type": "http.request", "body": json.dumps(CHAT | {"stream": True}).encode()}]
        bodies = []

        async def receive():
            return request.pop() if request else await asyncio.Event().wait()

        async def send(message):
            bodies.append(message.get("body", b""))
            await asyncio.sleep(0.05)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await create_app(state)(scope, receive, send)
        return bodies

    bodies = asyncio.run(main())
    assert b"".join(bodies).count(b"y") >= 100
    assert len(bodies) < 10


def test_error_before_the_first_token_is_a_status(server, client):
    server.engine.is_alive = False
    with pytest.raises(openai.InternalServerError) as dead:
        client.chat.completions.create(model="fake", messages=USER, stream=True)
    assert dead.value.status_code == 503
    assert dead.value.code == "engine_dead"


def test_error_in_mid_stream_is_an_event(server, client, http):
    server.engine.fail = "a kernel broke"
    server.engine.step_s = 0.01
    stream = client.chat.completions.create(model="fake", messages=USER, stream=True)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="a kernel broke"):
        texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(texts) == "He"
    reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert reply.status_code == 200
    assert "[DONE]" not in reply.text


def test_error_fails_a_whole_answer_and_its_siblings(server, http):
    server.engine.fail = "a kernel broke"
    reply = http.post("/v1/chat/completions", json=CHAT | {"n": 3})
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    server.wait_for(lambda: server.engine.num_live == 0)


def test_unexpected_error_tells_only_its_request_id(server, http, caplog, monkeypatch):
    monkeypatch.setattr(
        type(server.engine),
        "next_request_id",
        lambda self: (_ for _ in ()).throw(KeyError("secret")),
    )
    reply = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc"})
    assert reply.status_code == 500
    assert "abc" in reply.json()["error"]["message"]
    assert "secret" not in reply.text
    assert any(r.exc_info and "abc" in r.getMessage() for r in caplog.records)


def test_shutdown_lets_requests_finish_and_cuts_the_rest(start_server):
    server = start_server(drain_timeout_s=0.5)
    server.says("z" * 200)
    server.engine.step_s = 0.02
    text, begun = "", time.monotonic()
    with httpx.Client(base_url=server.url, timeout=20) as client:
        body = CHAT | {"stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            for i, line in enumerate(reply.iter_lines()):
                if i == 0:
                    server.ask_to_stop()
                text += line
    assert time.monotonic() - begun < 5
    assert '"z"' in text
    assert json.loads(text.split("data: ")[-1])["error"]["code"] == "aborted"


def test_a_silent_stream_says_that_it_is_still_there(start_server):
    """Before the first token, and between two; clients that know server-sent events skip it."""
    server = start_server(sse_keep_alive_interval_s=0.1)
    server.engine.hang = True
    url = f"{server.url}/v1/completions"
    lines = []
    body = {"prompt": "x", "stream": True, "max_tokens": 5}
    with httpx.stream("POST", url, json=body, timeout=20) as response:
        for line in response.iter_lines():
            lines.append(line)
            if lines.count(": still here") == 3:
                server.engine.hang = False
    assert lines.count(": still here") >= 3
    assert lines[-2] == "data: [DONE]"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        server.engine.step_s = 0.15
        said = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="fake", prompt="x", stream=True, max_tokens=3
            )
        ]
    assert "".join(said) == "Hel"


def test_after_a_comment_a_failure_is_an_error_event(start_server):
    server = start_server(sse_keep_alive_interval_s=0.1)
    server.engine.step_s, server.engine.fail = 0.3, "struck by the test"
    body = {"prompt": "x", "stream": True, "max_tokens": 5}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20)
    assert reply.status_code == 200
    assert ": still here" in reply.text
    assert "struck by the test" in reply.text.splitlines()[-2]
