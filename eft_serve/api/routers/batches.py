"""`/v1/batches`: files of requests, answered in the background."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from eft_serve.api.batch_answers import BatchObject, BatchPage
from eft_serve.api.batch_schemas import BatchBody, BatchesQuery, page_of, read_query
from eft_serve.api.body import receive_body
from eft_serve.api.context import context_of
from eft_serve.api.errors import json_response
from eft_serve.api.openapi import BODY_ERRORS, STORE_ERRORS, answers_of, body_of, query_of

ERRORS = (*STORE_ERRORS, 404)

router = APIRouter(default_response_class=Response)


@router.post("/v1/batches", openapi_extra=body_of(BatchBody) | answers_of(BatchObject, errors=(*BODY_ERRORS, *ERRORS)))
async def create_batch(request: Request) -> Response:
    """Have a file of requests answered."""
    context = context_of(request)
    tenant, batches = context.access.tenant(request), context.batches
    body, _ = await receive_body(request, lambda _: BatchBody, context.service.config.server.request_timeout_s)
    facts = await batches.create(tenant.name, body.input_file_id, body.endpoint, body.metadata)
    return json_response(facts.as_json())


@router.get("/v1/batches", openapi_extra=query_of(BatchesQuery) | answers_of(BatchPage, errors=STORE_ERRORS))
async def list_batches(request: Request) -> Response:
    """The tenant's batches, the newest first."""
    context = context_of(request)
    tenant, query = context.access.tenant(request), read_query(request, BatchesQuery)
    batches, has_more = await context.batches.batches(tenant.name, query.paging)
    return json_response(page_of([each.as_json() for each in batches], has_more))


@router.get("/v1/batches/{batch_id}", openapi_extra=answers_of(BatchObject, errors=ERRORS))
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """One of them."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    return json_response((await context.batches.batch(tenant.name, batch_id)).as_json())


@router.post("/v1/batches/{batch_id}/cancel", openapi_extra=answers_of(BatchObject, errors=ERRORS))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """Stop it; what has been answered is kept."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    return json_response((await context.batches.cancel(tenant.name, batch_id)).as_json())
