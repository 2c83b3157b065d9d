"""Long JSON documents: an array of records with strings, numbers, and names of a few values."""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher

from eft_serve.types import Grammar

NUM_RECORDS = 1000  # at least; a record takes a dozen tokens or more
FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("name", {"type": "string"}),
    ("quantity", {"type": "integer", "minimum": 0, "maximum": 99_999}),
    ("state", {"enum": ["ordered", "packed", "sent", "delivered", "returned"]}),
    ("remark", {"type": "string", "maxLength": 200}),
    ("paid", {"type": "boolean"}),
    ("code", {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,8}$"}),
    ("tags", {"type": "array", "items": {"type": "string"}, "minItems": 1}),
    ("weight", {"type": "number"}),
)


def grammar(number: int) -> Grammar:
    """Of `schema(number)` without blanks: random documents would have little else where blanks are allowed."""
    text = json.dumps(schema(number))
    definition = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
    return Grammar(definition, "response_format", of_schemas=True)


def schema(number: int) -> dict[str, Any]:
    """One of sixteen, whose documents are at different places after as many tokens.

    The first field goes round, and every other record is a list of its values, which come at its beginning.
    """
    turn = number // 2 % len(FIELDS)
    fields = dict([*FIELDS[turn:], *FIELDS[:turn]])
    named = {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}
    listed = {"type": "array", "prefixItems": [*fields.values()], "items": False, "minItems": len(fields)}
    return {"type": "array", "items": listed if number % 2 else named, "minItems": NUM_RECORDS}
