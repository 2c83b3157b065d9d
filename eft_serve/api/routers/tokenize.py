"""`POST /tokenize` and `POST /detokenize`, also below `/v1`: the tokens of the prompt that `usage` counts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of
from eft_serve.api.errors import json_response
from eft_serve.api.openapi import MODEL_ERRORS, answers_of, body_of
from eft_serve.api.prompt_answers import DetokenizedText, Tokens
from eft_serve.api.tokenize_schemas import MAX_TOKENS, DetokenizeBody, TokenizeBody, TokenizeChatBody
from eft_serve.errors import InvalidRequestError

router = APIRouter(default_response_class=Response)


@router.post("/tokenize", include_in_schema=False)
@router.post(
    "/v1/tokenize", openapi_extra=body_of(TokenizeBody, TokenizeChatBody) | answers_of(Tokens, errors=MODEL_ERRORS)
)
async def tokenize(request: Request) -> Response:
    """The tokens of a text or a chat, as the first model that counts reads it."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    body, _ = await receive_body(request, _kind_of, context.service.config.server.request_timeout_s)
    ensemble = context.ensemble(body.model, tenant)
    term = ensemble.resolve().counted
    max_model_len = context.service.max_model_len(term.model)
    async with context.limits.admit(tenant):
        token_ids, token_strs = await context.renderer.tokenize(
            term,
            ensemble.prompting[term.name],
            body.asked,
            body.prompt_options,
            max(MAX_TOKENS, max_model_len),
            with_strs=bool(body.return_token_strs),
        )
    return json_response(
        {"count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": token_strs}
    )


@router.post("/detokenize", include_in_schema=False)
@router.post("/v1/detokenize", openapi_extra=body_of(DetokenizeBody) | answers_of(DetokenizedText, errors=MODEL_ERRORS))
async def detokenize(request: Request) -> Response:
    """The text of tokens, special tokens included."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    body, _ = await receive_body(request, lambda _: DetokenizeBody, context.service.config.server.request_timeout_s)
    term = context.ensemble(body.model, tenant).resolve().counted
    limit = max(MAX_TOKENS, context.service.max_model_len(term.model))
    if len(body.tokens) > limit:
        raise InvalidRequestError(f"tokens: {len(body.tokens)} are more than {limit}; send fewer", param="tokens")
    async with context.limits.admit(tenant):
        return json_response({"prompt": await context.renderer.detokenize(term, body.tokens)})


def _kind_of(data: dict[str, Any]) -> type[TokenizeBody | TokenizeChatBody]:
    return TokenizeChatBody if "messages" in data else TokenizeBody
