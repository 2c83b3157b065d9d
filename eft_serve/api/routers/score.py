"""`POST /v1/score`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of, request_id_of
from eft_serve.api.openapi import MODEL_ERRORS, answers_of, body_of
from eft_serve.api.prompt_answers import ScoreList
from eft_serve.api.score_schemas import ScoreBody, SingleScoreBody
from eft_serve.api.scoring import ScoreCall, ScoreResponse

router = APIRouter(default_response_class=Response)


@router.post(
    "/v1/score", openapi_extra=body_of(ScoreBody, SingleScoreBody) | answers_of(ScoreList, errors=MODEL_ERRORS)
)
async def create_score(request: Request) -> Response:
    """What a recipe and each of its models say of given outputs, token by token."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    body, arrival = await receive_body(request, _kind_of, context.service.config.server.request_timeout_s)
    call = ScoreCall(
        request_id=request_id_of(request),
        tenant=tenant,
        ensemble=context.ensemble(body.model, tenant),
        arrival=arrival,
        body=body,
    )
    return ScoreResponse(context, call)


def _kind_of(data: dict[str, Any]) -> type[ScoreBody | SingleScoreBody]:
    return ScoreBody if "items" in data else SingleScoreBody
