"""Every error as OpenAI's `{"error": {"message", "type", "param", "code"}}`, whatever raised it."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from eft_serve.errors import DeadlineError, EftServeError, InvalidRequestError, RateLimitError

INTERNAL = "the server failed; its log has the details under this request id"
CLIENT_CLOSED_REQUEST = 499  # nginx's number; the client is gone, so it only labels metrics


class BodyTooLargeError(InvalidRequestError):
    """The request body is over the limit."""

    status, code = 413, "request_too_large"


class UnsupportedMediaTypeError(InvalidRequestError):
    """The body is not declared as what the endpoint reads."""

    status, code = 415, "unsupported_media_type"


class UnsupportedParameterError(InvalidRequestError):
    """A parameter of OpenAI's API that this server does not have yet, at a value that would change the answer."""

    code = "unsupported_parameter"


class ResponseNotFoundError(InvalidRequestError):
    """A response of `/v1/responses` is asked for by its id, and none is stored."""

    status, code = 404, "response_not_found"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def domain_body(error: EftServeError) -> dict[str, Any]:
    """A domain error in OpenAI's shape."""
    return error_body(error.message, error.error_type, error.param, error.code)


def domain_response(error: EftServeError) -> Response:
    """A domain error as a response, with the headers that its status needs."""
    headers: dict[str, str] = {}
    retry_after_s = error.retry_after_s
    if isinstance(error, RateLimitError) or retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s or 1)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, DeadlineError):
        headers["x-should-retry"] = "false"  # OpenAI's clients would repeat a request that takes too long
    return json_response(domain_body(error), error.status, headers)


def internal_body() -> dict[str, Any]:
    """An unexpected failure, without internal details."""
    return error_body(INTERNAL, "server_error", code="internal_error")


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`body` as JSON."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Register the handlers; unexpected errors are caught by the middleware, which knows the request id."""

    @app.exception_handler(EftServeError)
    async def domain(_: Request, error: EftServeError) -> Response:
        return domain_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(p) for p in first["loc"][1:]) or None
        return json_response(error_body(f"{param}: {first['msg']}", "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"no such endpoint: {request.url.path}; /openapi.json lists them",
            405: f"{request.method} is not allowed on {request.url.path}",
        }
        message = messages.get(error.status_code, error.detail)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        headers = dict(error.headers or {})
        return json_response(error_body(message, kind), error.status_code, headers)
