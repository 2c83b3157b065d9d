"""`POST /v1/responses`. Nothing is stored, so there is no response to ask for afterwards."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of, request_id_of
from eft_serve.api.errors import ResponseNotFoundError
from eft_serve.api.openapi import MODEL_ERRORS, answers_of, body_of
from eft_serve.api.preparing import PromptSource
from eft_serve.api.responses import ResponsesCall, ResponsesResponse
from eft_serve.api.responses_answers import EVENTS, ResponseObject
from eft_serve.api.responses_format import ResponseFormat
from eft_serve.api.responses_schemas import ResponsesBody

router = APIRouter(default_response_class=Response)


@router.post(
    "/v1/responses",
    openapi_extra=body_of(ResponsesBody) | answers_of(ResponseObject, events=EVENTS, errors=MODEL_ERRORS),
)
async def create_response(request: Request) -> Response:
    """The models' answer to a text or a conversation, whole or as a stream of typed events."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    server = context.service.config.server
    body, arrival = await receive_body(request, lambda _: ResponsesBody, server.request_timeout_s)

    options = body.prompt_options(server.default_max_tokens)
    render = partial(context.renderer.chat, messages=body.messages, param="input", options=options)
    call = ResponsesCall(
        request_id=request_id_of(request),
        tenant=tenant,
        ensemble=context.ensemble(body.model, tenant),
        body=body,
        format=ResponseFormat(),
        prompts=[PromptSource(render, "input")],
        default_max_tokens=server.default_max_tokens,
        arrival=arrival,
    )
    return ResponsesResponse(context, call)


@router.api_route("/v1/responses/{response_id}", methods=["GET", "DELETE"], include_in_schema=False)
@router.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
@router.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
async def find_response(request: Request, response_id: str) -> Response:
    """Always 404."""
    context_of(request).access.tenant(request)
    raise ResponseNotFoundError(
        f"response {response_id[:64]!r} is not stored, as none is; send the whole conversation in input",
        param="response_id",
    )
