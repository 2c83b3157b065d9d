"""JSON read strictly: every mistake is named by its place, and no key may be given twice.

Knows JSON, and none of its contents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from eft_serve.errors import InvalidRequestError

MOST_SHOWN = 100  # characters of a key in an error
MOST_PARTS = 10  # of a place, from the outside
MOST_KEYS = 4096  # of one object; each may cost an error
MOST_DIGITS = 20  # of a 64-bit integer with its sign


def read_object(raw: bytes | bytearray) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InvalidRequestError: it is not JSON, or not an object, or a key is given twice, or an object has too many.
    """
    try:
        msgspec.json.decode(raw)  # strict about numbers and characters, but takes the last of two equal keys
        data = json.loads(raw, object_pairs_hook=_unique)
    except (_KeysError, msgspec.DecodeError, ValueError, RecursionError) as error:
        _refuse(raw, error)
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


class _KeysError(Exception):
    """Some object has a key twice, or too many keys."""


@dataclass(frozen=True, slots=True)
class _Mistake:
    """In the place of a value that is not allowed."""

    reason: str


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs) or len(pairs) > MOST_KEYS:
        raise _KeysError
    return data


def _refuse(raw: bytes | bytearray, error: Exception) -> NoReturn:
    """Read it again, this time to find the place of the mistake."""
    try:
        data = json.loads(
            raw,
            object_pairs_hook=_with_mistakes,
            parse_constant=lambda text: _Mistake(f"{text} is not JSON"),
            parse_int=_integer,
            parse_float=_float,
        )
    except json.JSONDecodeError as found:
        message = f"the body is not valid JSON: {found.msg} at line {found.lineno}, column {found.colno}"
        raise InvalidRequestError(message) from error
    except (UnicodeDecodeError, RecursionError) as found:
        raise InvalidRequestError(f"the body is not valid JSON: {found}") from error
    try:
        mistake = _first_mistake(data)
    except RecursionError:
        mistake = None
    if mistake is None:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error
    reason, path = mistake
    place = ".".join(reversed(path[-MOST_PARTS:]))
    message = f"{place}: {reason}" if place else f"the body: {reason}"
    raise InvalidRequestError(message, param=place or None) from error


def _with_mistakes(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Mistake:
    if len(pairs) > MOST_KEYS:
        return _Mistake(f"an object has {len(pairs)} keys, more than {MOST_KEYS}")
    data: dict[str, Any] = {}
    for key, value in pairs:
        data[key] = _Mistake("given twice") if key in data else value
    return data


def _integer(text: str) -> int | _Mistake:
    return int(text) if len(text) <= MOST_DIGITS else _Mistake(f"an integer of {len(text)} digits is too large")


def _float(text: str) -> float | _Mistake:
    value = float(text)
    return value if abs(value) < float("inf") else _Mistake("the number is too large")


def _first_mistake(value: Any) -> tuple[str, list[str]] | None:
    """The reason, and the keys of its place from the inside out."""
    if isinstance(value, _Mistake):
        return value.reason, []
    if isinstance(value, str) and not _is_text(value):
        return "the text has half of a surrogate pair", []
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if (found := _first_mistake(inner)) is not None:
                found[1].append(_shown(key))
                return found
    return None


def _shown(key: str | int) -> str:
    """A key as an error may repeat it."""
    return str(key)[:MOST_SHOWN].encode(errors="backslashreplace").decode()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
