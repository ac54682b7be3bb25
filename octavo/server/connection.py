"""Reading a request's body and noticing that its sender has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from octavo.server.errors import ApiError

T = TypeVar("T")

# A body over the limit is read on and thrown away up to so many bytes, because a client that is
# still sending would otherwise see a reset connection in place of the answer.
DISCARD_BYTES = 64 * 2**20


class ClientDisconnectedError(Exception):
    """The client has closed the connection; there is nobody to answer."""


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, never holding more than `max_bytes` of it.

    Raises:
        ApiError: 413 over the limit, 408 when it does not arrive in time.
        ClientDisconnectedError: the client went away.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, max_bytes)
    except TimeoutError:
        raise ApiError(
            408,
            f"The request body did not arrive within {timeout_s:g} s.",
            "request_timeout",
            headers={"connection": "close"},
        ) from None


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared[:20]) > max_bytes
    chunks: list[bytes] = []
    num_bytes, more = 0, True
    while more and num_bytes <= DISCARD_BYTES:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnectedError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        num_bytes += len(chunk)
        too_large = too_large or num_bytes > max_bytes
        if too_large:
            chunks.clear()
        else:
            chunks.append(chunk)
    if too_large or more:
        raise ApiError(
            413,
            f"The request body is larger than {max_bytes} bytes; send less at once.",
            "body_too_large",
            headers={"connection": "close"},
        )
    return b"".join(chunks)


class OvertakenError(Exception):
    """What was waited for became pointless."""


async def unless(rival: Coroutine[Any, Any, object], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as `rival` is done.

    Raises:
        OvertakenError: that came first. `work` has ended by then.
    """
    task, watcher = asyncio.create_task(work), asyncio.create_task(rival)
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise OvertakenError
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientDisconnectedError: it went away first. `work` has ended by then.
    """
    try:
        return await unless(_disconnected(receive), work)
    except OvertakenError:
        raise ClientDisconnectedError from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
