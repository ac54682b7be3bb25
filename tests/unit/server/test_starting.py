"""The port answers while the model loads; a start that fails or is stopped ends the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest
from support.live_server import make_state

from octavo.config.server import ServerConfig
from octavo.errors import CheckpointError
from octavo.server import run
from octavo.server.starting import Starting
from octavo.server.state import ServerState

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


class Slow:
    """A start that ends when it is told to."""

    def __init__(self, **options: object) -> None:
        self.doors = run.Doors.open(ServerConfig.from_options(port=0, **options))
        self.stop = run.Stop()
        self.loaded, self.ready = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None
        self.was_cancelled = False

    async def start(self, starting: Starting) -> ServerState:
        starting.phase = "loading the model"
        try:
            await self.loaded.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.error is not None:
            raise self.error
        return make_state(self.doors.config, keys=self.doors.keys)

    async def serve(self, visit: Callable[[httpx.AsyncClient], Awaitable[None]]) -> int:
        serving = asyncio.create_task(
            run.serve(self.start, self.doors, lambda state: self.ready.set(), self.stop)
        )
        async with httpx.AsyncClient(base_url=self.doors.url, timeout=20) as http:
            try:
                await visit(http)
            finally:
                self.stop.ask()
            return await serving


def test_probes_tell_how_far_it_is_and_everything_else_waits() -> None:
    async def main() -> None:
        slow = Slow(api_key="s3cret")

        async def visit(http: httpx.AsyncClient) -> None:
            assert (await http.get("/livez")).status_code == 200
            for method, path in (
                *(("GET", "/readyz"), ("GET", "/startupz"), ("GET", "/health")),
                *(("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/nothing")),
            ):
                reply = await http.request(method, path)
                assert reply.status_code == 503, path
                error = reply.json()["error"]
                assert error["message"].startswith("Not ready: loading the model, 0 s so far")
                assert (error["type"], error["code"]) == ("service_unavailable", "not_ready")
                assert reply.headers["retry-after"] == "2"
                assert reply.headers["x-content-type-options"] == "nosniff"
            assert not slow.ready.is_set()
            slow.loaded.set()
            await slow.ready.wait()
            for path in ("/livez", "/readyz", "/startupz", "/health"):
                assert (await http.get(path)).status_code == 200, path
            assert (await http.get("/metrics")).status_code == 401
            headers = {"authorization": "Bearer s3cret"}
            reply = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert reply.status_code == 200

        assert await slow.serve(visit) == 0

    asyncio.run(main())


def test_a_start_that_fails_says_why() -> None:
    async def main() -> None:
        slow = Slow()
        url = slow.doors.url

        async def visit(http: httpx.AsyncClient) -> None:
            assert (await http.get("/livez")).status_code == 200
            slow.error = CheckpointError("there is no such model")
            slow.loaded.set()
            await asyncio.sleep(0.05)

        with pytest.raises(CheckpointError, match="no such model"):
            await slow.serve(visit)
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.ConnectError):
                await http.get(f"{url}/livez")

    asyncio.run(main())


def test_a_stop_while_the_model_loads_ends_the_start() -> None:
    async def main() -> None:
        slow = Slow()

        async def visit(http: httpx.AsyncClient) -> None:
            assert (await http.get("/livez")).status_code == 200

        assert await asyncio.wait_for(slow.serve(visit), 5) == 0
        assert slow.was_cancelled
        assert not slow.ready.is_set()

    asyncio.run(main())
