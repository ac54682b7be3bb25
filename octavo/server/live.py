"""The requests that are being answered now: whose they are, and how many each client has."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.server.errors import ApiError

if TYPE_CHECKING:
    from octavo.server.generation import Generation


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One HTTP request. `generation` is there once its body has been understood."""

    request_id: str
    client: str = ""
    route: str = ""
    began_s: float = field(default_factory=time.monotonic)
    generation: Generation | None = None


class LiveRequests:
    """Generating requests from their first byte to the last of their answer."""

    def __init__(self) -> None:
        self._requests: dict[LiveRequest, None] = {}  # in order of arrival
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(tuple(self._requests))

    def enter(self, request: LiveRequest, max_streams: int | None) -> None:
        """ApiError 429 when the client has `max_streams` already."""
        if max_streams is not None and self._counts[request.client] >= max_streams:
            raise ApiError(
                429,
                f"This API key has {max_streams} requests in progress, which is its limit; wait "
                "for one of them to end.",
                "too_many_streams",
                type="rate_limit_error",
                headers={"retry-after": "1"},
            )
        self._requests[request] = None
        self._counts[request.client] += 1

    def leave(self, request: LiveRequest) -> None:
        """Does nothing for one that has not entered."""
        if request not in self._requests:
            return
        del self._requests[request]
        self._counts[request.client] -= 1
        if not self._counts[request.client]:
            del self._counts[request.client]
