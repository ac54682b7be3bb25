"""A real uvicorn on a free port, in a thread, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable

from support.fake_engine import FakeEngine, byte_checkpoint

from octavo.config.server import ServerConfig
from octavo.server import run
from octavo.server.keys import KeyRing
from octavo.server.starting import Starting
from octavo.server.state import ServerState
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer
from octavo.types import EngineInfo


def make_state(
    config: ServerConfig, info: EngineInfo | None = None, keys: KeyRing | None = None
) -> ServerState:
    """A state with a fake engine that says "Hello, world!"; call it on the event loop."""
    checkpoint = byte_checkpoint()
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert tokenizer is not None
    return ServerState(
        engine=FakeEngine(lambda request: tokenizer.encode("Hello, world!"), info),
        tokenizer=tokenizer,
        chat_template=ChatTemplate.from_checkpoint(checkpoint, None, "<eos>"),
        generation_defaults={"top_k": 50},
        served_model_names=("fake", "alias"),
        config=config,
        keys=keys or KeyRing.from_config(config),
    )


class LiveServer:
    """`engine` and `state` belong to the server's thread; tests read them and set plain fields."""

    def __init__(self, info: EngineInfo | None = None, **options: object) -> None:
        self._info = info
        self.config = ServerConfig.from_options(**{"port": 0} | options)
        self.doors = run.Doors.open(self.config)
        self.url, self.admin_url = self.doors.url, self.doors.admin_url
        self.engine: FakeEngine
        self.state: ServerState
        self.num_cut: int | None = None  # known when it has ended
        self.started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        self._loop, self.stop = asyncio.get_running_loop(), run.Stop()
        self.num_cut = await run.serve(
            self._start, self.doors, lambda state: self.started.set(), self.stop
        )
        await self.engine.close()

    async def _start(self, starting: Starting) -> ServerState:
        self.state = make_state(self.config, self._info, self.doors.keys)
        assert isinstance(self.state.engine, FakeEngine)
        assert self.state.tokenizer is not None
        self.engine, self.encode = self.state.engine, self.state.tokenizer.encode
        return self.state

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self.started.wait(20)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread.is_alive():
            self.ask_to_stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def call(self, work: Callable[[], None]) -> None:
        """Do `work` in the server's thread; returns when it is done."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (work(), done.set()))
        assert done.wait(10)

    def ask_to_stop(self, *, with_grace: bool = False) -> None:
        with contextlib.suppress(RuntimeError):  # it has just ended by itself
            self._loop.call_soon_threadsafe(lambda: self.stop.ask(with_grace=with_grace))

    def reset(self) -> None:
        self.engine.reply = lambda request: self.encode("Hello, world!")
        self.engine.step_s = 0.0
        self.engine.hang = False
        self.engine.fail = None
        self.engine.is_alive = True
        self.engine.trouble = None
        self.engine.num_cached_tokens = 0
        self.engine.resumed_s = []
        self.engine.submitted.clear()
        self.engine.aborted.clear()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        """Until what the server's thread does has shown."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.005)

    def says(self, text: str) -> None:
        self.engine.reply = lambda request: self.encode(text)
