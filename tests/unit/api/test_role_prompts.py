"""`eft.prompts`: single roles of a recipe read another prompt than the rest."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, make_config, save_tokenizer
from test_score_api import answer

from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.config import AppConfig
from eft_serve.errors import UnavailableError
from eft_serve.types import GenerationRequest, Term

TURN = {"role": "user", "content": "hi"}
RECIPES = {
    "guided": {"base": "small", "reference": "small", "tuned": {"model": "small", "name": "law", "weight": 0}},
    "told": {"base": "small", "reference": {"model": "small", "system_prompt": "No."}, "tuned": "small"},
    "closed": {"base": "small", "reference": "small", "tuned": "small", "bounds": {"prompts": ["base"]}},
}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    config = make_config(tmp_path).model_dump()
    return Stack(AppConfig.parse(config | {"recipes": RECIPES | config["recipes"]}))


async def post(stack: Stack, path: str, **body: Any) -> Any:
    async with stack.client() as client:
        return await client.post(f"/v1/{path}", json={"model": "guided"} | body)


def texts(stack: Stack, request: GenerationRequest) -> dict[str, str]:
    """Every term's prompt as text."""
    tokenizer = stack.app.state.context.renderer.tokenizer("small").tokenizer
    return {name: tokenizer.decode(ids) for name, ids in request.prompts.items()}


MESSAGES = [{"role": "system", "content": "Be rude."}, TURN]
RENDERED = "<|system|>Be rude.\n<|user|>hi\n<|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "read"), [("Once", "<s>Once"), ([1, 2], '!"'), (MESSAGES, RENDERED)], ids=["text", "ids", "messages"]
)
@pytest.mark.parametrize(
    ("path", "body", "rest"),
    [
        ("chat/completions", {"messages": [TURN]}, "<|user|>hi\n<|assistant|>"),
        ("completions", {"prompt": "hi"}, "<s>hi"),
        ("completions", {"prompt": [3]}, "#"),
    ],
)
async def test_any_form_of_prompt_in_either_endpoint(
    stack: Stack, path: str, body: dict[str, Any], rest: str, prompt: Any, read: str
) -> None:
    response = await post(stack, path, **body, eft={"scale": 1.5, "prompts": {"reference": prompt}})
    assert response.status_code == 200, response.text
    [request] = stack.service.requests
    assert request.combination.terms == (Term("small", "small", 1.5), Term("small@reference", "small", -0.5))
    assert texts(stack, request) == {"small": rest, "small@reference": read}


async def test_what_the_recipe_says_of_a_role_still_applies(stack: Stack) -> None:
    eft = {"prompts": {"reference": MESSAGES, "tuned": "a"}}
    await post(stack, "chat/completions", model="told", messages=[TURN], eft=eft)
    [request] = stack.service.requests
    assert texts(stack, request) == {
        "small": "<|user|>hi\n<|assistant|>",
        "small@reference": "<|system|>No.\n\nBe rude.\n<|user|>hi\n<|assistant|>",
        "small@tuned": "<s>a",
    }


async def test_usage_counts_the_prompt_of_the_first_term_whoever_gives_it(stack: Stack) -> None:
    usage = (await post(stack, "completions", prompt="hi", eft={"prompts": {"base": "longer"}})).json()["usage"]
    assert usage["prompt_tokens"] == len("longer") + 1


async def test_components_and_rewards_name_the_terms_of_the_request(stack: Stack) -> None:
    eft = {"components": True, "weights": {"law": 1}, "prompts": {"law": "a", "reference": "b"}}
    await post(stack, "completions", prompt="hi", eft=eft)
    [request] = stack.service.requests
    [reward] = request.combination.rewards
    assert [term.name for term in request.combination.terms] == ["small", "small@reference", "small@law"]
    assert (reward.name, reward.tuned, reward.reference) == ("law", "small@law", "small@reference")


@pytest.mark.parametrize(
    ("prompts", "param", "said"),
    [
        ({"reference": ""}, "reference", "at least 1 character"),
        ({"reference": []}, "reference", "not empty"),
        ({"reference": 1}, "reference", "a string, a list of token ids, or a list of messages"),
        ({"reference": None}, "reference", "a string, a list"),
        ({"reference": {"role": "user"}}, "reference", "a string, a list"),
        ({"reference": ["a"]}, "reference", "a string, a list"),
        ({"reference": [1, TURN]}, "reference", "a string, a list"),
        ({"reference": [True]}, "reference", "a string, a list"),
        ({"reference": [257]}, "reference", "token id 257 is not in 0..256"),
        ({"reference": [-1]}, "reference", "token id -1"),
        ({"reference": [1] * 600}, "reference", "has 600 tokens"),
        ({"reference": "x" * 600}, "reference", "has 601 tokens"),
        ({"reference": [TURN, MESSAGES[0]]}, "reference", "system comes first"),
        ({"reference": [TURN | {"content": None}]}, "reference.0.content", "must be a string"),
        ({"reference": [TURN | {"content": [{"type": "image_url"}]}]}, "reference.0.content.0", "text-only"),
        ({"reference": [TURN | {"tool_calls": [1]}]}, "reference.0.tool_calls.0", "valid dictionary"),
        ({"small": "x"}, "small", "not a role"),
        ({"law": "x", "tuned": "y"}, "tuned", "another name too"),
    ],
)
async def test_a_wrong_prompt_is_named_by_its_role(
    stack: Stack, prompts: dict[str, Any], param: str, said: str
) -> None:
    eft = {"scale": 2, "prompts": prompts}
    response = await post(stack, "chat/completions", messages=[TURN], eft=eft)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, f"eft.prompts.{param}")
    assert error["message"].startswith(f"eft.prompts.{param}: ")
    assert said in error["message"]
    assert stack.service.requests == []


