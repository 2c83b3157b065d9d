"""OpenAI's own client against the live application: every way to read an answer, files and batches."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest
from clients import CITIES, JSON_TOKENS, QUESTION, TOOL, Answer
from harness import Served

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
CHAT: dict[str, Any] = {"model": "tools", "messages": MESSAGES, "max_completion_tokens": 2, "temperature": 0}
RESPONSE: dict[str, Any] = {"model": "eft", "input": QUESTION, "max_output_tokens": 24, "temperature": 0}
BATCH_TIMEOUT_S = 60.0


def test_parse_gives_an_object_of_the_model(served: Served) -> None:
    answer = served.client().chat.completions.parse(
        model="eft", messages=MESSAGES, response_format=Answer, max_tokens=JSON_TOKENS, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Answer)


def test_a_stream_is_parsed_too(served: Served) -> None:
    with served.client().chat.completions.stream(
        model="eft", messages=MESSAGES, response_format=Answer, max_tokens=JSON_TOKENS, temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Answer)


def test_a_parsed_tool_call_and_the_turn_after_it(served: Served) -> None:
    tool = openai.pydantic_function_tool(Answer, name="report")
    client = served.client()
    asked: dict[str, Any] = {"model": "tools", "temperature": 0, "tools": [tool]}
    answer = client.chat.completions.parse(
        **asked, messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, max_tokens=JSON_TOKENS
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Answer)
    messages: list[Any] = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "thank you"}]
    after = client.chat.completions.create(**asked, messages=messages, max_tokens=8)
    assert after.usage is not None
    assert answer.usage is not None
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_streamed_tool_call_is_the_whole_one(served: Served) -> None:
    asked: dict[str, Any] = CHAT | {
        "max_completion_tokens": JSON_TOKENS,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = served.client().chat.completions.create(**asked)
    with served.client().chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()

    def calls(completion: Any) -> list[Any]:
        return [(call.function.name, call.function.arguments) for call in completion.choices[0].message.tool_calls]

    assert calls(streamed) == calls(whole)
    assert {json.loads(arguments)["city"] for _, arguments in calls(whole)} <= set(CITIES)
    assert {name for name, _ in calls(whole)} == {"weather"}


def test_responses_whole_streamed_and_parsed(served: Served) -> None:
    client = served.client()
    whole = client.responses.create(**RESPONSE)
    assert whole.output_text
    with client.responses.stream(**RESPONSE) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == whole.output_text
    parsed = client.responses.parse(
        model="eft", input=QUESTION, text_format=Answer, max_output_tokens=JSON_TOKENS, temperature=0
    )
    assert isinstance(parsed.output_parsed, Answer)
    turns: list[Any] = [{"role": "user", "content": QUESTION}, *whole.output, {"role": "user", "content": "And then?"}]
    assert client.responses.create(**RESPONSE | {"input": turns}).output_text


async def test_the_asynchronous_client_answers_side_by_side(served: Served) -> None:
    async with served.async_client() as client:

        async def whole() -> str:
            answer = await client.chat.completions.create(**CHAT | {"model": "eft", "max_completion_tokens": 24})
            return str(answer.choices[0].message.content)

        async def streamed() -> str:
            chunks = await client.chat.completions.create(
                **CHAT | {"model": "eft", "max_completion_tokens": 24}, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        async def response() -> str:
            async with client.responses.stream(**RESPONSE) as stream:
                return (await stream.get_final_response()).output_text

        async def parsed() -> Any:
            answer = await client.chat.completions.parse(
                model="eft", messages=MESSAGES, response_format=Answer, max_tokens=JSON_TOKENS, temperature=0
            )
            return answer.choices[0].message.parsed

        one, two, three, four = await asyncio.gather(whole(), streamed(), response(), parsed())
        models = [model.id async for model in client.models.list()]
    assert one
    assert one == two == three
    assert isinstance(four, Answer)
    assert "eft" in models


def test_a_batch_from_upload_to_deletion(served: Served) -> None:
    client = served.client()
    bodies = [CHAT | {"model": "eft"}, CHAT | {"response_format": {"type": "json_object"}}, CHAT | {"model": "nobody"}]
    lines = [
        {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert client.files.wait_for_processing(file.id).bytes == len(content)
    assert file.id in {each.id for each in client.files.list(purpose="batch")}
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"purpose": "test"}
    )
    deadline = time.monotonic() + BATCH_TIMEOUT_S
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    assert batch.id in {each.id for each in client.batches.list()}
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {"line-0", "line-1"}
    assert [(error["custom_id"], error["response"]["status_code"]) for error in errors] == [("line-2", 404)]
    for file_id in (file.id, batch.output_file_id, batch.error_file_id):
        assert client.files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
