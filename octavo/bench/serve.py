"""`octavo bench serve`: a load against a running server, over OpenAI's API.

Requests leave at the times of a seeded Poisson process (or all at once), no more than
`max_concurrency` at a time; each is timed from when it was really sent.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from octavo import __version__
from octavo.bench import client as api
from octavo.bench.client import Exchange
from octavo.bench.loads import Load
from octavo.bench.report import (
    Facts,
    Figures,
    Percentiles,
    ServeReport,
    Timing,
    rate,
    write_json,
)
from octavo.bench.workloads import BenchRequest, scale_ids
from octavo.errors import ConfigError

_SLO_NAMES = ("ttft", "tpot", "e2e")
# Short everyday words: with the space before it, each is one token of nearly every vocabulary.
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do "
    "how their if will up other about out many then them these so some her would make like him "
    "into time has look two more write go see number no way could people my than first water been"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    base_url: str
    model: str | None = None  # None: the first that the server lists
    endpoint: str = "completions"
    api_key: str | None = field(default=None, repr=False)
    num_prompts: int | None = None  # None: all of the load
    request_rate: float = math.inf  # arrivals per second
    max_concurrency: int | None = None
    ignore_eos: bool = True
    vocab_size: int | None = None  # None: found out
    seed: int = 0
    timeout_s: float = 600.0
    slo: Mapping[str, float] | None = None  # ms, by name

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_concurrency", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
        for name in ("request_rate", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0.")


@dataclass(frozen=True, slots=True)
class ServeRun:
    report: ServeReport
    exchanges: list[Exchange]  # in the order of the load


def parse_slo(text: str) -> dict[str, float]:
    """From "ttft:200,tpot:50", in milliseconds. Raises ConfigError for anything else."""
    slo: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            slo[name] = float(value)
        except ValueError:
            slo[name] = math.nan
        if name not in _SLO_NAMES or not slo[name] > 0:
            raise ConfigError(
                f"--slo {part!r} is not NAME:MS, with NAME one of {', '.join(_SLO_NAMES)}."
            )
    return slo


def run_serve(load: Load, options: ServeOptions) -> ServeRun:
    """Drive the server and say what was measured.

    Raises:
        ConfigError: the server cannot be reached, or cannot take the load at all. What fails
        later is counted in the report.
    """
    return asyncio.run(_run(load, options))


async def _run(load: Load, options: ServeOptions) -> ServeRun:
    requests = load.take(options.num_prompts)
    async with api.make_client(options.base_url, options.api_key) as client:
        model = await _choose_model(client, options, load.name, requests)
        requests, prompt_kind = await _fit(client, model, options, load, requests)
        bodies = [_body(request, model, options, prompt_kind) for request in requests]
        cpu_s = time.process_time()
        exchanges = await _drive(client, bodies, options)
        cpu_s = time.process_time() - cpu_s
    report = _report(load.name, model, options, exchanges, prompt_kind, cpu_s)
    return ServeRun(report, exchanges)


async def _choose_model(
    client: httpx.AsyncClient, options: ServeOptions, name: str, requests: Sequence[BenchRequest]
) -> str:
    """The model to ask for. Raises ConfigError if the load is too long for it, where it says so."""
    listed = await api.list_models(client, options.timeout_s)
    if options.model is None and not listed:
        raise ConfigError("The server lists no models: set --model.")
    model: str = options.model or listed[0]["id"]
    limits = [entry.get("max_model_len") for entry in listed if entry["id"] == model]
    limit = limits[0] if limits else None
    for number, request in enumerate(requests, 1):
        if isinstance(limit, int) and request.total_len > limit:
            raise ConfigError(
                f"Request {number} of {name} takes {request.total_len} tokens, prompt and output, "
                f"but max_model_len of {model} is {limit}."
            )
    return model


async def _fit(
    client: httpx.AsyncClient,
    model: str,
    options: ServeOptions,
    load: Load,
    requests: list[BenchRequest],
) -> tuple[list[BenchRequest], str]:
    """Requests that the server can take, and how: as "token_ids" or, for chats and for servers
    that refuse these, as "text".

    Raises:
        ConfigError: a file has ids beyond the model's vocabulary.
    """
    if options.endpoint == "chat":
        return requests, "text"
    highest = max(max(request.prompt_token_ids) for request in requests)
    if options.vocab_size is not None:
        accepted: int | None = options.vocab_size - 1
    else:
        ladder = api.ID_LADDER if load.is_random else (highest, 0)
        accepted = await api.find_highest_id(client, model, options.timeout_s, ladder)
    if accepted is None:
        return requests, "text"
    if load.is_random:
        return [scale_ids(request, accepted + 1) for request in requests], "token_ids"
    if highest > accepted:
        raise ConfigError(f"{load.name} has token id {highest}, beyond the vocabulary of {model}.")
    return requests, "token_ids"


def _body(request: BenchRequest, model: str, options: ServeOptions, prompt_kind: str) -> bytes:
    """Encoded ahead of the run: a long prompt takes milliseconds."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    if prompt_kind == "token_ids":
        body["prompt"] = request.prompt_token_ids
    elif options.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": as_text(request)}]
    else:
        body["prompt"] = as_text(request)
    return json.dumps(body).encode()


