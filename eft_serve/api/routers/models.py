"""`GET /v1/models`: the recipes and plain models that the tenant may use."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.answers import Model, ModelList
from eft_serve.api.context import Context, context_of
from eft_serve.api.errors import json_response
from eft_serve.api.openapi import answers_of

router = APIRouter(default_response_class=Response)


@router.get("/v1/models", openapi_extra=answers_of(ModelList))
async def list_models(request: Request) -> Response:
    """All that `model` may name."""
    context = context_of(request)
    names = context.names(context.access.tenant(request))
    return json_response({"object": "list", "data": [_model(context, name) for name in names]})


@router.get("/v1/models/{name}", openapi_extra=answers_of(Model, errors=(404,)))
async def retrieve_model(request: Request, name: str) -> Response:
    """One of them."""
    context = context_of(request)
    ensemble = context.ensemble(name, context.access.tenant(request))
    return json_response(_model(context, ensemble.name))


def _model(context: Context, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": context.started, "owned_by": "eft-serve"}
