"""Processes: how they start, what they leave behind, and the other commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support.server import running_server

pytestmark = pytest.mark.slow


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def octavo(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octavo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_server_and_engine_with_status_0(
    smollm2_dir: Path, sig: signal.Signals
) -> None:
    with running_server() as server:
        engine = server.engine_pid()
        assert is_running(engine)
        assert server.stop(sig) == 0
        assert not is_running(engine)


def test_a_signal_to_the_engine_alone_is_left_to_the_server(smollm2_dir: Path) -> None:
    """systemd and terminals signal every process; requests must be able to finish."""
    with running_server() as server:
        engine = server.engine_pid()
        os.kill(engine, signal.SIGTERM)
        os.kill(engine, signal.SIGINT)
        with urllib.request.urlopen(f"{server.url}/health") as response:
            assert response.status == 200
        assert is_running(engine)
        assert server.stop(signal.SIGTERM) == 0
        assert not is_running(engine)


def test_the_engine_does_not_outlive_a_killed_server(smollm2_dir: Path) -> None:
    with running_server() as server:
        engine = server.engine_pid()
        server.stop(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while is_running(engine) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(engine)


def test_a_server_that_may_not_restart_its_engine_ends_with_a_status_and_a_cause(
    smollm2_dir: Path,
) -> None:
    with running_server("--max-engine-restarts", "0") as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        assert server.process.wait(20) == 1
        time.sleep(0.2)
        assert "signal 9" in server.log[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["no-such-model"], "smollm2-135m"),
        (["--max-model-len", "1m"], "8192"),
        (["--max-modl-len", "10"], "--max-modl-len"),
        (["--dtype", "int3"], "float32"),
        (["--max-num-seqs", "600", "--max-num-batched-tokens", "5"], "max_num_seqs"),
    ],
)
def test_a_start_that_fails_says_why_in_its_last_line(
    smollm2_dir: Path, flags: list[str], says: str
) -> None:
    result = octavo("serve", "--port", "0", *flags)
    assert result.returncode != 0
    assert says in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_taken_port_is_an_error_before_anything_is_loaded(smollm2_dir: Path) -> None:
    with running_server() as server:
        port = server.url.rsplit(":", 1)[1]
        result = octavo("serve", "--port", port)
        assert result.returncode == 1
        assert f"Cannot listen on 127.0.0.1:{port}" in result.stderr.strip().splitlines()[-1]


def test_generate_prints_the_text_alone(smollm2_dir: Path) -> None:
    question = ("--chat", "What is the capital of Japan?", "--temperature", "0")
    result = octavo("generate", *question)
    assert result.stdout == "The capital of Japan is Tokyo.\n"
    assert octavo("generate", "-", "--max-tokens", "3", input="1, 2, 3,").returncode == 0


def test_chat_keeps_its_history(smollm2_dir: Path) -> None:
    question = "What is the secret word?\n"
    lines = f"The secret word is banana. Remember it.\n{question}/reset\n{question}/help\n/exit\n"
    flags = ("--temperature", "0", "--max-tokens", "20", "--stats")
    result = octavo("chat", *flags, input=lines)
    assert result.returncode == 0, result.stderr
    answers = [line for line in result.stdout.split("> ") if "per second]" in line]
    assert ["banana" in answer for answer in answers] == [True, True, False]


def test_a_config_file_is_the_command_line_in_yaml(smollm2_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("max-model-len: 512\nserved_model_name: small\nmax-num-seqs: 4\n")
    with running_server("--config", str(config), "--max-num-seqs", "2") as server:
        assert server.model == "small"
        with urllib.request.urlopen(f"{server.url}/metrics") as response:
            assert 'num_gpu_blocks="' in response.read().decode()
    config.write_text("max-modl-len: 512\n")
    result = octavo("serve", "--config", str(config))
    assert result.returncode == 1
    assert "max-modl-len" in result.stderr


def test_models_pull_and_doctor(smollm2_dir: Path) -> None:
    assert "smollm2-135m" in octavo("models").stdout
    assert str(smollm2_dir) in octavo("pull", "smollm2-135m").stdout
    doctor = octavo("doctor")
    assert doctor.returncode == 0
    assert "chosen by --device auto" in doctor.stdout
