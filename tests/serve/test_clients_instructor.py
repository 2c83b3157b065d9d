"""instructor against the live application, in its modes that say a schema."""

from __future__ import annotations

from typing import Any

import pytest
from clients import JSON_TOKENS, QUESTION, Answer, package
from harness import Served

instructor = package("instructor")

MESSAGES = [{"role": "user", "content": QUESTION}]
MODES = ["JSON_SCHEMA", "TOOLS"]  # JSON only asks for any object, which an untrained model never ends
ASKED: dict[str, Any] = {
    "model": "tools",
    "messages": MESSAGES,
    "temperature": 0,
    "max_tokens": JSON_TOKENS,
    "max_retries": 0,
}


def patched(client: Any, mode: str) -> Any:
    return instructor.from_openai(client, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_an_object_of_the_model(served: Served, mode: str) -> None:
    answer = patched(served.client(), mode).chat.completions.create(response_model=Answer, **ASKED)
    assert isinstance(answer, Answer)


async def test_an_answer_of_the_asynchronous_client(served: Served) -> None:
    async with served.async_client() as client:
        answer = await patched(client, "TOOLS").chat.completions.create(response_model=Answer, **ASKED)
    assert isinstance(answer, Answer)


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_a_stream_fills_the_object(served: Served, mode: str) -> None:
    client = patched(served.client(), mode)
    first, *_, last = client.chat.completions.create_partial(response_model=Answer, **ASKED)
    assert Answer.model_validate(last.model_dump())
    assert first.model_dump() != last.model_dump()
