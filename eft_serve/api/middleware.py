"""Around every request: its id, its count, and the handler of unexpected errors."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eft_serve.api.errors import CLIENT_CLOSED_REQUEST, internal_body, json_response
from eft_serve.api.metrics import ApiMetrics

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger(__name__)


class RequestMiddleware:
    """Gives each request an id (the client's own if it is well-formed), answers 500 for unexpected errors, and counts.

    Args:
        app: the application that it wraps.
        metrics: where it counts requests.
        show_id: whether responses carry the id; false behind a proxy that adds the same header itself.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, show_id: bool = True) -> None:
        self._app = app
        self._metrics = metrics
        self._show_id = show_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._show_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        self._metrics.running.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or CLIENT_CLOSED_REQUEST
        except Exception:
            logger.exception("request %s failed unexpectedly", request_id)
            if status is not None:
                raise  # too late for an error answer: the server cuts the connection, which the client notices
            await json_response(internal_body(), 500)(scope, receive, send_with_id)
        finally:
            self._metrics.running.dec()
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._metrics.http_requests.labels(route, str(status or CLIENT_CLOSED_REQUEST)).inc()


def _request_id(headers: Headers) -> str:
    wanted = headers.get(REQUEST_ID, "")
    return wanted if SANE_ID.fullmatch(wanted) else uuid.uuid4().hex
