"""Bring a server up: the engine loads its weights while this process reads the tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from octavo.checkpoint import locate_from
from octavo.config import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.client import EngineProcess
from octavo.engine.supervisor import SPARE_AFTER_S, Patience, Supervisor
from octavo.errors import EngineDeadError
from octavo.server.run import Doors, Stop, serve
from octavo.server.starting import Starting
from octavo.server.state import ServerState, sampling_defaults
from octavo.server.tracing import open_tracing
from octavo.text.chat_template import open_text

T = TypeVar("T")


async def run_server(
    process: EngineProcess,
    args: EngineArgs,
    config: ServerConfig,
    on_ready: Callable[[str, str], None],
) -> int:
    """Serve until SIGTERM or SIGINT; the number of requests that were cut off then.

    Args:
        process: a fresh engine process; stopped before this returns.
        on_ready: called with the model's name and the server's URL once requests are answered.

    Raises:
        OctavoError: the address is taken, the model cannot be loaded, the engine has died, ...
    """
    doors, stop = Doors.open(config), Stop()
    names = config.served_names(args.model)
    tracing = open_tracing(config, names[0])
    engine: Supervisor | None = None

    async def start(starting: Starting) -> ServerState:
        nonlocal engine
        starting.phase = "finding the model"
        checkpoint = await _in_daemon_thread(lambda: locate_from(args))
        starting.phase = "loading the model"
        connecting = asyncio.create_task(
            Supervisor.start(process, args, checkpoint, _patience(config))
        )
        try:
            tokenizer, template = await asyncio.to_thread(open_text, checkpoint)
            engine = await connecting
        except BaseException:
            connecting.cancel()
            raise
        # Without an engine, and without hope of another, it answers nothing: end.
        engine.on_death(stop.ask)
        use_model_defaults = config.generation_config == "auto"
        return ServerState(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=template,
            generation_defaults=sampling_defaults(checkpoint.generation_config)
            if use_model_defaults
            else {},
            served_model_names=names,
            config=config,
            keys=doors.keys,
            tracing=tracing,
        )

    try:
        url = doors.url
        num_cut = await serve(start, doors, lambda state: on_ready(state.model_name, url), stop)
        if engine is not None and engine.death is not None:
            raise EngineDeadError(f"The engine has ended: {engine.death}")
        return num_cut
    finally:
        doors.close()
        if engine is not None:
            await engine.close()


def _patience(config: ServerConfig) -> Patience:
    return Patience(
        step_s=config.stall_timeout_s,
        max_restarts=config.max_engine_restarts,
        spare_after_s=SPARE_AFTER_S if config.spare_engine else None,
    )


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """`work()` in a thread that no exit waits for: it may be a download of an hour."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not future.done():
            set_it()

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            try:
                result = work()
            except Exception as exc:
                error = exc
                loop.call_soon_threadsafe(settle, lambda: future.set_exception(error))
            else:
                loop.call_soon_threadsafe(settle, lambda: future.set_result(result))

    threading.Thread(target=run, name="locate", daemon=True).start()
    return await future
