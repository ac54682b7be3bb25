"""Concurrent HTTP streams through the real server: rate, who used the CPU, and memory over time.

    python benchmarks/streams.py                              1, 4, 16 and 64 streams
    python benchmarks/streams.py --streams 32 --seconds 1200  a soak: one line a minute

Every stream asks for one chat completion after another, of some 30 prompt and 64 output tokens.
Linux only: reads /proc. The client runs on the same cores and is named as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx

WORDS = ("apple", "river", "stone", "cloud", "paper", "window", "garden", "music", "yellow")
NUM_OUTPUT_TOKENS = 64


class Server:
    """`octavo serve` and the engine process that it starts."""

    def __init__(self, model: str) -> None:
        self.model = model
        command = [sys.executable, "-m", "octavo", "serve", model, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"ready on (http\S+)/v1 after ([\d.]+) s", line):
                self.url, self.ready_s = found[1], float(found[2])
                break
        else:
            raise SystemExit(f"the server ended with {self.process.wait()}")

    def processes(self) -> dict[str, int]:
        """Process ids by what they are; the engine is the child with the most memory."""
        server = self.process.pid
        stats = (path.read_text().rsplit(")", 1) for path in Path("/proc").glob("[0-9]*/stat"))
        children = [int(a.split(" ", 1)[0]) for a, b in stats if int(b.split()[1]) == server]
        return {"server": server, "engine": max(children, key=rss_mb), "client": os.getpid()}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def stream(
    client: httpx.AsyncClient, model: str, rng: random.Random, counts: dict[str, int]
) -> None:
    """Ask until cancelled; counts tokens as they come."""
    while True:
        text = " ".join(rng.choices(WORDS, k=12))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Tell a story of: {text}."}],
            "max_tokens": NUM_OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0.8,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            num_tokens = 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    usage = json.loads(line[6:])["usage"]
                    counts["tokens"] += usage["completion_tokens"] - num_tokens
                    num_tokens = usage["completion_tokens"]
            counts["requests"] += 1


async def measure(server: Server, num_streams: int, seconds: float, every_s: float) -> None:
    """One line for every `every_s`."""
    counts = {"tokens": 0, "requests": 0}
    pids = server.processes()
    limits = httpx.Limits(max_connections=num_streams)
    async with (
        httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client,
        asyncio.TaskGroup() as group,
    ):
        tasks = [
            group.create_task(stream(client, server.model, random.Random(i), counts))
            for i in range(num_streams)
        ]
        await asyncio.sleep(3)  # until all have started
        for _ in range(round(seconds / every_s)):
            start_s, before = time.monotonic(), dict(counts)
            used = {name: cpu_s(pid) for name, pid in pids.items()}
            await asyncio.sleep(every_s)
            wall_s = time.monotonic() - start_s
            shares = {name: (cpu_s(pid) - used[name]) / wall_s for name, pid in pids.items()}
            tokens = counts["tokens"] - before["tokens"]
            print(
                f"{num_streams:3} streams: {tokens / wall_s:7.1f} tok/s, "
                f"{counts['requests'] - before['requests']:5} requests; cores "
                + ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
                + "; MB "
                + ", ".join(f"{name} {rss_mb(pid):.0f}" for name, pid in pids.items()),
                flush=True,
            )
        for task in tasks:
            task.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of streams")
    args = parser.parse_args()
    server = Server(args.model)
    print(f"ready in {server.ready_s:.1f} s")
    try:
        for num_streams in args.streams:
            asyncio.run(measure(server, num_streams, args.seconds, min(args.seconds, 60.0)))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
