"""A generating request at the door: whose it is, since when, and how long it may take."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

from starlette.requests import Request

from octavo.errors import InvalidRequestError
from octavo.server.connection import read_body
from octavo.server.state import ServerState
from octavo.server.tracing import NO_TRACE, Trace

TIMEOUT_HEADER = "x-request-timeout"


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float  # time.monotonic()
    client: str  # the name of its API key; "" without keys
    timeout_s: float  # as header and server have it; inf: none
    trace: Trace = NO_TRACE

    def within(self, timeout: float | None) -> Arrival:
        """With the limit of the request's own field `timeout`: the shortest counts."""
        if timeout is None:
            return self
        check_timeout(timeout, "timeout")
        return dataclasses.replace(self, timeout_s=min(self.timeout_s, float(timeout)))

    @property
    def deadline_s(self) -> float | None:
        """time.monotonic()."""
        return None if math.isinf(self.timeout_s) else self.at_s + self.timeout_s


def check_timeout(timeout: float, param: str) -> None:
    if not 0 < timeout < math.inf:
        raise InvalidRequestError(
            f"{param} must be a number of seconds above 0, got {timeout}.", param
        )


async def receive(state: ServerState, http: Request) -> tuple[Arrival, bytes]:
    """Read the body of a generating request. While the queue is full this is all the work that
    goes into one.

    Raises:
        ApiError: 429 when too many wait; see `read_body` for the others.
        InvalidRequestError: the timeout header is no number of seconds.
    """
    at_s = time.monotonic()
    limit_s = state.config.request_timeout_s or math.inf
    if (text := http.headers.get(TIMEOUT_HEADER)) is not None:
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        check_timeout(timeout_s, TIMEOUT_HEADER)
        limit_s = min(limit_s, timeout_s)
    client = getattr(http.state, "client", "")
    arrival = Arrival(at_s, client, limit_s, getattr(http.state, "trace", NO_TRACE))
    body = await read_body(http, state.config.max_body_bytes, state.config.read_timeout_s)
    state.admission.check_count(arrival.client)
    return arrival, body
