"""`/v1/files`: what batches read and write."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from eft_serve.api.batch_answers import DeletedFile, FileObject, FilePage
from eft_serve.api.batch_schemas import FilesQuery, page_of, read_query
from eft_serve.api.context import context_of
from eft_serve.api.errors import json_response
from eft_serve.api.openapi import BINARY, BODY_ERRORS, STORE_ERRORS, answers_of, form_of, query_of
from eft_serve.api.uploads import UploadForm, receive_upload

ERRORS = (*STORE_ERRORS, 404)

router = APIRouter(default_response_class=Response)


@router.post(
    "/v1/files", openapi_extra=form_of(UploadForm) | answers_of(FileObject, errors=(*BODY_ERRORS, *STORE_ERRORS, 429))
)
async def create_file(request: Request) -> Response:
    """Upload a file of requests."""
    context = context_of(request)
    tenant, config = context.access.tenant(request), context.service.config.server
    batches = context.batches
    with context.uploads.hold(tenant.name):
        async with receive_upload(request, config.max_file_bytes, config.request_timeout_s) as upload:
            stored = await batches.add_file(tenant.name, upload.filename, upload.size, upload.pieces())
    return json_response(stored.as_json())


@router.get("/v1/files", openapi_extra=query_of(FilesQuery) | answers_of(FilePage, errors=STORE_ERRORS))
async def list_files(request: Request) -> Response:
    """The tenant's files."""
    context = context_of(request)
    tenant, query = context.access.tenant(request), read_query(request, FilesQuery)
    files, has_more = await context.batches.files(tenant.name, query.paging, query.purpose)
    return json_response(page_of([each.as_json() for each in files], has_more))


@router.get("/v1/files/{file_id}", openapi_extra=answers_of(FileObject, errors=ERRORS))
async def retrieve_file(request: Request, file_id: str) -> Response:
    """One of them."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    return json_response((await context.batches.file(tenant.name, file_id)).as_json())


@router.get("/v1/files/{file_id}/content", openapi_extra=answers_of(media_type=BINARY, errors=ERRORS))
async def retrieve_file_content(request: Request, file_id: str) -> Response:
    """Its contents."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    stored = await context.batches.file(tenant.name, file_id)
    headers = {
        "content-length": str(stored.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(stored.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    content = context.batches.content(tenant.name, stored)
    return StreamingResponse(content, headers=headers, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", openapi_extra=answers_of(DeletedFile, errors=ERRORS))
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete it."""
    context = context_of(request)
    tenant = context.access.tenant(request)
    await context.batches.delete_file(tenant.name, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})
