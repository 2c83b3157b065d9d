"""What the endpoints of files and batches accept, as OpenAI has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request

from eft_serve.api.body import first_mistake
from eft_serve.api.knobs import Metadata, Strict
from eft_serve.batches.ids import Paging
from eft_serve.batches.lines import URLS
from eft_serve.errors import InvalidRequestError

MAX_ID = 256  # characters; ours are shorter


class BatchBody(Strict):
    """`POST /v1/batches`."""

    NO_OPS: ClassVar[dict[str, tuple[Any, ...]]] = {"output_expires_after": ()}

    input_file_id: str = Field(max_length=MAX_ID)
    """Of a file with the purpose `batch`."""
    endpoint: Annotated[str, Field(json_schema_extra={"enum": list(URLS)})]
    """That every request of the file is for."""
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    """Repeated in the answers."""

    @field_validator("endpoint")
    @classmethod
    def _is_served(cls, endpoint: str) -> str:
        if endpoint not in URLS:
            raise ValueError(f"must be one of {', '.join(URLS)}")
        return endpoint


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    after: str | None = Field(default=None, max_length=MAX_ID)


class FilesQuery(_Query):
    """`GET /v1/files`."""

    limit: int = Field(default=10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = Field(default=None, max_length=MAX_ID)

    @property
    def paging(self) -> Paging:
        """The part of the list."""
        return Paging(self.limit, self.after, newest_first=self.order == "desc")


class BatchesQuery(_Query):
    """`GET /v1/batches`."""

    limit: int = Field(default=20, ge=1, le=100)

    @property
    def paging(self) -> Paging:
        """The part of the list."""
        return Paging(self.limit, self.after)


Query = TypeVar("Query", bound=_Query)


def read_query(request: Request, kind: type[Query]) -> Query:
    """The query's parameters; raises `InvalidRequestError` that names the first offending one."""
    data: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in data:
            shown = name[:MAX_ID]
            raise InvalidRequestError(f"{shown}: given twice", param=shown)
        data[name] = value
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise first_mistake(error) from error


def page_of(objects: list[dict[str, Any]], has_more: bool) -> Mapping[str, Any]:
    """OpenAI's list."""
    ids = [each["id"] for each in objects] or [None]
    return {"object": "list", "data": objects, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
