"""OpenAI's batch file format: one request per input line, one answer per output line; knows no HTTP.

An invalid line gets an answer with an error. Blank lines are skipped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eft_serve.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions")
KEYS = {"custom_id", "method", "url", "body"}
INVALID_LINE = "invalid_line"
UNREACHED = "unreached"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input: a request, or the reason why it is invalid."""

    number: int  # from 1
    custom_id: str | None
    url: str = ""
    body: bytes = b""  # JSON
    mistake: str | None = None

    @property
    def key(self) -> str | int:
        """Links the answer to it: the custom_id, or without one the number."""
        return self.custom_id if self.custom_id is not None else self.number


def read_lines(path: Path) -> Iterator[Line]:
    """The input, lazily.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield parse_line(number, raw)
    except OSError as error:
        raise ConfigError(f"--input: {path} cannot be read: {error.strerror}") from error


def parse_line(number: int, raw: bytes) -> Line:
    """One line; `mistake` has all of its mistakes."""
    try:
        data = json.loads(raw)
        json.dumps(data, allow_nan=False)  # Python accepts NaN, Infinity and 1e999; JSON does not
    except (ValueError, RecursionError) as error:
        return Line(number, None, mistake=f"line {number} is not JSON: {error}")
    if not isinstance(data, dict):
        return Line(number, None, mistake=f"line {number} is not a JSON object")
    custom_id = data.get("custom_id") if isinstance(data.get("custom_id"), str) else None
    if mistakes := list(_mistakes(data)):
        return Line(number, custom_id or None, mistake=f"line {number}: {'; '.join(mistakes)}")
    return Line(number, custom_id, data["url"], json.dumps(data["body"]).encode())


def _mistakes(data: dict[str, Any]) -> Iterator[str]:
    body = data.get("body")
    if unknown := sorted(set(data) - KEYS):
        yield f"unknown keys {unknown}"
    if not isinstance(data.get("custom_id"), str) or not data["custom_id"]:
        yield "custom_id: must be a string that is not empty"
    if data.get("method") != "POST":
        yield "method: must be POST"
    if data.get("url") not in URLS:
        yield f"url: must be one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        yield "body: must be an object"
    elif body.get("stream"):
        yield "body.stream: a batch does not stream; leave it out"


def input_keys(path: Path) -> set[str | int]:
    """The keys of all lines.

    Raises:
        ConfigError: the file cannot be read, or two lines have the same custom_id.
    """
    numbers: dict[str | int, int] = {}
    for line in read_lines(path):
        first = numbers.setdefault(line.key, line.number)
        if first != line.number:
            raise ConfigError(f"--input: lines {first} and {line.number} both have custom_id {line.key!r}; rename one")
    return set(numbers)


def answer(line: Line, status: int, request_id: str | None, body: Any) -> dict[str, Any]:
    """The output line of a request that the server answered, with any status."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"line-{line.number}", "custom_id": line.custom_id, "response": response, "error": None}


def failure(line: Line, code: str, message: str) -> dict[str, Any]:
    """The output line of a request without an answer."""
    error = {"code": code, "message": message}
    return {"id": f"line-{line.number}", "custom_id": line.custom_id, "response": None, "error": error}


class OutputFile:
    """The output file: each answer is on disk before the next is written; locked by one process at a time.

    Unreached requests are written last, when everything else is done, so that a later run can cut them off and try
    again.
    """

    def __init__(self, path: Path, keys: set[str | int]) -> None:
        """Open the file, or resume it.

        Raises:
            ConfigError: it cannot be opened, another process writes it, or it belongs to another input.
        """
        self.path = path
        try:
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ConfigError(f"--output: another batch is writing {path}") from error
        except OSError as error:
            raise ConfigError(f"--output: {path} cannot be written: {error.strerror}") from error
        try:
            self.done = self._resume(keys)
        except ConfigError:
            self._file.close()
            raise

    def append(self, line: dict[str, Any]) -> None:
        """Add one line and wait until it is on disk."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _resume(self, keys: set[str | int]) -> set[str | int]:
        """Keys that have an answer; truncates the file after the last of them."""
        done: set[str | int] = set()
        end = tail = 0
        self._file.seek(0)
        for number, raw in enumerate(self._file, start=1):
            tail += len(raw)
            if not raw.endswith(b"\n"):
                break  # incomplete when the last run was killed
            key, unreached = self._parse(number, raw)
            if unreached:
                continue
            if end + len(raw) != tail or key in done or key not in keys:
                raise ConfigError(
                    f"--output: line {number} of {self.path} ({key!r}) is not an answer to this input; use another file"
                )
            done.add(key)
            end = tail
        self._file.truncate(end)
        return done

    def _parse(self, number: int, raw: bytes) -> tuple[str | int, bool]:
        """(key, whether the request was unreached) of an output line."""
        try:
            data = json.loads(raw)
            custom_id = data["custom_id"]
            key = int(data["id"].removeprefix("line-")) if custom_id is None else str(custom_id)
            return key, data["error"] is not None and data["error"]["code"] == UNREACHED
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--output: line {number} of {self.path} is not an answer; name another file") from error
