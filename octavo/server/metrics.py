"""Prometheus metrics, under vLLM's names where the meaning is the same, so that its dashboards,
autoscaling recipes and routers work unchanged.

The numbers are plain attributes on the event loop's thread and become Prometheus families when
somebody scrapes: counting a step costs a few additions, not a lock per sample.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from octavo.server.admission import Admission
from octavo.types import EngineCounts, EngineInfo, StepOutputs, StepStats

# Seconds. Fine from 1 ms: a decode step of a small model takes 2 to 10.
_FINE_S = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05)
_COARSE_S = (0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320)
SECONDS = (*_FINE_S, *_COARSE_S)
TOKENS = tuple(base * 10**e for e in range(6) for base in (1, 2, 5))
STEP_TOKENS = (1, *(2**e for e in range(3, 15)))
CHOICES = (1, 2, 5, 10, 20, 50, 100)


class Histogram:
    """Counts per bucket; `observe` is a bisection and three additions."""

    __slots__ = ("bounds", "counts", "doc", "name", "total")

    def __init__(self, bounds: tuple[float, ...], name: str, doc: str) -> None:
        self.name = name
        self.doc = doc
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as the exposition format has them."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(map(float, self.counts)), strict=True))


class Histograms:
    """Every histogram that is published."""

    def __init__(self) -> None:
        self.first_token_s = Histogram(
            SECONDS, "vllm:time_to_first_token_seconds", "Arrival to first token."
        )
        self.inter_token_s = Histogram(
            SECONDS, "vllm:inter_token_latency_seconds", "Between tokens of one sequence."
        )
        self.per_output_token_s = Histogram(
            SECONDS,
            "vllm:request_time_per_output_token_seconds",
            "Mean time per token after the first.",
        )
        self.e2e_s = Histogram(
            SECONDS, "vllm:e2e_request_latency_seconds", "Arrival to last token."
        )
        self.queue_s = Histogram(
            SECONDS, "vllm:request_queue_time_seconds", "Arrival to first scheduling."
        )
        self.prefill_s = Histogram(
            SECONDS, "vllm:request_prefill_time_seconds", "First scheduling to first token."
        )
        self.decode_s = Histogram(
            SECONDS, "vllm:request_decode_time_seconds", "First token to last token."
        )
        self.inference_s = Histogram(
            SECONDS, "vllm:request_inference_time_seconds", "First scheduling to last token."
        )
        self.prompt_tokens = Histogram(
            TOKENS, "vllm:request_prompt_tokens", "Prompt tokens per sequence."
        )
        self.generation_tokens = Histogram(
            TOKENS, "vllm:request_generation_tokens", "Generated tokens per sequence."
        )
        self.params_n = Histogram(CHOICES, "vllm:request_params_n", "The parameter n.")
        self.params_max_tokens = Histogram(
            TOKENS, "vllm:request_params_max_tokens", "The parameter max_tokens."
        )
        self.iteration_tokens = Histogram(
            STEP_TOKENS, "vllm:iteration_tokens_total", "Tokens computed per engine step."
        )
        self.step_s = Histogram(SECONDS, "octavo:step_seconds", "Duration of an engine step.")


class ServerMetrics(Collector):
    """Counts, and collects itself into a registry of its own."""

    def __init__(self, info: EngineInfo, model_name: str, counts: EngineCounts) -> None:
        self.info = info
        self.counts = counts
        self.histograms = Histograms()
        self.stats = StepStats()
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_preemptions = 0
        # The reasons that a dashboard asks for exist from the start, at zero.
        self.finished: Counter[str] = Counter(
            dict.fromkeys(("stop", "length", "abort", "timeout"), 0)
        )
        self.http_requests: Counter[tuple[str, int]] = Counter()
        self.http_rejections: Counter[str] = Counter(
            dict.fromkeys(("queue_full", "deadline_unreachable", "deadline_exceeded"), 0)
        )
        self._labels = {"model_name": model_name, "engine": "0"}
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def on_step(self, outputs: StepOutputs) -> None:
        """The engine listener: a handful of additions whatever the batch."""
        stats = outputs.stats
        self.stats = stats
        self.num_generation_tokens += len(outputs.token_ids)
        self.num_prefix_queries += stats.num_prefix_queries
        self.num_prefix_hits += stats.num_prefix_hits
        self.num_preemptions += stats.num_preemptions
        if stats.num_batched_tokens:
            self.histograms.iteration_tokens.observe(stats.num_batched_tokens)
            self.histograms.step_s.observe(stats.step_s)

    def collect(self) -> Iterator[Metric]:
        yield from self._gauges()
        yield from self._counters()
        yield from self._engine()
        names, values = list(self._labels), list(self._labels.values())
        for histogram in vars(self.histograms).values():
            family = HistogramMetricFamily(histogram.name, histogram.doc, labels=names)
            family.add_metric(values, histogram.buckets(), histogram.total)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        stats, info = self.stats, self.info
        yield self._gauge(
            "vllm:num_requests_running", "Sequences that hold a device row.", stats.num_running
        )
        yield self._gauge("vllm:num_requests_waiting", "Sequences in the queue.", stats.num_waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.", stats.kv_usage
        )
        facts = {
            "block_size": info.block_size,
            "num_gpu_blocks": info.num_blocks,
            "enable_prefix_caching": info.enable_prefix_caching,
            "kv_capacity_tokens": info.kv_capacity_tokens,
            "cache_dtype": info.kv_cache_dtype,
        }
        config = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache, as labels.", labels=[*self._labels, *facts]
        )
        config.add_metric([*self._labels.values(), *(str(v) for v in facts.values())], 1)
        yield config
        yield _by_label(
            "octavo:startup_seconds",
            "Start-up time. On a GPU, load and compile overlap.",
            "phase",
            info.startup_s,
        )
        yield _by_label(
            "octavo:memory_bytes", "Device memory; host: locked for it.", "use", info.memory_bytes
        )

    def _counters(self) -> Iterator[Metric]:
        for name, doc, value in (
            ("prefix_cache_queries", "Prompt tokens looked up.", self.num_prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found.", self.num_prefix_hits),
            ("num_preemptions", "Sequences set back to the queue.", self.num_preemptions),
            ("prompt_tokens", "Prompt tokens processed.", self.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", self.num_generation_tokens),
        ):
            family = CounterMetricFamily(f"vllm:{name}", doc, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family
        success = CounterMetricFamily(
            "vllm:request_success",
            "Sequences finished.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in self.finished.items():
            success.add_metric([*self._labels.values(), reason], count)
        yield success
        requests = CounterMetricFamily(
            "octavo:http_requests", "HTTP responses.", labels=["route", "status"]
        )
        for (route, status), count in self.http_requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        rejections = CounterMetricFamily(
            "octavo:http_rejections", "Requests refused or failed, by cause.", labels=["reason"]
        )
        for reason, count in self.http_rejections.items():
            rejections.add_metric([reason], count)
        yield rejections

    def _engine(self) -> Iterator[Metric]:
        counts = self.counts
        for name, doc, value in (
            ("engine_restarts", "Engine processes that were replaced.", counts.num_restarts),
            ("requests_resumed", "Sequences that went on in another.", counts.num_resumed),
            ("requests_isolated", "Sequences given up as killers.", counts.num_isolated),
        ):
            family = CounterMetricFamily(f"octavo:{name}", doc, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), value)
            yield family
        yield self._gauge(
            "octavo:engine_recovery_seconds",
            "From the latest death to the next engine's being ready.",
            counts.last_recovery_s,
        )

    def _gauge(self, name: str, doc: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, doc, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _by_label(name: str, doc: str, label: str, values: dict[str, float] | dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, doc, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


class QueueMetrics(Collector):
    """The server's queue: depth and limits, the wait that it means, and the clients' shares."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        queue = self._admission
        depth = {"requests": queue.num_waiting, "tokens": queue.num_waiting_tokens}
        limits = {"requests": queue.max_requests, "tokens": queue.max_tokens}
        yield _by_label("octavo:queue_depth", "What waits for the engine.", "unit", depth)
        yield _by_label("octavo:queue_limit", "Most that may wait; 0: no limit.", "unit", limits)
        yield GaugeMetricFamily(
            "octavo:queue_predicted_wait_seconds",
            "Until a sequence that comes now would be started.",
            queue.predicted_wait_s(),
        )
        yield GaugeMetricFamily(
            "octavo:tokens_per_second", "Prompt and output, while busy.", queue.tokens_per_s
        )
        for name, doc, counts in (
            ("octavo:client_tokens", "Prompt and output.", queue.num_tokens_by_client),
            ("octavo:client_refusals", "Requests refused.", queue.num_refused_by_client),
        ):
            family = CounterMetricFamily(name, doc, labels=["client"])
            for client, count in counts.items():
                family.add_metric([client], count)
            yield family


