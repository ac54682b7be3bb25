"""Overload as clients see it: refusals, deadlines, and a flood that leaves no trace."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.fake_engine import fake_info

USER = [{"role": "user", "content": "hi"}]
CHAT = {"messages": USER}


@pytest.fixture
def full(start_server):
    """A server with one row and one place to wait, both taken for as long as the engine hangs."""
    server = start_server(fake_info(max_num_seqs=1), max_queue_requests=1)
    server.engine.num_rows = 1
    server.engine.hang = True

    async def occupy():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            post = client.post("/v1/chat/completions", json=CHAT)
            return await asyncio.gather(post, client.post("/v1/chat/completions", json=CHAT))

    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.extend(asyncio.run(occupy())))
    thread.start()
    # The first also counts as waiting until the engine has spoken of it.
    server.wait_for(lambda: server.engine.num_live == 2 and server.engine.num_running == 1)
    server.wait_for(lambda: server.state.admission.num_waiting == 1)
    yield server
    server.engine.hang = False
    thread.join(20)
    assert [reply.status_code for reply in replies] == [200, 200]
    server.wait_for(lambda: server.state.admission.num_waiting == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_a_429_that_says_when(full, stream):
    reply = httpx.post(f"{full.url}/v1/chat/completions", json=CHAT | {"stream": stream})
    assert reply.status_code == 429
    assert reply.json()["error"]["code"] == "queue_full"
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert 1000 <= int(reply.headers["retry-after-ms"]) <= 60_000


def test_a_refusal_costs_no_work(full, monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("tokenised for nothing")

    monkeypatch.setattr(type(full.state.tokenizer), "encode", encode)
    monkeypatch.setattr(type(full.state.tokenizer), "encode_batch", encode)
    monkeypatch.setattr(json, "loads", encode)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert httpx.post(full.url + path, content=b'{"prompt": "x"}').status_code == 429


def test_the_official_client_comes_back_when_it_was_told(full):
    begun = time.monotonic()
    with openai.OpenAI(base_url=f"{full.url}/v1", api_key="-", max_retries=1) as client:
        full._loop.call_soon_threadsafe(full._loop.call_later, 0.3, setattr, full.engine, "hang", 0)
        answer = client.chat.completions.create(model="fake", messages=USER)
    assert answer.choices[0].message.content == "Hello, world!"
    assert time.monotonic() - begun >= 1.0


def test_refusals_and_the_queue_are_counted(full):
    httpx.post(f"{full.url}/v1/chat/completions", json=CHAT)
    text = httpx.get(f"{full.url}/metrics").text
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["octavo:http_rejections_total", ("queue_full",)] == 1
    assert samples["octavo:http_rejections_total", ("deadline_exceeded",)] == 0
    assert samples["octavo:queue_depth", ("requests",)] == 1
    assert samples["octavo:queue_depth", ("tokens",)] > 0
    assert samples["octavo:queue_limit", ("requests",)] == 1
    assert samples["octavo:client_refusals_total", ("",)] == 1
    assert ("octavo:queue_predicted_wait_seconds", ()) in samples


@pytest.mark.parametrize("how", ["field", "header", "option"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_deadline_is_a_504_that_is_not_sent_again(start_server, how, n):
    server = start_server(request_timeout_s=0.2 if how == "option" else 30.0)
    server.engine.hang = True
    extra = {
        "field": {"extra_body": {"timeout": 0.2}},
        "header": {"extra_headers": {"X-Request-Timeout": "0.2"}},
        "option": {},
    }[how]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=3) as client,
        pytest.raises(openai.InternalServerError) as late,
    ):
        client.chat.completions.create(model="fake", messages=USER, n=n, **extra)
    assert late.value.status_code == 504
    assert late.value.code == "deadline_exceeded"
    assert len(server.engine.submitted) == n  # it was tried once
    server.wait_for(lambda: len(server.engine.aborted) == n)
    server.wait_for(lambda: not server.engine.num_live)
    assert server.state.metrics.finished["timeout"] == n
    deadline_s = server.engine.submitted[0].deadline_s
    assert deadline_s == pytest.approx(server.engine.submitted[0].arrival_s + 0.2, abs=1e-6)


def test_the_shortest_of_the_limits_counts(server, http):
    headers = {"x-request-timeout": "5"}
    http.post("/v1/chat/completions", json=CHAT | {"timeout": 3}, headers=headers)
    http.post("/v1/chat/completions", json=CHAT | {"timeout": 9.5}, headers=headers)
    http.post("/v1/chat/completions", json=CHAT)
    first, second, third = server.engine.submitted
    assert first.deadline_s - first.arrival_s == pytest.approx(3)
    assert second.deadline_s - second.arrival_s == pytest.approx(5)
    assert third.deadline_s is None


def test_a_stream_that_is_late_ends_with_an_error_event(server, http):
    server.says("z" * 200)
    server.engine.step_s = 0.01
    reply = http.post("/v1/chat/completions", json=CHAT | {"stream": True, "timeout": 0.3})
    assert reply.status_code == 200
    assert '"z' in reply.text
    assert json.loads(reply.text.split("data: ")[-1])["error"]["code"] == "deadline_exceeded"
    server.wait_for(lambda: len(server.engine.aborted) == 1)


@pytest.mark.parametrize("value", [0, -1, "soon", True, 1e400])
def test_a_timeout_that_is_none_is_refused(server, http, value):
    body = json.dumps(CHAT | {"timeout": value}).replace("Infinity", "1e400")
    reply = http.post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert not server.engine.submitted


@pytest.mark.parametrize("value", ["0", "nan", "inf", "", "5s"])
def test_a_timeout_header_that_is_none_is_refused(server, http, value):
    headers = {"x-request-timeout": value}
    reply = http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "x-request-timeout"


def test_a_keys_name_goes_to_the_engine(start_server):
    server = start_server(api_key="secret")
    headers = {"authorization": "Bearer secret"}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, json=CHAT, headers=headers).status_code == 200
    assert server.engine.submitted[0].client == "api-key"
    assert server.state.admission.num_tokens_by_client["api-key"] > 0


@pytest.mark.slow
def test_ten_times_the_load_leaves_latency_flat(start_server):
    """Ten times what the engine serves, for seconds: those who are let in wait no longer than with
    a queue that is just full, all others get a 429, and nothing is left behind.
    """
    server = start_server(fake_info(max_num_seqs=4), max_queue_requests=16)
    server.engine.num_rows = 4
    server.engine.step_s = 0.005

    async def one(client, replies):
        begun = time.monotonic()
        reply = await client.post("/v1/chat/completions", json=CHAT)
        replies.append((reply, time.monotonic() - begun))

    async def closed(client, num_clients, num_rounds):
        replies = []

        async def loop():
            for _ in range(num_rounds):
                await one(client, replies)

        await asyncio.gather(*(loop() for _ in range(num_clients)))
        return replies

    async def opened(client, rate, seconds):
        replies, tasks = [], []
        for _ in range(int(rate * seconds)):
            tasks.append(asyncio.ensure_future(one(client, replies)))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*tasks)
        return replies

    async def main():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=30, limits=limits) as client:
            begun = time.monotonic()
            calm = await closed(client, 20, 10)  # rows and queue just full
            rate = len(calm) / (time.monotonic() - begun)
            return calm, await opened(client, 10 * rate, 4.0)

    calm, flood = asyncio.run(main())
    assert {reply.status_code for reply, _ in calm} == {200}
    assert {reply.status_code for reply, _ in flood} == {200, 429}
    admitted = sorted(seconds for reply, seconds in flood if reply.status_code == 200)
    refused = [reply for reply, _ in flood if reply.status_code == 429]
    assert all(1 <= int(reply.headers["retry-after"]) <= 60 for reply in refused)
    assert len(refused) > len(admitted) > 50
    before = sorted(seconds for _, seconds in calm)
    assert admitted[int(0.95 * len(admitted))] < 3 * before[int(0.95 * len(before))]
    server.wait_for(lambda: not server.engine.num_live)
    assert server.state.admission.num_waiting == 0
    assert not server.state.admission._sequences
    assert not server.state.live
