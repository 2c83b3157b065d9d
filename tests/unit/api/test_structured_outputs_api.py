"""Structured output in requests: what reaches the coordinator, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, make_config

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
COMPLETION = {"model": "up", "prompt": "a"}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def embedded(definition: str) -> Any:
    """The schema in a grammar, without our options."""
    schema = json.loads(definition.partition("start: %json ")[2])
    return {key: value for key, value in schema.items() if key != "x-guidance"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": json_schema(SCHEMA)}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "structured_outputs.json"),
    ],
)
@pytest.mark.parametrize(("path", "body"), [("chat/completions", chat()), ("completions", COMPLETION)])
async def test_a_json_schema_reaches_the_coordinator(
    stack: Stack, path: str, body: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    async with stack.client() as client:
        response = await client.post(f"/v1/{path}", json=body | fields)
    assert response.status_code == 200, response.text
    (request,) = stack.service.requests
    assert request.sampling.grammar is not None
    assert (embedded(request.sampling.grammar.definition), request.sampling.grammar.param) == (SCHEMA, param)
    assert request.sampling.grammar.salt == request.tenant


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        {"structured_outputs": {"json_object": True}},
    ],
)
async def test_without_a_schema_any_object_is_allowed(stack: Stack, fields: dict[str, Any]) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    assert embedded(stack.service.requests[0].sampling.grammar.definition) == {"type": "object"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("structured", "definition"),
    [
        ({"choice": ["yes", 'no "x"\n']}, 'start: "yes" | "no \\"x\\"\\n"'),
        ({"grammar": 'start: "x"'}, 'start: "x"'),
    ],
)
async def test_a_grammar_reaches_the_coordinator(stack: Stack, structured: dict[str, Any], definition: str) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(structured_outputs=structured))
    assert response.status_code == 200, response.text
    assert stack.service.requests[0].sampling.grammar.definition.endswith(f"\n{definition}")  # type: ignore[union-attr]


async def test_text_as_format_and_special_stop_strings_change_nothing(stack: Stack) -> None:
    async with stack.client() as client:
        plain = await client.post("/v1/chat/completions", json=chat(response_format={"type": "text"}, stop="x"))
        stopped = await client.post(
            "/v1/chat/completions", json=chat(response_format=json_schema(SCHEMA), stop=["<s>"], stop_token_ids=[0])
        )
    assert (plain.status_code, stopped.status_code) == (200, 200), stopped.text
    assert stack.service.requests[0].sampling.grammar is None


DEEP: Any = {"type": "string"}
for _ in range(400):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": json_schema({"type": "strin"})}, "response_format.json_schema.schema", "strin"),
        ({"response_format": json_schema({"not": {}})}, "response_format.json_schema.schema", '"not"'),
        ({"response_format": json_schema({"$ref": "#/x"})}, "response_format.json_schema.schema", "/x"),
        ({"response_format": json_schema(DEEP)}, "response_format.json_schema.schema", "recursion"),
        ({"response_format": json_schema({"enum": ["x" * 70_000]})}, "response_format.json_schema.schema", "shorten"),
        (
            {"response_format": json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(4000)}})},
            "response_format.json_schema.schema",
            "too big",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "one",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", ""),
        ({"structured_outputs": {"json": "7"}}, "structured_outputs.json", "object"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"regex": "(?P<x>a)\\1"}}, "structured_outputs.regex", "backref"),
        ({"structured_outputs": {"regex": "(" * 30_000 + "a" + ")" * 30_000}}, "structured_outputs.regex", ""),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0", ""),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar", "unknown name"),
        ({"structured_outputs": {"grammar": '{"grammars": []}'}}, "structured_outputs.grammar", "Lark"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "GBNF"),
        ({"structured_outputs": {"grammar": "start: " + "(" * 30_000}}, "structured_outputs.grammar", "nested"),
        ({"structured_outputs": {"grammar": 'start: ""'}}, "structured_outputs.grammar", "no text"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unknown"),
        ({"response_format": json_schema(SCHEMA), "stop": "}"}, "stop", "half-way"),
        ({"response_format": json_schema(SCHEMA), "stop_token_ids": [90]}, "stop_token_ids", "special"),
    ],
)
async def test_what_cannot_be_a_grammar_is_named(stack: Stack, fields: dict[str, Any], param: str, says: str) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert says in error["message"]
    assert len(error["message"]) < 1000
    assert stack.service.requests == []


async def test_a_schema_that_would_compile_for_ever_is_refused_while_others_are_answered(stack: Stack) -> None:
    endless = {"type": "string", "allOf": [{"pattern": f".*x.{{{i}}}y.*"} for i in range(40)]}
    async with stack.client() as client:
        bodies = [chat(response_format=json_schema(endless)), chat(response_format=json_schema(SCHEMA))]
        refused, answered = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format.json_schema.schema"
    assert "too complex" in refused.json()["error"]["message"]
    assert answered.status_code == 200, answered.text
