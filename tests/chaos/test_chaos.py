"""Real processes, real faults: no stream breaks, no token differs, nothing is left behind.

pytest tests/chaos --chaos-rounds 50
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from support.chaos import (
    Ledger,
    Reference,
    is_ready,
    load,
    metrics,
    requests,
    settled,
    stream,
    until,
)
from support.server import RunningServer, running_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


async def replaced(server: RunningServer, pid: int) -> None:
    """Until another engine than `pid` is at work."""
    await until(lambda: pid not in server.child_pids() and is_ready(server))


def test_kill_the_engine(
    server: RunningServer, reference: Reference, ledger: Ledger, rounds: int
) -> None:
    """kill -9 at random moments under 64 streams."""

    async def run() -> None:
        before = await settled(server)
        rng = random.Random(1)
        async with load(server, reference, ledger):
            for _ in range(rounds):
                await asyncio.sleep(rng.random() * 4)
                pid = server.engine_pid()
                os.kill(pid, signal.SIGKILL)
                ledger.num_faults += 1
                await replaced(server, pid)
        after = await settled(server)
        assert after.num_children == before.num_children
        assert after.num_files <= before.num_files + 2
        assert after.rss_bytes - before.rss_bytes < 60 << 20, "the server has grown"
        assert metrics(server)["octavo:engine_restarts_total"] == rounds

    asyncio.run(run())
    ledger.take_log(server)
    assert server.process.poll() is None


def test_stop_the_engine(
    server: RunningServer, reference: Reference, ledger: Ledger, rounds: int
) -> None:
    """SIGSTOP: it is there and does nothing. Health says so, and it is replaced."""

    async def run() -> None:
        async with load(server, reference, ledger):
            for _ in range(max(1, rounds // 4)):
                pid = server.engine_pid()
                os.kill(pid, signal.SIGSTOP)
                ledger.num_faults += 1
                await until(lambda: not is_ready(server), 30)
                await replaced(server, pid)
                await asyncio.sleep(1)

    asyncio.run(run())
    ledger.take_log(server)
    assert any("has not answered" in line for line in server.log)


def test_clients_hang_up(
    server: RunningServer, reference: Reference, ledger: Ledger, rounds: int
) -> None:
    """A quarter of the clients leave in the middle of their streams, also while an engine dies."""

    async def leave(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            for _ in range(5 * rounds):
                await stream(http, rng.choice(requests()), leave_after=rng.randrange(1, 30))
                ledger.num_faults += 1

    async def run() -> None:
        before = await settled(server)
        async with load(server, reference, ledger, num_streams=32):
            leaving = asyncio.gather(*(leave(i) for i in range(8)))
            await asyncio.sleep(1)
            os.kill(server.engine_pid(), signal.SIGKILL)
            await leaving
        after = await settled(server)
        assert after.num_files <= before.num_files + 2

    asyncio.run(run())
    ledger.take_log(server)


def test_run_out_of_files(
    smollm2_dir: Path, reference: Reference, ledger: Ledger, tmp_path: Path
) -> None:
    """Connections use up every file descriptor while an engine dies: what runs goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def run(server: RunningServer) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        idle: list[socket.socket] = []
        async with load(server, reference, ledger, num_streams=16):
            idle.extend(socket.create_connection((host, int(port))) for _ in range(200))
            await asyncio.sleep(0.5)
            pid = server.engine_pid()
            os.kill(pid, signal.SIGKILL)
            ledger.num_faults += 1
            await asyncio.sleep(2)
            for sock in idle:
                sock.close()
            await replaced(server, pid)
        await settled(server)

    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        with running_server("--crash-dir", str(tmp_path)) as server:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            asyncio.run(run(server))
            ledger.take_log(server)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_fill_the_disk(smollm2_dir: Path, reference: Reference, ledger: Ledger) -> None:
    """No file can grow any more: neither caches nor crash dumps hold up a restart."""

    async def run(server: RunningServer) -> None:
        async with load(server, reference, ledger, num_streams=16):
            for _ in range(2):
                pid = server.engine_pid()
                os.kill(pid, signal.SIGKILL)
                ledger.num_faults += 1
                await replaced(server, pid)
                await asyncio.sleep(1)

    with running_server() as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, 0))
        asyncio.run(run(server))
        ledger.take_log(server)
        assert any("no flight recording" in line for line in server.log)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_the_clock_jumps(
    smollm2_dir: Path,
    reference: Reference,
    ledger: Ledger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The wall clock leaps by hours in both directions, and back: nobody times out or waits."""
    library, clock = tmp_path / "wrong_clock.so", tmp_path / "clock"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    clock.write_text("0")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("WRONG_CLOCK", str(clock))
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, "WRONG_CLOCK": str(_written(tmp_path / "probe", "100000000"))},
        capture_output=True,
        check=True,
    )
    assert float(told.stdout) > 1.8e9, "the wrong clock is not in use"

    async def run(server: RunningServer) -> None:
        async with load(server, reference, ledger, num_streams=16):
            for jump_s in (86_400, -86_400, 4_000_000, -1_000_000_000, 0):
                clock.write_text(str(jump_s))
                ledger.num_faults += 1
                await asyncio.sleep(1)
        assert metrics(server)["octavo:engine_restarts_total"] == 0

    with running_server("--crash-dir", str(tmp_path)) as server:
        monkeypatch.delenv("LD_PRELOAD")
        asyncio.run(run(server))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_memory_stays_flat(
    smollm2_dir: Path, reference: Reference, ledger: Ledger, rounds: int
) -> None:
    """Server and engine under steady load, with a cache small enough to be touched at once."""

    def rss(pid: int) -> int:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        return int(fields[1]) * resource.getpagesize()

    async def sample(server: RunningServer, count: int) -> list[int]:
        sizes = []
        for _ in range(count):
            await asyncio.sleep(0.5)
            sizes.append(rss(server.process.pid) + rss(server.engine_pid()))
        return sizes

    async def run(server: RunningServer) -> None:
        async with load(server, reference, ledger, num_streams=32):
            num_quiet = 0
            for _ in range(36):  # until every block has been used once
                sizes = await sample(server, 10)
                num_quiet = num_quiet + 1 if sizes[-1] - sizes[0] < 1 << 20 else 0
                if num_quiet == 3:
                    break
            growths = []
            for _ in range(3):  # a leak goes on; room for a batch larger than any before does not
                sizes = await sample(server, 8 * rounds)
                half = len(sizes) // 2
                growths.append((max(sizes[half:]) - max(sizes[:half])) >> 20)
                if growths[-1] < 8:
                    break
        assert growths[-1] < 8, f"grew by {growths} MB, within {4 * rounds} s each"

    with running_server("--num-gpu-blocks-override", "300") as server:
        asyncio.run(run(server))
