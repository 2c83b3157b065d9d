"""Tool calls in answers: whatever the pieces, the same calls and the same content."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eft_serve.api.tool_parsers import PARSERS, CallDelta, Parsed
from eft_serve.config_recipes import ToolFormat

NAMES = {"get_weather", "f.g-1"}


def parse(tool_format: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)])"""
    parser = PARSERS[tool_format](NAMES)
    parsed: list[Parsed] = [each for piece in pieces for each in parser.push(piece)] + parser.finish()
    content, calls = "", list[list[str]]()
    for each in parsed:
        if isinstance(each, CallDelta):
            assert each.index in (len(calls), len(calls) - 1)
            assert (each.name is not None) == (each.index == len(calls)), "a call begins with its name"
            if each.name is not None:
                calls.append([each.name, ""])
            calls[-1][1] += each.arguments
        else:
            assert each, "content is not empty"
            content += each
    return content, [(name, arguments) for name, arguments in calls]


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8))) if text else []
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


A = '{"city": "Zürich {[\\"}", "days": [1, {"a": "}"}]}'
OTHER = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {A}}}\n</tool_call>', "", [("get_weather", A)]),
    (
        "hermes",
        f'Let me look.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {A}}}\n</tool_call>\n<tool_call>\n'
        '{ "name" : "f.g-1" , "arguments" : {} }\n</tool_call>\n',
        "Let me look.",
        [("get_weather", A), ("f.g-1", "{}")],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f.g-1"}</tool_call>', "", [("f.g-1", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f.g-1"}</tool_call>', "", [("f.g-1", "{}")]),
    ("hermes", '<tool_call>{"name": "f.g-1", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f.g-1", '{"a": 1}')]),
    ("hermes", "plain <tool_call text  ", "plain <tool_call text  ", []),
    ("hermes", OTHER, OTHER, []),
    ("hermes", '<tool_call>{"name": "f.g-1", "arguments": {"a": 1', "", [("f.g-1", '{"a": 1')]),
    ("hermes", '<tool_call>{"name": "f.g', '<tool_call>{"name": "f.g', []),
    ("hermes", '<tool_call>{"name": "f.g-1", "arguments": {}}</tool_', "", [("f.g-1", "{}")]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {A}}}', "", [("get_weather", A)]),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {A}}}; {{"name": "f.g-1", "parameters": {{}}}}',
        "",
        [("get_weather", A), ("f.g-1", "{}")],
    ),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", 'It is {"name": "f.g-1"}', 'It is {"name": "f.g-1"}', []),
    ("llama3_json", "\n ", "\n ", []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {A}}}]', "", [("get_weather", A)]),
    ("mistral", "[TOOL_CALLS]other{}[TOOL_CALLS]f.g-1{}", "[TOOL_CALLS]other{}", [("f.g-1", "{}")]),
    (
        "mistral",
        f'Sure.[TOOL_CALLS][{{"name": "f.g-1", "arguments": {{}}}}, {{"name": "get_weather", "arguments": {A}}}]',
        "Sure.",
        [("f.g-1", "{}"), ("get_weather", A)],
    ),
    (
        "mistral",
        f'[TOOL_CALLS]get_weather{A}[TOOL_CALLS]f.g-1[ARGS]{{"x": {{}}}}',
        "",
        [("get_weather", A), ("f.g-1", '{"x": {}}')],
    ),
    ("mistral", "[TOOL_CALLS]other{}", "[TOOL_CALLS]other{}", []),
    ("mistral", "[TOOL_", "[TOOL_", []),
]


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_are_found_whatever_the_pieces(
    tool_format: ToolFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(tool_format, [text]) == (content, calls)
    assert parse(tool_format, [*text]) == (content, calls)
    rng = random.Random(text)
    for _ in range(30):
        assert parse(tool_format, pieces_of(text, rng)) == (content, calls)


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.lists(
        st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(max_size=8), JSON, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    st.randoms(use_true_random=False),
)
def test_any_arguments_arrive_as_they_were_written(
    tool_format: ToolFormat, calls: list[tuple[str, dict[str, Any]]], rng: random.Random
) -> None:
    key = "parameters" if tool_format == "llama3_json" else "arguments"
    objects = [json.dumps({"name": name, key: arguments}, ensure_ascii=rng.random() < 0.5) for name, arguments in calls]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects),
        "llama3_json": "; ".join(objects),
        "mistral": f"[TOOL_CALLS][{', '.join(objects)}]",
    }[tool_format]
    content, found = parse(tool_format, pieces_of(text, rng))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.text(alphabet='<>[]{}":,;\\ \nabTOOL_CALStool_call/name|arguments', max_size=80),
    st.randoms(use_true_random=False),
)
def test_text_without_calls_stays_as_it_is(tool_format: ToolFormat, text: str, rng: random.Random) -> None:
    assert parse(tool_format, pieces_of(text, rng)) == (text, [])
