"""LangChain's `ChatOpenAI` against the live application: answers, streams, structured output, tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from clients import CITIES, JSON_TOKENS, QUESTION, Answer, package
from harness import Served

langchain_openai = package("langchain_openai")
messages = package("langchain_core.messages")
tools = package("langchain_core.tools")

Method = Literal["json_schema", "function_calling", "json_mode"]


@pytest.fixture
def chat(served: Served) -> Callable[..., Any]:
    def model(name: str = "eft", **options: Any) -> Any:
        own = {"max_tokens": 64, "temperature": 0, "max_retries": 0, **options}
        return langchain_openai.ChatOpenAI(model=name, base_url=f"{served.url}/v1", api_key=served.keys["tests"], **own)

    return model


def weather_tool() -> Any:
    @tools.tool  # type: ignore[untyped-decorator]
    def weather(city: Literal["Lima", "Quito"]) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    return weather


def test_an_answer_and_its_stream(chat: Any) -> None:
    model = chat(stream_usage=True)
    whole = model.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream(QUESTION))
    gathered = pieces[0]
    for piece in pieces[1:]:
        gathered += piece
    assert (gathered.content, gathered.usage_metadata) == (whole.content, whole.usage_metadata)
    assert gathered.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


async def test_several_at_once(chat: Any) -> None:
    model = chat()
    whole = await model.ainvoke(QUESTION)
    assert [answer.content for answer in await model.abatch([QUESTION] * 4)] == [whole.content] * 4


def test_turns_of_every_role(chat: Any) -> None:
    turns = [("system", "Be brief."), ("human", QUESTION), ("ai", "It is Lima."), ("human", "And of Ecuador?")]
    assert chat(seed=5, logprobs=True, top_logprobs=2).invoke(turns).response_metadata["logprobs"]["content"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output_is_an_object_of_the_model(chat: Any, method: Method, strict: bool | None) -> None:
    model = chat("tools", max_tokens=JSON_TOKENS).with_structured_output(Answer, method=method, strict=strict)
    assert isinstance(model.invoke(QUESTION), Answer)


def test_structured_output_of_a_plain_schema_is_a_dictionary(chat: Any) -> None:
    schema = Answer.model_json_schema() | {"title": "answer", "description": "An answer."}
    found = chat("tools", max_tokens=JSON_TOKENS).with_structured_output(schema, method="json_schema").invoke(QUESTION)
    assert Answer.model_validate(found)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # openai's client serialises what it parsed
def test_structured_output_streams(chat: Any) -> None:
    *_, last = (
        chat("tools", max_tokens=JSON_TOKENS).with_structured_output(Answer, method="json_schema").stream(QUESTION)
    )
    assert isinstance(last, Answer)


@pytest.mark.parametrize("choice", ["any", "required", "weather"])
def test_a_tool_is_called_and_its_answer_read(chat: Any, choice: str) -> None:
    weather = weather_tool()
    model = chat("tools", max_tokens=JSON_TOKENS).bind_tools(
        [weather], tool_choice=choice, strict=True, parallel_tool_calls=False
    )
    asked = messages.HumanMessage(QUESTION)
    call_turn = model.invoke([asked])
    (call,) = call_turn.tool_calls
    assert (call["name"], call["args"]["city"] in CITIES) == ("weather", True)
    result = weather.invoke(call)
    assert isinstance(result, messages.ToolMessage)
    after = chat("tools").bind_tools([weather]).invoke([asked, call_turn, result])
    assert after.usage_metadata["input_tokens"] > call_turn.usage_metadata["input_tokens"]


def test_a_streamed_tool_call_is_gathered(chat: Any) -> None:
    model = chat("tools", max_tokens=JSON_TOKENS).bind_tools([weather_tool()], tool_choice="weather", strict=True)
    pieces = list(model.stream(QUESTION))
    gathered = pieces[0]
    for piece in pieces[1:]:
        gathered += piece
    (call,) = gathered.tool_calls
    assert [call["args"]] == [each["args"] for each in model.invoke(QUESTION).tool_calls]


def test_the_responses_endpoint(chat: Any) -> None:
    model = chat(use_responses_api=True)
    answer = model.invoke(QUESTION)
    assert answer.text == chat().invoke(QUESTION).content
    streamed = "".join(piece.text for piece in model.stream(QUESTION))
    assert streamed == answer.text
    assert model.invoke([("human", QUESTION), answer, ("human", "And of Ecuador?")]).text


def test_text_completions_of_several_prompts(served: Served) -> None:
    model = langchain_openai.OpenAI(
        model="eft",
        base_url=f"{served.url}/v1",
        api_key=served.keys["tests"],
        temperature=0,
        max_tokens=8,
        max_retries=0,
    )
    prompts = [f"User: {QUESTION}\nAssistant:", "User: What is the capital of Ecuador?\nAssistant:"]
    texts = [generation.text for (generation,) in model.generate(prompts).generations]
    assert texts == [model.invoke(prompt) for prompt in prompts]
    assert "".join(model.stream(prompts[0])) == texts[0]
