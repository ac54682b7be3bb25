"""Spans of requests, kept in memory; and what becomes of a collector that is not there."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.live_server import LiveServer

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server.otel import OtelTracing, to_collector
from octavo.server.tracing import NO_TRACE, Tracing, open_tracing

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
PROMPT = "tell me of the azure whale"


class Spans:
    """What one server has traced."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = OtelTracing(SimpleSpanProcessor(self._exporter), "fake")

    def take(self) -> list[ReadableSpan]:
        """Those of the request that was answered last; they come a moment after the answer."""
        deadline_s = time.monotonic() + 5
        while not any(s.name == "llm_request" for s in self._exporter.get_finished_spans()):
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        return list(spans)

    @property
    def is_empty(self) -> bool:
        return not self._exporter.get_finished_spans()


@pytest.fixture
def spans(server: LiveServer) -> Iterator[Spans]:
    spans = Spans()
    server.state.tracing = spans.tracing
    yield spans
    server.state.tracing = Tracing()


def only(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    [span] = [span for span in spans if span.name == name]
    return span


def parent_name(spans: list[ReadableSpan], span: ReadableSpan) -> str | None:
    names = {s.context.span_id: s.name for s in spans}
    return None if span.parent is None else names.get(span.parent.span_id)


def chat(http: httpx.Client, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": PROMPT}], **fields}
    return http.post("/v1/chat/completions", json=body)


def test_a_request_is_a_tree_of_its_stages(http: httpx.Client, spans: Spans) -> None:
    assert chat(http, stream=True).status_code == 200
    found = spans.take()
    tree = {(parent_name(found, span), span.name) for span in found}
    assert tree == {
        (None, "llm_request"),
        ("llm_request", "tokenise"),
        ("llm_request", "queue"),
        ("llm_request", "prefill"),
        ("prefill", "prefill chunk"),
        ("llm_request", "decode"),
        ("llm_request", "detokenise"),
        ("llm_request", "send"),
    }
    root = only(found, "llm_request")
    assert root.kind is SpanKind.SERVER
    assert root.status.status_code is StatusCode.UNSET
    assert abs(root.start_time - time.time_ns()) < 60e9
    for span in found:
        assert root.start_time <= span.start_time <= span.end_time <= root.end_time, span.name
    in_order = [only(found, name) for name in ("tokenise", "queue", "prefill", "decode")]
    for before, after in itertools.pairwise(in_order):
        assert before.start_time <= after.start_time
    chunks = [span for span in found if span.name == "prefill chunk"]
    num_prompt = only(found, "prefill").attributes["octavo.num_prompt_tokens"]
    assert sum(chunk.attributes["octavo.num_tokens"] for chunk in chunks) == num_prompt
    assert len(chunks) == 2


def test_the_request_span_has_vllms_attributes(http: httpx.Client, spans: Spans) -> None:
    fields = {"temperature": 0.5, "top_p": 0.75, "max_tokens": 5}
    http.headers["x-request-id"] = "mine"
    try:
        usage = chat(http, **fields).json()["usage"]
    finally:
        del http.headers["x-request-id"]
    attributes = dict(only(spans.take(), "llm_request").attributes)
    latencies = {
        name.removeprefix("gen_ai.latency."): attributes.pop(name)
        for name in list(attributes)
        if name.startswith("gen_ai.latency.")
    }
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.id": "mine",
        "gen_ai.response.model": "fake",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
    }
    assert set(latencies) == {
        "time_in_queue",
        "time_to_first_token",
        "e2e",
        "time_in_model_prefill",
        "time_in_model_decode",
        "time_in_model_inference",
    }
    assert latencies["time_in_queue"] == 0.001
    inference = latencies["time_in_model_prefill"] + latencies["time_in_model_decode"]
    assert latencies["time_in_model_inference"] == pytest.approx(inference)
    assert latencies["e2e"] == pytest.approx(latencies["time_in_queue"] + inference)


def test_the_clients_trace_goes_on(http: httpx.Client, spans: Spans) -> None:
    body = {"prompt": PROMPT}
    http.post("/v1/completions", json=body, headers={"traceparent": TRACEPARENT})
    found = spans.take()
    root = only(found, "llm_request")
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    assert {f"{span.context.trace_id:032x}" for span in found} == {TRACE_ID}


@pytest.mark.parametrize(
    "header", ["nonsense", f"00-{'0' * 32}-{PARENT_ID}-01", "00-" + "a" * 9999]
)
def test_a_parent_that_is_none_begins_a_trace(
    http: httpx.Client, spans: Spans, header: str
) -> None:
    http.post("/v1/completions", json={"prompt": "a"}, headers={"traceparent": header})
    assert only(spans.take(), "llm_request").parent is None


def test_a_client_may_ask_not_to_be_traced(http: httpx.Client, spans: Spans) -> None:
    header = f"00-{TRACE_ID}-{PARENT_ID}-00"
    assert http.post("/v1/completions", json={"prompt": "a"}, headers={"traceparent": header})
    http.post("/v1/completions", json={"prompt": "b"})
    roots = [span for span in spans.take() if span.name == "llm_request"]
    assert [root.parent for root in roots] == [None]


def test_neither_prompt_nor_output_is_told(
    server: LiveServer, http: httpx.Client, spans: Spans
) -> None:
    server.says("the hidden answer")
    chat(http, stop=["hidden"], logprobs=True)
    texts = " ".join(span.to_json() for span in spans.take())
    for secret in ("azure", "whale", "hidden", "answer", "the h"):
        assert secret not in texts


def test_every_sequence_has_its_stages_up_to_a_number(http: httpx.Client, spans: Spans) -> None:
    http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 3})
    found = spans.take()
    for name in ("queue", "prefill", "decode"):
        numbers = [span.attributes["octavo.sequence"] for span in found if span.name == name]
        assert numbers == [0, 1, 2, 3]
    http.post("/v1/completions", json={"prompt": ["a"] * 30, "max_tokens": 3})
    found = spans.take()
    assert sum(span.name == "decode" for span in found) == 16
    assert only(found, "llm_request").attributes["gen_ai.usage.num_sequences"] == 30
    assert only(found, "llm_request").attributes["gen_ai.usage.completion_tokens"] == 90


