"""`eft.components` and `best_of` in chat and text completions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, events, make_config

from eft_serve.types import Delta, FinishReason, GenerationRequest, SpecDecodeStats, TokenComponents, Usage


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


def described(letter: str, reward: float = 0.5, num_top: int = 0) -> TokenComponents:
    """What three models and one reward say of a token; `<s>` is token 0, bytes follow."""
    top = [TokenComponents(i, -1.0 - i, [-1.0, -2.0, -3.0], [1.0], 0.5) for i in range(num_top)]
    return TokenComponents(token_id(letter), -0.5, [-1.0, -2.0, -3.5], [-1.5], reward, top)


def token_id(letter: str) -> int:
    return ord(letter) - ord("a") + 65  # "!" is 1


def answer(request: GenerationRequest) -> Iterable[Delta]:
    """Two letters; the second candidate and the fourth have the largest reward."""
    candidate = int(request.request_id.rpartition("-")[2])
    rewards = [0.5, 2.0, -1.0, 2.0][candidate % 4]
    for letter, last in (("ab"[0], False), ("cdef"[candidate % 4], True)):
        told = None if request.components is None else [described(letter, rewards, request.components)]
        reason = FinishReason.STOP if last else None
        usage = Usage(models={}, seconds=1.0, spec_decode=SpecDecodeStats(1, 1, 2)) if last else None
        yield Delta(text=letter, token_ids=[token_id(letter)], finish_reason=reason, components=told, usage=usage)


async def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    stack.service.answer = answer
    async with stack.client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return events(response) if body.get("stream") else response.json()


COMPLETION = {"model": "up", "prompt": "x"}
A = {
    "token_id": 65,
    "token": "a",
    "logprob": -0.5,
    "models": {"large": -1.0, "small": -2.0, "small-chat": -3.5},
    "rewards": {"small-chat": -1.5},
    "reward": 0.5,
}


@pytest.mark.parametrize(("path", "body"), [("chat/completions", chat()), ("completions", COMPLETION)])
async def test_a_choice_has_its_tokens_components_when_asked_for(stack: Stack, path: str, body: dict[str, Any]) -> None:
    whole = await post(stack, f"/v1/{path}", {**body, "eft": {"components": True}})
    assert whole["choices"][0]["eft"] == {"tokens": [A, A | {"token_id": 67, "token": "c"}]}
    with_top = await post(stack, f"/v1/{path}", {**body, "eft": {"components": 2}})
    top = with_top["choices"][0]["eft"]["tokens"][0]["top"]
    assert [(t["token"], t["models"]["large"]) for t in top] == [("<s>", -1.0), ("!", -1.0)]
    assert all("top" not in t for t in top)
    plain = [await post(stack, f"/v1/{path}", {**body, "eft": eft}) for eft in ({"components": False}, {})]
    assert all("eft" not in each["choices"][0] for each in plain)
    assert [r.components for r in stack.service.requests] == [0, 2, None, None]


async def test_a_streams_chunk_has_those_of_its_tokens(stack: Stack) -> None:
    body = {**COMPLETION, "eft": {"components": True}, "stream": True, "return_token_ids": True}
    *chunks, done = await post(stack, "/v1/completions", body)
    assert done == "[DONE]"
    told = [(c["choices"][0]["token_ids"], c["choices"][0]["eft"]["tokens"]) for c in chunks]
    assert told == [([65], [A]), ([67], [A | {"token_id": 67, "token": "c"}])]


async def test_models_that_count_for_nothing_are_prompted_too_and_the_usage_stays(stack: Stack) -> None:
    only_tuned = chat(eft={"scale": 0})
    plain = await post(stack, "/v1/chat/completions", only_tuned)
    looked_at = await post(stack, "/v1/chat/completions", only_tuned | {"eft": {"scale": 0, "components": True}})
    first, second = stack.service.requests
    assert (list(first.prompts), list(second.prompts)) == (["small-chat"], ["large", "small", "small-chat"])
    assert first.prompts["small-chat"] == second.prompts["small-chat"] != second.prompts["large"]
    assert plain["usage"] == looked_at["usage"]


async def test_a_plain_model_has_components_and_no_reward(stack: Stack) -> None:
    stack.service.answer = lambda _: [
        Delta(
            text="a",
            token_ids=[65],
            finish_reason=FinishReason.STOP,
            components=[TokenComponents(65, -0.5, [-0.5], [], 0.0)],
        )
    ]
    async with stack.client() as client:
        body = {**COMPLETION, "model": "small", "eft": {"components": True}}
        [choice] = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["eft"]["tokens"] == [A | {"models": {"small": -0.5}, "rewards": {}, "reward": None}]


async def test_the_best_come_first_and_the_earlier_of_equals(stack: Stack) -> None:
    whole = await post(stack, "/v1/completions", {**COMPLETION, "best_of": 4, "n": 3, "seed": 7})
    assert [(c["index"], c["text"], c["eft"]) for c in whole["choices"]] == [
        (0, "ad", {"reward": 4.0}),
        (1, "af", {"reward": 4.0}),
        (2, "ac", {"reward": 1.0}),
    ]
    assert whole["usage"]["completion_tokens"] == 8, "every candidate's tokens count"
    requests = sorted(stack.service.requests, key=lambda r: r.request_id)
    assert requests[0].sampling.seed == 7
    assert len({r.sampling.seed for r in requests}) == 4
    assert {r.components for r in requests} == {0}


async def test_one_of_several_with_what_was_asked_of_it(stack: Stack) -> None:
    eft = {"components": True, "report": True}
    whole = await post(stack, "/v1/chat/completions", chat(best_of=2, eft=eft, return_token_ids=True))
    [choice] = whole["choices"]
    assert choice["message"]["content"] == "ad"
    assert choice["token_ids"] == [65, 68]
    assert (choice["eft"]["reward"], len(choice["eft"]["tokens"])) == (4.0, 2)
    assert whole["usage"]["eft"]["drafted"] == 2


async def test_best_of_one_changes_nothing(stack: Stack) -> None:
    whole = await post(stack, "/v1/completions", {**COMPLETION, "model": "small", "best_of": 1})
    assert "eft" not in whole["choices"][0]
    assert stack.service.requests[0].components is None


async def test_a_stream_of_all_candidates_ends_each_with_its_reward(stack: Stack) -> None:
    *chunks, _ = await post(stack, "/v1/chat/completions", chat(stream=True, best_of=2, n=2))
    rewards = {c["choices"][0]["index"]: c["choices"][0]["eft"] for c in chunks if "eft" in c["choices"][0]}
    assert rewards == {0: {"reward": 1.0}, 1: {"reward": 4.0}}
