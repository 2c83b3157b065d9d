"""Tools in chats: what the models read, what has to be called, and the calls in answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import CHAT_TEMPLATE, MODELS, Stack, chat, events, save_tokenizer

from eft_serve.config import AppConfig
from eft_serve.types import Delta, FinishReason, GenerationRequest

TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}{% for m in messages %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}"
    "{{ m['tool_call_id'] }}\n{% endfor %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of today.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now", "strict": True}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


class Says:
    """Answers with a text, in pieces of three characters."""

    def __init__(self, text: str = CALL, finish: FinishReason = FinishReason.STOP) -> None:
        self.text, self.finish = text, finish

    def __call__(self, request: GenerationRequest) -> Iterable[Delta]:
        pieces = [self.text[i : i + 3] for i in range(0, len(self.text), 3)]
        for i, piece in enumerate(pieces):
            yield Delta(text=piece, token_ids=[i], finish_reason=self.finish if i == len(pieces) - 1 else None)


def make_stack(tmp_path: Path, answer: Says | None = None, template: str = TEMPLATE, **recipe: Any) -> Stack:
    extra = ["[TOOL_CALLS]"]
    paths = {model: save_tokenizer(tmp_path / model, template=template, extra_tokens=extra) for model in MODELS}
    names = {"base": "large", "reference": "small", "tuned": "small-chat"}
    config = {
        "models": {model: {"path": str(path)} for model, path in paths.items()},
        "recipes": {"up": {"tool_parser": "hermes", **names, **recipe}},
    }
    return Stack(AppConfig.parse(config), answer or Says())


async def ask(stack: Stack, **fields: Any) -> Any:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(**({"tools": TOOLS} | fields)))
    return response.json() if response.status_code == 200 else (response.status_code, response.json()["error"])


def prompt_of(stack: Stack) -> str:
    tokenizer = stack.app.state.context.renderer.tokenizer("small")
    text: str = tokenizer.decode(stack.service.requests[-1].prompts["small"], skip_special_tokens=True)
    return text


async def test_a_call_in_an_answer_is_a_tool_call(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says(f"I look.\n{CALL}\n{CALL}"))
    (choice,) = (await ask(stack))["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "I look.")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Bonn"}'}
    ] * 2
    ids = {call["id"] for call in message["tool_calls"]}
    assert len(ids) == 2
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)
    assert {call["type"] for call in message["tool_calls"]} == {"function"}


async def test_openais_client_gathers_a_streamed_call(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says(f"I look.\n{CALL}"))
    client = stack.openai()
    async with client.chat.completions.stream(**chat(tools=TOOLS)) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    (choice,) = final.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})


async def test_a_streamed_call_comes_in_pieces(tmp_path: Path) -> None:
    stack = make_stack(tmp_path)
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(tools=TOOLS, stream=True))
    parts = [event["choices"][0] for event in events(response) if event != "[DONE]"]
    calls = [call for part in parts for call in part["delta"].get("tool_calls", ())]
    assert (calls[0]["function"], calls[0]["type"]) == ({"name": "weather", "arguments": ""}, "function")
    assert all(set(call) == {"index", "function"} for call in calls[1:])
    assert len(calls) > 4, "arguments are passed on as they come"
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bonn"}'
    assert parts[-1]["finish_reason"] == "tool_calls"
    assert not any(part["delta"].get("content") for part in parts)


async def test_without_parallel_calls_the_first_one_stands(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says(f"{CALL}\n{CALL}"))
    (choice,) = (await ask(stack, parallel_tool_calls=False))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_a_call_that_was_cut_keeps_its_reason(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says(CALL[:-17], FinishReason.LENGTH))
    (choice,) = (await ask(stack))["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Bon'


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}])
async def test_where_no_tool_may_be_called_text_stays_text(tmp_path: Path, fields: dict[str, Any]) -> None:
    stack = make_stack(tmp_path, template=CHAT_TEMPLATE)
    (choice,) = (await ask(stack, **fields))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", CALL)
    assert "tool_calls" not in choice["message"]
    assert stack.service.requests[0].sampling.skip_special_tokens


async def test_models_read_the_tools_and_the_messages_of_tools(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says("fine"))
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    (choice,) = (await ask(stack, messages=messages))["choices"]
    assert choice["message"]["content"] == "fine"
    prompt = prompt_of(stack)
    assert '"name": "weather"' in prompt
    assert '"properties": {}' in prompt, "a function without parameters has none"
    assert "strict" not in prompt
    assert '<|assistant|>{"name": "weather", "arguments": {"city": "Bonn"}}' in prompt
    assert "<|tool|>sunnyc1" in prompt
    assert stack.service.requests[0].sampling.grammar is None


async def test_of_the_special_tokens_those_that_begin_calls_are_shown_to_the_parser(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says("a"), tool_parser="mistral")
    tokenizer = stack.app.state.context.renderer.tokenizer("large")
    tokenizer.special["[TOOL_CALLS]"] = 257
    await ask(stack)
    await ask(stack, tool_choice="none")
    shown, plain = (request.sampling for request in stack.service.requests)
    assert (shown.skip_special_tokens, shown.shown_special_token_ids) == (True, (257,))
    assert plain.shown_special_token_ids == ()


async def test_a_model_that_stops_in_a_call_has_made_none(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says(f"{CALL}\n{CALL[:-17]}"))
    (choice,) = (await ask(stack))["choices"]
    assert choice["finish_reason"] == "stop"
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(tools=TOOLS, stream=True))
    assert events(response)[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "now"]), ({"type": "function", "function": {"name": "now"}}, ["now"])],
)
async def test_a_call_that_has_to_be_made_is_forced_by_a_grammar(tmp_path: Path, choice: Any, names: list[str]) -> None:
    stack = make_stack(tmp_path)
    assert (await ask(stack, tool_choice=choice))["choices"][0]["finish_reason"] == "tool_calls"
    grammar = stack.service.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.param, grammar.of_schemas) == ("tools", True)
    assert [name for name in ("weather", "now") if f'\\"{name}\\"' in grammar.definition] == names
    assert ("{0,15}" in grammar.definition) == (choice == "required"), "a named tool is called once, as OpenAI has it"
    await ask(stack, tool_choice=choice, parallel_tool_calls=False)
    single = stack.service.requests[1].sampling.grammar
    assert single is not None
    assert "{0,15}" not in single.definition


async def test_ids_for_mistral_are_as_its_templates_want_them(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, Says('[TOOL_CALLS][{"name": "now", "arguments": {}}]'), tool_parser="mistral")
    (choice,) = (await ask(stack))["choices"]
    assert len(choice["message"]["tool_calls"][0]["id"]) == 9


MESSAGE = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", ""),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", ""),
        ({"tools": [{"type": "function"}]}, "tools.0.function", ""),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "twice"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools", "128"),
        ({"tool_choice": "always"}, "tool_choice", ""),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name", "among"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", "tools"),
        ({"functions": [FUNCTION]}, "functions", ""),
        ({"messages": [MESSAGE, {"role": "assistant", "content": None}]}, "messages.1.content", ""),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", ""),
        ({"messages": [MESSAGE | {"tool_call_id": "x"}]}, "messages.0.tool_call_id", ""),
        (
            {"messages": [MESSAGE | {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}]},
            "messages.0.tool_calls",
            "assistant",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "object",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "not",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 70_000]}}}],
                "tool_choice": "required",
            },
            "tools",
            "too long",
        ),
    ],
)
async def test_a_mistake_with_tools_is_named(tmp_path: Path, fields: dict[str, Any], param: str, says: str) -> None:
    stack = make_stack(tmp_path)
    status, error = await ask(stack, **fields)
    assert (status, error["param"]) == (400, param), error
    assert says in error["message"]
    assert stack.service.requests == []


async def test_tools_need_a_parser_and_templates_that_know_them(tmp_path: Path) -> None:
    status, error = await ask(make_stack(tmp_path, tool_parser=None))
    assert (status, error["param"]) == (400, "tools")
    assert "tool_parser" in error["message"]
    status, error = await ask(make_stack(tmp_path, template=CHAT_TEMPLATE))
    assert (status, error["param"]) == (400, "tools")
    assert "knows no tools" in error["message"]
    messages = [MESSAGE, {"role": "tool", "content": "x", "tool_call_id": "1"}]
    status, error = await ask(make_stack(tmp_path, template=CHAT_TEMPLATE), tools=None, messages=messages)
    assert (status, error["param"]) == (400, "messages.1")


async def test_a_schema_that_no_grammar_enforces_is_fine_where_the_model_is_free_to_call(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"not": {}}}}]
    (choice,) = (await ask(make_stack(tmp_path), tools=tools))["choices"]
    assert choice["finish_reason"] == "tool_calls"
