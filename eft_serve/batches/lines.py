"""OpenAI's batch format: one request per input line, one answer per output line; knows no files and no HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
KEYS = {"custom_id", "method", "url", "body"}
INVALID_LINE = "invalid_line"
INVALID_JSON = "invalid_json_line"  # OpenAI's


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: a request, or the reason why it is invalid."""

    number: int  # from 1
    custom_id: str | None
    url: str = ""
    body: bytes = b""  # JSON
    mistake: str | None = None
    code: str | None = None  # of the mistake
    param: str | None = None  # the first offending key

    @property
    def key(self) -> str | int:
        """Links the answer to it: the custom_id, or without one the number."""
        return self.custom_id if self.custom_id is not None else self.number


def parse_line(number: int, raw: bytes) -> Line:
    """One line; `mistake` has all of its mistakes."""
    try:
        data = json.loads(raw)
        json.dumps(data, allow_nan=False)  # Python accepts NaN, Infinity and 1e999; JSON does not
    except (ValueError, RecursionError) as error:
        return Line(number, None, mistake=f"line {number} is not JSON: {error}", code=INVALID_JSON)
    if not isinstance(data, dict):
        return Line(number, None, mistake=f"line {number} is not a JSON object", code=INVALID_JSON)
    custom_id = data.get("custom_id") if isinstance(data.get("custom_id"), str) else None
    if mistakes := list(_mistakes(data)):
        text = f"line {number}: {'; '.join(mistake for _, mistake in mistakes)}"
        return Line(number, custom_id or None, mistake=text, code=INVALID_LINE, param=mistakes[0][0])
    return Line(number, custom_id, data["url"], json.dumps(data["body"]).encode())


def _mistakes(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of each."""
    body = data.get("body")
    if unknown := sorted(set(data) - KEYS):
        yield unknown[0], f"unknown keys {unknown}"
    if not isinstance(data.get("custom_id"), str) or not data["custom_id"]:
        yield "custom_id", "custom_id: must be a string that is not empty"
    if data.get("method") != "POST":
        yield "method", "method: must be POST"
    if data.get("url") not in URLS:
        yield "url", f"url: must be one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        yield "body", "body: must be an object"
    elif body.get("stream"):
        yield "body.stream", "body.stream: a batch does not stream; leave it out"


def answer(line: Line, status: int, request_id: str | None, body: Any) -> dict[str, Any]:
    """The output line of a request that the server answered, with any status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"line-{line.number}", "custom_id": line.custom_id, "response": response, "error": None}


def failure(line: Line, code: str, message: str) -> dict[str, Any]:
    """The output line of a request without an answer."""
    error = {"code": code, "message": message}
    return {"id": f"line-{line.number}", "custom_id": line.custom_id, "response": None, "error": error}
