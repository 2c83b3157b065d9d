"""`/v1/completions`: OpenAI's shapes, text and token ids, and the context's end."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_fakes import Stack, events, make_config, save_tokenizer

from eft_serve.config import AppConfig
from eft_serve.types import Delta, FinishReason


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


async def test_a_whole_answer_has_openais_shape(stack: Stack) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/completions", json={"model": "up", "prompt": "abc"})
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "text_completion",
        "model": "up",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9},
    }
    assert stack.service.requests[0].sampling.max_tokens == 16


async def test_a_stream_ends_with_its_finish_reason_and_skips_tokens_without_text(stack: Stack) -> None:
    half = Delta(text="", token_ids=[1])
    last = Delta(text="", token_ids=[2], finish_reason=FinishReason.LENGTH)
    stack.service.answer = lambda _: [half, Delta(text="é", token_ids=[3]), last]
    async with stack.client() as client:
        response = await client.post("/v1/completions", json={"model": "up", "prompt": "a", "stream": True})
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("é", None),
        ("", "length"),
    ]


async def test_text_gets_the_tokenizers_special_tokens_and_ids_are_taken_as_they_are(stack: Stack) -> None:
    async with stack.client() as client:
        await client.post("/v1/completions", json={"model": "up", "prompt": "ab"})
        await client.post("/v1/completions", json={"model": "up", "prompt": [5, 6]})
        await client.post("/v1/completions", json={"model": "up", "prompt": ["ab"]})
    text, ids, listed = (r.prompts for r in stack.service.requests)
    assert text["large"][0] == 0
    assert len(text["large"]) == 3
    assert ids == {"large": [5, 6], "small": [5, 6], "small-chat": [5, 6]}
    assert listed == text


async def test_what_does_not_fit_the_context_is_refused_or_clipped_as_asked(stack: Stack) -> None:
    stack.service.context_length = 10
    async with stack.client() as client:
        cases = (
            ("x" * 10, None, "prompt"),
            ("x" * 10, 5, "prompt"),
            ("xx", 8, "max_tokens"),
            ("xx", 2**31 - 1, "max_tokens"),
        )
        for prompt, max_tokens, param in cases:
            request = {"model": "up", "prompt": prompt} | ({"max_tokens": max_tokens} if max_tokens else {})
            response = await client.post("/v1/completions", json=request)
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"
            assert response.json()["error"]["param"] == param
        assert stack.service.requests == []
        await client.post("/v1/completions", json={"model": "up", "prompt": "xxxx"})
        await client.post("/v1/completions", json={"model": "up", "prompt": "xxxx", "max_tokens": 5})
    assert [r.sampling.max_tokens for r in stack.service.requests] == [5, 5]


async def test_an_empty_prompt_is_refused(stack: Stack) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/completions", json={"model": "up", "prompt": []})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


async def test_the_openai_client_reads_both(stack: Stack) -> None:
    client = stack.openai()
    whole = await client.completions.create(model="small", prompt="a", n=2, seed=1)
    assert [c.text for c in whole.choices] == ["Hello", "Hello"]
    stream = await client.completions.create(model="small", prompt=[3, 4], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello"


async def test_a_character_streams_as_itself_whatever_it_is(stack: Stack) -> None:
    text = 'line\nbreak\r\n"quote" \u2028 \U0001f600 data: x'
    stack.service.answer = lambda _: [Delta(text=text, token_ids=[1], finish_reason=FinishReason.STOP)]
    client = stack.openai()
    stream = await client.completions.create(model="small", prompt="a", stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == [text]


async def test_token_ids_come_when_asked_for_whole_and_streamed_even_without_text(stack: Stack) -> None:
    last = Delta(text="", token_ids=[2], finish_reason=FinishReason.STOP)
    stack.service.answer = lambda _: [Delta(text="", token_ids=[1]), Delta(text="é", token_ids=[3, 4]), last]
    body = {"model": "up", "prompt": "a", "return_token_ids": True}
    async with stack.client() as client:
        whole = (await client.post("/v1/completions", json=body)).json()
        *chunks, _ = events(await client.post("/v1/completions", json={**body, "stream": True}))
        plain = (await client.post("/v1/completions", json={**body, "return_token_ids": None})).json()
    assert whole["choices"][0]["token_ids"] == [1, 3, 4, 2]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[1], [3, 4], [2]]
    assert "token_ids" not in plain["choices"][0]


FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")


async def test_before_a_suffix_the_models_are_asked_for_the_middle(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "coder", extra_tokens=FIM)
    stack = Stack(AppConfig.parse({"models": {"coder": {"path": str(tmp_path / "coder")}}}))
    tokenizer = stack.app.state.context.renderer.tokenizer("coder")
    tokenizer.tokenizer.backend_tokenizer.add_special_tokens(list(FIM))
    async with stack.client() as client:
        body = {"model": "coder", "prompt": "a", "suffix": "b"}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        plain = await client.post("/v1/completions", json=body | {"suffix": ""})
        refused = [
            (await client.post("/v1/completions", json=body | other)).json()["error"]["param"]
            for other in ({"prompt": [66]}, {"truncate_prompt_tokens": 3}, {"prompt_logprobs": 0}, {"suffix": 7})
        ]
    assert plain.status_code == 200
    assert refused == ["suffix"] * 4
    asked, without = (request.prompts["coder"] for request in stack.service.requests)
    assert tokenizer.decode(asked) == "<s><fim_prefix>a<fim_suffix>b<fim_middle>"
    assert len(asked) == 6, "these are tokens of their own"
    assert tokenizer.decode(without) == "<s>a"
