"""Uploads by multipart form: they go to a temporary file as they arrive, and end at the first byte too many."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import IO, Literal

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from eft_serve.api.answers import Closed
from eft_serve.api.errors import BodyTooLargeError, UnsupportedMediaTypeError, UnsupportedParameterError
from eft_serve.api.strict_json import MOST_SHOWN
from eft_serve.errors import DeadlineError, InvalidRequestError, RateLimitError

PURPOSE = "batch"
FIELDS = ("file", "purpose")
MAX_FIELDS = 8
MAX_FIELD_BYTES = 2**10
MAX_NAME = 255  # characters of a file's name
FORM_BYTES = 2**14  # for all but the file
PIECE_BYTES = 2**20
MAX_UPLOADS, MAX_UPLOADS_OF_TENANT = 16, 4
UPLOAD_RETRY_S = 1.0  # it is unknown when one ends


class UploadForm(Closed):
    """The form of an upload, for the description."""

    file: bytes
    """Lines of requests."""
    purpose: Literal["batch"]


class UploadSlots:
    """How many uploads lie in temporary files of this process at once."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()

    @contextmanager
    def hold(self, tenant: str) -> Iterator[None]:
        """One slot while the block lasts; raises `RateLimitError` when there is none."""
        if self._running[tenant] >= MAX_UPLOADS_OF_TENANT or self._running.total() >= MAX_UPLOADS:
            raise RateLimitError("other uploads are under way; send one after another", retry_after_s=UPLOAD_RETRY_S)
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that has arrived."""

    filename: str
    size: int  # bytes
    file: IO[bytes]

    def pieces(self) -> Iterator[bytes]:
        """The contents; blocks."""
        self.file.seek(0)
        while piece := self.file.read(PIECE_BYTES):
            yield piece


@asynccontextmanager
async def receive_upload(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[Upload]:
    """The form's file, for as long as the block lasts.

    Args:
        max_bytes: of the file.
        timeout_s: for all of it to arrive.

    Raises:
        UnsupportedMediaTypeError: the body is not a multipart form.
        BodyTooLargeError: the file is larger than `max_bytes`.
        UnsupportedParameterError: OpenAI has this field, or this purpose, and we do not.
        InvalidRequestError: the form is malformed, or a field is missing or unknown.
        DeadlineError: it did not arrive in time.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "multipart/form-data":
        raise UnsupportedMediaTypeError("content-type must be multipart/form-data, with the part 'file'", param="file")
    parser = _FormParser(request, max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"file: the form cannot be read: {error.message}", param="file") from error
    except TimeoutError as error:
        raise DeadlineError(f"the file did not arrive within {timeout_s:g} s") from error
    try:
        yield _checked(form.multi_items(), max_bytes)
    finally:
        await form.close()


class _FormParser(MultiPartParser):
    """Ends with an exception where the form is too large or cut off; then the temporary files are closed too."""

    def __init__(self, request: Request, max_bytes: int) -> None:
        stream = self._bounded(request, max_bytes)
        super().__init__(request.headers, stream, max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
        self._is_whole = False

    def on_end(self) -> None:
        self._is_whole = True

    async def _bounded(self, request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
        most, size = max_bytes + FORM_BYTES, 0
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
            raise _too_large(max_bytes)
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise _too_large(max_bytes)
            yield piece
        if not self._is_whole:
            raise MultiPartException("it ends before its last boundary")


def _checked(items: list[tuple[str, UploadFile | str]], max_bytes: int) -> Upload:
    values: dict[str, UploadFile | str] = {}
    for name, value in items:
        shown = name[:MOST_SHOWN]
        if name.partition("[")[0] == "expires_after":
            raise UnsupportedParameterError(
                "expires_after: not supported yet; delete the file when it is not needed", param="expires_after"
            )
        if name not in FIELDS or name in values:
            reason = "given twice" if name in values else "unknown parameter"
            raise InvalidRequestError(f"{shown}: {reason}", param=shown)
        values[name] = value
    purpose, file = values.get("purpose"), values.get("file")
    if not isinstance(purpose, str):
        raise InvalidRequestError(f"purpose: is missing; send {PURPOSE!r}", param="purpose")
    if purpose != PURPOSE:
        shown = purpose[:MOST_SHOWN]
        raise UnsupportedParameterError(f"purpose: {shown!r} is not served, only {PURPOSE!r}", param="purpose")
    if not isinstance(file, UploadFile):
        raise InvalidRequestError("file: send the contents as a part with a filename", param="file")
    filename, size = file.filename or "file", file.size or 0
    if len(filename) > MAX_NAME:
        raise InvalidRequestError(f"file: its name has more than {MAX_NAME} characters", param="file")
    if size > max_bytes:
        raise _too_large(max_bytes)
    if size == 0:
        raise InvalidRequestError("file: it is empty", param="file")
    return Upload(filename, size, file.file)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"file: is over {max_bytes} bytes (server.max_file_bytes); split it", param="file")
