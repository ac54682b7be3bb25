"""Fixtures: one server for all tests of this folder, its clients, and servers of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from support.live_server import LiveServer, make_state

from octavo.config.server import ServerConfig
from octavo.server.state import ServerState
from octavo.types import EngineInfo


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[LiveServer]:
    with LiveServer() as server:
        yield server


@pytest.fixture
def server(_shared_server: LiveServer) -> LiveServer:
    _shared_server.reset()
    return _shared_server


@pytest.fixture(scope="session")
def _shared_http(_shared_server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=_shared_server.url, timeout=20) as client:
        yield client


@pytest.fixture
def http(server: LiveServer, _shared_http: httpx.Client) -> httpx.Client:
    return _shared_http


@pytest.fixture(scope="session")
def openai_client(_shared_server: LiveServer) -> Iterator[openai.OpenAI]:
    url = f"{_shared_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def client(server: LiveServer, openai_client: openai.OpenAI) -> openai.OpenAI:
    return openai_client


@pytest.fixture
def new_state() -> Callable[..., ServerState]:
    return lambda **options: make_state(ServerConfig.from_options(**options))


@pytest.fixture
def start_server() -> Iterator[Callable[..., LiveServer]]:
    """Servers of a test's own, with options."""
    running: list[LiveServer] = []

    def start(info: EngineInfo | None = None, **options: object) -> LiveServer:
        running.append(LiveServer(info, **options).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()
