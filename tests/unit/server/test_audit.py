"""Every route of both ports, with every kind of key: the tables of `app.py` are what is enforced,
and docs/security.md has the same tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from support.live_server import LiveServer

from octavo.server.app import ADMIN_ROUTES, ROUTES, Endpoint
from octavo.server.keys import SCOPES, Access, append_entry, new_key

DOCS = Path(__file__).parents[3] / "docs" / "security.md"
PORTS = {"public": ROUTES, "admin": ADMIN_ROUTES}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(SCOPES, n)]
CASES = [(port, endpoint) for port, endpoints in PORTS.items() for endpoint in endpoints]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Headers by the name of the key: one for every set of scopes, each also expired."""
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    found = {}
    for scopes in SUBSETS:
        for name, expires in (("-".join(scopes), None), (f"old-{'-'.join(scopes)}", "2020-01-01")):
            found[name], entry = new_key(name, scopes, expires)
            append_entry(path, entry)
    return {"file": str(path)} | {name: f"Bearer {key}" for name, key in found.items()}


@pytest.fixture(scope="module")
def locked(keys: dict[str, str]) -> Iterator[LiveServer]:
    with LiveServer(api_key_file=keys["file"], admin_port=0, api_key="s3cret") as server:
        server.state.request_drain = lambda: None  # it would answer, and end the server
        yield server


Ask = Callable[..., int]


@pytest.fixture(scope="module")
def ask(client: httpx.Client) -> Ask:
    """The status of a request to one of a server's ports."""

    def ask(server: LiveServer, port: str, method: str, path: str, key: str = "") -> int:
        base = server.url if port == "public" else server.admin_url
        headers = {"authorization": key.encode("latin-1")} if key else {}
        return client.request(method, f"{base}{path}", headers=headers).status_code

    return ask


def concrete(endpoint: Endpoint) -> str:
    return endpoint.path.replace("{model:path}", "fake").replace("{request_id:path}", "none")


@pytest.mark.parametrize(
    ("port", "endpoint"), CASES, ids=[f"{port} {e.method} {e.path}" for port, e in CASES]
)
def test_every_route_with_every_key(
    ask: Ask, locked: LiveServer, keys: dict[str, str], port: str, endpoint: Endpoint
) -> None:
    access, method, path = endpoint.access, endpoint.method, concrete(endpoint)
    is_open = access is Access.OPEN
    strangers = ("", "Bearer", "Bearer wrong", "s3cret", "Bearer s3crets", "Bearer é", "Basic eA==")
    for authorization in strangers:
        assert ask(locked, port, method, path, authorization) == (200 if is_open else 401)
    for scopes in SUBSETS:
        name = "-".join(scopes)
        status = ask(locked, port, method, path, keys[name])
        if is_open or access is Access.ANY or access in scopes:
            assert status not in (401, 403), name
        else:
            assert status == 403, name
        expected = 200 if is_open else 401
        assert ask(locked, port, method, path, keys[f"old-{name}"]) == expected, name
    if method == "GET":
        assert ask(locked, port, "HEAD", path) == (200 if is_open else 401)


@pytest.mark.parametrize("port", PORTS)
def test_without_a_key_what_is_there_looks_like_what_is_not(
    ask: Ask, locked: LiveServer, keys: dict[str, str], port: str
) -> None:
    for method, path in [
        *(("GET", "/nothing"), ("GET", "/"), ("POST", "/v1/nothing"), ("GET", "/livez/")),
        *(("GET", "/v1/completions"), ("PUT", "/v1/models"), ("OPTIONS", "/v1/models")),
        *(("GET", "//livez"), ("GET", "/%6civez/x"), ("GET", "/admin/%2e%2e/livez")),
        *(("DELETE", "/admin/requests"), ("GET", "/livez;/v1/models")),
    ]:
        assert ask(locked, port, method, path) == 401, path
        assert ask(locked, port, method, path, keys["infer-metrics-admin"]) in (404, 405), path


def test_admin_routes_are_not_on_the_public_port(
    ask: Ask, locked: LiveServer, keys: dict[str, str]
) -> None:
    for endpoint in set(ADMIN_ROUTES) - set(ROUTES):
        path = concrete(endpoint)
        everything = keys["infer-metrics-admin"]
        assert ask(locked, "public", endpoint.method, path, everything) == 404


def test_the_key_of_the_command_line_may_infer_and_scrape_and_no_more(
    ask: Ask, locked: LiveServer
) -> None:
    for authorization in ("Bearer s3cret", "bearer s3cret"):
        assert ask(locked, "public", "GET", "/v1/models", authorization) == 200
        assert ask(locked, "public", "GET", "/metrics", authorization) == 200
        assert ask(locked, "admin", "GET", "/admin/config", authorization) == 403


def test_two_authorization_headers_are_none(
    client: httpx.Client, locked: LiveServer, keys: dict[str, str]
) -> None:
    headers = [("authorization", keys["infer"]), ("authorization", "Bearer wrong")]
    for order in (headers, headers[::-1]):
        assert client.get(f"{locked.url}/v1/models", headers=order).status_code == 401


def test_without_keys_everything_is_open_and_there_is_no_admin_port(
    ask: Ask, server: LiveServer
) -> None:
    assert server.admin_url is None
    for endpoint in ROUTES:
        assert ask(server, "public", endpoint.method, concrete(endpoint)) not in (401, 403)
    assert ask(server, "public", "GET", "/admin/config") == 404


def test_a_route_cannot_be_made_without_saying_what_it_asks() -> None:
    async def handler(state: object, http: Request) -> None: ...

    with pytest.raises(TypeError, match="missing"):
        Endpoint("GET", "/new", handler=handler)  # type: ignore[call-arg]
    assert all(isinstance(e.access, Access) for _, e in CASES)
    assert {e.access for e in ROUTES} >= {Access.OPEN, Access.INFER, Access.METRICS}
    probes = {e.path for _, e in CASES if e.access is Access.OPEN}
    assert probes == {"/health", "/livez", "/readyz", "/startupz"}


def test_the_page_on_security_has_these_tables() -> None:
    text = DOCS.read_text()
    for port, endpoints in PORTS.items():
        rows = [f"| `{e.method} {e.path}` | {e.access} |" for e in endpoints]
        begin = text.index(f"<!-- routes of the {port} port -->")
        table = text[begin : text.index("\n\n", begin)].splitlines()
        assert table[3:] == rows
