"""`octavo serve`: an engine process, and an HTTP server in this one."""

from __future__ import annotations

import argparse
import asyncio
import time

from octavo import log
from octavo.cli.flags import add_config_file, add_options, split_options
from octavo.config import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.client import EngineProcess
from octavo.errors import ConfigError

CUT_OFF = 3  # exit status: the server ended in order, but requests did not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="built-in name, hub id, folder or .gguf file (default: smollm2-135m)",
    )
    add_config_file(parser)
    add_options(parser, ServerConfig)
    add_options(parser, EngineArgs, "model")


def run(namespace: argparse.Namespace) -> int:
    start_s = time.monotonic()
    engine_options, server_options = split_options(namespace, EngineArgs, ServerConfig)
    args = EngineArgs.from_options(**engine_options)
    config = ServerConfig.from_options(**server_options)
    log_format = log.setup_logging("server", config.log_format)  # it may come from a file
    # First of all, as it imports torch while this process prepares its own side.
    process = EngineProcess(config.crash_folder, log_format)
    try:
        num_cut = asyncio.run(_serve(process, args, config, start_s))
    finally:
        process.stop()
    return CUT_OFF if num_cut else 0


async def _serve(
    process: EngineProcess, args: EngineArgs, config: ServerConfig, start_s: float
) -> int:
    try:
        from octavo.server.launch import run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"The server needs the package {error.name!r}: pip install 'octavo[server]'."
        ) from error

    def announce(name: str, url: str) -> None:
        seconds = time.monotonic() - start_s
        log.get_console().info("%s is ready on %s/v1 after %.1f s", name, url, seconds)

    return await run_server(process, args, config, announce)
