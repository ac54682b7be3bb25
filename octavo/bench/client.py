"""One request to an OpenAI-compatible server, streamed, with a timestamp for every chunk."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from octavo.bench.report import Timing
from octavo.bench.sse import EventParser
from octavo.errors import ConfigError

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
_MAX_CAUSE = 200  # characters of a server's message that are kept

# From above: the highest id of the workloads, then of common sizes of vocabularies.
ID_LADDER = (150_000, 127_999, 99_999, 49_151, 31_999, 9_999, 999, 99)


@dataclass(slots=True)
class Exchange:
    """What one request came to. Times in seconds since the run began."""

    index: int
    scheduled_s: float
    sent_s: float = 0.0
    end_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)  # chunks that brought text
    last_token_s: float = 0.0  # also where the last tokens had no text
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    counted_by: str = "usage"
    error: str | None = None
    status: int | None = None  # of the HTTP response; None where there was none
    retry_after_s: float | None = None  # with a refusal: when to come back

    @property
    def itl_ms(self) -> list[float]:
        """Between one chunk and the next."""
        pairs = zip(self.chunk_s, self.chunk_s[1:], strict=False)
        return [(later - earlier) * 1e3 for earlier, later in pairs]

    def timing(self) -> Timing | None:
        """None if it failed."""
        if self.error is not None:
            return None
        return Timing(
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens,
            start_s=self.sent_s,
            first_token_s=self.chunk_s[0],
            last_token_s=self.last_token_s,
        )


class StreamError(Exception):
    """The server did not give a whole answer; the message is the cause that is reported."""


def api_root(base_url: str) -> str:
    """With /v1, whether or not it was given. Raises ConfigError for what is no URL."""
    url = base_url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--base-url must begin with http:// or https://, not {base_url!r}.")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--base-url {base_url!r} is no URL: {error}") from error
    return url if url.endswith("/v1") else f"{url}/v1"


def make_client(base_url: str, api_key: str | None) -> httpx.AsyncClient:
    """Raises ConfigError for a URL or a key that cannot be used."""
    if api_key is not None and not api_key.isascii():
        raise ConfigError("--api-key must be ASCII.")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=api_root(base_url),
        headers={**headers, "Content-Type": "application/json"},
        timeout=None,  # each request has one deadline of its own
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy would be measured with the server
    )


async def list_models(client: httpx.AsyncClient, timeout_s: float) -> list[dict[str, Any]]:
    """What /v1/models lists; empty where the server has no such route.

    Raises:
        ConfigError: the server cannot be reached, or refuses the key.
    """
    response = await _send(client, "GET", "/models", None, timeout_s)
    if response.status_code in (401, 403):
        raise ConfigError(f"The server refuses the API key: {_cause(response)}. Set --api-key.")
    if response.status_code != 200:
        return []
    try:
        listed = response.json()["data"]
        return [entry for entry in listed if isinstance(entry.get("id"), str)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{response.url} is not OpenAI's list of models.") from error


async def find_highest_id(
    client: httpx.AsyncClient, model: str, timeout_s: float, ladder: Sequence[int]
) -> int | None:
    """The first token id of the ladder that the server takes in a prompt; None if it takes text
    only.

    Raises:
        ConfigError: it answers with anything but success or a refusal of the prompt.
    """
    for token_id in ladder:
        body = {"model": model, "prompt": [token_id], "max_tokens": 1, "temperature": 0.0}
        response = await _send(client, "POST", PATHS["completions"], body, timeout_s)
        if response.status_code == 200:
            return token_id
        if response.status_code not in (400, 422):
            raise ConfigError(f"The server refuses a first request: {_cause(response)}.")
    return None


async def _send(
    client: httpx.AsyncClient, method: str, path: str, body: Any, timeout_s: float
) -> httpx.Response:
    try:
        async with asyncio.timeout(timeout_s):
            return await client.request(method, path, json=body)
    except (httpx.HTTPError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"Cannot reach {client.base_url}: {reason}. Check --base-url.") from error


async def stream(
    client: httpx.AsyncClient,
    endpoint: str,
    body: bytes,
    exchange: Exchange,
    origin_s: float,
    timeout_s: float,
) -> None:
    """Send `body`, read the answer to its end, fill in `exchange`. Never raises for what the server
    does: `exchange.error` says it.
    """
    exchange.sent_s = time.perf_counter() - origin_s
    reader = _AnswerReader(exchange)
    try:
        async with (
            asyncio.timeout(timeout_s),
            client.stream("POST", PATHS[endpoint], content=body) as response,
        ):
            exchange.status = response.status_code
            if response.status_code != 200:
                exchange.retry_after_s = _retry_after_s(response)
                await response.aread()
                raise StreamError(_cause(response))
            async for chunk in response.aiter_bytes():
                reader.feed(chunk, time.perf_counter() - origin_s)
        reader.finish()
    except StreamError as error:
        exchange.error = str(error)
    except TimeoutError:
        exchange.error = f"no whole answer within {timeout_s:g} s"
    except httpx.HTTPError as error:
        exchange.error = f"{type(error).__name__}: {error}".rstrip(": ")
    exchange.end_s = time.perf_counter() - origin_s


class _AnswerReader:
    """Takes in the events of one answer. Raises StreamError for what is none."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._parser = EventParser()
        self._has_usage = False
        self._is_done = False

    def feed(self, chunk: bytes, now_s: float) -> None:
        for data in self._parser.feed(chunk):
            if data == "[DONE]":
                self._is_done = True
                continue
            try:
                self._take(json.loads(data), now_s)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise StreamError(f"malformed event: {data[:_MAX_CAUSE]}") from error

    def _take(self, event: Any, now_s: float) -> None:
        exchange = self._exchange
        if event.get("error"):
            raise StreamError(f"error event: {_message(event)[:_MAX_CAUSE]}")
        for choice in event.get("choices") or ():
            ends = choice.get("finish_reason") is not None
            self._is_done |= ends
            # An end without text counts as a token only if there was none at all.
            if _has_text(choice) or (ends and not exchange.chunk_s):
                exchange.chunk_s.append(now_s)
            if _has_text(choice) or ends:
                exchange.last_token_s = now_s
        if usage := event.get("usage"):
            self._has_usage = True
            exchange.num_prompt_tokens = int(usage["prompt_tokens"])
            exchange.num_output_tokens = int(usage["completion_tokens"])
            details = usage.get("prompt_tokens_details") or {}
            exchange.num_cached_tokens = int(details.get("cached_tokens") or 0)

    def finish(self) -> None:
        """The stream is over: is the answer whole?"""
        exchange = self._exchange
        if not self._is_done:
            raise StreamError("the stream ended early")
        if not exchange.chunk_s:
            raise StreamError("the answer was empty")
        if not self._has_usage:
            exchange.counted_by = "chunks"
            exchange.num_output_tokens = len(exchange.chunk_s)


def _has_text(choice: Mapping[str, Any]) -> bool:
    """A chat's first chunk, which only names the role, has none."""
    delta = choice.get("delta") or choice
    names = ("text", "content", "reasoning_content", "reasoning", "tool_calls")
    return any(delta.get(name) for name in names)


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:  # none, or a date
        return None


def _cause(response: httpx.Response) -> str:
    try:
        text = _message(response.json())
    except ValueError:
        text = response.text
    return f"HTTP {response.status_code}: {' '.join(text.split())[:_MAX_CAUSE]}"


def _message(body: Any) -> str:
    """From {"error": {"message": ...}}, {"error": "..."}, or whatever it is."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else error
    return str(message if message is not None else body)
