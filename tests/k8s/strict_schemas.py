"""Schemas that refuse what they do not know: KubeRay's as JSON Schema, Serve's as pydantic models."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Ray's own use of pydantic
    from ray.serve.schema import HTTPOptionsSchema as HTTPOptionsSchema
    from ray.serve.schema import ServeApplicationSchema as ServeApplicationSchema
    from ray.serve.schema import ServeDeploySchema as ServeDeploySchema

ROOT = Path(__file__).parent.parent.parent
DEFAULT_CRDS = ROOT.parent / "shared" / "kuberay-crds"
OBJECT_META = {"type": "object"}


def unavailable(what: str) -> None:
    """Skip on a developer's machine; fail where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def crd_schema(kind: str) -> dict[str, Any]:
    """JSON Schema of `ray.io/v1`'s rayservices, rayclusters or rayjobs; unknown keys are mistakes."""
    directory = Path(os.environ.get("EFT_SERVE_KUBERAY_CRDS", DEFAULT_CRDS))
    path = directory / f"ray.io_{kind}.yaml"
    if not path.is_file():
        unavailable(f"no {path}: set EFT_SERVE_KUBERAY_CRDS to a folder with KubeRay's CRDs")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = OBJECT_META
    return schema


def strict(schema: Any) -> Any:
    """The schema, refusing what the API server would silently drop."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    tightened = {key: strict(value) for key, value in schema.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not open_ended:
        tightened["additionalProperties"] = False
    return tightened


def unknown_keys(model: type[BaseModel], data: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys that pydantic would ignore in this data."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    for key, value in data.items():
        if key not in fields:
            yield f"{where}{key}"
        else:
            yield from _unknown_in(fields[key], value, f"{where}{key}.")


def _unknown_in(annotation: Any, value: Any, where: str) -> Iterator[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and isinstance(value, dict):
        yield from unknown_keys(annotation, value, where)
    elif get_origin(annotation) is list and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_in(get_args(annotation)[0], item, f"{where}{index}.")
    elif get_origin(annotation) in (Union, types.UnionType):
        found = [list(_unknown_in(option, value, where)) for option in get_args(annotation) if option is not type(None)]
        yield from min(found, key=len)
