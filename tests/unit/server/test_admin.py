"""What the admin routes do; who may use them is in test_audit.py."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.live_server import LiveServer

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server.keys import append_entry, new_key

USER = [{"role": "user", "content": "a prompt that nobody else should see"}]
CHAT = {"model": "fake", "messages": USER}


@pytest.fixture
def server(start_server: Callable[..., LiveServer]) -> LiveServer:
    server = start_server(admin_port=0, drain_timeout_s=5.0, drain_grace_s=0.2)
    server.says("x" * 100)
    server.engine.step_s = 0.02
    return server


@pytest.fixture
def admin(server: LiveServer) -> Iterator[httpx.Client]:
    assert server.admin_url is not None
    with httpx.Client(base_url=server.admin_url, timeout=20) as client:
        yield client


def test_live_requests_are_listed_without_their_text(
    server: LiveServer, admin: httpx.Client
) -> None:
    assert admin.get("/admin/requests").json() == {"requests": []}
    with (
        httpx.Client(base_url=server.url, headers={"x-request-id": "abc"}) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True, "n": 2}) as reply,
    ):
        lines = reply.iter_lines()
        for _ in range(20):
            next(lines)
        text = admin.get("/admin/requests").text
        (live,) = json.loads(text)["requests"]
    assert "nobody" not in text
    assert (live["id"], live["client"], live["num_sequences"]) == ("abc", "", 2)
    assert live["route"] == "/v1/chat/completions"
    assert 0 < live["age_s"] < 10
    assert live["num_output_tokens"] > 1
    assert live["num_prompt_tokens"] > 20
    server.wait_for(lambda: len(server.state.live_requests) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_abort_ends_a_request_and_tells_its_client(
    server: LiveServer, admin: httpx.Client, stream: bool
) -> None:
    outcomes: list[Exception] = []

    def ask() -> None:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=2) as client:
            try:
                answer = client.chat.completions.create(
                    **CHAT, stream=stream, extra_headers={"x-request-id": "a/b"}
                )
                list(answer)
            except openai.APIError as exc:
                outcomes.append(exc)

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_for(lambda: any(live.generation for live in server.state.live_requests))
    assert admin.post("/admin/abort/other").status_code == 404
    assert admin.post("/admin/abort/a/b").json() == {"aborted": 1}
    thread.join(10)
    assert "operator ended" in str(outcomes[0])
    assert server.engine.num_live == 0
    assert len(server.engine.submitted) == 1, "and it has not been sent again"


def test_drain_is_what_sigterm_does(server: LiveServer, admin: httpx.Client) -> None:
    body = CHAT | {"stream": True}
    with (
        httpx.Client(base_url=server.url, timeout=20) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        assert admin.post("/admin/drain").json() == {"status": "draining", "num_requests": 1}
        assert admin.post("/admin/drain").status_code == 200  # asking again does not force it
        assert admin.get("/readyz").status_code == 503
        server.engine.step_s = 0.001  # it is seen to be running; the rest may come at once
        assert "[DONE]" in reply.read().decode()
    server.wait_for(lambda: server.num_cut == 0)


def test_the_configuration_is_shown_without_secrets(
    start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    key, entry = new_key("op", ["admin"])
    append_entry(path, entry)
    server = start_server(admin_port=0, api_key="s3cret", api_key_file=str(path))
    headers = {"authorization": f"Bearer {key}"}
    reply = httpx.get(f"{server.admin_url}/admin/config", headers=headers)
    assert reply.json()["server"]["api_key"] == "(set)"
    assert reply.json()["server"]["drain_timeout_s"] == 30
    assert reply.json()["engine"]["max_model_len"] == 256
    assert "s3cret" not in reply.text
    assert key not in reply.text


def test_keys_can_be_read_again_at_once(
    start_server: Callable[..., LiveServer], tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    key, entry = new_key("op", ["admin"])
    append_entry(path, entry)
    server = start_server(admin_port=0, api_key_file=str(path))
    with httpx.Client(headers={"authorization": f"Bearer {key}"}) as http:
        reload = f"{server.admin_url}/admin/reload-keys"
        assert http.post(reload).status_code == 200
        path.write_text("- nonsense")
        reply = http.post(reload)
        assert reply.status_code == 500
        assert "stay as they were" in reply.json()["error"]["message"]
        assert http.get(f"{server.admin_url}/admin/requests").status_code == 200


def test_metrics_and_probes_are_on_the_admin_port_too(
    server: LiveServer, admin: httpx.Client
) -> None:
    assert "vllm:num_requests_running" in admin.get("/metrics").text
    assert admin.get("/readyz").status_code == 200
    assert admin.post("/v1/chat/completions", json=CHAT).status_code == 404


def test_an_admin_port_for_everybody_needs_keys() -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        ServerConfig(admin_port=0, admin_host="0.0.0.0")
    ServerConfig(admin_port=0, admin_host="0.0.0.0", api_key_file="keys.yaml")
    ServerConfig(admin_port=0, admin_host="::1")


def test_without_a_key_of_scope_admin_there_is_a_warning(
    start_server: Callable[..., LiveServer], caplog: pytest.LogCaptureFixture
) -> None:
    start_server(admin_port=0, api_key="s3cret")
    assert "nobody can use the admin routes" in caplog.text


def test_a_web_page_cannot_use_the_port_of_the_machine_that_shows_it(
    server: LiveServer, admin: httpx.Client
) -> None:
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    assert admin.post("/admin/drain", headers=headers).status_code == 403
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert reply.json()["error"]["code"] == "origin_not_allowed"
    assert not server.state.draining
