"""Sampling controls of chat and text completions, as they reach the coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, events, make_config

from eft_serve.types import SamplingParams


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


COMPLETION = {"model": "up", "prompt": "a"}


@pytest.mark.parametrize(("path", "body"), [("chat/completions", chat()), ("completions", COMPLETION)])
async def test_each_control_reaches_the_coordinator(stack: Stack, path: str, body: dict[str, Any]) -> None:
    controls = {
        "max_tokens": 9,
        "min_tokens": 2,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"7": -100, "300": 2.5},
        "allowed_token_ids": [5, 7.0],
        "bad_words": ["ab", " c"],
        "stop": "x",
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "seed": 3,
    }
    async with stack.client() as client:
        response = await client.post(f"/v1/{path}", json=body | controls)
    assert response.status_code == 200, response.text
    (request,) = stack.service.requests
    letters = {letter: ord(letter) - ord("a") + 65 for letter in "abc"}
    a, b, c = letters.values()
    words = request.sampling.bad_words
    assert {len(word) for word in words} == {2, 3}
    assert words[0] == (a, b)
    assert words[1][1:] == (a, b)
    assert words[2] == (words[1][0], c), "a word that begins with a space is the same after one"
    assert len(words) == 3
    assert request.sampling == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        presence_penalty=-0.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias=((7, -100.0), (300, 2.5)),
        allowed_token_ids=(5, 7),
        bad_words=words,
        stop=("x",),
        stop_token_ids=(9,),
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        ignore_eos=True,
        seed=3,
    )


async def test_a_stop_string_that_is_a_special_token_is_its_id_too(stack: Stack) -> None:
    async with stack.client() as client:
        await client.post("/v1/completions", json=COMPLETION | {"stop": ["<s>", "s"], "stop_token_ids": [5]})
    (request,) = stack.service.requests
    assert (request.sampling.stop, request.sampling.stop_token_ids) == (("<s>", "s"), (5, 0))


async def test_the_speaker_of_a_message_reaches_a_template_that_shows_it(tmp_path: Path) -> None:
    stack = Stack(
        make_config(tmp_path, template="{% for m in messages %}{{ m['name'] }}: {{ m['content'] }}{% endfor %}")
    )
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": "a", "name": "Bob"}]))
    (request,) = stack.service.requests
    assert len(request.prompts["small"]) == len("Bob: a")


async def test_usage_so_far_is_in_every_chunk_if_asked_for(stack: Stack) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True, stream_options=options))
    usages = [event["usage"]["completion_tokens"] for event in events(response) if event != "[DONE]"]
    assert usages == sorted(usages)
    assert (usages[0], usages[-1]) == (3, 5)
