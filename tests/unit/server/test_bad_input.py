"""Every request of the table is refused helpfully, costs the engine nothing, and harms nobody."""

from __future__ import annotations

import httpx
import pytest
from bad_requests import BadRequest, bad_requests

CASES = bad_requests("fake", max_model_len=256, vocab_size=259)
GOOD = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: BadRequest, server, http: httpx.Client):
    reply = http.request(case.method, case.path, content=case.body, headers=case.headers)
    assert reply.status_code == case.status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert case.says.lower() in error["message"].lower()
    assert len(error["message"]) < 1000
    assert error["type"] == "invalid_request_error"
    if case.param is not None:
        assert error["param"] == case.param
    assert server.engine.submitted == []
    good = http.post("/v1/chat/completions", json=GOOD)
    assert good.json()["choices"][0]["message"]["content"] == "Hello, world!"


def test_names_are_unique_and_many():
    assert len({case.name for case in CASES}) == len(CASES) >= 70


def test_template_code_in_a_message_is_text(server, http: httpx.Client):
    text = "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}"
    body = GOOD | {"messages": [{"role": "user", "content": text}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    prompt = server.state.tokenizer.decode(server.engine.submitted[0].prompt_token_ids)
    assert text in prompt
    assert "49" not in prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "response_format": {"type": "text"}, "logit_bias": {}},
        {"n": 1, "stream": False, "stop": None, "seed": None, "best_of": 1},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"modalities": ["text"], "reasoning_effort": None, "safety_identifier": "x"},
        {"stream_options": None, "temperature": None, "max_tokens": None, "top_k": -1},
    ],
)
def test_harmless_values_are_accepted(fields, server, http: httpx.Client):
    reply = http.post("/v1/chat/completions", json=GOOD | fields)
    assert reply.status_code == 200, reply.text


def test_content_type_does_not_matter(server, http: httpx.Client):
    body = b'{"messages": [{"role": "user", "content": "hi"}]}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": content_type}
        )
        assert reply.status_code == 200


def test_body_without_length_is_bounded_too(server, http: httpx.Client):
    def chunks():
        for _ in range(200):
            yield b" " * 65_536

    reply = http.post("/v1/completions", content=chunks())
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "body_too_large"
    assert server.engine.submitted == []
