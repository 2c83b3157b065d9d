"""`logprobs` of chat and text completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, events, make_config

from eft_serve.api.model_tokenizer import BYTE_OF
from eft_serve.types import Delta, FinishReason, GenerationRequest, TokenComponents

EURO = (0xE2, 0x82, 0xAC)


def alone(token_id: int, logprob: float, top: Iterable[TokenComponents] = ()) -> TokenComponents:
    return TokenComponents(token_id, logprob, [], [], 0.0, list(top))


def letter(byte: int) -> int:
    """The token of a byte: `<s>` is token 0, then come the letters of the byte alphabet in order."""
    return 1 + [BYTE_OF[character] for character in sorted(BYTE_OF)].index(byte)


def answer(request: GenerationRequest) -> Iterable[Delta]:
    """`a€` and an end token, a token a delta; the text comes when the character is whole."""
    texts = ["a", "", "", "€", ""]
    tokens = [letter(ord("a")), *map(letter, EURO), 0]
    for place, (text, token_id) in enumerate(zip(texts, tokens, strict=True)):
        top = [alone(token_id, -0.5), *(alone(letter(ord("b") + i), -1.5 - i) for i in range(4))]
        described = [alone(token_id, -0.5, top[: request.logprobs])] if request.logprobs is not None else None
        reason = FinishReason.STOP if place == 4 else None
        yield Delta(text=text, token_ids=[token_id], finish_reason=reason, components=described)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path), answer)


async def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    async with stack.client() as client:
        response = await client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return [event for event in events(response) if event != "[DONE]"] if body.get("stream") else response.json()


COMPLETION = {"model": "up", "prompt": "x"}
CONTENT = [
    {"token": "a", "logprob": -0.5, "bytes": [97]},
    {"token": "�", "logprob": -0.5, "bytes": [0xE2]},
    {"token": "�", "logprob": -0.5, "bytes": [0x82]},
    {"token": "�", "logprob": -0.5, "bytes": [0xAC]},
    {"token": "<s>", "logprob": -0.5, "bytes": [60, 115, 62]},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_top", [None, 0, 2])
async def test_a_chat_has_content_with_the_bytes_of_every_token(
    stack: Stack, stream: bool, num_top: int | None
) -> None:
    answered = await post(stack, "chat/completions", chat(stream=stream, logprobs=True, top_logprobs=num_top))
    choices = [chunk["choices"][0] for chunk in answered] if stream else answered["choices"]
    content = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert [{k: v for k, v in token.items() if k != "top_logprobs"} for token in content] == CONTENT
    top = [[other["token"] for other in token["top_logprobs"]] for token in content]
    assert top[0] == ["a", "b"][: num_top or 0]
    assert stack.service.requests[0].logprobs == (num_top or 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_completion_has_offsets_and_the_chosen_token_among_the_likeliest(
    stack: Stack, stream: bool
) -> None:
    answered = await post(stack, "completions", COMPLETION | {"stream": stream, "logprobs": 2})
    choices = [chunk["choices"][0] for chunk in answered] if stream else answered["choices"]
    shown = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [text for each in shown for text in each["tokens"]] == ["a", "�", "�", "�", "<s>"]
    assert [offset for each in shown for offset in each["text_offset"]] == [0, 1, 1, 1, 2]
    assert {value for each in shown for value in each["token_logprobs"]} == {-0.5}
    assert shown[0]["top_logprobs"][0] == {"a": -0.5, "b": -1.5}


@pytest.mark.parametrize(("path", "body"), [("chat/completions", chat()), ("completions", COMPLETION)])
async def test_without_logprobs_none_are_asked_for(stack: Stack, path: str, body: dict[str, Any]) -> None:
    answered = await post(stack, path, body)
    assert answered["choices"][0]["logprobs"] is None
    assert stack.service.requests[0].logprobs is None


async def test_the_mode_reaches_the_coordinator(stack: Stack) -> None:
    await post(stack, "completions", COMPLETION | {"logprobs": 0, "eft": {"logprobs_mode": "processed_logprobs"}})
    assert stack.service.requests[0].logprobs_mode == "processed_logprobs"
