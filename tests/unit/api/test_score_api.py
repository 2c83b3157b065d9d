"""`/v1/score`: what reaches the models, what comes back, and mistakes named by their item."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Connection, Stack, make_config, save_tokenizer

from eft_serve.config import AppConfig
from eft_serve.errors import ContextLengthError, to_failure
from eft_serve.tenancy.store import create_tenant
from eft_serve.types import Combination, Delta, FinishReason, GenerationRequest, Reward, Term, TokenComponents

LIMIT_S = 5.0


def answer(request: GenerationRequest) -> Iterable[Delta]:
    """Token by token, with a reward of 0.5 each."""
    given = request.forced_token_ids or []
    for i, token_id in enumerate(given):
        told = TokenComponents(token_id, -0.25, [-1.0] * len(request.prompts), [0.5], 0.5)
        reason = FinishReason.LENGTH if i == len(given) - 1 else None
        yield Delta(text="", token_ids=[token_id], components=[told], finish_reason=reason)


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path), answer)


async def post(stack: Stack, body: dict[str, Any]) -> tuple[int, Any]:
    async with stack.client() as client:
        response = await client.post("/v1/score", json={"model": "up", **body})
    return response.status_code, response.json()


def items(*completions: object) -> dict[str, Any]:
    return {"items": [{"prompt": "ab", "completion": completion} for completion in completions]}


async def test_one_item_beside_the_options(stack: Stack) -> None:
    status, body = await post(stack, {"prompt": "ab", "completion": "cd"})
    assert status == 200
    token = {
        "token_id": 67,
        "token": "c",
        "logprob": -0.25,
        "models": {"large": -1.0, "small": -1.0, "small-chat": -1.0},
        "rewards": {"small-chat": 0.5},
        "reward": 0.5,
    }
    total = {
        "logprob": -0.5,
        "models": {"large": -2.0, "small": -2.0, "small-chat": -2.0},
        "reward": 1.0,
        "num_tokens": 2,
    }
    assert body == {
        "object": "list",
        "model": "up",
        "data": [
            {"index": 0, "tokens": [token, token | {"token_id": 68, "token": "d"}], "total": total, "split_token": None}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


async def test_every_item_is_a_request_and_the_answers_keep_their_order(stack: Stack) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "completion": "abc"}
    eft = {"scale": 0.0, "weights": {"small-chat": 2.0}, "truncate_top_p": 0.9}
    body = {"items": [{"prompt": [7, 8], "completion": [65, 0]}, chat], "eft": eft, "components": 3}
    status, answered = await post(stack, body)
    assert status == 200
    assert [[t["token_id"] for t in each["tokens"]] for each in answered["data"]] == [[65, 0], [65, 66, 67]]
    assert answered["data"][0]["tokens"][1]["token"] == "<s>"
    ids, text = sorted(stack.service.requests, key=lambda r: r.request_id)
    assert ids.prompts == {"large": [7, 8], "small": [7, 8], "small-chat": [7, 8]}
    assert len(text.prompts["large"]) == 1 + len("User: hi\nAssistant:")
    assert len(text.prompts["small"]) == len("<|user|>hi\n<|assistant|>")
    every = (
        Term("large", "large", 0.0),
        Term("small", "small", -1.0),
        Term("small-chat", "small-chat", 2.0, weight=2.0),
    )
    for request in (ids, text):
        assert request.combination == Combination(every, 0.9, (Reward("small-chat", "small-chat", "small", 2.0),), "up")
        assert (request.components, request.speculative) == (3, None)
    assert (ids.forced_token_ids, text.forced_token_ids) == ([65, 0], [65, 66, 67])
    prompt_tokens = len(ids.prompts["small-chat"]) + len(text.prompts["small-chat"])
    assert answered["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": prompt_tokens + 5,
    }


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"} | fields], "completion": "a"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "completion"),
        ({"completion": "a"}, None),
        ({"prompt": "a"}, "completion"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"prompt": "a", "completion": []}, "completion"),
        ({"prompt": "a", "completion": [1.5]}, "completion"),
        ({"prompt": "a", "completion": ["a", "b"]}, "completion"),
        ({"prompt": "a", "completion": [257]}, "completion"),
        ({"prompt": [], "completion": "a"}, "prompt"),
        ({"prompt": [257], "completion": "a"}, "prompt"),
        (message(foo=1), "messages.0.foo"),
        ({"items": []}, "items"),
        ({"items": {}}, "items"),
        (items(*"a" * 65), "items"),
        (items("a", "a") | {"prompt": "a"}, "prompt"),
        ({"items": [{"prompt": "a", "messages": [], "completion": "a"}]}, "items.0.messages"),
        ({"items": [{"completion": "a"}]}, "items.0"),
        ({"items": [message() | {"prompt": "a"}]}, "items.0"),
        ({"items": ["a"]}, "items.0"),
        ({"items": [message(), message(name=1)]}, "items.1.messages.0.name"),
        ({"items": [message(), message(role="robot")]}, "items.1.messages.0.role"),
        ({"items": [message(), {**message(), "foo": 1}]}, "items.1.foo"),
        (items("a", "a", "a", [1, 257]), "items.3.completion"),
        (items("a", [-1]), "items.1.completion"),
        (items("a", ""), "items.1.completion"),
        (items("a", "x" * 510), "items.1.completion"),
        (items("a") | {"components": 21}, "components"),
        (items("a") | {"components": True}, "components"),
        (items("a") | {"eft": {"scale": 1e9}}, "eft.scale"),
        (items("a") | {"eft": {"weights": {"large": 1}}}, "eft.weights"),
        (items("a") | {"eft": {"weights": {"small-chat": "1"}}}, "eft.weights.small-chat"),
        (items("a") | {"eft": {"components": True}}, "eft.components"),
        (items("a") | {"eft": {"speculative": {}}}, "eft.speculative"),
        (items("a") | {"model": "small", "eft": {"scale": 1.0}}, "eft"),
        (items("a") | {"temperature": 0}, "temperature"),
        (items("a") | {"stream": True}, "stream"),
    ],
)
async def test_a_wrong_field_is_named(stack: Stack, body: dict[str, Any], param: str | None) -> None:
    status, answered = await post(stack, body)
    error = answered["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert (param or "give either") in error["message"]
    assert stack.service.requests == []


async def test_nan_is_no_number(stack: Stack) -> None:
    async with stack.client() as client:
        content = b'{"model": "up", "prompt": "a", "completion": "a", "eft": {"scale": NaN}}'
        response = await client.post("/v1/score", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400


async def test_a_completion_that_fills_the_context_is_scored(stack: Stack) -> None:
    stack.service.context_length = 10
    status, _ = await post(stack, items("x" * 7))
    assert status == 200
    status, body = await post(stack, items("x" * 8))
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")


async def test_what_a_coordinator_refuses_is_named_by_its_item(stack: Stack) -> None:
    refusal = to_failure(ContextLengthError("completion: has 2 tokens, and there is room for 1", param="completion"))

    def refusing(request: GenerationRequest) -> Iterable[Delta]:
        if request.forced_token_ids == [65, 66]:
            return [Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=refusal)]
        return answer(request)

    stack.service.answer = refusing
    status, body = await post(stack, items("a", "b", "ab"))
    assert (status, body["error"]["param"]) == (400, "items.2.completion")
    assert body["error"]["message"] == "items.2.completion: has 2 tokens, and there is room for 1"
    assert body["error"]["code"] == "context_length_exceeded"


async def test_models_of_several_vocabularies_share_no_completion(tmp_path: Path) -> None:
    paths = {"a": save_tokenizer(tmp_path / "a"), "b": save_tokenizer(tmp_path / "b", extra_tokens=["more"])}
    config = AppConfig.parse(
        {
            "models": {name: {"path": str(path)} for name, path in paths.items()},
            "recipes": {"up": {"base": "a", "reference": "b", "tuned": "b"}},
        }
    )
    status, body = await post(Stack(config, answer), {"prompt": "x", "completion": "a"})
    assert (status, body["error"]["param"]) == (400, "completion")


async def test_a_disconnect_frees_every_item(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    key = create_tenant(file, "acme", ["up"], max_concurrent_requests=3)
    stack = Stack(make_config(tmp_path, tenants_file=str(file)), lambda request: list(answer(request))[:1])
    limits = stack.app.state.context.limits
    headers = {"authorization": f"Bearer {key}"}
    connection = Connection(stack.app, "/v1/score", {"model": "up", **items("ab", "cd", "ef")}, headers)
    serving = asyncio.create_task(connection.run())
    async with asyncio.timeout(LIMIT_S):
        while stack.metric("eft_tenant_requests_total") is None and stack.service.num_running < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert stack.service.num_running == limits.num_running("acme") == 3
        connection.gone.set()
        await serving
    assert (stack.service.num_running, stack.service.num_closed_early) == (0, 3)
    assert limits.num_running("acme") == 0
    assert stack.metric("eft_tenant_requests_total", tenant="acme", recipe="up", status="499") == 1
    assert stack.metric("eft_tenant_generation_tokens_total", tenant="acme") == 3


async def test_tenants_and_their_limits_hold(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    key = create_tenant(file, "acme", ["up"], max_concurrent_requests=2)
    stack = Stack(make_config(tmp_path, tenants_file=str(file)), answer)
    async with stack.client(headers={"authorization": f"Bearer {key}"}) as client:
        many = await client.post("/v1/score", json={"model": "up", **items("a", "b", "c")})
        foreign = await client.post("/v1/score", json={"model": "small", **items("a")})
        fine = await client.post("/v1/score", json={"model": "up", **items("a", "b")})
    async with stack.client() as client:
        nobody = await client.post("/v1/score", json={"model": "up", **items("a")})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "items")
    assert [foreign.status_code, fine.status_code, nobody.status_code] == [404, 200, 401]


async def test_it_takes_no_longer_than_a_request_may(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path, request_timeout_s=0.2), lambda _: [])
    status, body = await post(stack, items("a", "b"))
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert stack.service.num_running == 0