def test_a_restart_is_an_event(server: LiveServer, http: httpx.Client, spans: Spans) -> None:
    server.engine.resumed_s = [time.monotonic()]
    http.post("/v1/completions", json={"prompt": "a"})
    [event] = only(spans.take(), "llm_request").events
    assert event.name == "engine restarted"
    assert abs(event.timestamp - time.time_ns()) < 60e9


@pytest.mark.parametrize(
    ("body", "status"), [({"prompt": 7}, 400), ({"prompt": "a", "model": "none"}, 404)]
)
def test_a_refused_request_is_traced_as_far_as_it_came(
    http: httpx.Client, spans: Spans, body: dict[str, object], status: int
) -> None:
    assert http.post("/v1/completions", json=body).status_code == status
    found = spans.take()
    root = only(found, "llm_request")
    assert root.attributes["http.response.status_code"] == status
    assert root.status.status_code is StatusCode.UNSET  # the client's fault, by OpenTelemetry
    assert "prefill" not in {span.name for span in found}


def test_a_failed_request_is_an_error(server: LiveServer, http: httpx.Client, spans: Spans) -> None:
    server.engine.fail = "out of luck"
    http.post("/v1/completions", json={"prompt": "a", "stream": True})
    root = only(spans.take(), "llm_request")
    assert root.status.status_code is StatusCode.ERROR
    assert root.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_a_client_that_leaves_ends_its_trace(
    server: LiveServer, http: httpx.Client, spans: Spans
) -> None:
    server.engine.hang = True
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"prompt": "a"}, timeout=0.3)
    found = spans.take()
    assert only(found, "llm_request").attributes["http.response.status_code"] == 499
    assert {span.name for span in found} >= {"queue", "prefill"}
    assert "decode" not in {span.name for span in found}


def test_other_routes_and_other_peoples_requests_are_not_traced(
    start_server: Callable[..., LiveServer],
) -> None:
    server, spans = start_server(api_key="k"), Spans()
    server.state.tracing = spans.tracing
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/health").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 401
    assert spans.is_empty


def test_nothing_is_done_where_nobody_traces() -> None:
    tracing = open_tracing(ServerConfig(), "m")
    assert tracing.begin({"path": "/v1/completions"}) is NO_TRACE

    async def send(message: object) -> None: ...

    assert NO_TRACE.watch_send(send) is send
    code = "import sys, octavo.server.launch; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "octavo.server.otel")
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    config = ServerConfig(otlp_traces_endpoint="http://localhost:4318")
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[otel\]'"):
        open_tracing(config, "m")


@pytest.mark.parametrize("url", ["localhost:4317", "grpc://x:4317", "http://", "http://x:port", ""])
def test_an_endpoint_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        ServerConfig(otlp_traces_endpoint=url)


def test_variables_of_the_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    spans = Spans()
    facts = spans.tracing._provider.resource.attributes
    assert (facts["service.name"], facts["deployment.environment"]) == ("mine", "test")
    scope = {"path": "/v1/completions", "state": {"request_id": "r"}, "method": "POST"}
    trace = spans.tracing.begin({**scope, "headers": []})
    trace.end("/v1/completions", 200)
    assert spans.is_empty
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "1")
    with pytest.raises(ConfigError, match="max_queue_size"):
        to_collector("http://localhost:4318", "m")


def test_a_collector_that_is_away_is_told_of_once_and_waited_for_briefly(
    server: LiveServer,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr("octavo.server.collector._CLOSE_S", 0.5)
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    with caplog.at_level("INFO"):
        server.state.tracing = to_collector("http://user:secret@127.0.0.1:9", "m")
        try:
            begun_s = time.monotonic()
            for _ in range(20):
                assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 200
                time.sleep(0.03)
            assert time.monotonic() - begun_s < 10

            def told() -> list[logging.LogRecord]:
                # By identity: a record that passes two loggers is captured by each.
                records = {id(record): record for record in caplog.records}.values()
                return [r for r in records if "do not reach" in r.getMessage()]

            server.wait_for(lambda: bool(told()), 20)
            begun_s = time.monotonic()
            server.state.tracing.close()
            assert time.monotonic() - begun_s < 5
            # It is done trying: nobody else's test hears of it.
            server.wait_for(lambda: not any("Otel" in t.name for t in threading.enumerate()), 5)
        finally:
            server.state.tracing = Tracing()
    [warning] = told()
    assert "http://127.0.0.1:9/v1/traces" in warning.message
    assert "secret" not in caplog.text
    assert all(record.name.startswith(("octavo", "httpx", "httpcore")) for record in caplog.records)
