"""Bring a server up: the engine loads its weights while this process reads the tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from octavo.checkpoint import Checkpoint, locate
from octavo.config import EngineArgs
from octavo.config.server import ServerConfig
from octavo.engine.client import EngineProcess
from octavo.engine.supervisor import Patience, Supervisor
from octavo.errors import EngineDeadError
from octavo.server.app import create_app
from octavo.server.run import bind, serve
from octavo.server.state import ServerState, sampling_defaults
from octavo.server.tracing import open_tracing
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer


async def run_server(
    process: EngineProcess,
    args: EngineArgs,
    config: ServerConfig,
    on_ready: Callable[[str, str], None],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        process: a fresh engine process; stopped before this returns.
        on_ready: called with the model's name and the server's URL once requests are answered.

    Raises:
        OctavoError: the address is taken, the model cannot be loaded, the engine has died, ...
    """
    sock = bind(config)
    names = config.served_names(args.model)
    tracing = open_tracing(config, names[0])
    checkpoint = await asyncio.to_thread(
        locate,
        args.model,
        revision=args.revision,
        download_dir=args.download_dir,
        tokenizer=args.tokenizer,
        load_format=args.load_format,
    )
    patience = Patience(step_s=config.stall_timeout_s, max_restarts=config.max_engine_restarts)
    connecting = asyncio.create_task(Supervisor.start(process, args, checkpoint, patience))
    try:
        tokenizer, template = await asyncio.to_thread(_open_text, checkpoint)
    except BaseException:
        connecting.cancel()
        raise
    engine = await connecting
    try:
        use_model_defaults = config.generation_config == "auto"
        state = ServerState(
            engine=engine,
            tokenizer=tokenizer,
            chat_template=template,
            generation_defaults=sampling_defaults(checkpoint.generation_config)
            if use_model_defaults
            else {},
            served_model_names=names,
            config=config,
            tracing=tracing,
        )
        url = f"http://{config.host}:{sock.getsockname()[1]}"
        # Without an engine, and without hope of another, it answers nothing: end.
        ended = asyncio.Event()
        engine.on_death(ended.set)
        app = create_app(state)
        await serve(app, config, sock, lambda: on_ready(state.model_name, url), ended)
        if engine.death is not None:
            raise EngineDeadError(f"The engine has ended: {engine.death}")
    finally:
        await engine.close()


def _open_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, ChatTemplate | None]:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    bos = tokenizer.bos_token if tokenizer else None
    eos = tokenizer.eos_token if tokenizer else None
    return tokenizer, ChatTemplate.from_checkpoint(checkpoint, bos, eos)
