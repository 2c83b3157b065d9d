"""An answer is sent back as the client's own helpers left it: with what they parsed, and where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import CHAT_TEMPLATE, MODELS, Stack, chat, save_tokenizer
from pydantic import BaseModel

from eft_serve.config import AppConfig
from eft_serve.types import Delta, FinishReason, GenerationRequest

TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}"
    "{% endfor %}{{ tools }}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
USER = {"role": "user", "content": "hi"}


class Weather(BaseModel):
    city: str


TOOL = openai.pydantic_function_tool(Weather, name="weather")


def make_stack(tmp_path: Path, template: str, text: str) -> Stack:
    def answer(_: GenerationRequest) -> Iterable[Delta]:
        return [Delta(text=text, token_ids=[1], finish_reason=FinishReason.STOP)]

    paths = {model: save_tokenizer(tmp_path / model, template=template) for model in MODELS}
    names = {"base": "large", "reference": "small", "tuned": "small-chat"}
    config = {
        "models": {model: {"path": str(path)} for model, path in paths.items()},
        "recipes": {"up": {"tool_parser": "hermes", **names}},
    }
    return Stack(AppConfig.parse(config), answer)


def last_prompt(stack: Stack) -> str:
    tokenizer = stack.app.state.context.renderer.tokenizer("small")
    text: str = tokenizer.decode(stack.service.requests[-1].prompts["small"], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_parsed_call_is_sent_back_as_it_came(tmp_path: Path, streamed: bool) -> None:
    stack = make_stack(tmp_path, TEMPLATE, CALL)
    completions = stack.openai().chat.completions
    message = await ask(completions, streamed, tools=[TOOL])
    (call,) = message.tool_calls or []
    assert call.function.parsed_arguments == Weather(city="Bonn")
    told = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    await completions.create(**chat(tools=[TOOL], messages=[USER, message, told]))
    assert '{"name": "weather", "arguments": {"city": "Bonn"}}sunny' in last_prompt(stack)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, as it serialises the message
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_parsed_answer_is_sent_back_as_it_came(tmp_path: Path, streamed: bool) -> None:
    stack = make_stack(tmp_path, CHAT_TEMPLATE, '{"city": "Bonn"}')
    completions = stack.openai().chat.completions
    message = await ask(completions, streamed, response_format=Weather)
    assert message.parsed == Weather(city="Bonn")
    await completions.create(**chat(messages=[USER, message, USER]))
    assert '<|assistant|>{"city": "Bonn"}\n' in last_prompt(stack)


async def ask(completions: Any, streamed: bool, **fields: Any) -> Any:
    """The message of an answer, as the client's helpers give it."""
    if not streamed:
        return (await completions.parse(**chat(**fields))).choices[0].message
    async with completions.stream(**chat(**fields)) as stream:
        return (await stream.get_final_completion()).choices[0].message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "hi", "parsed": {"city": "Bonn"}}, "messages.0.parsed"),
        ({"role": "assistant", "content": "hi", "parse": {}}, "messages.0.parse"),
    ],
)
async def test_only_an_assistants_message_was_parsed(tmp_path: Path, message: dict[str, Any], param: str) -> None:
    stack = make_stack(tmp_path, CHAT_TEMPLATE, "hi")
    with pytest.raises(openai.BadRequestError) as refusal:
        await stack.openai().chat.completions.create(**chat(messages=[message]))
    assert refusal.value.param == param