@dataclass(slots=True)
class SequenceTimer:
    """When one sequence arrived, started and produced; observes each fact as it becomes known."""

    metrics: ServerMetrics
    arrival_s: float
    num_prompt_tokens: int
    queue_s: float | None = None
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    reason: str = ""  # why it ended

    def started(self, queue_s: float) -> None:
        if self.queue_s is None:
            self.queue_s = queue_s
            self.metrics.histograms.queue_s.observe(queue_s)

    def tokens(self, count: int) -> None:
        """`count` tokens were taken now; their mean gap counts for each of them."""
        now, histograms = time.monotonic(), self.metrics.histograms
        if not self.num_tokens:
            self.first_s = now
            self.metrics.num_prompt_tokens += self.num_prompt_tokens
            histograms.first_token_s.observe(now - self.arrival_s)
        else:
            histograms.inter_token_s.observe((now - self.last_s) / count, count)
        self.last_s = now
        self.num_tokens += count

    def finished(self, reason: str) -> None:
        self.reason = reason
        self.metrics.finished[reason] += 1
        if not self.num_tokens:
            return
        histograms = self.metrics.histograms
        scheduled_s = self.arrival_s + (self.queue_s or 0.0)
        decode_s = self.last_s - self.first_s
        histograms.e2e_s.observe(self.last_s - self.arrival_s)
        histograms.prefill_s.observe(max(self.first_s - scheduled_s, 0.0))
        histograms.inference_s.observe(max(self.last_s - scheduled_s, 0.0))
        histograms.decode_s.observe(decode_s)
        histograms.prompt_tokens.observe(self.num_prompt_tokens)
        histograms.generation_tokens.observe(self.num_tokens)
        if self.num_tokens > 1:
            histograms.per_output_token_s.observe(decode_s / (self.num_tokens - 1))
