"""The `octavo` command: arguments to configuration, nothing else. Commands are imported when they
run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Protocol

import octavo
from octavo import log
from octavo.errors import ConfigError, OctavoError


class Command(Protocol):
    """A module of this package."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def run(self, namespace: argparse.Namespace) -> int: ...


COMMANDS = {
    "serve": "serve a model over OpenAI's API",
    "chat": "talk to a model in the terminal",
    "generate": "complete a prompt",
    "pull": "fetch a model ahead of its first use",
    "models": "list the models that are built in or already here",
    "keys": "make API keys for a server",
    "bench": "measure speed, offline or against a server",
    "replay": "run the last steps of a dead engine again",
    "doctor": "show what this machine has and what Octavo would choose",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Expected errors end in one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="octavo", description="An LLM inference and serving engine."
    )
    parser.add_argument("--version", action="version", version=f"octavo {octavo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command_parser = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            command = _load(name)
            command.add_arguments(command_parser)
            command_parser.set_defaults(run=command.run)
    namespace = parser.parse_args(arguments)
    try:
        process: log.Process = "server" if chosen == "serve" else "octavo"
        log.setup_logging(process, getattr(namespace, "log_format", None))
    except ConfigError as error:
        parser.error(str(error))
    try:
        return int(namespace.run(namespace))
    except OctavoError as error:
        log.get_console().error("%s", error)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _load(name: str) -> Command:
    module: Command = importlib.import_module(f"octavo.cli.{name}")
    return module
