"""A load whose every answer is known, and what can be seen of a server from outside."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support.server import RunningServer

NUM_STREAMS = 64
_TIMEOUT = httpx.Timeout(180)
_PROMPTS = (
    "Once upon a time",
    "The capital of Japan is",
    "Water boils when",
    "A recipe for bread:",
    "def fibonacci(n):",
    "The moon is",
    "In the year 1969,",
    "My favourite animal is the",
)

Request = dict[str, Any]
Reference = dict[str, str]  # by `key`


def requests() -> list[Request]:
    """Greedy and seeded ones of several lengths."""
    made = []
    for i in range(24):
        sampling: Request = {"temperature": 0} if i % 2 else {"temperature": 0.9, "seed": i}
        made.append(
            {
                "prompt": f"{_PROMPTS[i % len(_PROMPTS)]} ({i})",
                "max_tokens": 40 + 7 * i,
                "stream": True,
                **sampling,
            }
        )
    return made


def key(request: Request) -> str:
    return json.dumps(request, sort_keys=True)


def make_reference(server: RunningServer) -> Reference:
    async def run() -> Reference:
        async with httpx.AsyncClient(base_url=server.url, timeout=_TIMEOUT) as http:
            return {key(r): (await stream(http, r)).text for r in requests()}

    return asyncio.run(run())


@dataclass
class Answer:
    text: str = ""
    error: str = ""
    longest_gap_s: float = 0.0


async def stream(
    http: httpx.AsyncClient, request: Request, leave_after: int | None = None
) -> Answer:
    """Read a completion to its end; `leave_after` pieces, hang up."""
    answer, last_s, num_pieces, done = Answer(), time.monotonic(), 0, False
    try:
        async with http.stream("POST", "/v1/completions", json=request) as response:
            if response.status_code != 200:
                answer.error = f"{response.status_code} {(await response.aread()).decode()}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now_s = time.monotonic()
                answer.longest_gap_s = max(answer.longest_gap_s, now_s - last_s)
                last_s = now_s
                if line == "data: [DONE]":
                    done = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error = str(event["error"])
                    return answer
                answer.text += event["choices"][0]["text"]
                num_pieces += 1
                if num_pieces == leave_after:
                    return answer
    except httpx.HTTPError as error:
        answer.error = repr(error)
    if not done and not answer.error:
        answer.error = "the stream ended early"
    return answer


@dataclass
class Ledger:
    """What was done to a server, and what its clients noticed."""

    name: str
    num_faults: int = 0
    num_streams: int = 0
    num_broken: int = 0
    num_different: int = 0
    longest_pause_s: float = 0.0  # between two pieces of a stream
    recoveries_s: list[float] = field(default_factory=list)  # by the server's own account
    notes: list[str] = field(default_factory=list)

    def take(self, request: Request, answer: Answer, reference: Reference) -> None:
        self.num_streams += 1
        self.longest_pause_s = max(self.longest_pause_s, answer.longest_gap_s)
        if answer.error:
            self.num_broken += 1
            self.notes.append(answer.error)
        elif answer.text != reference[key(request)]:
            self.num_different += 1
            self.notes.append(f"{request}: {answer.text!r}")

    def take_log(self, server: RunningServer) -> None:
        found = re.findall(r"the engine is back after ([\d.]+) s", "".join(server.log))
        self.recoveries_s += map(float, found)


@asynccontextmanager
async def load(
    server: RunningServer, reference: Reference, ledger: Ledger, num_streams: int = NUM_STREAMS
) -> AsyncIterator[None]:
    """Keep so many streams running; what is running at the end is read to its end."""
    stop = asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    pool = requests()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            request = rng.choice(pool)
            ledger.take(request, await stream(http, request), reference)

    async with httpx.AsyncClient(base_url=server.url, timeout=_TIMEOUT, limits=limits) as http:
        tasks = [asyncio.create_task(client(http, i)) for i in range(num_streams)]
        try:
            await asyncio.sleep(0.5)
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> float:
    """Seconds until it held."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < timeout_s, "timed out"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun_s


# ---- from outside


def metrics(server: RunningServer) -> dict[str, float]:
    """Samples by name, labels dropped and summed."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z:_]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        values[name] = values.get(name, 0.0) + float(value)
    return values


def is_ready(server: RunningServer) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/readyz", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@dataclass(frozen=True)
class Footprint:
    """What a server holds when it has nothing to do."""

    num_children: int
    num_files: int
    rss_bytes: int

    @classmethod
    def of(cls, server: RunningServer) -> Footprint:
        pid = server.process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        rss = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert rss is not None
        num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(len(server.child_pids()), num_files, int(rss[1]) << 10)


async def settled(server: RunningServer) -> Footprint:
    """The footprint once everything has ended, blocks and queue included."""
    await until(lambda: is_ready(server))
    await until(lambda: len(server.child_pids()) == 2, 30)  # the spare is back

    def idle() -> bool:
        now = metrics(server)
        return not (
            now["vllm:num_requests_running"]
            or now["vllm:num_requests_waiting"]
            or now["vllm:kv_cache_usage_perc"]
        )

    await until(idle, 30)
    await asyncio.sleep(0.5)  # for connections to close
    return Footprint.of(server)
