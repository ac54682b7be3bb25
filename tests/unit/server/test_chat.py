"""Chat completions through the official client."""

from __future__ import annotations

import asyncio
import dataclasses

import openai
import pytest

USER = [{"role": "user", "content": "hi"}]


def chat(client: openai.OpenAI, **fields):
    return client.chat.completions.create(
        model="fake", messages=fields.pop("messages", USER), **fields
    )


def test_whole_answer(server, client):
    server.engine.num_cached_tokens = 5
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Hello, world!"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    prompt = server.engine.submitted[0].prompt_token_ids
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len("Hello, world!") + 1  # and EOS
    assert answer.usage.total_tokens == len(prompt) + 14
    assert answer.usage.prompt_tokens_details.cached_tokens == 5


def test_prompt_is_the_rendered_template(server, client):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    chat(client, messages=messages)
    prompt = server.state.tokenizer.decode(
        server.engine.submitted[0].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_history_as_the_client_gives_it_back(server, client):
    message = chat(client).choices[0].message
    chat(client, messages=[*USER, message.model_dump(), *USER])
    chat(client, messages=[*USER, message, *USER])


def test_tool_results_are_accepted(server, client):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat(
        client,
        messages=[
            *USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
    )


def test_continue_final_message(server, client):
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    chat(client, messages=messages, extra_body={"continue_final_message": True})
    prompt = server.state.tokenizer.decode(server.engine.submitted[0].prompt_token_ids)
    assert prompt.endswith("assistant\nThe answer is")


def test_max_tokens(server, client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{name: 4})
        assert answer.choices[0].message.content == "Hell"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4


def test_n_outputs(server, client):
    texts = ["alpha", "beta", "gamma"]
    server.engine.reply = lambda r: server.encode(texts[(len(server.engine.submitted) - 1) % 3])
    answer = chat(client, n=3, seed=7)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({r.seed for r in server.engine.submitted}) == 3
    assert answer.usage.prompt_tokens == len(server.engine.submitted[0].prompt_token_ids)


def test_stop_string_ends_the_engines_request(server, client):
    server.says("one two three " + "x" * 100)
    server.engine.step_s = 0.001
    answer = chat(client, stop=["three", "four"])
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "three"
    server.wait_for(lambda: server.engine.num_live == 0)
    assert server.engine.aborted == [server.engine.submitted[0].request_id]


def test_stop_token(server, client):
    (bang,) = server.encode(",")
    answer = chat(client, extra_body={"stop_token_ids": [bang]})
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].stop_reason == bang


def test_generation_config_gives_defaults(server, client):
    chat(client)
    chat(client, extra_body={"top_k": 3, "min_p": 0.1}, temperature=0.5)
    default, own = (r.params for r in server.engine.submitted)
    assert (default.temperature, default.top_k, default.max_tokens) == (1.0, 50, None)
    assert (own.temperature, own.top_k, own.min_p) == (0.5, 3, 0.1)


def test_logprobs(server, client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(c.token for c in content[:-1]) == "Hello, world!"
    assert bytes(content[0].bytes) == b"H"
    assert content[0].logprob == -1.0
    assert [t.logprob for t in content[0].top_logprobs] == [-0.5, -1.0]
    assert content[0].top_logprobs[1].token == "H"
    answer = chat(client, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_bytes_of_half_characters(server, client):
    server.says("é")
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert bytes(b for c in content[:2] for b in c.bytes) == "é".encode()


def test_stream(server, client):
    server.says("Hällo 🌍")
    server.engine.step_s = 0.001
    chunks = list(chat(client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hällo 🌍"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    assert {c.id for c in chunks} == {chunks[0].id}
    assert all(c.object == "chat.completion.chunk" and c.usage is None for c in chunks)


def test_stream_usage(server, client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 14
    assert all(c.usage is None for c in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    server.engine.step_s = 0.001
    chunks = list(chat(client, stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 14


def test_stream_interleaves_choices(server, client):
    server.engine.step_s = 0.001
    texts = ["", "", ""]
    order = []
    for chunk in chat(client, stream=True, n=3):
        (choice,) = chunk.choices
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["Hello, world!"] * 3
    assert order != sorted(order)


def test_stream_logprobs_match_the_tokens(server, client):
    server.engine.step_s = 0.001
    chunks = list(chat(client, stream=True, logprobs=True, top_logprobs=1))
    tokens = [
        t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content
    ]
    assert tokens == [*"Hello, world!", "<eos>"]


def test_token_ids(server, client):
    answer = chat(client, extra_body={"return_token_ids": True})
    assert answer.prompt_token_ids == list(server.engine.submitted[0].prompt_token_ids)
    assert answer.choices[0].token_ids == [*server.encode("Hello, world!"), 0]
    chunks = list(chat(client, stream=True, extra_body={"return_token_ids": True}))
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    ids = [t for c in chunks for t in getattr(c.choices[0], "token_ids", None) or []]
    assert ids == answer.choices[0].token_ids


def test_prompt_logprobs(server, client):
    answer = chat(client, extra_body={"prompt_logprobs": 0})
    prompt = server.engine.submitted[0].prompt_token_ids
    assert answer.prompt_logprobs[0] is None
    assert list(answer.prompt_logprobs[3]) == [str(prompt[3])]


def test_request_fields_reach_the_engine(server, client):
    chat(
        client,
        logit_bias={"65": 1.5},
        extra_body={"priority": -3, "cache_salt": "tenant", "ignore_eos": True, "max_tokens": 5},
    )
    (request,) = server.engine.submitted
    assert (request.priority, request.cache_salt, request.stop_token_ids) == (-3, "tenant", ())
    assert request.params.logit_bias == {65: 1.5}


def test_typed_errors(server, client):
    with pytest.raises(openai.NotFoundError, match="'fake', 'alias'") as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(client, temperature=-1)
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"


def test_async_client(server):
    async def main() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="-") as client:
            whole = client.chat.completions.create(model="alias", messages=USER)
            stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            return [(await whole).choices[0].message.content, text]

    assert asyncio.run(main()) == ["Hello, world!"] * 2


def test_priority_needs_the_policy(server, http):
    server.state.engine.info = dataclasses.replace(
        server.state.engine.info, scheduling_policy="fcfs"
    )
    body = {"messages": [{"role": "user", "content": "hi"}], "priority": 1}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    assert "--scheduling-policy" in reply.json()["error"]["message"]
