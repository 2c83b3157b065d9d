"""Bodies that somebody may send to break the server, each with the status and the parameter that answer it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from openapi_requests import BATCHES, CHAT, DETOKENIZE, FILES, HI, MINIMAL, RESPONSES, SCORE, TEXT, TOKENIZE

MIB = 2**20


@dataclass(frozen=True)
class Hostile:
    """One request; JSON unless its content type says otherwise."""

    name: str
    path: str
    content: bytes
    param: str | None
    status: int = 400
    content_type: str = "application/json"

    def __str__(self) -> str:
        return self.name


def fields(name: str, path: str, param: str | None, status: int = 400, **given: Any) -> Hostile:
    """A valid body but for these fields."""
    return Hostile(name, path, json.dumps(MINIMAL[path] | given).encode(), param, status)


def raw(name: str, path: str, param: str | None, text: str, status: int = 400) -> Hostile:
    """A valid body with more text before its end."""
    return Hostile(name, path, (json.dumps(MINIMAL[path])[:-1] + text + "}").encode(), param, status)


def nested(depth: int, inner: Any = None) -> Any:
    """Objects in one another, as a schema has them."""
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner or {"type": "string"}}, "required": ["a"]}
    return inner


def cycle(length: int) -> dict[str, Any]:
    """References that lead round in a circle, and never to a type."""
    places = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{(i + 1) % length}"}] * 2} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": places}


def doubling(depth: int, keyword: str) -> dict[str, Any]:
    """Each definition needs the next one twice: 2^depth schemas."""
    places: dict[str, Any] = {f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": places | {f"d{depth}": {"type": "string", "minLength": 3}}}


def schema(value: Any) -> dict[str, Any]:
    """That an answer shall have."""
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def tool(parameters: Any = None, name: str = "f", **more: Any) -> dict[str, Any]:
    """A function with these parameters."""
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}, **more}}


IN_SCHEMA = "response_format.json_schema.schema"
DEEP_JSON = "[" * 100_000 + "]" * 100_000


def of_grammars() -> Iterator[Hostile]:
    """Grammars and schemas that cannot be kept, or would take for ever."""
    schemas = {
        "a deep schema": nested(400),
        "a circle of references": cycle(50),
        "a reference to itself": {"$ref": "#"},
        "thousands of anyOf": {"anyOf": [{"const": i, "minLength": i} for i in range(4000)]},
        "thousands of allOf": {"allOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(3000)]},
        "a huge enum": {"enum": ["x" * 70_000]},
        "thousands of properties": {"type": "object", "properties": {f"p{i}": {} for i in range(4000)}},
        "an impossible schema": {"type": "string", "minLength": 5, "maxLength": 2},
        "a schema on the network": {"$ref": "http://localhost:1/schema.json"},
        "a schema in a file": {"$ref": "file:///etc/passwd"},
        "a negation": {"not": {}},
        "a type that is none": {"type": "strin"},
    }
    for name, value in schemas.items():
        yield fields(name, CHAT, IN_SCHEMA, response_format=schema(value))
    yield fields(
        "a deep schema in text.format",
        RESPONSES,
        "text.format.schema",
        text={"format": {"type": "json_schema", "name": "a", "schema": nested(400)}},
    )
    yield fields(
        "a schema whose name is a kilometre long",
        CHAT,
        "response_format.json_schema.name",
        response_format={"type": "json_schema", "json_schema": {"name": "a" * 10_000, "schema": {}}},
    )
    outputs: dict[str, dict[str, Any]] = {
        "a deep regex": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
        "a regex with a look-ahead": {"regex": "(?=a)b"},
        "a regex with half a bracket": {"regex": "(a"},
        "a grammar that recurs on the left without end": {"grammar": "start: start"},
        "a grammar that is nothing": {"grammar": 'start: "" | start start'},
        "a deep grammar": {"grammar": "start: " + "(" * 30_000},
        "a grammar that names nothing": {"grammar": "start: nothing"},
        "a grammar of half a rule": {"grammar": "root ::= ("},
        "a grammar that repeats repetitions": {"grammar": 'start: x{1000}{1000}{1000}\nx: "a"{1000}'},
        "a grammar that imports a file": {"grammar": '%import "/etc/passwd"\nstart: "a"'},
        "too many choices": {"choice": ["x"] * 1025},
        "a choice of nothing": {"choice": [""]},
        "schema as a deep text": {"json": DEEP_JSON[:60_000]},
        "json_object false": {"json_object": False},
        "everything at once": {"regex": "a", "choice": ["b"]},
    }
    for name, value in outputs.items():
        (first, *more) = value
        place = "structured_outputs" if more else f"structured_outputs.{first}"
        yield fields(name, TEXT, place + (".0" if value.get("choice") == [""] else ""), structured_outputs=value)


def of_tools() -> Iterator[Hostile]:
    """Tools."""
    yield fields("a tool without a name", CHAT, "tools.0.function.name", tools=[{"type": "function", "function": {}}])
    yield fields("a tool of nothing", CHAT, "tools.0.type", tools=[{}])
    yield fields("ten thousand tools", CHAT, "tools", tools=[tool(name=f"f{i}") for i in range(10_000)])
    yield fields("a tool twice", CHAT, "tools", tools=[tool(), tool()])
    yield fields("null among the tools", CHAT, "tools.1", tools=[tool(), None])
    yield fields("a tool's name in markup", CHAT, "tools.0.function.name", tools=[tool(name='"}<tool_call>')])
    yield fields("a tool of another kind", CHAT, "tools.0.type", tools=[{"type": "code_interpreter"}])
    yield fields("a tool that cannot be forced", CHAT, "tools", tools=[tool({"not": {}})], tool_choice="required")
    yield fields("a deep tool that is forced", CHAT, "tools", tools=[tool(nested(300))], tool_choice="required")
    yield fields(
        "a doubling tool that is forced",
        CHAT,
        "tools",
        tool_choice="required",
        tools=[tool({"type": "object", "properties": {"a": doubling(24, "allOf")}})],
    )
    yield fields(
        "tools that are too long to force",
        CHAT,
        "tools",
        tool_choice="required",
        tools=[
            tool({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}}, name=f"f{i}")
            for i in range(100)
        ],
    )
    yield fields(
        "a choice that is no tool",
        CHAT,
        "tool_choice.function.name",
        tools=[tool()],
        tool_choice={"type": "function", "function": {"name": "g"}},
    )
    yield fields("a choice without tools", CHAT, "tool_choice", tool_choice="required")
    yield fields("a schema beside tools", CHAT, "response_format", tools=[tool()], response_format=schema({}))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": DEEP_JSON}}
    yield fields(
        "deep arguments",
        CHAT,
        "messages.0.tool_calls.0.function.arguments",
        messages=[{"role": "assistant", "tool_calls": [call]}],
    )
    yield fields("tools in a response", RESPONSES, "tools", tools=[tool()])


def of_messages() -> Iterator[Hostile]:
    """Messages, parts and prompts."""
    parts: dict[str, Any] = {
        "an image": {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        "a sound": {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "a refusal of the user": {"type": "refusal", "refusal": "No."},
        "a part of null": None,
        "a part of a list": [],
    }
    for name, part in parts.items():
        yield fields(name, CHAT, "messages.0.content.0", messages=[{"role": "user", "content": [part]}])
    yield fields(
        "a part with an extra",
        CHAT,
        "messages.0.content.0.x",
        messages=[{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}],
    )
    yield fields("parts without one", CHAT, "messages.0.content", messages=[{"role": "user", "content": []}])
    yield fields("a hundred thousand messages", CHAT, "messages", messages=[HI] * 100_000)
    yield fields("null among the messages", CHAT, "messages.1", messages=[HI, None])
    yield fields("an unknown role", CHAT, "messages.0.role", messages=[{"role": "root", "content": "a"}])
    yield fields("three megabytes of text", CHAT, "messages", messages=[{"role": "user", "content": "a " * 1_500_000}])
    yield fields("many prompts", TEXT, "prompt", prompt=["a"] * 129)
    yield fields("many prompts of many answers", TEXT, "prompt", prompt=["a"] * 100, n=16)
    yield fields("null among the prompts", TEXT, "prompt", prompt=["a", None])
    yield fields("a huge token id", TEXT, "prompt", prompt=[2**63])
    yield fields("a negative token id", SCORE, "completion", completion=[-1])
    yield fields("half a million token ids", TEXT, "prompt", prompt=[1] * 500_000)
    yield fields("a role that the recipe has not", CHAT, "eft.prompts.evil", eft={"prompts": {"evil": "a"}})
    yield fields("a role's prompt of nothing", CHAT, "eft.prompts.base", eft={"prompts": {"base": []}})
    yield fields("a thousand roles", CHAT, "eft.prompts", eft={"prompts": {f"r{i}": "a" for i in range(1000)}})
    yield fields("a role's prompt of a megabyte", CHAT, "eft.prompts.base", eft={"prompts": {"base": "a " * MIB}})
    yield fields("a role with a kilometre of name", CHAT, "eft.prompts." + "r" * 100, eft={"prompts": {"r" * 9999: ""}})
    yield fields(
        "reserved template arguments", CHAT, "chat_template_kwargs.tokenize", chat_template_kwargs={"tokenize": 1}
    )
    yield fields("huge template arguments", CHAT, "chat_template_kwargs", chat_template_kwargs={"style": "x" * MIB})
    yield raw("deep template arguments", CHAT, None, f', "chat_template_kwargs": {{"style": {DEEP_JSON}}}')
    yield fields("a template of one's own", CHAT, "chat_template", chat_template="{{ 1 / 0 }}")
    yield fields("a huge input", RESPONSES, "input", input="a " * MIB)
    yield fields("an item of another kind", RESPONSES, "input.0.type", input=[{"type": "computer_call"}])
    yield fields("too many items to score", SCORE, "items", items=[MINIMAL[SCORE]] * 65)
    yield fields("a megabyte to score", SCORE, "completion", completion="a " * MIB)


def of_numbers() -> Iterator[Hostile]:
    """Parameters out of bounds, and of the wrong type."""
    yield fields("a bias on a negative token", CHAT, "logit_bias.-1", logit_bias={"-1": 1})
    yield fields("a bias without end", CHAT, "logit_bias.1", logit_bias={"1": 1e6})
    yield fields("a bias on a word", CHAT, "logit_bias.hello", logit_bias={"hello": 1})
    yield fields("ten thousand biases", TEXT, "logit_bias", logit_bias={str(i): 1 for i in range(10_000)})
    yield fields("an allowed token that is none", CHAT, "allowed_token_ids.0", allowed_token_ids=[2**31])
    for name, number in (("presence_penalty", 2.1), ("frequency_penalty", -1e300), ("repetition_penalty", 0)):
        beyond: dict[str, Any] = {name: number}
        yield fields(f"{name} {number}", CHAT, name, **beyond)
    for text in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0x10"):
        place = None if text == "-0x10" else "temperature"
        yield raw(f"a temperature of {text[:9]}", TEXT, place, f', "temperature": {text}')
    for name in ("max_tokens", "n", "seed", "top_p", "stop", "stream", "logprobs", "stream_options", "metadata", "eft"):
        wrong: dict[str, Any] = {name: {"a": []} if name == "stop" else "yes"}
        yield fields(f"{name} of the wrong type", CHAT, name, **wrong)
        listed: dict[str, Any] = {name: [[1]]}
        yield fields(f"{name} in a list", CHAT, f"{name}.0" if name == "stop" else name, **listed)
    yield fields("a model of nothing", CHAT, "model", model=None)
    yield fields("a model's name of a megabyte", CHAT, "model", model="m" * MIB)
    yield fields("a model by its path", CHAT, "model", 404, model="../../etc/passwd")
    yield fields("tokens without end", TEXT, "max_tokens", max_tokens=2**31 - 1)
    yield fields("thousands of stop strings", CHAT, "stop", stop=["x"] * 5000)
    yield fields("a stop string of a megabyte", CHAT, "stop.0", stop=["x" * MIB])
    yield fields("thousands of bad words", CHAT, "bad_words", bad_words=["x"] * 5000)
    yield fields("metadata of a megabyte", RESPONSES, "metadata.a", metadata={"a": "x" * MIB})
    yield fields("thousands of metadata", BATCHES, "metadata", metadata={str(i): "" for i in range(5000)})
    yield fields("a batch of a path", BATCHES, "input_file_id", 404, input_file_id="../../etc/passwd")
    yield fields("tokens that are none", DETOKENIZE, "tokens", tokens=[2**31])
    yield fields("too many tokens", DETOKENIZE, "tokens", tokens=[1] * 200_000)
    yield fields("a text of a megabyte", TOKENIZE, "prompt", prompt="a " * MIB)


def of_bytes() -> Iterator[Hostile]:
    """What is hardly JSON."""
    for path, param in zip(MINIMAL, (None,) * 9, strict=False):
        yield Hostile(f"20 MB to {path}", path, b'{"model": "' + b"a" * 20_000_000 + b'"}', param, 413)
        yield Hostile(f"deep brackets to {path}", path, DEEP_JSON.encode(), param)
        yield Hostile(f"a form to {path}", path, b"model=up", param, 415, "application/x-www-form-urlencoded")
    yield Hostile("nothing", CHAT, b"", None)
    yield Hostile("a list", CHAT, b"[]", None)
    yield Hostile("half an object", CHAT, b'{"model": "up"', None)
    yield Hostile("bytes that are no text", CHAT, b'{"model": "\xff\xfe"}', None)
    yield raw("half a surrogate pair", CHAT, "user", r', "user": "\ud800"')
    yield raw("a key of half a surrogate pair", CHAT, None, r', "\ud800": 1')
    yield raw("a key twice", CHAT, "model", ', "model": "small"')
    yield raw("a million nulls", TEXT, "stop", ', "stop": [' + "null," * 500_000 + "null]")
    yield fields("an unknown key", CHAT, "nonsense", nonsense=None)
    yield raw("unknown keys without end", CHAT, None, "".join(f', "k{i}": 1' for i in range(100_000)))
    yield Hostile(
        "20 MB of form", FILES, b"--x\r\n" + b"a" * 20_000_000, "file", 413, "multipart/form-data; boundary=x"
    )
    yield Hostile("a form without an end", FILES, b"--x\r\n", "file", 400, "multipart/form-data; boundary=x")
    yield Hostile("a form without a boundary", FILES, b"x", "file", 400, "multipart/form-data")
    yield Hostile("JSON as a file", FILES, b"{}", "file", 415)


def harmless() -> Iterator[Hostile]:
    """What looks like a bomb and is none: grammars are followed token by token, and never spelled out."""
    for keyword in ("allOf", "anyOf"):
        yield fields(f"{keyword} that doubles", CHAT, None, 200, response_format=schema(doubling(24, keyword)))
    endless = {"type": "array", "minItems": 10**9, "items": {"type": "string"}}
    yield fields("items without end", CHAT, None, 200, response_format=schema(endless))
    for name, regex in (
        ("a regex that repeats repetitions", "(((a{1,99}){1,99}){1,99}){1,99}"),
        ("a regex of a billion", "a{1000000000}"),
        ("a regex of unicode classes", r"(\p{L}{1,999}){1,999}"),
        ("a regex that backtracks elsewhere", "(a|a)*(a*)*b"),
    ):
        yield fields(name, TEXT, None, 200, structured_outputs={"regex": regex})


HOSTILE = [*of_grammars(), *of_tools(), *of_messages(), *of_numbers(), *of_bytes()]
HARMLESS = [*harmless()]
