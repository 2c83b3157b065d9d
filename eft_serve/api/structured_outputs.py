"""What a request says of its answer's form: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from eft_serve.api.knobs import Strict
from eft_serve.errors import InvalidRequestError
from eft_serve.grammars import definitions
from eft_serve.types import Grammar

MAX_CHOICES = 1024

Schema = dict[str, Any]
Text = Annotated[str, Field(min_length=1, max_length=definitions.MAX_CHARACTERS)]


class JsonSchemaFormat(Strict):
    """A JSON schema that the answer is valid against."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    """Accepted and not used."""
    json_schema: Schema | None = Field(default=None, alias="schema")
    """None: any object."""
    strict: bool | None = None
    """The answer follows the schema in any case."""


class ResponseFormat(Strict):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and with no other")
        return self


class StructuredOutputs(Strict):
    """vLLM's; exactly one of these."""

    json_schema: Schema | Text | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as its text."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    regex: Text | None = None
    """Of Rust's `regex` crate; matches the whole answer."""
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=MAX_CHOICES)
        ]
        | None
    ) = None
    """One of these texts."""
    grammar: Text | None = None
    """A context-free grammar in Lark's notation or in GBNF."""

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if len(self.given) != 1:
            raise ValueError("give exactly one of json, json_object, regex, choice and grammar")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """What was given, by its name."""
        return {name: value for name, value in self.model_dump(by_alias=True).items() if value is not None}


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, param: str = "response_format"
) -> Grammar | None:
    """The grammar that an answer has to follow; None for any text.

    Args:
        param: what the format is called in errors; `text.format` has its schema beside its type.

    Raises:
        InvalidRequestError: it cannot be a grammar, or is too long.
    """
    if structured is not None:
        ((name, value),) = structured.given.items()
        if name == "json_object":
            return _grammar("structured_outputs.json_object", definitions.of_json_schema, definitions.ANY_OBJECT)
        return _grammar(f"structured_outputs.{name}", _DEFINITIONS[name], value)
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is None:
        return _grammar(param, definitions.of_json_schema, definitions.ANY_OBJECT)
    own = response_format.json_schema.json_schema
    schema = definitions.ANY_OBJECT if own is None else own
    place = f"{param}.json_schema.schema" if param == "response_format" else f"{param}.schema"
    return _grammar(place, definitions.of_json_schema, schema)


_DEFINITIONS: dict[str, Callable[[Any], str]] = {
    "json": definitions.of_json_schema,
    "regex": definitions.of_regex,
    "choice": definitions.of_choice,
    "grammar": definitions.of_grammar,
}


def _grammar(param: str, define: Callable[[Any], str], value: Any) -> Grammar:
    size = len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False))
    if size > definitions.MAX_CHARACTERS:
        message = f"{param}: has {size} characters, more than {definitions.MAX_CHARACTERS}; shorten it"
        raise InvalidRequestError(message, param=param)
    try:
        return Grammar(define(value), param, of_schemas=define is definitions.of_json_schema)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error
