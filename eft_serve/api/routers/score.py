"""`POST /v1/score`."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.body import read_json, validate
from eft_serve.api.context import context_of, request_id_of
from eft_serve.api.openapi import body_of
from eft_serve.api.score_schemas import ScoreBody, SingleScoreBody
from eft_serve.api.scoring import ScoreCall, ScoreResponse

router = APIRouter()


@router.post("/v1/score", openapi_extra=body_of(ScoreBody, SingleScoreBody))
async def create_score(request: Request) -> Response:
    """What a recipe and each of its models say of given outputs, token by token."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    data = await read_json(request, context.service.config.server.request_timeout_s)
    arrival = asyncio.get_running_loop().time()
    body = validate(ScoreBody, data) if "items" in data else validate(SingleScoreBody, data)
    call = ScoreCall(
        request_id=request_id_of(request),
        tenant=tenant,
        ensemble=context.ensemble(body.model, tenant),
        arrival=arrival,
        body=body,
    )
    return ScoreResponse(context, call)
