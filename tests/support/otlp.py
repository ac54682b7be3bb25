"""A collector that keeps the spans it is sent: OTLP over HTTP, as protobuf."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


class Collector(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.paths: set[str] = set()
        self.received: list[ResourceSpans] = []

    def spans(self) -> list[Span]:
        return [s for part in self.received for scope in part.scope_spans for s in scope.spans]

    def wait_for(self, name: str, count: int, timeout_s: float = 30) -> list[Span]:
        """All spans, once there are `count` of that name."""
        deadline_s = time.monotonic() + timeout_s
        while sum(span.name == name for span in self.spans()) < count:
            assert time.monotonic() < deadline_s, [span.name for span in self.spans()]
            time.sleep(0.01)
        return self.spans()


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.add(self.path)
        self.server.received += ExportTraceServiceRequest.FromString(body).resource_spans
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()
