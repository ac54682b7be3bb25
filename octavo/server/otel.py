"""Traces for an OpenTelemetry collector: what is seen of a request while it runs, and the spans
that are made of that when it has ended. Neither prompts nor outputs are in them.

    llm_request               the HTTP request; kind SERVER
    ├── tokenise
    ├── queue                 these three for each sequence: submitted to first scheduled,
    ├── prefill               to first token,
    │   └── prefill chunk     a step that computed a part of the prompt
    ├── decode                to last token
    │   └── recompute chunk   after a preemption, or in another engine
    ├── detokenise            these two are as long as all their pieces together, and begin
    └── send                  with the first one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

import octavo
from octavo.engine.protocol import RequestStream
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.server.collector import CollectorExporter, close_in_time
from octavo.server.generation import Assembler, Choice, Generation
from octavo.server.tracing import NO_TRACE, Trace, Tracing
from octavo.text.stream import OutputDelta
from octavo.types import MAX_CHUNKS, Chunk, Finish, RequestUpdate, TokenLogprobs

logger = get_logger(__name__)

TRACED_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
_MAX_SEQUENCES = 16  # of one request that have spans of their own

Attributes = Mapping[str, AttributeValue]


def to_collector(endpoint: str, model_name: str) -> OtelTracing:
    """Raises ConfigError where the SDK refuses one of its environment variables."""
    try:
        exporter = CollectorExporter(endpoint)
        return OtelTracing(BatchSpanProcessor(exporter), model_name, exporter.shutdown)
    except ValueError as error:
        raise ConfigError(f"An OTEL_* environment variable cannot be honoured: {error}") from None


class OtelTracing(Tracing):
    def __init__(
        self,
        processor: SpanProcessor,
        model_name: str,
        give_up: Callable[[], None] = lambda: None,
    ) -> None:
        """`give_up` makes a delivery in `processor` end that takes too long."""
        own = {"service.name": "octavo", "service.version": octavo.__version__}
        resource = Resource.create(own).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("octavo", octavo.__version__)
        self._model_name = model_name
        self._give_up = give_up

    def begin(self, scope: Scope) -> Trace:
        if scope["path"] not in TRACED_PATHS:
            return NO_TRACE
        trace = scope["state"]["trace"] = OtelTrace(self._tracer, scope, self._model_name)
        return trace

    def close(self) -> None:
        close_in_time(self._provider.shutdown, self._give_up)


class Stopwatch:
    """Adds up the pieces of a stage that comes and goes."""

    def __init__(self) -> None:
        self.first_s = 0.0
        self.total_s = 0.0
        self.num_pieces = 0

    def add(self, begin_s: float) -> None:
        """A piece that ends now."""
        if not self.num_pieces:
            self.first_s = begin_s
        self.total_s += time.monotonic() - begin_s
        self.num_pieces += 1


class WatchedStream:
    """A sequence's stream; keeps what only traces tell."""

    def __init__(self, stream: RequestStream) -> None:
        self._stream = stream
        self.chunks: list[Chunk] = []
        self.resumed_s: list[float] = []

    async def next(self) -> RequestUpdate:
        update = await self._stream.next()
        self.chunks += update.chunks[: MAX_CHUNKS - len(self.chunks)]
        self.resumed_s += update.resumed_s
        return update


class WatchedAssembler:
    def __init__(self, assembler: Assembler, stopwatch: Stopwatch) -> None:
        self._assembler = assembler
        self._stopwatch = stopwatch

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        finish: Finish | None = None,
    ) -> OutputDelta:
        begin_s = time.monotonic()
        delta = self._assembler.push(token_ids, logprobs, finish)
        self._stopwatch.add(begin_s)
        return delta


class OtelTrace(Trace):
    """Gathers; `end` makes spans of it."""

    def __init__(self, tracer: Tracer, scope: Scope, model_name: str) -> None:
        self._tracer = tracer
        self._scope = scope
        self._model_name = model_name
        self._began_s = time.monotonic()
        self._submitted_s = self._began_s
        self._tokenise, self._detokenise, self._send = Stopwatch(), Stopwatch(), Stopwatch()
        self._generation: Generation | None = None
        self._streams: list[WatchedStream] = []

    @contextmanager
    def tokenising(self) -> Iterator[None]:
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self._tokenise.add(begin_s)

    def watch(self, generation: Generation) -> None:
        self._submitted_s = time.monotonic()
        self._generation = generation
        for choice in generation.choices:
            choice.assembler = WatchedAssembler(choice.assembler, self._detokenise)
        for choice in generation.choices[:_MAX_SEQUENCES]:
            if choice.stream is not None:
                choice.stream = WatchedStream(choice.stream)
                self._streams.append(choice.stream)

    def watch_send(self, send: Send) -> Send:
        async def watched(message: Message) -> None:
            begin_s = time.monotonic()
            await send(message)
            self._send.add(begin_s)

        return watched

    def end(self, route: str, status: int) -> None:
        try:
            self._end(route, status)
        except Exception:  # the answer has been given; a trace is not worth a connection
            logger.exception("a trace could not be made")

    def _end(self, route: str, status: int) -> None:
        ended_s = time.monotonic()
        spans = Spans(self._tracer)
        parent = TraceContextTextMapPropagator().extract(Headers(scope=self._scope))
        root = spans.begin("llm_request", self._began_s, parent, kind=SpanKind.SERVER)
        if not root.is_recording():
            root.end()
            return
        root.set_attributes(self._request_attributes(route, status))
        inside = set_span_in_context(root, parent)
        if self._tokenise.num_pieces:
            spans.add_stage("tokenise", self._tokenise, inside)
        if self._generation is not None:
            root.set_attributes(generation_attributes(self._generation))
            if _has_failed(self._generation):
                root.set_status(StatusCode.ERROR)
            self._add_sequences(spans, root, inside, ended_s)
            spans.add_stage("detokenise", self._detokenise, inside)
        if status >= 500:
            root.set_status(StatusCode.ERROR)
        spans.add_stage("send", self._send, inside)
        root.end(spans.ns(ended_s))

    def _request_attributes(self, route: str, status: int) -> Attributes:
        facts = self._scope["state"]
        client = facts.get("client", "")
        return {
            "http.request.method": self._scope["method"],
            "http.route": route,
            "http.response.status_code": status,
            "gen_ai.request.id": facts["request_id"],
            "gen_ai.response.model": self._model_name,
            **({"octavo.client": client} if client else {}),
        }

    def _add_sequences(self, spans: Spans, root: Span, inside: Context, ended_s: float) -> None:
        assert self._generation is not None
        for choice, stream in zip(self._generation.choices, self._streams, strict=False):
            for at_s in stream.resumed_s:
                root.add_event(
                    "engine restarted", {"octavo.sequence": choice.index}, spans.ns(at_s)
                )
            spans.add_sequence(choice, stream.chunks, self._submitted_s, ended_s, inside)


