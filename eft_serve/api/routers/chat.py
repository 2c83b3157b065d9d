"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.answers import ChatCompletion, ChatCompletionChunk, ErrorBody
from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of, request_id_of
from eft_serve.api.formats import ChatFormat
from eft_serve.api.generation import GenerationResponse
from eft_serve.api.openapi import MODEL_ERRORS, answers_of, body_of
from eft_serve.api.preparing import GenerationCall, PromptSource
from eft_serve.api.schemas import ChatBody
from eft_serve.api.tool_format import ToolChatFormat
from eft_serve.ensemble import Ensemble

router = APIRouter(default_response_class=Response)


@router.post(
    "/v1/chat/completions",
    openapi_extra=body_of(ChatBody)
    | answers_of(ChatCompletion, events=(ChatCompletionChunk, ErrorBody), has_done=True, errors=MODEL_ERRORS),
)
async def create_chat_completion(request: Request) -> Response:
    """The models' answer to a conversation, whole or as a stream."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    body, arrival = await receive_body(request, lambda _: ChatBody, context.service.config.server.request_timeout_s)
    default_max_tokens = context.service.config.server.default_max_tokens
    ensemble = context.ensemble(body.model, tenant)
    render = partial(
        context.renderer.chat,
        messages=[m.rendered for m in body.messages],
        options=body.prompt_options(default_max_tokens),
    )
    call = GenerationCall(
        request_id=request_id_of(request),
        tenant=tenant,
        ensemble=ensemble,
        body=body,
        format=_format(body, ensemble),
        prompts=[PromptSource(render, "messages")],
        default_max_tokens=default_max_tokens,
        arrival=arrival,
    )
    return GenerationResponse(context, call)


def _format(body: ChatBody, ensemble: Ensemble) -> ChatFormat:
    tools = body.active_tools
    if tools is None or ensemble.tool_parser is None:  # `prepare` refuses tools without a parser
        return ChatFormat()
    return ToolChatFormat(tool_format=ensemble.tool_parser, names=tools.names, parallel=tools.parallel)
