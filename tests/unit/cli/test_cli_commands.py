"""The commands as they are typed, in this process."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
from support.tiny_folder import write_tiny_folder

import octavo
from octavo.cli.main import COMMANDS, main

TINY = ["--load-format", "dummy", "--num-gpu-blocks-override", "32", "--num-threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: octavo {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out and summary in out for name, summary in COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"octavo {octavo.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["models", "--fast"], ["serve", "a", "b"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_an_expected_error_is_one_line(
    empty_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "no-such-model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("octavo: No model 'no-such-model'. Give a built-in name")
    assert captured.err.count("\n") == 1


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("octavo.cli.pull.locate", interrupted)
    assert main(["pull", "x"]) == 130


def test_a_log_level_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit) as caught:
        main(["models"])
    assert caught.value.code == 2
    assert "OCTAVO_LOG_LEVEL" in capsys.readouterr().err


def test_models(empty_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert "(fetched on first use)" in capsys.readouterr().out
    here = empty_home / "models" / "smollm2-135m"
    here.mkdir(parents=True)
    (here / "config.json").write_text("{}")
    assert main(["models"]) == 0
    assert str(here) in capsys.readouterr().out


def test_pull_says_where_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").touch()
    assert main(["pull", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} is in {folder}\n"


def test_doctor(empty_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty_home / "packed").mkdir(parents=True)
    for name in ("a", "b"):
        (empty_home / "packed" / f"{name}.packed").write_bytes(bytes(60_000_000))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for heading in ("Packages", "Devices", "Environment", "Models"):
        assert f"\n{heading}\n" in out
    assert "chosen by --device auto" in out
    assert f"caches are in {empty_home}" in out
    assert f"packed weights of 2 models, 0.1 GB, in {empty_home / 'packed'}" in out


def test_doctor_shows_no_secrets(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "geheim")
    monkeypatch.setenv("HF_TOKEN", "geheim")
    assert main(["doctor"]) == 0
    assert "geheim" not in capsys.readouterr().out


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "hello", "--model", str(folder), *TINY]
    sampling = ["--max-tokens", "4", "--seed", "1"]
    assert main([*arguments, *sampling]) == 0
    first = capsys.readouterr().out
    assert main([*arguments, *sampling]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--top-p", "7"]) == 1
    assert "top_p" in capsys.readouterr().err


def test_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "/reset", "/huh", "x" * 500, "bye", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    sampling = ["--max-tokens", "3", "--temperature", "0"]
    assert main(["chat", str(folder), "--stats", *sampling, *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("per second]") == 2
    assert captured.out.count("/reset forgets") == 2  # the greeting and "/huh"
    assert "Shorten the prompt" in captured.err
    assert "/reset starts anew" in captured.err
    assert next(lines, None) is None
