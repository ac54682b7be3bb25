"""The real process at its doors: while it loads, with keys, and at its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.server import RunningServer, running_server

from octavo.server.keys import append_entry, new_key

pytestmark = pytest.mark.slow

LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True}


@contextmanager
def loading_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL as soon as it listens, which is long before it is ready."""
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if match := re.search(r"listening on (http://\S+);", line):
                    yield process, match[1]
                    break
        finally:
            process.kill()


def test_the_port_answers_while_the_model_loads(smollm2_dir: Path) -> None:
    with loading_server() as (_, url), httpx.Client(base_url=url, timeout=30) as http:
        assert http.get("/livez").status_code == 200
        phases = set()
        while (reply := http.get("/startupz")).status_code == 503:
            phases.add(re.sub(r", \d+ s so far.*", "", reply.json()["error"]["message"]))
            assert http.get("/livez").status_code == 200
            time.sleep(0.05)
        assert "Not ready: loading the model" in phases
        assert reply.json() == {"status": "ok"}
        body = {"prompt": "1, 2, 3, 4,", "max_tokens": 3, "temperature": 0}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == " 5,"


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_model_loads_is_orderly(smollm2_dir: Path, sig: signal.Signals) -> None:
    with loading_server() as (process, url):
        assert httpx.get(f"{url}/livez").status_code == 200
        process.send_signal(sig)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


class Streaming:
    """A long stream in a thread, and the text of all of it when it has ended."""

    def __init__(self, server: RunningServer) -> None:
        self.began = threading.Event()
        self.text = ""
        self._url = server.url
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.began.wait(30)

    def _run(self) -> None:
        with (
            httpx.Client(base_url=self._url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply,
        ):
            for text in reply.iter_text():
                self.text += text
                self.began.set()

    def last_event(self) -> dict[str, dict[str, str]]:
        self._thread.join(30)
        event: dict[str, dict[str, str]] = json.loads(self.text.rstrip("\n").split("data: ")[-1])
        return event


@pytest.mark.parametrize("by", ["second signal", "timeout"])
def test_requests_that_are_cut_off_are_told_and_the_status_says_so(
    smollm2_dir: Path, by: str
) -> None:
    timeout = "60" if by == "second signal" else "1.5"
    with running_server("--drain-timeout", timeout, "--drain-grace", "0.5") as server:
        stream = Streaming(server)
        server.process.send_signal(signal.SIGTERM)
        if by == "second signal":
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
        assert stream.last_event()["error"]["code"] == "aborted"
        assert server.process.wait(20) == 3
        time.sleep(0.2)
        assert "1 requests were cut off" in server.log[-1]


def test_keys_are_read_again_on_sighup_and_admin_has_its_own_port(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"

    def add(name: str, scope: str) -> dict[str, str]:
        key, entry = new_key(name, [scope])
        append_entry(path, entry)
        return {"authorization": f"Bearer {key}"}

    old = add("old", "infer")
    with running_server("--api-key-file", str(path), "--admin-port", "0") as server:
        (line,) = (line for line in server.log if "admin routes on" in line)
        admin = line.rsplit(" ", 1)[1].strip()
        body = {"prompt": "1, 2, 3,", "max_tokens": 2}
        with httpx.Client(base_url=server.url, timeout=30) as http:
            assert http.post("/v1/completions", json=body, headers=old).status_code == 200
            assert http.post("/v1/completions", json=body).status_code == 401
            path.unlink()
            new, operator = add("new", "infer"), add("operator", "admin")
            server.process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert http.post("/v1/completions", json=body, headers=old).status_code == 401
            assert http.post("/v1/completions", json=body, headers=new).status_code == 200
            assert http.get(f"{admin}/admin/requests", headers=new).status_code == 403
            assert http.get(f"{admin}/admin/requests", headers=operator).json() == {"requests": []}
            assert http.post(f"{admin}/admin/drain", headers=operator).status_code == 200
        assert server.process.wait(20) == 0
