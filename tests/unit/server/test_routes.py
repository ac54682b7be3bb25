"""The routes beside generation, and what holds for all of them."""

from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import octavo

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def test_models(server, client):
    models = list(client.models.list())
    assert [m.id for m in models] == ["fake", "alias"]
    assert models[0].object == "model"
    assert models[0].max_model_len == 256
    assert client.models.retrieve("alias").id == "alias"


def test_tokenize_text(server, http):
    reply = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) == 3
    assert reply["max_model_len"] == 256
    assert http.post("/tokenize", json={"prompt": "a"}).json()["token_strs"] is None


def test_tokenize_messages_counts_what_chat_counts(server, http):
    count = http.post("/tokenize", json=CHAT).json()["count"]
    usage = http.post("/v1/chat/completions", json=CHAT).json()["usage"]
    assert usage["prompt_tokens"] == count


def test_detokenize(server, http):
    tokens = http.post("/tokenize", json={"prompt": "Grüße 🌍"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Grüße 🌍"}


def test_version(server, http):
    assert http.get("/version").json() == {"version": octavo.__version__}


def test_health_follows_the_engine(server, http):
    for path in ("/health", "/livez", "/readyz", "/startupz"):
        assert http.get(path).status_code == 200
    server.engine.trouble = "the engine is being restarted"
    assert http.get("/livez").status_code == 200
    for path in ("/health", "/readyz"):
        reply = http.get(path)
        assert reply.status_code == 503
        assert "being restarted" in reply.json()["error"]["message"]


def test_draining_is_not_ready_but_healthy(server, http):
    server.state.draining = True
    try:
        assert http.get("/readyz").status_code == 503
        assert http.get("/health").status_code == 200
    finally:
        server.state.draining = False


def test_request_id(server, http):
    reply = http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1"
    assert reply.json()["id"] == "chatcmpl-abc-1"
    assert re.fullmatch("[0-9a-f]{32}", http.get("/health").headers["x-request-id"])
    odd = http.get("/health", headers={"x-request-id": "a b"})
    assert re.fullmatch("[0-9a-f]{32}", odd.headers["x-request-id"])
    assert "x-request-id" in http.get("/nothing").headers


def test_no_cors_by_default(server, http):
    reply = http.get("/v1/models", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in reply.headers


def metrics(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = http.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_a_request(server, http):
    labels = (("engine", "0"), ("model_name", "fake"))

    def changed(name: str, *more: tuple[str, str]) -> float:
        key = (name, tuple(sorted((*labels, *more))))
        return after[key] - before.get(key, 0.0)

    before = metrics(http)
    server.engine.step_s = 0.002
    prompt_len = http.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    after = metrics(http)
    assert changed("vllm:generation_tokens_total") == 14
    assert changed("vllm:prompt_tokens_total") == prompt_len
    assert changed("vllm:request_success_total", ("finished_reason", "stop")) == 1
    for name in (
        *("time_to_first_token_seconds", "request_time_per_output_token_seconds"),
        *("e2e_request_latency_seconds", "request_queue_time_seconds"),
        *("request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_inference_time_seconds", "request_prompt_tokens"),
        *("request_generation_tokens", "request_params_n"),
    ):
        assert changed(f"vllm:{name}_count") == 1, name
    assert changed("vllm:inter_token_latency_seconds_count") == 13
    assert 0.02 < changed("vllm:inter_token_latency_seconds_sum") < 2
    assert changed("vllm:iteration_tokens_total_count") == 14
    assert after["vllm:num_requests_running", labels] == 1
    assert ("octavo:startup_seconds", (("phase", "load"),)) in after
    assert ("octavo:memory_bytes", (("use", "kv"),)) in after
    assert any(name == "process_resident_memory_bytes" for name, _ in after)
    (info,) = (dict(pairs) for name, pairs in after if name == "vllm:cache_config_info")
    assert (info["block_size"], info["num_gpu_blocks"]) == ("16", "64")
    for name in ("num_requests_waiting", "kv_cache_usage_perc"):
        assert (f"vllm:{name}", labels) in after
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions"):
        assert (f"vllm:{name}_total", labels) in after


def test_metrics_count_what_is_refused(server, http):
    def count(name: str, *labels: tuple[str, str]) -> float:
        return metrics(http).get((name, labels), 0.0)

    rejected = ("octavo:http_rejections_total", ("reason", "unknown_parameter"))
    routed = ("octavo:http_requests_total", ("route", "/v1/completions"), ("status", "400"))
    other = ("octavo:http_requests_total", ("route", "other"), ("status", "404"))
    before = [count(*rejected), count(*routed), count(*other)]
    http.post("/v1/completions", json={"prompt": "a", "nonsense": 1})
    http.get("/x" * 10)
    after = [count(*rejected), count(*routed), count(*other)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/invocations", "/shutdown"])
def test_nothing_else_is_there(server, http, path):
    assert http.get(path).status_code == 404
