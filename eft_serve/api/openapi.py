"""The OpenAPI description of endpoints that read their bodies themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

REF = "#/components/schemas/{model}"


def body_of(*kinds: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for an endpoint whose body is one of these."""
    references = [{"$ref": REF.format(model=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def install(app: FastAPI, *bodies: type[BaseModel]) -> None:
    """Let `/openapi.json` describe those bodies."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, definitions = models_json_schema([(b, "validation") for b in bodies], ref_template=REF)
            description = get_openapi(title=app.title, version=app.version, routes=app.routes)
            description.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = description
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]
