"""A real server in a real process: `octavo serve` on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_READY = re.compile(r'(?:octavo: |"message": ")(\S+) is ready on (http://\S+)/v1 after ([\d.]+) s')


@dataclass
class RunningServer:
    """A server that answers. `log` holds what it has written to stderr so far."""

    process: subprocess.Popen[str]
    model: str
    url: str
    ready_s: float
    log: list[str] = field(repr=False)

    def child_pids(self) -> list[int]:
        """The engine, and after a while its spare."""
        pid = self.process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def engine_pid(self) -> int:
        return self.child_pids()[0]

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send a signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout_s)


@contextmanager
def running_server(*flags: str, timeout_s: float = 120) -> Iterator[RunningServer]:
    """Start, wait until it is ready, and stop however the body ends."""
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", *flags]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    log: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_collect, args=(process.stderr, log), daemon=True)
    reader.start()
    try:
        match = _wait_ready(process, log, timeout_s)
        yield RunningServer(process, match[1], match[2], float(match[3]), log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)
        process.stderr.close()


def _collect(stream: Iterator[str], log: list[str]) -> None:
    for line in stream:
        log.append(line)  # noqa: PERF402  # line by line, as they come


def _wait_ready(
    process: subprocess.Popen[str], log: Sequence[str], timeout_s: float
) -> re.Match[str]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for line in list(log):
            if match := _READY.search(line):
                return match
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise AssertionError(f"the server did not get ready (status {process.poll()}):\n{''.join(log)}")
