"""Ten times more requests than a server can serve, for some seconds, with a real engine."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Iterator

import httpx
import pytest
from support.server import RunningServer, running_server
from support.tiny_folder import write_tiny_folder

from octavo.bench.client import Exchange
from octavo.bench.loads import random_sizes
from octavo.bench.report import percentile
from octavo.bench.serve import ServeOptions, run_serve

pytestmark = pytest.mark.slow

ROWS, QUEUE = 2, 6
SECONDS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Slow enough that ten times what it serves is no load for the client."""
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    model = write_tiny_folder(tmp_path_factory.mktemp("tiny"), **size)
    flags = (f"--max-num-seqs={ROWS}", f"--max-queue-requests={QUEUE}", "--load-format=dummy")
    with running_server(str(model), *flags) as running:
        yield running


def metrics(server: RunningServer) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        lines = response.read().decode().splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def load(server: RunningServer, num_requests: int, **options: object) -> list[Exchange]:
    requests = random_sizes(32, 64, num_requests, seed=0)
    chosen = ServeOptions(
        base_url=server.url,
        num_prompts=num_requests,
        timeout_s=60.0,
        vocab_size=500,
        **options,  # type: ignore[arg-type]
    )
    return run_serve(requests, chosen).exchanges


def p95_s(exchanges: list[Exchange]) -> float:
    return percentile(sorted(x.end_s - x.sent_s for x in exchanges if x.status == 200), 0.95)


def test_latency_stays_flat_and_refusals_are_429(server: RunningServer) -> None:
    load(server, 12, max_concurrency=ROWS)  # the first kernels, the first rate
    calm = load(server, 64, max_concurrency=ROWS + QUEUE)  # rows and queue just full
    assert all(x.error is None for x in calm)
    rate = len(calm) / max(x.end_s for x in calm)

    flood = load(server, int(10 * rate * SECONDS), request_rate=10 * rate)
    assert {x.status for x in flood} == {200, 429}
    refused = [x for x in flood if x.status == 429]
    admitted = [x for x in flood if x.status == 200]
    assert all(x.error is None for x in admitted)
    assert all(x.retry_after_s is not None and 1 <= x.retry_after_s <= 60 for x in refused)
    assert len(refused) > len(flood) / 2
    assert len(admitted) > 2 * (ROWS + QUEUE)
    # Refusals take some of the processor, so a little more than "the same" is allowed.
    assert p95_s(admitted) < 2.5 * p95_s(calm)
    first, second = admitted[: len(admitted) // 2], admitted[len(admitted) // 2 :]
    assert p95_s(second) < 2 * p95_s(first)
    # A refusal waits for nobody; most of what it takes here is the client's own time.
    refusal_s = percentile(sorted(x.end_s - x.sent_s for x in refused), 0.5)
    assert refusal_s < p95_s(calm) / 3

    deadline_s = time.monotonic() + 10
    while (now := metrics(server))["vllm:num_requests_running" + label(now)]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert now['octavo:queue_depth{unit="requests"}'] == 0
    assert now['octavo:queue_depth{unit="tokens"}'] == 0
    assert now['octavo:http_rejections_total{reason="queue_full"}'] >= len(refused)


def label(samples: dict[str, float]) -> str:
    name = next(name for name in samples if name.startswith("vllm:num_requests_running"))
    return name.removeprefix("vllm:num_requests_running")


def test_deadlines_hold_under_overload(server: RunningServer) -> None:
    """Whatever is late is told so about when it is late: by refusal, or by the deadline."""
    body = {"prompt": [5] * 32, "max_tokens": 64, "ignore_eos": True, "timeout": 0.5}
    ends: list[tuple[int, str | None, float]] = []

    async def one(client: httpx.AsyncClient) -> None:
        begun = time.monotonic()
        reply = await client.post("/v1/completions", json=body)
        code = reply.json().get("error", {}).get("code")
        ends.append((reply.status_code, code, time.monotonic() - begun))

    async def flood() -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=server.url, limits=limits, timeout=30) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(150):
                group.create_task(one(client))
                await asyncio.sleep(0.01)

    asyncio.run(flood())
    assert {status for status, _, _ in ends} <= {200, 429, 504}
    codes = {code for _, code, _ in ends}
    assert codes - {None} <= {"queue_full", "deadline_unreachable", "deadline_exceeded"}
    assert codes - {None}
    assert max(seconds for _, _, seconds in ends) < 2.5
