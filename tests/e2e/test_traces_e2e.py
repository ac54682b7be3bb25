"""Traces of a real server with the built-in model, received by a collector over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.otlp import collector
from support.server import RunningServer, running_server

pytestmark = pytest.mark.slow

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
LONG = "one two three four five six seven eight nine ten " * 60


def complete(server: RunningServer, prompt: str, max_tokens: int) -> int:
    """Prompt tokens, as the answer counts them."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"traceparent": TRACEPARENT}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return int(json.load(response)["usage"]["prompt_tokens"])


def wait_for_tokens(server: RunningServer, num_tokens: int) -> None:
    """Until so many were generated in all."""
    found, deadline_s = 0.0, time.monotonic() + 60
    while found < num_tokens:
        assert time.monotonic() < deadline_s
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        [value] = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
        found = float(value)


def number(span: Span, name: str) -> float:
    [value] = [attribute.value for attribute in span.attributes if attribute.key == name]
    return value.double_value if value.HasField("double_value") else value.int_value


def children(spans: list[Span], parent: Span, name: str) -> list[Span]:
    return [s for s in spans if s.parent_span_id == parent.span_id and s.name == name]


def test_stages_chunks_and_a_restart_reach_the_collector(
    smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "test-server")
    budget = 256
    flags = ("--max-num-batched-tokens", str(budget), "--max-num-seqs", "8")
    with (
        collector() as there,
        running_server("--otlp-traces-endpoint", there.url, *flags) as server,
    ):
        num_prompt = complete(server, LONG, 4)
        spans = there.wait_for("llm_request", 1)
        [root] = [span for span in spans if span.name == "llm_request"]
        assert root.trace_id.hex() == TRACE_ID
        [prefill] = children(spans, root, "prefill")
        chunks = children(spans, prefill, "prefill chunk")
        assert len(chunks) == -(-num_prompt // budget) >= 2
        assert sum(number(chunk, "octavo.num_tokens") for chunk in chunks) == num_prompt
        for stage in ("tokenise", "queue", "decode", "detokenise", "send"):
            assert len(children(spans, root, stage)) == 1, stage
        for span in spans:
            assert root.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        busy_s = sum(number(chunk, "octavo.step_s") for chunk in chunks)
        assert busy_s <= number(root, "gen_ai.latency.time_to_first_token") + 0.05

        client = threading.Thread(target=complete, args=(server, "Once", 200))
        client.start()
        wait_for_tokens(server, 4 + 20)
        os.kill(server.engine_pid(), signal.SIGKILL)
        client.join()
        assert server.stop() == 0  # what was not sent yet is sent at the end
    spans = there.spans()
    root = [span for span in spans if span.name == "llm_request"][1]
    assert [event.name for event in root.events] == ["engine restarted"]
    [decode] = children(spans, root, "decode")
    assert children(spans, decode, "recompute chunk")
    assert number(root, "gen_ai.usage.completion_tokens") == 200
    assert there.paths == {"/v1/traces"}
    [name] = {
        attribute.value.string_value
        for part in there.received
        for attribute in part.resource.attributes
        if attribute.key == "service.name"
    }
    assert name == "test-server"
    assert "one two" not in str(there.received)


def test_a_collector_that_is_away_delays_neither_answers_nor_the_end(smollm2_dir: Path) -> None:
    with running_server("--otlp-traces-endpoint", "http://127.0.0.1:9") as server:
        complete(server, "One, two,", 3)
        begun_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun_s < 15
    told = [line for line in server.log if "traces" in line]
    assert sum("do not reach http://127.0.0.1:9/v1/traces" in line for line in told) == 1
    assert "Traceback" not in "".join(server.log)
