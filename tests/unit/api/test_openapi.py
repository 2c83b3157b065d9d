"""`/openapi.json` is true: requests are taken as it says, and answers look as it says."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import Stack, deltas, make_config
from hypothesis import HealthCheck, given, settings
from openapi_checks import Description, full_answer

from eft_serve.errors import UnavailableError
from eft_serve.tenancy.store import create_tenant

CHAT, TEXT, RESPONSES, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/score"
HI = {"role": "user", "content": "hi"}
EVERYTHING = {"eft": {"components": 2, "report": True}, "stream": False}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"model": "up", "messages": [HI]},
    TEXT: {"model": "up", "prompt": "a"},
    RESPONSES: {"model": "up", "input": "hi"},
    SCORE: {"model": "up", "prompt": "a", "completion": "b"},
}


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path), full_answer)


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Description:
    return Description(Stack(make_config(tmp_path_factory.mktemp("described"))).app)


ANSWERED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {}),
    (CHAT, EVERYTHING | {"logprobs": True, "top_logprobs": 2, "n": 2, "return_token_ids": True}),
    (CHAT, {"best_of": 3, "n": 2}),
    (CHAT, {"stream": True}),
    (CHAT, STREAM | {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "eft": {"components": 2}}),
    (CHAT, {"model": "small", "eft": {"components": 1}}),
    (CHAT, {"stop": "x", "logit_bias": {"7": 1.5}, "max_tokens": 2.0, "temperature": None, "eft": None, "n": None}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "refusal": None}]}),
    (CHAT, {"eft": {"components": 1.0, "speculative": {"num_tokens": 2.0}}}),
    (CHAT, {"tools": [], "store": False, "response_format": {"type": "text"}, "stop": ["x", "y"], "top_k": -1}),
    (TEXT, {}),
    (TEXT, EVERYTHING | {"logprobs": 2, "n": 2}),
    (TEXT, STREAM | {"logprobs": 2, "eft": {"components": 2}}),
    (TEXT, {"prompt": ["a"]}),
    (TEXT, {"prompt": [66, 67]}),
    (TEXT, {"prompt": [[66, 67]], "echo": False, "suffix": None}),
    (RESPONSES, {}),
    (RESPONSES, {"stream": True}),
    (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "eft": {"components": 2}}),
    (RESPONSES, {"stream": True, "include": ["message.output_text.logprobs"], "eft": {"components": 0}}),
    (RESPONSES, {"input": [HI, {"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "store": None}),
    (RESPONSES, {"instructions": "I.", "metadata": {"a": "b"}, "user": "me", "text": {"format": {"type": "text"}}}),
    (SCORE, {}),
    (SCORE, {"components": 2}),
    (SCORE, {"model": "small", "prompt": [66], "completion": [67, 68]}),
    (SCORE, {"prompt": None, "messages": [HI]}),
]


@pytest.mark.parametrize(("path", "fields"), ANSWERED)
async def test_a_described_request_gets_a_described_answer(
    stack: Stack, description: Description, path: str, fields: dict[str, Any]
) -> None:
    body = MINIMAL[path] | fields
    assert description.allows(path, body)
    async with stack.client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    description.check(response, path)


async def test_several_scores_are_described(stack: Stack, description: Description) -> None:
    body = {"model": "up", "items": [{"prompt": "a", "completion": "b"}, {"messages": [HI], "completion": [67]}]}
    assert description.allows(SCORE, body)
    async with stack.client() as client:
        response = await client.post(SCORE, json=body)
    assert response.status_code == 200
    description.check(response, SCORE)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"max_tokens": 0}),
    (CHAT, {"max_tokens": 2.5}),
    (CHAT, {"top_k": -2}),
    (CHAT, {"temperature": "1"}),
    (CHAT, {"nonsense": None}),
    (CHAT, {"logit_bias": {"x": 1}}),
    (CHAT, {"logit_bias": {"7": 101}}),
    (CHAT, {"stop": [""]}),
    (CHAT, {"stop": ["x"] * 17}),
    (CHAT, {"tools": [{"type": "function"}]}),
    (CHAT, {"response_format": {"type": "xml"}}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "nobody", "content": "a"}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
    (CHAT, {"messages": [HI | {"audio": {}}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]}),
    (CHAT, {"eft": {"components": 21}}),
    (CHAT, {"eft": {"speculative": {"num_tokens": 0}}}),
    (TEXT, {"prompt": {"a": 1}}),
    (TEXT, {"logprobs": True}),
    (RESPONSES, {"store": True}),
    (RESPONSES, {"max_tokens": 5}),
    (RESPONSES, {"n": 2}),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}),
    (SCORE, {"components": -1}),
    (SCORE, {"stream": True}),
]


@pytest.mark.parametrize(("path", "fields"), REFUSED)
async def test_what_is_not_described_is_refused_as_described(
    stack: Stack, description: Description, path: str, fields: dict[str, Any]
) -> None:
    body = MINIMAL[path] | fields
    assert not description.allows(path, body)
    async with stack.client() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 400
    description.check(response, path)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
async def test_an_error_in_mid_stream_is_described(stack: Stack, description: Description, path: str) -> None:
    stack.service.answer = lambda _: [*deltas("a", "b")[:1], UnavailableError("gone")]
    async with stack.client() as client:
        response = await client.post(path, json=MINIMAL[path] | {"stream": True})
    assert "gone" in response.text
    description.check(response, path)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, SCORE])
async def test_every_error_is_described(tmp_path: Path, path: str) -> None:
    key = create_tenant(tmp_path / "tenants.yaml", "acme", ["up"], requests_per_minute=3)
    stack = Stack(make_config(tmp_path, tenants_file=str(tmp_path / "tenants.yaml"), request_timeout_s=0.2))
    description = Description(stack.app)
    body = MINIMAL[path]
    statuses = []
    async with stack.client(headers={"authorization": f"Bearer {key}"}) as client:

        async def post(answer: list[Any], **kwargs: Any) -> None:
            stack.service.answer = lambda _: answer
            response = await client.post(path, **({"json": body} | kwargs))
            description.check(response, path)
            statuses.append(response.status_code)

        await post([], headers={"authorization": "Bearer wrong"})
        await post([], json=body | {"model": "nope"})
        await post([], json=None, content=b"[", headers={"content-type": "application/json"})
        await post([], json=None, content=b"a=b", headers={"content-type": "text/plain"})
        await post([], json=body | {"user": "a" * 2**22})
        await post([UnavailableError("gone")])
        await post([RuntimeError("a fault of ours")])
        await post([])  # nothing comes
        await post([])  # one too many
    assert statuses == [401, 404, 400, 415, 413, 503, 500, 504, 429]
    plain = Stack(make_config(tmp_path / "plain"))
    async with plain.client(peer="10.0.0.9") as client:
        response = await client.post(path, json=body)
    assert response.status_code == 403
    description.check(response, path)


async def test_answers_without_a_body_to_read_are_described(stack: Stack, description: Description) -> None:
    visited = []
    async with stack.client() as client:
        for path in ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"):
            response = await client.get(path.replace("{name}", "up"))
            assert response.status_code == 200
            description.check(response, path)
            visited.append(("GET", path))
        stack.service.missing = "large"
        description.check(await client.get("/v1/models/nope"), "/v1/models/{name}")
        description.check(await client.get("/ready"), "/ready")
    async with stack.client(peer="10.0.0.9") as client:
        description.check(await client.get("/metrics"), "/metrics")
        description.check(await client.get("/v1/models"), "/v1/models")
    assert description.operations == {*visited, *(("POST", path) for path in MINIMAL)}


def test_keys_are_described_as_this_server_asks_for_them(tmp_path: Path) -> None:
    create_tenant(tmp_path / "tenants.yaml", "acme", ["up"])
    plain = Description(Stack(make_config(tmp_path)).app).document
    tenanted = Description(Stack(make_config(tmp_path, tenants_file=str(tmp_path / "tenants.yaml"))).app).document
    assert (plain["security"], tenanted["security"]) == ([{}, {"bearer": []}], [{"bearer": []}])
    for document in (plain, tenanted):
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        without = {path for path, item in document["paths"].items() if item.get("get", {}).get("security") == []}
        assert without == {"/health", "/ready"}


async def test_the_description_is_served_to_everybody(stack: Stack) -> None:
    async with stack.client(peer="10.0.0.9") as client:
        response = await client.get("/openapi.json")
        assert (await client.get("/docs")).status_code == 404  # such a page would load scripts from elsewhere
    assert (response.status_code, response.json()) == (200, stack.app.openapi())


def test_nothing_is_described_that_never_comes(description: Description) -> None:
    assert "422" not in str(description.document)
    assert "HTTPValidationError" not in description.document["components"]["schemas"]


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("path", MINIMAL)
def test_no_generated_request_gets_an_answer_that_is_not_described(stack: Stack, path: str, mode: str) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="requests are generated where it is installed")
    checks = importlib.import_module("schemathesis.specs.openapi.checks")
    stack.service.context_length = 2**40
    operation = schemathesis.openapi.from_dict(stack.app.openapi())[path]["POST"]
    statuses: set[int] = set()

    @settings(max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and may_be_a_name(case.body.get("model")):
            case.body["model"] = "up"  # otherwise nearly every answer would be 404
        response = runner.run(post(case.as_transport_kwargs(base_url="http://localhost")))
        # what is described may still be refused: some fields depend on one another
        case.validate_response(response, excluded_checks=[checks.positive_data_acceptance])
        statuses.add(response.status_code)

    async def post(sent: dict[str, Any]) -> httpx.Response:
        async with stack.client() as client:
            content = json.dumps(sent["json"]).encode() if "json" in sent else sent.get("data")
            return await client.post(path, content=content, headers=sent["headers"])

    with asyncio.Runner() as runner:
        run()
    assert statuses == ({200, 400} if mode == "POSITIVE" else {400}) | (statuses & {415})  # where there is no body


def may_be_a_name(name: object) -> bool:
    """Whether it could be a model's name."""
    return isinstance(name, str) and len(name) <= 256
