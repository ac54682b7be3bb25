"""Logs as JSON: every line that a server and its engines write parses, whatever happens to them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.server import RunningServer, running_server

pytestmark = pytest.mark.slow

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def records(lines: list[str]) -> list[dict[str, Any]]:
    """Every line, parsed; all have what all must have."""
    parsed = [json.loads(line) for line in lines]
    for record in parsed:
        assert _TIME.fullmatch(record["time"]), record
        assert record["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
        assert record["process"] in ("server", "engine")
        assert isinstance(record["logger"], str)
        assert isinstance(record["message"], str)
    return parsed


def post(server: RunningServer, body: dict[str, Any], **headers: str) -> int:
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_every_line_parses_over_the_death_of_an_engine(smollm2_dir: Path) -> None:
    little = ("--kv-cache-memory-bytes", "64M")  # about which the engine warns
    with running_server("--log-format", "json", "--access-log", *little) as server:
        body = {"prompt": "One, two,", "max_tokens": 4, "temperature": 0}
        assert post(server, body, **{"x-request-id": "first"}) == 200
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert post(server, body) == 200
        assert post(server, {"prompt": 7}) == 400
        assert server.stop() == 0
    log = records(server.log)
    messages = [record["message"] for record in log]
    assert any("is ready on" in message for message in messages)
    assert any("signal 9" in message for message in messages)
    assert any("is back after" in message for message in messages)
    assert {record["process"] for record in log} == {"server", "engine"}
    access = [record for record in log if record["logger"] == "octavo.server.gate"]
    assert [record["status"] for record in access] == [200, 200, 400]
    first = access[0]
    assert (first["request_id"], first["method"]) == ("first", "POST")
    assert (first["route"], first["client"]) == ("/v1/completions", "")
    assert 0 < first["duration_s"] < 60


def test_the_last_line_of_a_server_that_gives_up_parses(smollm2_dir: Path) -> None:
    with running_server("--log-format", "json", "--max-engine-restarts", "0") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(20) == 1
    last = records(server.log)[-1]
    assert "signal 9" in last["message"]
    assert last["level"] == "ERROR"


def test_a_start_that_fails_and_the_environment_variable(smollm2_dir: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "octavo", "serve", "--port", "0", "--max-model-len", "1m"],
        env={**os.environ, "OCTAVO_LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 1
    assert "8192" in records(result.stderr.splitlines())[-1]["message"]
