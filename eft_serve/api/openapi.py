"""The OpenAPI description of endpoints that read their bodies and word their answers themselves.

An endpoint says what it takes and gives where it is declared: `openapi_extra=body_of(...) | answers_of(...)`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from starlette.responses import Response

from eft_serve.api.answers import ErrorBody
from eft_serve.api.errors import json_response

REF = "#/components/schemas/{model}"
JSON, EVENT_STREAM, TEXT = "application/json", "text/event-stream", "text/plain"
FORM, BINARY = "multipart/form-data", "application/octet-stream"
OPEN: dict[str, Any] = {"security": []}
"""Added to `openapi_extra` of an endpoint that needs no key."""

ERRORS = {
    400: "A parameter is unknown, malformed or out of bounds; `param` names it.",
    401: "No key, or a wrong one, on a server with tenants.",
    403: "A server without tenants was asked from beyond loopback, or the key does not allow this.",
    404: "There is no such thing, or none that this key may use.",
    413: "The body is too large.",
    415: "The body is compressed, or not declared as what the endpoint reads.",
    429: "The tenant's limit is reached.",
    500: "The server failed.",
    503: "A model has no replica now, too many requests wait, the server is starting, or its file store is away.",
    504: "The request took longer than its deadline.",
}
BODY_ERRORS = (400, 413, 415, 504)
"""Of an endpoint that reads a body."""
MODEL_ERRORS = (*BODY_ERRORS, 404, 429, 503)
"""Of one that runs models besides."""
STORE_ERRORS = (400, 503)
"""Of one that asks the store of files and batches, which may be switched off."""

HEADERS = {401: "www-authenticate", 429: "retry-after"}
BEARER = {"type": "http", "scheme": "bearer", "description": "A tenant's key. A server without tenants asks for none."}

_described: dict[str, type[Any]] = {}  # every type that some endpoint refers to, by name


class _Generator(GenerateJsonSchema):
    """With the keywords that pydantic gets wrong where a validator stands before a bound, or a pattern before keys."""

    BOUNDS: ClassVar = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}

    def generate_inner(self, schema: Any) -> JsonSchemaValue:
        found = {self.BOUNDS.get(name, name): value for name, value in super().generate_inner(schema).items()}
        return found | {"additionalProperties": False} if "patternProperties" in found else found


def body_of(*kinds: type[Any]) -> dict[str, Any]:
    """For an endpoint whose body is one of these."""
    return {"requestBody": {"required": True, "content": {JSON: {"schema": _schema_of(kinds)}}}}


def form_of(kind: type[Any]) -> dict[str, Any]:
    """For an endpoint whose body is such a multipart form."""
    return {"requestBody": {"required": True, "content": _content(FORM, kind)}}


def query_of(kind: type[BaseModel]) -> dict[str, Any]:
    """For an endpoint whose query has these parameters, none of which is required."""
    properties = kind.model_json_schema()["properties"]
    return {"parameters": [{"name": name, "in": "query", "schema": _not_null(properties[name])} for name in properties]}


def answers_of(
    answer: type[Any] | None = None,
    *,
    media_type: str = TEXT,
    events: tuple[type[Any], ...] = (),
    has_done: bool = False,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """For an endpoint that answers with this.

    Args:
        answer: the JSON object; None for text or bytes.
        media_type: of text or bytes.
        events: where it also streams, one of these is the data of each event.
        has_done: whether the last one is `[DONE]` instead.
        errors: statuses besides those that every endpoint has.
    """
    content = {media_type: {"schema": {"type": "string"}}} if answer is None else _content(JSON, answer)
    if events:
        content |= {EVENT_STREAM: {"schema": _event_of(events, has_done)}}
    done = {"description": "The answer; `text/event-stream` where `stream` is true." if events else "The answer."}
    return {"responses": {"200": done | {"content": content}} | {str(status): _error(status) for status in errors}}


def install(app: FastAPI, *, has_tenants: bool) -> None:
    """Let `/openapi.json` describe the application's endpoints."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, has_tenants)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    def described() -> Response:  # no coroutine: it takes a quarter of a second, which FastAPI spends in a thread
        return json_response(app.openapi())


def _description(app: FastAPI, has_tenants: bool) -> dict[str, Any]:
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for operation in (operation for path in description["paths"].values() for operation in path.values()):
        own = operation["responses"]
        own.pop("422", None)  # FastAPI's own, which never comes: what is invalid is 400
        for status in (500,) if operation.get("security") == [] else (401, 403, 500):
            own.setdefault(str(status), _error(status))
    # after the endpoints, which may have been the first to refer to a type
    _, definitions = TypeAdapter.json_schemas(
        [(name, "validation", TypeAdapter(kind)) for name, kind in _described.items()],
        ref_template=REF,
        schema_generator=_Generator,
    )
    description["components"] = {"schemas": definitions["$defs"], "securitySchemes": {"bearer": BEARER}}
    description["security"] = [{"bearer": []}] if has_tenants else [{}, {"bearer": []}]
    return description


def _schema_of(kinds: tuple[type[Any], ...]) -> dict[str, Any]:
    references = []
    for kind in kinds:
        assert _described.setdefault(kind.__name__, kind) is kind, f"two types are called {kind.__name__}"
        references.append({"$ref": REF.format(model=kind.__name__)})
    return references[0] if len(references) == 1 else {"anyOf": references}


def _event_of(kinds: tuple[type[Any], ...], has_done: bool) -> dict[str, Any]:
    """One event: OpenAPI 3.1 has no keyword for those of a stream, and this is what readers take `schema` for."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": _schema_of(kinds)}
    shown = {"anyOf": [data, {"const": "[DONE]"}]} if has_done else data
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": shown}, "required": ["data"]}


def _content(media_type: str, *kinds: type[Any]) -> dict[str, Any]:
    return {media_type: {"schema": _schema_of(kinds)}}


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a parameter that may be left out: a query has no null."""
    shown = {name: value for name, value in schema.items() if name != "anyOf" and (name, value) != ("default", None)}
    for branch in schema.get("anyOf", ()):
        shown |= branch if branch != {"type": "null"} else {}
    return shown


def _error(status: int) -> dict[str, Any]:
    described = {"description": ERRORS[status], "content": _content(JSON, ErrorBody)}
    if status in HEADERS:
        described["headers"] = {HEADERS[status]: {"schema": {"type": "string"}, "required": True}}
    return described