def as_text(request: BenchRequest) -> str:
    """One word for each token id: about as long, and equal beginnings stay equal."""
    return " ".join(_WORDS[token_id % len(_WORDS)] for token_id in request.prompt_token_ids)


def arrival_times(num_requests: int, request_rate: float, seed: int) -> list[float]:
    """Seconds at which requests leave: a Poisson process, or all 0 for an infinite rate."""
    if math.isinf(request_rate):
        return [0.0] * num_requests
    rng = random.Random(seed)
    return list(itertools.accumulate(rng.expovariate(request_rate) for _ in range(num_requests)))


async def _drive(
    client: httpx.AsyncClient, bodies: Sequence[bytes], options: ServeOptions
) -> list[Exchange]:
    times = arrival_times(len(bodies), options.request_rate, options.seed)
    exchanges = [Exchange(index, at_s) for index, at_s in enumerate(times)]
    limit = options.max_concurrency
    gate = asyncio.Semaphore(limit) if limit else nullcontext()
    with tqdm(total=len(bodies), desc="requests", unit="req", disable=None, leave=False) as bar:
        origin_s = time.perf_counter()

        async def one(body: bytes, exchange: Exchange) -> None:
            async with gate:
                await api.stream(
                    client, options.endpoint, body, exchange, origin_s, options.timeout_s
                )
            bar.update()

        async with asyncio.TaskGroup() as group:
            for body, exchange in zip(bodies, exchanges, strict=True):
                delay_s = exchange.scheduled_s - (time.perf_counter() - origin_s)
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                group.create_task(one(body, exchange))
    return exchanges


def _report(
    name: str,
    model: str,
    options: ServeOptions,
    exchanges: Sequence[Exchange],
    prompt_kind: str,
    cpu_s: float,
) -> ServeReport:
    good = [exchange for exchange in exchanges if exchange.error is None]
    timings = [timing for exchange in good if (timing := exchange.timing()) is not None]
    causes = collections.Counter(exchange.error for exchange in exchanges if exchange.error)
    seconds = max(exchange.end_s for exchange in exchanges)
    met = [timing for timing in timings if _meets(timing, options.slo or {})]
    return ServeReport(
        facts=Facts(workload=name, model=model, octavo_version=__version__),
        figures=Figures.of(timings, seconds),
        itl_ms=Percentiles.of(gap for exchange in good for gap in exchange.itl_ms),
        e2e_ms=Percentiles.of(timing.e2e_ms for timing in timings),
        request_throughput=rate(len(timings), seconds),
        num_failed=len(exchanges) - len(good),
        failures=dict(causes.most_common()),
        num_refused=sum(exchange.status == 429 for exchange in exchanges),
        retry_after_s=Percentiles.of(exchange.retry_after_s for exchange in exchanges),
        slo=dict(options.slo) if options.slo else None,
        goodput=rate(len(met), seconds) if options.slo else None,
        num_counted_by_chunks=sum(exchange.counted_by == "chunks" for exchange in good),
        prompt_kind=prompt_kind,
        client_cpu_share=round(cpu_s / seconds, 3) if seconds > 0 else 0.0,
    )


def _meets(timing: Timing, slo: Mapping[str, float]) -> bool:
    values = {"ttft": timing.ttft_ms, "tpot": timing.tpot_ms, "e2e": timing.e2e_ms}
    return all((values[name] or 0.0) <= limit for name, limit in slo.items())


def write_output(folder: Path, run: ServeRun) -> None:
    """report.json, requests.jsonl and report.png. Needs matplotlib."""
    from octavo.bench.plot import write_plot

    folder.mkdir(exist_ok=True)
    write_json(folder / "report.json", run.report.as_json())
    with (folder / "requests.jsonl").open("w") as file:
        for exchange in run.exchanges:
            file.write(json.dumps(_row(exchange)) + "\n")
    write_plot(folder / "report.png", run.report, run.exchanges)


def _row(exchange: Exchange) -> dict[str, Any]:
    timing = exchange.timing()
    latencies = {
        "ttft_ms": timing.ttft_ms if timing else None,
        "tpot_ms": timing.tpot_ms if timing else None,
        "e2e_ms": timing.e2e_ms if timing else None,
    }
    return dataclasses.asdict(exchange) | latencies