@pytest.mark.parametrize(
    ("model", "prompts", "param"),
    [
        ("small", {"base": "x"}, "eft.prompts.base"),
        ("closed", {"reference": "x"}, "eft.prompts.reference"),
        ("told", {"reference": [1]}, "eft.prompts.reference"),
        ("guided", {str(i): "x" for i in range(65)}, "eft.prompts"),
        ("guided", {"x" * 300: "x"}, "eft.prompts." + "x" * 100),
    ],
)
async def test_a_role_that_takes_no_such_prompt_is_refused(
    stack: Stack, model: str, prompts: dict[str, Any], param: str
) -> None:
    response = await post(stack, "completions", model=model, prompt="a", eft={"scale": 2, "prompts": prompts})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_the_prompt_for_all_is_still_named_as_itself(stack: Stack) -> None:
    eft = {"scale": 2, "prompts": {"reference": "x"}}
    response = await post(stack, "completions", prompt="x" * 600, eft=eft)
    assert response.json()["error"]["param"] == "prompt"
    response = await post(stack, "completions", prompt=[300], eft=eft)
    assert response.json()["error"]["param"] == "prompt"


async def test_no_prompts_are_the_default(stack: Stack) -> None:
    unprompted: list[dict[str, Any]] = [{"prompts": None}, {"prompts": {}}, {}]
    for eft in unprompted:
        assert (await post(stack, "completions", prompt="a", seed=1, eft=eft)).status_code == 200
    assert {tuple(request.prompts) for request in stack.service.requests} == {("small",)}


async def test_token_ids_for_one_role_are_of_its_own_models_vocabulary(tmp_path: Path) -> None:
    paths = {"m": save_tokenizer(tmp_path / "m"), "wide": save_tokenizer(tmp_path / "wide", extra_tokens=["<extra>"])}
    recipe = {"base": "m", "reference": "wide", "tuned": {"model": "m", "name": "law", "weight": 0}, "scale": 2}
    models = {name: {"path": str(path)} for name, path in paths.items()}
    stack = Stack(AppConfig.parse({"models": models, "recipes": {"guided": recipe}}))
    response = await post(stack, "completions", prompt="a", eft={"prompts": {"reference": [257]}})
    assert response.status_code == 200, "its own model has this token"
    assert stack.service.requests[0].prompts == {"m": [0, 65], "wide": [257]}


async def test_a_long_prompt_for_one_role_leaves_the_event_loop_free(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.service.context_length = 50_000
    encode, threads = ModelTokenizer.encode, set[int]()

    def noted(*args: Any) -> list[int]:
        threads.add(threading.get_ident())
        return encode(*args)

    monkeypatch.setattr(ModelTokenizer, "encode", noted)
    await post(stack, "chat/completions", messages=[TURN], eft={"scale": 2, "prompts": {"reference": "x" * 10_000}})
    assert len(stack.service.requests[0].prompts["small@reference"]) == 10_001
    assert threading.get_ident() not in threads


async def score(stack: Stack, **body: Any) -> Any:
    stack.service.answer = lambda _: [UnavailableError("enough seen")]
    return await post(stack, "score", **body)


async def test_scores_read_the_prompts_of_roles_for_every_item(stack: Stack) -> None:
    items = [{"prompt": "a", "completion": "x"}, {"messages": [TURN], "completion": [5]}]
    await score(stack, items=items, eft={"prompts": {"reference": "b", "law": [1]}})
    first, second = stack.service.requests
    assert texts(stack, first) == {"small": "<s>a", "small@reference": "<s>b", "small@law": "!"}
    assert texts(stack, second) == texts(stack, first) | {"small": "<|user|>hi\n<|assistant|>"}


async def test_a_scored_text_follows_the_prompt_of_the_term_that_counts() -> None:
    recipe = {"base": "m", "reference": "m", "tuned": {"model": "m", "name": "law"}}
    stack = Stack(AppConfig.parse({"models": {"m": {"path": "zoo:base-small"}}, "recipes": {"guided": recipe}}), answer)
    body = {"prompt": "The capital is", "completion": "a"}
    split = [
        (await post(stack, "score", **body, eft={"prompts": {role: "Hello "}})).json()["data"][0]["split_token"]
        for role in ("reference", "base")
    ]
    assert split == [None, " a"]


@pytest.mark.parametrize("items", [{"prompt": "a", "completion": "x"}, {"items": [{"prompt": "a", "completion": "x"}]}])
async def test_a_wrong_prompt_of_a_score_is_of_no_item(stack: Stack, items: dict[str, Any]) -> None:
    response = await score(stack, **items, eft={"prompts": {"reference": [300]}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "eft.prompts.reference")
