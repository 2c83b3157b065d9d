"""From bytes to a validated request; every mistake is a 400 that names the field."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from eft_serve.api.errors import BodyTooLargeError, UnsupportedMediaTypeError, UnsupportedParameterError
from eft_serve.api.knobs import Strict
from eft_serve.api.messages import Message
from eft_serve.api.strict_json import MOST_SHOWN, read_object
from eft_serve.errors import DeadlineError, InvalidRequestError

MAX_BODY_BYTES = 4 * 2**20
INLINE_BYTES = 2**15  # a millisecond or two; more is parsed in a thread, or it would stall every stream
Body = TypeVar("Body", bound=Strict)


async def receive_body(
    request: Request, kind_of: Callable[[dict[str, Any]], type[Body]], timeout_s: float
) -> tuple[Body, float]:
    """The validated body, and when the request arrived, in seconds of the event loop's clock.

    Args:
        kind_of: the kind of body that a JSON object is.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError, DeadlineError: see `_receive`.
        InvalidRequestError: see `read_object` and `validate`.
    """
    arrival = asyncio.get_running_loop().time()
    raw = await _receive(request, timeout_s)

    def parse() -> Body:
        data = read_object(raw)
        return validate(kind_of(data), data)

    return parse() if len(raw) <= INLINE_BYTES else await asyncio.to_thread(parse), arrival


async def _receive(request: Request, timeout_s: float, max_bytes: int = MAX_BODY_BYTES) -> bytearray:
    """The request's body.

    Raises:
        UnsupportedMediaTypeError: it is compressed, or not declared as JSON. A web page may send other types to any
            server without permission, so this also keeps other sites' pages out.
        BodyTooLargeError: it is larger than `max_bytes`.
        DeadlineError: it did not arrive in time.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise UnsupportedMediaTypeError("content-type must be application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"content-encoding {encoding[:MOST_SHOWN]!r} is not supported; send plain JSON")
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                raw += piece
                if len(raw) > max_bytes:
                    raise BodyTooLargeError(f"the body is over {max_bytes} bytes; send less")
    except TimeoutError as error:
        raise DeadlineError(f"the body did not arrive within {timeout_s:g} s") from error
    return raw


def validate(kind: type[Body], data: dict[str, Any]) -> Body:
    """The body as `kind`; raises `InvalidRequestError` that names the first offending field."""
    data = without_no_ops(data, kind.NO_OPS)
    if "messages" in kind.model_fields:
        data = _with_plain_messages(data)
    if "eft" in kind.model_fields and isinstance(data.get("eft"), dict):
        data["eft"] = _with_plain_prompts(data["eft"])
    if "items" in kind.model_fields and isinstance(data.get("items"), list):
        data["items"] = [
            _with_plain_messages(item, f"items.{i}.") if isinstance(item, dict) else item
            for i, item in enumerate(data["items"])
        ]
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise first_mistake(error) from error


def _with_plain_messages(data: dict[str, Any], path: str = "") -> dict[str, Any]:
    messages = data.get("messages")
    return data | {"messages": _plain(messages, f"{path}messages")} if isinstance(messages, list) else data


def _with_plain_prompts(eft: dict[str, Any]) -> dict[str, Any]:
    prompts = eft.get("prompts")
    if not isinstance(prompts, dict):
        return eft
    plain = {
        role: _plain(prompt, f"eft.prompts.{role[:MOST_SHOWN]}") if isinstance(prompt, list) else prompt
        for role, prompt in prompts.items()
    }
    return eft | {"prompts": plain}


def _plain(messages: list[Any], path: str) -> list[Any]:
    return [
        without_no_ops(m, Message.NO_OPS, f"{path}.{i}.") if isinstance(m, dict) else m for i, m in enumerate(messages)
    ]


def without_no_ops(data: Mapping[str, Any], no_ops: Mapping[str, tuple[Any, ...]], path: str = "") -> dict[str, Any]:
    """`data` without parameters that are not served yet; raises where one would change the answer."""
    for name in data.keys() & no_ops.keys():
        value = data[name]
        if value is not None and not any(type(value) is type(same) and value == same for same in no_ops[name]):
            raise UnsupportedParameterError(f"{path}{name}: not supported yet; leave it out", param=path + name)
    return {name: value for name, value in data.items() if name not in no_ops}


def first_mistake(error: ValidationError) -> InvalidRequestError:
    """The first mistake that pydantic found, as the caller may read it."""
    first = error.errors(include_url=False, include_input=False)[0]
    # pydantic names the branch of a union after the field; these parts are not in the caller's JSON
    where = [str(part)[:MOST_SHOWN] for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    where += [first["ctx"]["param"]] if first["type"] == "cross_field" else []
    param = ".".join(where) or None
    message = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return InvalidRequestError(f"{param}: {message}" if param else message, param=param)
