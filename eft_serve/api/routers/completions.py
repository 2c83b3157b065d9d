"""`POST /v1/completions`."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.answers import Completion, ErrorBody
from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of, request_id_of
from eft_serve.api.formats import CompletionFormat
from eft_serve.api.generation import GenerationResponse
from eft_serve.api.openapi import MODEL_ERRORS, answers_of, body_of
from eft_serve.api.preparing import GenerationCall, PromptSource
from eft_serve.api.schemas import CompletionBody

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter(default_response_class=Response)


@router.post(
    "/v1/completions",
    openapi_extra=body_of(CompletionBody)
    | answers_of(Completion, events=(Completion, ErrorBody), has_done=True, errors=MODEL_ERRORS),
)
async def create_completion(request: Request) -> Response:
    """The models' continuation of a text, whole or as a stream."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    body, arrival = await receive_body(
        request, lambda _: CompletionBody, context.service.config.server.request_timeout_s
    )
    render, options = context.renderer.completion, body.prompt_options(DEFAULT_MAX_TOKENS)
    names = [f"prompt.{i}" for i in range(len(body.prompt))] if len(body.prompt) > 1 else ["prompt"]
    call = GenerationCall(
        request_id=request_id_of(request),
        tenant=tenant,
        ensemble=context.ensemble(body.model, tenant),
        body=body,
        format=CompletionFormat(),
        prompts=[
            PromptSource(
                partial(render, prompt=prompt, param=name, options=options),
                name,
                echo=prompt if isinstance(prompt, str) else None,
            )
            for name, prompt in zip(names, body.prompt, strict=True)
        ],
        default_max_tokens=DEFAULT_MAX_TOKENS,
        arrival=arrival,
    )
    return GenerationResponse(context, call)
