"""An OpenAI-compatible server in a thread that says what a script tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Refusal = (
    tuple[int, dict[str, Any]] | tuple[int, dict[str, Any], dict[str, str]]
)  # status, body, headers


class FakeOpenAI:
    """`answer(body)` gives the pieces of a streamed answer, written one by one, or a refusal.

    Token ids of `vocab_size` and more get a 400; a `vocab_size` of 0 takes no token ids at all.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Iterable[bytes] | Refusal],
        *,
        vocab_size: int = 300,
        max_model_len: int | None = None,
        api_key: str | None = None,
    ) -> None:
        self.answer = answer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.api_key = api_key
        self.bodies: list[dict[str, Any]] = []  # of streamed requests, as they arrived
        self.num_running = self.max_running = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = False  # server_close() then waits for them
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> FakeOpenAI:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeOpenAI

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""

    def do_GET(self) -> None:
        if self.fake.api_key and self.headers["Authorization"] != f"Bearer {self.fake.api_key}":
            self._json(401, {"error": {"message": "wrong key"}})
        elif self.path == "/v1/models":
            model = {"id": "fake-model", "max_model_len": self.fake.max_model_len}
            self._json(200, {"data": [model]})
        else:
            self._json(404, {"error": {"message": "unknown URL"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body.get("prompt")
        if isinstance(prompt, list) and max(prompt) >= self.fake.vocab_size:
            self._json(400, {"error": {"message": f"no token {max(prompt)}"}})
        elif not body.get("stream"):
            self._json(200, {"choices": [{"text": "x"}]})
        else:
            self._stream(body)

    def _stream(self, body: dict[str, Any]) -> None:
        fake = self.fake
        with fake.lock:
            fake.bodies.append(body)
            fake.num_running += 1
            fake.max_running = max(fake.max_running, fake.num_running)
        try:
            answer = fake.answer(body)
            if isinstance(answer, tuple):
                self._json(*answer)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in answer:
                self.wfile.write(piece)
                self.wfile.flush()
        except BrokenPipeError:
            pass  # the client gave up
        finally:
            with fake.lock:
                fake.num_running -= 1

    def _json(
        self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def spoken(
    body: dict[str, Any], *, step_s: float = 0.002, usage: bool = True, done: bool = True
) -> Iterable[bytes]:
    """A whole answer of `max_tokens` chunks, as the endpoint's schema has it."""
    is_chat = "messages" in body
    if is_chat:
        yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for i in range(body["max_tokens"]):
        time.sleep(step_s)
        end = "length" if i == body["max_tokens"] - 1 else None
        text = {"delta": {"content": "a"}} if is_chat else {"text": "a"}
        yield event({"choices": [{**text, "finish_reason": end}]})
    if usage:
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        num_prompt = len(prompt.split() if isinstance(prompt, str) else prompt)
        counts = {"prompt_tokens": num_prompt, "completion_tokens": body["max_tokens"]}
        details = {"prompt_tokens_details": {"cached_tokens": 1}}
        yield event({"choices": [], "usage": {**counts, **details}})
    if done:
        yield b"data: [DONE]\n\n"
