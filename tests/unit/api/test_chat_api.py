"""`/v1/chat/completions`: OpenAI's shapes, and what reaches the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import Stack, chat, deltas, events, make_config, save_tokenizer

from eft_serve.config import AppConfig
from eft_serve.errors import UnavailableError
from eft_serve.types import (
    Combination,
    Delta,
    FinishReason,
    GenerationRequest,
    ModelUsage,
    SamplingParams,
    Term,
    Usage,
)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path, default_max_tokens=77))


async def test_a_whole_answer_has_openais_shape(stack: Stack) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat())
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    prompt_tokens = len("<s>") - 2 + len("User: hi\nAssistant:")
    assert body == {
        "object": "chat.completion",
        "model": "up",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 5, "total_tokens": prompt_tokens + 5},
    }


async def test_a_stream_has_openais_shape(stack: Stack) -> None:
    request = chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {(chunks[0]["id"], "chat.completion.chunk", "up")}
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks[:-1]] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo"}, None),
        ({}, "stop"),
    ]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5


async def test_without_include_usage_no_chunk_speaks_of_it(stack: Stack) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True))
    assert all("usage" not in e and e["choices"] for e in events(response)[:-1])


async def test_every_model_that_runs_gets_its_own_prompt(stack: Stack) -> None:
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=chat())
        await client.post("/v1/chat/completions", json=chat(eft={"scale": 0}))
        await client.post("/v1/chat/completions", json=chat(model="small"))
    up, chat_alone, plain = stack.service.requests
    assert list(up.prompts) == ["large", "small", "small-chat"]
    assert len(up.prompts["large"]) == 1 + len("User: hi\nAssistant:")
    assert len(up.prompts["small"]) == len("<|user|>hi\n<|assistant|>")
    assert up.prompts["small"] == up.prompts["small-chat"]
    assert list(chat_alone.prompts) == ["small-chat"]
    assert chat_alone.combination.terms == (Term("small-chat", "small-chat", 1.0, weight=1.0),)
    assert list(plain.prompts) == ["small"]
    assert plain.combination.terms == (Term("small", "small", 1.0),)


TOLD = {"model": "small", "system_prompt": "No jokes.", "weight": 1.5}
STEERED = {"base": "small", "reference": "small", "tuned": TOLD}
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("path", "body", "before"),
    [
        ("chat/completions", {"messages": [TURN]}, "<|system|>No jokes.\n"),
        ("completions", {"prompt": "hi"}, "No jokes.\n"),
        ("score", {"messages": [TURN], "completion": "a"}, "<|system|>No jokes.\n"),
        ("score", {"prompt": "hi", "completion": "a"}, "No jokes.\n"),
    ],
)
async def test_a_terms_system_prompt_is_in_its_own_prompt_alone(
    tmp_path: Path, path: str, body: dict[str, Any], before: str
) -> None:
    models = {"small": {"path": str(save_tokenizer(tmp_path / "small"))}}
    stack = Stack(AppConfig.parse({"models": models, "recipes": {"steered": STEERED}}))
    stack.service.answer = lambda _: [UnavailableError("enough seen")]
    async with stack.client() as client:
        await client.post(f"/v1/{path}", json={"model": "steered", **body})
    [request] = stack.service.requests
    assert list(request.prompts) == ["small", "small@tuned"]
    assert len(request.prompts["small@tuned"]) == len(request.prompts["small"]) + len(before)


async def test_defaults_are_openais_and_the_configs(stack: Stack) -> None:
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=chat(seed=5))
    [request] = stack.service.requests
    assert request.sampling == SamplingParams(seed=5, max_tokens=77)
    assert [(term.name, term.coefficient) for term in request.combination.terms] == [
        ("large", 1.0),
        ("small", -1.0),
        ("small-chat", 1.0),
    ]
    assert (request.combination.truncate_top_p, request.combination.rewards) == (1.0, ())
    assert request.tenant == "anonymous"


async def test_all_parameters_arrive(stack: Stack) -> None:
    fields = {"temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": 9, "stop": ["a", "b"]}
    knobs = {"scale": 1.5, "weights": {"small-chat": 2}, "truncate_top_p": 0.9}
    request = chat(**fields, ignore_eos=True, max_completion_tokens=3, eft=knobs)
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=request)
    [got] = stack.service.requests
    assert got.sampling == SamplingParams(
        temperature=0, top_p=0.5, top_k=4, min_p=0.1, seed=9, stop=("a", "b"), ignore_eos=True, max_tokens=3
    )
    up_scaled = (
        Term("large", "large", 1.5, ratio=1.5),
        Term("small", "small", -2.5, ratio=-1.5),
        Term("small-chat", "small-chat", 2.0, weight=2.0),
    )
    assert got.combination == Combination(up_scaled, 0.9, recipe="up")


async def test_each_choice_has_an_id_a_seed_and_a_stream_of_its_own(stack: Stack) -> None:
    def answer(request: GenerationRequest) -> list[object]:
        return deltas("ab", "c", finish=FinishReason.LENGTH) if request.request_id.endswith("-1") else deltas("x")  # type: ignore[return-value]

    stack.service.answer = answer  # type: ignore[assignment]
    async with stack.client() as client:
        streamed = await client.post("/v1/chat/completions", json=chat(n=3, seed=7, stream=True))
        whole = (await client.post("/v1/chat/completions", json=chat(n=3, seed=7))).json()
    requests = stack.service.requests
    assert len({r.request_id for r in requests}) == 6
    seeds = [r.sampling.seed for r in sorted(requests[:3], key=lambda r: r.request_id)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    for event in events(streamed)[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "x", 1: "abc", 2: "x"}
    assert reasons == {0: "stop", 1: "length", 2: "stop"}
    assert [(c["message"]["content"], c["finish_reason"]) for c in whole["choices"]] == [
        ("x", "stop"),
        ("abc", "length"),
        ("x", "stop"),
    ]
    assert whole["usage"]["completion_tokens"] == 5


async def test_a_request_without_a_seed_draws_one(stack: Stack) -> None:
    async with stack.client() as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=chat())
    first, second = (r.sampling.seed for r in stack.service.requests)
    assert first != second
    assert 0 <= first < 2**63


async def test_the_openai_client_reads_both(stack: Stack) -> None:
    client = stack.openai()
    whole = await client.chat.completions.create(
        model="up", messages=[{"role": "user", "content": "hi"}], extra_body={"eft": {"scale": 0.5}}
    )
    assert whole.choices[0].message.content == "Hello"
    assert stack.service.requests[0].combination.terms[0].coefficient == 0.5
    stream = await client.chat.completions.create(
        model="up",
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert len(stack.service.requests[1].prompts["small"]) == len("<|user|>a\nb\n<|assistant|>")


async def test_the_openai_client_lists_models(stack: Stack) -> None:
    client = stack.openai()
    assert [m.id async for m in client.models.list()] == ["up", "down", "large", "small", "small-chat"]
    assert (await client.models.retrieve("down")).object == "model"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("nobody")


async def test_without_a_default_an_answer_may_fill_the_context(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path))
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=chat())
    (request,) = stack.service.requests
    assert request.sampling.max_tokens == stack.service.context_length - max(map(len, request.prompts.values()))


async def test_usage_says_how_many_prompt_tokens_were_cached(stack: Stack) -> None:
    used = {"large": ModelUsage(19, 16), "small": ModelUsage(9, 0), "small-chat": ModelUsage(9, 9)}

    def answer(request: GenerationRequest) -> list[Delta]:
        usage = Usage(models=used, seconds=1.0)
        return [Delta(text="a", token_ids=[65], finish_reason=FinishReason.STOP, usage=usage)]

    stack.service.answer = answer
    async with stack.client() as client:
        whole = (await client.post("/v1/chat/completions", json=chat(n=2))).json()
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
