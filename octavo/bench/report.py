"""What a run measured, as figures, as JSON and as a few lines for people.

Offline and serve runs share this: a `Timing` per request, `Figures` per run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Percentiles:
    """None where there was nothing to measure."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self:
        """Of the values that are not None, rounded to three decimals."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return cls(None, None, None)
        return cls(*(round(percentile(known, share), 3) for share in (0.50, 0.90, 0.99)))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest of the ordered values, linearly; `share` is 0 to 1."""
    position = share * (len(ordered) - 1)
    low, fraction = math.floor(position), position % 1
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One request that succeeded. Times in seconds since the run began."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt
    start_s: float  # handed over
    first_token_s: float
    last_token_s: float

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return (self.first_token_s - self.start_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None if there is only that."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) * 1e3 / (self.num_output_tokens - 1)

    @property
    def e2e_ms(self) -> float:
        return (self.last_token_s - self.start_s) * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run over all requests."""

    seconds: float  # from the first request handed over to the last token
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

    @classmethod
    def of(cls, timings: Sequence[Timing], seconds: float) -> Self:
        num_prompt_tokens = sum(timing.num_prompt_tokens for timing in timings)
        num_output_tokens = sum(timing.num_output_tokens for timing in timings)
        return cls(
            seconds=round(seconds, 6),
            output_tokens_per_s=rate(num_output_tokens, seconds),
            prompt_tokens_per_s=rate(num_prompt_tokens, seconds),
            ttft_ms=Percentiles.of(timing.ttft_ms for timing in timings),
            tpot_ms=Percentiles.of(timing.tpot_ms for timing in timings),
            num_requests=len(timings),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            num_cached_tokens=sum(timing.num_cached_tokens for timing in timings),
        )


def rate(count: int, seconds: float) -> float:
    """Per second; 0 where no time passed."""
    return round(count / seconds, 3) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was measured. None where a remote server does not say."""

    workload: str
    model: str
    octavo_version: str
    device: str | None = None
    device_name: str | None = None
    dtype: str | None = None
    startup_s: float | None = None  # from the start of the process to an engine that is ready
    peak_memory_bytes: int | None = None
    kv_capacity_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineReport:
    facts: Facts
    repeats: tuple[Figures, ...]

    @property
    def best(self) -> Figures:
        """The repeat with the highest output rate."""
        return max(self.repeats, key=lambda figures: figures.output_tokens_per_s)

    def as_json(self) -> dict[str, Any]:
        """Figures of the best repeat and the facts in one flat object, all repeats beside them."""
        repeats = [dataclasses.asdict(figures) for figures in self.repeats]
        return dataclasses.asdict(self.best) | dataclasses.asdict(self.facts) | {"repeats": repeats}

    def summary(self) -> str:
        facts, best = self.facts, self.best
        lines = [
            f"{facts.workload}: {facts.model} ({facts.dtype}) on {facts.device_name}",
            *figure_lines(best),
            f"  started in {facts.startup_s:.1f} s, peak memory "
            f"{(facts.peak_memory_bytes or 0) / 2**30:.2f} GiB, "
            f"KV cache for {facts.kv_capacity_tokens:,} tokens",
        ]
        if len(self.repeats) > 1:
            seconds = ", ".join(f"{figures.seconds:.2f}" for figures in self.repeats)
            lines.append(f"  the best of {len(self.repeats)} repeats, which took {seconds} s")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    facts: Facts
    figures: Figures  # of the requests that succeeded
    itl_ms: Percentiles  # between two chunks of one answer
    e2e_ms: Percentiles
    request_throughput: float  # requests per second
    num_failed: int
    failures: dict[str, int]  # by cause
    num_refused: int  # of those that failed: answered with 429
    retry_after_s: Percentiles  # what they were told
    slo: dict[str, float] | None  # ms
    goodput: float | None  # requests per second that met the slo
    num_counted_by_chunks: int  # answers without usage: their chunks were counted as tokens
    prompt_kind: str  # "token_ids" or "text"
    client_cpu_share: float  # of one core; near 1 the client is what was measured

    def as_json(self) -> dict[str, Any]:
        """One flat object."""
        own = dataclasses.asdict(self)
        figures, facts = own.pop("figures"), own.pop("facts")
        return {**figures, **facts, **own}

    def summary(self) -> str:
        facts = self.facts
        lines = [
            f"{facts.workload}: {facts.model}",
            *figure_lines(self.figures),
            _percentile_line("ITL", self.itl_ms),
            _percentile_line("E2E", self.e2e_ms),
            f"  {self.request_throughput:.2f} requests/s, {self.num_failed} failed",
        ]
        lines += [f"    {count} x {cause}" for cause, count in self.failures.items()]
        if self.retry_after_s.p50 is not None:
            told = self.retry_after_s
            lines.append(
                f"  {self.num_refused} refused, Retry-After p50 {told.p50:.0f} s, "
                f"p90 {told.p90:.0f} s, p99 {told.p99:.0f} s"
            )
        if self.goodput is not None:
            lines.append(f"  goodput {self.goodput:.2f} requests/s")
        if self.client_cpu_share > 0.9:
            lines.append(
                "  The client used a whole CPU core: it may have been slower than the server."
            )
        return "\n".join(lines)


def figure_lines(figures: Figures) -> list[str]:
    return [
        f"  {figures.num_requests} requests in {figures.seconds:.2f} s, "
        f"{figures.num_prompt_tokens:,} prompt tokens ({figures.num_cached_tokens:,} cached), "
        f"{figures.num_output_tokens:,} output tokens",
        f"  {figures.output_tokens_per_s:,.1f} output tok/s, "
        f"{figures.prompt_tokens_per_s:,.1f} prompt tok/s",
        _percentile_line("TTFT", figures.ttft_ms),
        _percentile_line("TPOT", figures.tpot_ms),
    ]


def _percentile_line(name: str, values: Percentiles) -> str:
    if values.p50 is None or values.p90 is None or values.p99 is None:
        return f"  {name}: nothing to measure"
    return f"  {name} p50 {values.p50:.1f} ms, p90 {values.p90:.1f} ms, p99 {values.p99:.1f} ms"


def check_output(path: Path, *, is_folder: bool) -> None:
    """Before the run, not after it. Raises ConfigError where the report could not be written."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.absolute().parent}.")
    if path.exists() and path.is_dir() != is_folder:
        wanted = "folder" if is_folder else "file"
        raise ConfigError(f"--output {path} exists and is no {wanted}.")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
