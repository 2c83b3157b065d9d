"""From bytes to a validated request; every mistake is a 400 that names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import Request

from eft_serve.api.errors import BodyTooLargeError, UnsupportedMediaTypeError, UnsupportedParameterError
from eft_serve.api.knobs import Strict
from eft_serve.api.schemas import Message
from eft_serve.errors import DeadlineError, InvalidRequestError

MAX_BODY_BYTES = 4 * 2**20
Body = TypeVar("Body", bound=Strict)


async def receive_body(request: Request, kind: type[Body], timeout_s: float) -> tuple[Body, float]:
    """The validated body, and when the request arrived, in seconds of the event loop's clock.

    Raises:
        InvalidRequestError: as `read_json` and `validate`.
        DeadlineError: the body did not arrive within `timeout_s` seconds.
    """
    arrival = asyncio.get_running_loop().time()
    return validate(kind, await read_json(request, timeout_s)), arrival


async def read_json(request: Request, timeout_s: float, max_bytes: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        UnsupportedMediaTypeError: it is not declared as JSON. A web page may send other types to any server without
            permission, so this also keeps other sites' pages out.
        BodyTooLargeError: it is larger than `max_bytes`.
        InvalidRequestError: it is not JSON, or not an object.
        DeadlineError: it did not arrive in time.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaTypeError("content-type must be application/json")
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                raw += piece
                if len(raw) > max_bytes:
                    raise BodyTooLargeError(f"the body is over {max_bytes} bytes; send less")
    except TimeoutError as error:
        raise DeadlineError(f"the body did not arrive within {timeout_s:g} s") from error
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


def validate(kind: type[Body], data: dict[str, Any]) -> Body:
    """The body as `kind`; raises `InvalidRequestError` that names the first offending field."""
    data = without_no_ops(data, kind.NO_OPS)
    if "messages" in kind.model_fields:
        data = _with_plain_messages(data)
    if "items" in kind.model_fields and isinstance(data.get("items"), list):
        data["items"] = [
            _with_plain_messages(item, f"items.{i}.") if isinstance(item, dict) else item
            for i, item in enumerate(data["items"])
        ]
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first_mistake(error) from error


def _with_plain_messages(data: dict[str, Any], path: str = "") -> dict[str, Any]:
    messages = data.get("messages")
    if not isinstance(messages, list):
        return data
    plain = [
        without_no_ops(m, Message.NO_OPS, f"{path}messages.{i}.") if isinstance(m, dict) else m
        for i, m in enumerate(messages)
    ]
    return data | {"messages": plain}


def without_no_ops(data: Mapping[str, Any], no_ops: Mapping[str, tuple[Any, ...]], path: str = "") -> dict[str, Any]:
    """`data` without parameters that are not served yet; raises where one would change the answer."""
    for name in data.keys() & no_ops.keys():
        value = data[name]
        if value is not None and not any(type(value) is type(same) and value == same for same in no_ops[name]):
            raise UnsupportedParameterError(f"{path}{name}: not supported yet; leave it out", param=path + name)
    return {name: value for name, value in data.items() if name not in no_ops}


def _first_mistake(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    # pydantic names the branch of a union after the field; these parts are not in the caller's JSON
    where = [str(part) for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    param = ".".join(where) or None
    message = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param)
