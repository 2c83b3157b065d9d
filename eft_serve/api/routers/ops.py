"""`/health`, `/ready` and `/metrics`, for those who operate the server."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.responses import Response

from eft_serve.api.answers import Health, Ready
from eft_serve.api.context import context_of
from eft_serve.api.errors import json_response
from eft_serve.api.openapi import OPEN, answers_of
from eft_serve.errors import UnavailableError

PROBE_TIMEOUT_S = 5.0

router = APIRouter(default_response_class=Response)


@router.head("/health", include_in_schema=False)
@router.get("/health", openapi_extra=OPEN | answers_of(Health))
async def health() -> Response:
    """200 as long as this process answers; says nothing of the models."""
    return json_response({"status": "ok"})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", openapi_extra=OPEN | answers_of(Ready, errors=(503,)))
async def ready(request: Request) -> Response:
    """200 when every model answered a step, 503 with what is missing otherwise."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await context_of(request).service.check_ready()
    except TimeoutError as error:
        raise UnavailableError(f"the models did not answer within {PROBE_TIMEOUT_S:g} s") from error
    return json_response({"status": "ready"})


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", openapi_extra=answers_of(errors=(503,)))
async def metrics(request: Request) -> Response:
    """Prometheus text of every process; with tenants it needs a key of one that has `metrics: true`."""
    context = context_of(request)
    context.access.metrics_reader(request)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            others = await context.service.metrics()
    except TimeoutError as error:
        raise UnavailableError(f"not every process answered within {PROBE_TIMEOUT_S:g} s") from error
    return Response(generate_latest(context.registry) + others, media_type=CONTENT_TYPE_PLAIN_0_0_4)
