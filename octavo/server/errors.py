"""Every failure as OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`.

| exception           | status | type                   |
| ------------------- | ------ | ---------------------- |
| ApiError            | its own| its own                |
| InvalidRequestError | 400    | invalid_request_error  |
| EngineDeadError     | 503    | service_unavailable    |
| HTTPException       | its own| invalid_request_error  |
| anything else       | 500    | server_error           |
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from octavo.errors import EngineDeadError, EngineError, InvalidRequestError, OctavoError
from octavo.log import get_logger

logger = get_logger(__name__)


class ErrorObject(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorObject


class ApiError(OctavoError):
    """A failure with a status of its own, raised by the server package only."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None,
        *,
        param: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error = ErrorObject(message, type, param, code)
        self.headers = dict(headers or {})


class RequestFailedError(EngineError):
    """The engine ended a request that it had accepted, for a reason that is not the client's."""


def model_not_found(name: str, served: tuple[str, ...]) -> ApiError:
    names = ", ".join(repr(s) for s in served)
    shown = name if len(name) <= 200 else name[:200] + "…"
    return ApiError(
        404,
        f"The model {shown!r} is not served here; use one of: {names}.",
        "model_not_found",
        param="model",
    )


def deadline_exceeded() -> ApiError:
    """504 and not 408, which says that the client was slow, and which clients send again unasked.
    This one would only be late again: OpenAI's clients obey x-should-retry.
    """
    return ApiError(
        504,
        "The request was not finished within its timeout. Ask for less, or allow more time.",
        "deadline_exceeded",
        type="timeout_error",
        headers={"x-should-retry": "false"},
    )


def as_api_error(exc: Exception, request_id: str) -> ApiError:
    """The table above. An unexpected exception is logged with its traceback and told only by its
    request id.
    """
    fields = {"request_id": request_id}
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, InvalidRequestError):
        return ApiError(400, str(exc), exc.code, param=exc.param)
    if isinstance(exc, EngineDeadError):
        logger.error("request %s: the engine is gone: %s", request_id, exc, extra=fields)
        return ApiError(
            503,
            "The engine is not running; try again later, and tell the operator if it stays so.",
            "engine_dead",
            type="service_unavailable",
            headers={"retry-after": "5"},
        )
    if isinstance(exc, HTTPException):
        return _routing_error(exc)
    if isinstance(exc, RequestFailedError):
        logger.error("request %s failed in the engine: %s", request_id, exc, extra=fields)
        # Clients repeat every 5xx unless told otherwise; this would fail again.
        headers = {"x-should-retry": "false"}
        return ApiError(500, str(exc), "request_failed", type="server_error", headers=headers)
    logger.error("request %s: unexpected error", request_id, exc_info=exc, extra=fields)
    return ApiError(
        500,
        f"Internal error. Give the operator this request id: {request_id}.",
        "internal_error",
        type="server_error",
    )


def _routing_error(exc: HTTPException) -> ApiError:
    if exc.status_code == 404:
        return ApiError(
            404, "Unknown URL. GET /v1/models lists what is served under /v1.", "unknown_url"
        )
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "")
        return ApiError(
            405,
            f"This URL does not take that method; use {allowed}.",
            "method_not_allowed",
            headers=exc.headers,
        )
    return ApiError(exc.status_code, str(exc.detail), None, headers=exc.headers)


def to_response(error: ApiError) -> Response:
    return Response(
        msgspec.json.encode(ErrorBody(error.error)),
        error.status,
        error.headers,
        "application/json",
    )
