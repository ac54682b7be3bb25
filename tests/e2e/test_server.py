"""The real model, through the real port, with the official client."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from bad_requests import bad_requests
from support.server import RunningServer

pytestmark = pytest.mark.slow

JAPAN = [{"role": "user", "content": "What is the capital of Japan?"}]
TOPICS = ["rivers", "bread", "the moon", "chess", "rain", "trains", "glass", "whales", "paper"]


def metric(server: RunningServer, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2-135m", messages=JAPAN, temperature=0)
    assert answer.choices[0].message.content == "The capital of Japan is Tokyo."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_streaming_equals_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="smollm2-135m",
        messages=JAPAN,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "The capital of Japan is Tokyo."
    assert chunks[-1].usage.completion_tokens == 8
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 3


def test_a_repeated_prompt_comes_from_the_cache(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Repeat after me: " + "one two three " * 20}]
    for _ in range(2):
        answer = client.chat.completions.create(
            model="smollm2-135m", messages=messages, temperature=0, max_tokens=8
        )
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached >= answer.usage.prompt_tokens - 16
    assert cached % 16 == 0


def test_stop_strings_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2-135m",
        prompt="1, 2, 3, 4,",
        temperature=0,
        max_tokens=40,
        stop=" 9",
        logprobs=2,
        echo=True,
    )
    choice = answer.choices[0]
    assert choice.text.startswith("1, 2, 3, 4, 5, 6, 7, 8,")
    assert choice.finish_reason == "stop"
    assert "9" not in choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_64_streams_at_once_say_what_each_says_alone(
    client: openai.OpenAI, server: RunningServer
) -> None:
    """Greedy and seeded requests, streaming, together and then one after the other."""

    def options(i: int) -> dict:
        topic = TOPICS[i % len(TOPICS)]
        return {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": f"Tell me {i + 2} things about {topic}."}],
            "max_tokens": 12 + i % 9,
            **({"temperature": 0} if i % 2 else {"temperature": 0.8, "seed": i}),
        }

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as many:

            async def one(i: int) -> str:
                stream = await many.chat.completions.create(stream=True, **options(i))
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(64)))

    texts = asyncio.run(together())
    alone = [
        client.chat.completions.create(**options(i)).choices[0].message.content for i in range(64)
    ]
    assert texts == alone
    assert len(set(texts)) > 32


def test_a_client_that_leaves_stops_costing(client: openai.OpenAI, server: RunningServer) -> None:
    stream = client.completions.create(
        model="smollm2-135m",
        prompt="Once upon a time",
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert metric(server, "vllm:num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 20
    while metric(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server, "vllm:num_requests_running") == 0
    tokens = metric(server, "vllm:generation_tokens_total")
    time.sleep(0.5)
    assert metric(server, "vllm:generation_tokens_total") == tokens


def test_an_abandoned_plain_request_stops_costing(server: RunningServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(urllib.request.urlopen, request, timeout=2)
        with pytest.raises(TimeoutError):
            waiting.result()
    deadline = time.monotonic() + 20
    while metric(server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(server, "vllm:num_requests_running") == 0


def test_bad_requests_are_refused_by_the_real_thing(
    client: openai.OpenAI, server: RunningServer
) -> None:
    model = client.models.list().data[0]
    before = metric(server, "vllm:request_success_total")
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for case in bad_requests("smollm2-135m", model.max_model_len, 49152):
            reply = http.request(case.method, case.path, content=case.body, headers=case.headers)
            assert reply.status_code == case.status, (case.name, reply.text)
            assert case.says.lower() in reply.json()["error"]["message"].lower(), case.name
    assert metric(server, "vllm:request_success_total") == before
    test_chat(client)


def test_metrics_count_and_name_the_start(server: RunningServer) -> None:
    assert metric(server, "octavo:startup_seconds") > 0
    assert metric(server, "octavo:memory_bytes") > 5e8
    assert metric(server, "vllm:request_success_total") > 0
    assert metric(server, "vllm:time_to_first_token_seconds_count") > 0