class Spans:
    """Makes spans of times by time.monotonic()."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, at_s: float) -> int:
        """Since 1970."""
        return self._offset_ns + int(at_s * 1e9)

    def begin(self, name: str, begin_s: float, parent: Context, **settings: Any) -> Span:
        return self._tracer.start_span(name, parent, start_time=self.ns(begin_s), **settings)

    def add(
        self, name: str, begin_s: float, end_s: float, parent: Context, attributes: Attributes
    ) -> Context:
        """A span that is whole; returns the context for its children."""
        span = self.begin(name, begin_s, parent, attributes=attributes)
        span.end(self.ns(max(begin_s, end_s)))
        return set_span_in_context(span, parent)

    def add_stage(self, name: str, stage: Stopwatch, parent: Context) -> None:
        if stage.num_pieces:
            end_s = stage.first_s + stage.total_s
            self.add(name, stage.first_s, end_s, parent, {"octavo.num_pieces": stage.num_pieces})

    def add_sequence(
        self,
        choice: Choice,
        chunks: Sequence[Chunk],
        submitted_s: float,
        ended_s: float,
        parent: Context,
    ) -> None:
        """The stages that it has reached; the last of them ends when the request did."""
        timer, which = choice.timer, {"octavo.sequence": choice.index}
        first_s = timer.first_s if timer.num_tokens else ended_s
        if timer.queue_s is None:
            self.add("queue", submitted_s, ended_s, parent, which)
            return
        scheduled_s = max(timer.arrival_s + timer.queue_s, submitted_s)
        self.add("queue", submitted_s, scheduled_s, parent, which)
        num_prompt = {
            "octavo.num_prompt_tokens": len(choice.prompt.token_ids),
            "octavo.num_cached_tokens": choice.num_cached_tokens,
        }
        prefill = self.add("prefill", scheduled_s, first_s, parent, which | num_prompt)
        for chunk in chunks:
            if chunk.end_s <= first_s:
                self._add_chunk("prefill chunk", chunk, scheduled_s, prefill)
        if not timer.num_tokens:
            return
        num_output = {"octavo.num_output_tokens": timer.num_tokens}
        decode = self.add("decode", first_s, timer.last_s, parent, which | num_output)
        for chunk in chunks:
            if chunk.end_s > first_s:
                self._add_chunk("recompute chunk", chunk, first_s, decode)

    def _add_chunk(self, name: str, chunk: Chunk, least_s: float, parent: Context) -> None:
        begin_s = max(chunk.end_s - chunk.step_s, least_s)
        attributes = {"octavo.num_tokens": chunk.num_tokens, "octavo.step_s": chunk.step_s}
        self.add(name, begin_s, chunk.end_s, parent, attributes)


def _has_failed(generation: Generation) -> bool:
    return any(choice.timer.reason in ("error", "timeout") for choice in generation.choices)


def generation_attributes(generation: Generation) -> dict[str, AttributeValue]:
    """Under vLLM's names. Of several sequences: the first that was scheduled, the first token and
    the last one.
    """
    params, usage = generation.params, generation.usage()
    timers = [choice.timer for choice in generation.choices]
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
        "gen_ai.usage.num_sequences": len(timers),
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": [timer.reason for timer in timers if timer.reason],
    }
    if params.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = params.max_tokens
    queues_s = [timer.queue_s for timer in timers if timer.queue_s is not None]
    if not queues_s:
        return attributes
    queue_s = attributes["gen_ai.latency.time_in_queue"] = min(queues_s)
    begun = [timer for timer in timers if timer.num_tokens]
    if begun:
        arrival_s = begun[0].arrival_s
        first_s = min(timer.first_s for timer in begun) - arrival_s
        last_s = max(timer.last_s for timer in begun) - arrival_s
        attributes |= {
            "gen_ai.latency.time_to_first_token": first_s,
            "gen_ai.latency.e2e": last_s,
            "gen_ai.latency.time_in_model_prefill": max(first_s - queue_s, 0.0),
            "gen_ai.latency.time_in_model_decode": last_s - first_s,
            "gen_ai.latency.time_in_model_inference": max(last_s - queue_s, 0.0),
        }
    return attributes
