"""Completions through the official client."""

from __future__ import annotations

import pytest


def complete(client, prompt="abc", **fields):
    return client.completions.create(model="fake", prompt=prompt, **fields)


def test_whole_answer(server, client):
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 3
    assert server.engine.submitted[0].params.max_tokens == 16


def test_max_tokens_null_fills_the_context(server, client):
    complete(client, max_tokens=None)
    assert server.engine.submitted[0].max_total_len == 256


@pytest.mark.parametrize(
    ("prompt", "num_choices"), [(["ab", "cd"], 2), ([65, 66], 1), ([[65], [66, 67], [68]], 3)]
)
def test_kinds_of_prompts(server, client, prompt, num_choices):
    answer = complete(client, prompt)
    assert [c.index for c in answer.choices] == list(range(num_choices))
    assert len(server.engine.submitted) == num_choices
    if isinstance(prompt[0], int):
        assert server.engine.submitted[0].prompt_token_ids == tuple(prompt)


def test_prompts_times_n(server, client):
    answer = complete(client, ["ab", "cde"], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    lengths = [len(r.prompt_token_ids) for r in server.engine.submitted]
    assert lengths == [2, 2, 3, 3]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 4 * 14


def test_echo(server, client):
    assert complete(client, echo=True).choices[0].text == "abcHello, world!"
    ids = server.encode("xyz")
    assert complete(client, ids, echo=True).choices[0].text == "xyzHello, world!"


def test_logprobs(server, client):
    logprobs = complete(client, logprobs=2, max_tokens=3).choices[0].logprobs
    assert logprobs.tokens == ["H", "e", "l"]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-1.0] * 3
    assert logprobs.top_logprobs[0] == {"H": -1.0, "I": -0.5}


def test_chosen_token_is_always_among_the_top(server, client):
    logprobs = complete(client, logprobs=0, max_tokens=1).choices[0].logprobs
    assert logprobs.top_logprobs == [{"H": -1.0}]


def test_echo_with_logprobs(server, client):
    logprobs = complete(client, echo=True, logprobs=1, max_tokens=2).choices[0].logprobs
    assert logprobs.tokens == [*"abc", "H", "e"]
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert None not in logprobs.token_logprobs[1:]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]


def test_scoring_a_prompt(server, client):
    answer = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs.tokens == [*"abc"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_stream(server, client):
    server.engine.step_s = 0.001
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "Hello, world!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 14


def test_stream_of_many_prompts_with_echo(server, client):
    server.engine.step_s = 0.001
    texts = {0: "", 1: "", 2: "", 3: ""}
    for chunk in complete(client, ["a", "b"], n=2, echo=True, logprobs=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [p + "Hello, world!" for p in "aabb"]


def test_stream_logprob_offsets_run_on(server, client):
    server.engine.step_s = 0.001
    offsets = []
    for chunk in complete(client, echo=True, logprobs=0, stream=True):
        offsets += chunk.choices[0].logprobs.text_offset
    assert offsets[:16] == list(range(16))


def test_truncation_keeps_the_end(server, client):
    complete(client, "abcdef", extra_body={"truncate_prompt_tokens": 2})
    assert server.engine.submitted[0].prompt_token_ids == tuple(server.encode("ef"))
    complete(client, "x" * 1000, max_tokens=6, extra_body={"truncate_prompt_tokens": -1})
    assert len(server.engine.submitted[1].prompt_token_ids) == 250


def test_vllm_extras(server, client):
    extras = {
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "bad_words": ["no"],
        "allowed_token_ids": [65, 66],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "prompt_logprobs": 1,
        "return_token_ids": True,
        "request_id": "my-id",
        "add_special_tokens": False,
    }
    answer = complete(client, stop="world", extra_body=extras)
    assert answer.id == "cmpl-my-id"
    assert answer.choices[0].text == "Hello, world"
    assert answer.choices[0].prompt_token_ids == server.encode("abc")
    assert len(answer.choices[0].prompt_logprobs) == 3
    params = server.engine.submitted[0].params
    assert (params.repetition_penalty, params.min_tokens) == (1.1, 2)
    assert server.engine.submitted[0].bad_words_token_ids


def test_long_text_is_tokenised_off_the_loop(server, client):
    complete(client, "x" * 100_000, max_tokens=5, extra_body={"truncate_prompt_tokens": 10})
    assert len(server.engine.submitted[0].prompt_token_ids) == 10
