"""Flags from option dataclasses, sizes, and the --config file below them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.flags import add_config_file, add_options, split_options
from octavo.cli.sampling import add_sampling_flags, sampling_params
from octavo.config import EngineArgs
from octavo.config.options import from_options, option
from octavo.config.server import ServerConfig
from octavo.errors import ConfigError, InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class SomeConfig:
    name: str = option("n", "a name")
    kind: str = option("a", "a kind", ("a", "b"))
    size: int | None = option(None, "a size, 100% of it")
    share: float = option(0.5, "a share")
    is_on: bool = option(False, "a switch")
    pause_s: float = option(1.0, "a time")
    maybe: bool | None = option(None, "a switch that may be left open")


def parse(*arguments: str, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_config_file(parser)
    add_options(parser, SomeConfig, *skip)
    (options,) = split_options(parser.parse_args(arguments), SomeConfig)
    from_options(SomeConfig, options)
    return options


def test_only_what_was_given_is_there() -> None:
    assert parse() == {}
    assert parse("--name", "x", "--is-on", "--no-maybe") == {
        "name": "x",
        "is_on": True,
        "maybe": False,
    }
    assert parse("--share", "0.25", "--kind", "b") == {"share": 0.25, "kind": "b"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8192", 8192),
        ("8k", 8000),
        ("8K", 8192),
        ("4G", 4 << 30),
        ("4g", 4_000_000_000),
        ("1.5k", 1500),
        ("2M", 2 << 20),
        ("2m", 2_000_000),
        ("0", 0),
        ("-3", -3),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse(f"--size={text}") == {"size": value}


@pytest.mark.parametrize("text", ["", "k", "1kk", "1e3", "0.5", "1.0001k", "-1k", "8 k", "1T"])
def test_what_is_no_size(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--size={text}")
    assert "--size" in capsys.readouterr().err


def test_a_value_that_is_no_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--kind", "c")
    assert "'a', 'b'" in capsys.readouterr().err.replace("a, b", "'a', 'b'")


def test_a_skipped_field_has_no_flag() -> None:
    with pytest.raises(SystemExit):
        parse("--name", "x", skip=("name",))


def test_times_are_in_seconds_and_their_flags_do_not_say_so(file: Path) -> None:
    assert parse("--pause", "2.5") == {"pause_s": 2.5}
    file.write_text("pause: 3\n")
    assert parse("--config", str(file)) == {"pause_s": 3}
    file.write_text("pause_s: 3\n")
    with pytest.raises(ConfigError, match="pause-s"):
        parse("--config", str(file))


# ---- --config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "options.yaml"


def test_the_command_line_wins_over_the_file(file: Path) -> None:
    file.write_text("name: from-file\nis-on: true\nshare: 1\n")
    assert parse("--config", str(file), "--name", "given") == {
        "name": "given",
        "is_on": True,
        "share": 1,
    }
    assert parse("--config", str(file), "--no-is-on")["is_on"] is False


def test_dashes_underscores_and_sizes(file: Path) -> None:
    file.write_text("is_on: true\nsize: 8k\n")
    assert parse("--config", str(file)) == {"is_on": True, "size": 8000}
    file.write_text("size: 4096\n")
    assert parse("--config", str(file)) == {"size": 4096}


def test_an_empty_file_says_nothing(file: Path) -> None:
    file.write_text("# nothing\n")
    assert parse("--config", str(file)) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 5\nzzz: 1\n", "unknown options: sise, zzz. Known: .*size"),
        ("- name\n", "mapping of options, not a list"),
        ("name: [\n", "Cannot read"),
        ("size: eight\n", "'eight' is not a number"),
        ("is_on: maybe\n", "'is_on' takes bool"),
        ("name: 5\n", "'name' takes str"),
    ],
)
def test_a_file_that_is_no_use(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(file))


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the config file no\.yaml"):
        parse("--config", "no.yaml")


def test_two_classes_share_a_command_line_and_a_file(file: Path) -> None:
    file.write_text("port: 9\nmax-model-len: 8k\n")
    parser = argparse.ArgumentParser()
    add_config_file(parser)
    add_options(parser, ServerConfig)
    add_options(parser, EngineArgs)
    namespace = parser.parse_args(["--config", str(file), "--host", "h"])
    engine, server = split_options(namespace, EngineArgs, ServerConfig)
    assert engine == {"max_model_len": 8000}
    assert server == {"port": 9, "host": "h"}


# ---- sampling


def test_sampling_flags() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    namespace = parser.parse_args(["--top-k", "5", "--seed", "3", "--stop", "a", "--stop", "b"])
    params = sampling_params(namespace, max_tokens=9, top_k=1)
    assert (params.top_k, params.seed, params.stop, params.max_tokens) == (5, 3, ("a", "b"), 9)
    with pytest.raises(InvalidRequestError, match="top_p"):
        sampling_params(parser.parse_args(["--top-p", "2"]))
