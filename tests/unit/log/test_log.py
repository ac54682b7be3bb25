"""What reaches stderr, in processes of their own: logging is set up once per process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from octavo import env
from octavo.errors import ConfigError


def stderr_of(code: str, **variables: str) -> str:
    setup = "import sys; from octavo import log; from octavo.log import get_logger\n"
    environment = {**os.environ, "OCTAVO_LOG_FORMAT": "json", **variables}
    result = subprocess.run(
        [sys.executable, "-c", setup + code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return result.stderr


def records(code: str, **variables: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stderr_of(code, **variables).splitlines()]


def test_extra_becomes_fields() -> None:
    [record] = records(
        "log.setup_logging('engine')\n"
        "get_logger('octavo.x').info('a\\n%s', 'b', extra={'request_id': 'r', 'path': log.env})"
    )
    assert record["message"] == "a\nb"
    assert (record["process"], record["logger"], record["level"]) == ("engine", "octavo.x", "INFO")
    assert record["request_id"] == "r"
    assert "octavo.env" in record["path"]  # what JSON cannot say is told in words
    assert set(record) == {"time", "level", "logger", "process", "message", "request_id", "path"}


def test_an_exception_is_one_line() -> None:
    [record] = records(
        "log.setup_logging('server')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: get_logger('octavo').exception('why')"
    )
    assert record["message"] == "why"
    assert record["exception"].startswith("Traceback")
    assert record["exception"].endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('what')", "uncaught: what"),
        (
            "import threading\n"
            "def fail(): raise ValueError('what')\n"
            "threading.Thread(target=fail).start()",
            "uncaught: what",
        ),
        ("import warnings; warnings.warn('old')", "old"),
        ("import logging; logging.getLogger('other').warning('theirs')", "theirs"),
        (
            "import logging\n"
            "logging.getLogger('own').addHandler(logging.StreamHandler())\n"
            "logging.getLogger('own').propagate = False\n"
            "logging.getLogger('own').warning('theirs')",
            "theirs",
        ),
        ("print('a', 'line', file=sys.stderr)", "a line"),
        ("log.get_console().info('ready')", "ready"),
    ],
)
def test_whatever_is_written_is_json(code: str, says: str) -> None:
    [record] = records(f"log.setup_logging('server')\n{code}", OCTAVO_LOG_LEVEL="error")
    assert says in record["message"]


def test_stacks_can_still_be_dumped() -> None:
    text = stderr_of(
        "log.setup_logging('engine')\n"
        "import faulthandler; faulthandler.enable(); faulthandler.dump_traceback()"
    )
    assert "most recent call first" in text


def test_text() -> None:
    text = stderr_of(
        "log.setup_logging('engine')\n"
        "get_logger('octavo.x').warning('a')\n"
        "get_logger('octavo.x').info('hidden')\n"
        "log.get_console().info('shown')",
        OCTAVO_LOG_FORMAT="text",
        OCTAVO_LOG_LEVEL="warning",
    )
    first, second = text.splitlines()
    assert first.startswith("engine ")
    assert first.endswith(" WARNING octavo.x: a")
    assert second == "octavo: shown"


def test_a_format_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="OCTAVO_LOG_FORMAT must be one of text, json, not 'xml'"):
        env.get("OCTAVO_LOG_FORMAT")
