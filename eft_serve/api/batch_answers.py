"""What answers of `/v1/files` and `/v1/batches` look like; `eft_serve.batches` makes them."""

from __future__ import annotations

from typing import Literal

from eft_serve.api.answers import Closed


class FileObject(Closed):
    """What is known of a file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """In Unix seconds, as all times."""
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    status_details: None
    expires_at: None


class DeletedFile(Closed):
    """The file is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Page(Closed):
    """A part of a list; the next one begins `after` its last id."""

    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilePage(Page):
    """Files of the tenant."""

    data: list[FileObject]


class BatchMistake(Closed):
    """Why a batch failed."""

    code: str
    message: str
    param: str | None
    line: int | None
    """Of the input, from 1."""


class BatchMistakes(Closed):
    """All that was found."""

    object: Literal["list"]
    data: list[BatchMistake]


class RequestCounts(Closed):
    """Requests of a batch: all, and those that have an answer or an error."""

    total: int
    completed: int
    failed: int


class BatchObject(Closed):
    """A file of requests on its way to a file of answers."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchMistakes | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchPage(Page):
    """Batches of the tenant, the newest first."""

    data: list[BatchObject]
