"""`/openapi.json` is true: requests are taken as it says, and answers look as it says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, deltas, make_config
from openapi_checks import Description, full_answer, make_stack
from openapi_requests import (
    ANSWERED,
    BATCHES,
    CHAT,
    FILES,
    HI,
    MINIMAL,
    OF_TOOLS,
    REFUSED,
    RESPONSES,
    SCORE,
    TEXT,
    TOKENIZE,
    TOOLS,
)

from eft_serve.errors import UnavailableError
from eft_serve.tenancy.store import create_tenant
from eft_serve.types import Delta, FinishReason, GenerationRequest


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return make_stack(tmp_path, full_answer)


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Description:
    return Description(Stack(make_config(tmp_path_factory.mktemp("described"))).app)


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


async def test_the_tokens_of_a_chat_are_described(stack: Stack, description: Description) -> None:
    body = {"model": "up", "messages": OF_TOOLS[:1], "chat_template_kwargs": {"style": "a"}, "tools": []}
    assert description.allows(TOKENIZE, body)
    async with stack.client() as client:
        response = await client.post(TOKENIZE, json=body)
    assert response.status_code == 200
    description.check(response, TOKENIZE)


class Calls:
    """Says something and calls a tool, in pieces of three characters."""

    TEXT = 'So: <tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'

    def __call__(self, request: GenerationRequest) -> Iterable[Delta]:
        for i in range(0, len(self.TEXT), 3):
            last = i + 3 >= len(self.TEXT)
            yield Delta(text=self.TEXT[i : i + 3], token_ids=[i], finish_reason=FinishReason.STOP if last else None)


@pytest.mark.parametrize("text", [Calls.TEXT, Calls.TEXT.removeprefix("So: ")])
@pytest.mark.parametrize("stream", [False, True])
async def test_calls_of_tools_are_described(
    stack: Stack, description: Description, monkeypatch: pytest.MonkeyPatch, text: str, stream: bool
) -> None:
    monkeypatch.setattr(Calls, "TEXT", text)
    stack.service.answer = Calls()
    body = MINIMAL[CHAT] | {"tools": TOOLS, "tool_choice": "required", "stream": stream}
    assert description.allows(CHAT, body)
    async with stack.client() as client:
        response = await client.post(CHAT, json=body)
    assert '"finish_reason":"tool_calls"' in response.text
    description.check(response, CHAT)


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


READ = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics")
STORED = [
    ("POST", FILES),
    ("GET", FILES),
    ("GET", f"{FILES}/{{file_id}}"),
    ("GET", f"{FILES}/{{file_id}}/content"),
    ("POST", BATCHES),
    ("GET", BATCHES),
    ("GET", f"{BATCHES}/{{batch_id}}"),
    ("POST", f"{BATCHES}/{{batch_id}}/cancel"),
    ("DELETE", f"{FILES}/{{file_id}}"),
]


async def test_answers_without_a_body_to_read_are_described(stack: Stack, description: Description) -> None:
    async with stack.client() as client:
        for path in READ:
            response = await client.get(path.replace("{name}", "up"))
            assert response.status_code == 200
            description.check(response, path)
        stack.service.missing = "large"
        description.check(await client.get("/v1/models/nope"), "/v1/models/{name}")
        description.check(await client.get("/ready"), "/ready")
    async with stack.client(peer="10.0.0.9") as client:
        description.check(await client.get("/metrics"), "/metrics")
        description.check(await client.get("/v1/models"), "/v1/models")


async def test_files_and_batches_are_described(stack: Stack, description: Description) -> None:
    ids: dict[str, str] = {}
    form: dict[str, Any] = {"files": {"file": ("a.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}
    async with stack.client() as client:

        async def send(method: str, path: str, **kwargs: Any) -> Any:
            url = path.replace("{file_id}", ids.get("file", "")).replace("{batch_id}", ids.get("batch", ""))
            response = await client.request(method, url, **kwargs)
            description.check(response, path)
            return response

        other = (await send(*STORED[0], **form)).json()["id"]
        ids["file"] = (await send(*STORED[0], **form)).json()["id"]
        for method, path in STORED[1:]:
            fields = {"input_file_id": other, "metadata": {"a": "b"}}
            asked = {"json": MINIMAL[BATCHES] | fields} if (method, path) == ("POST", BATCHES) else {}
            response = await send(method, path, **asked)
            assert response.status_code == 200, (path, response.text)
            if asked:
                ids["batch"] = response.json()["id"]
        for method, path in STORED:  # the file is gone, the batch exists, and neither does elsewhere
            ids["batch"] = "batch_nope"
            assert (await send(method, path, params={"limit": "x"})).status_code in (400, 404, 415)
    off = Stack(make_config(Path(stack.service.config.server.files_url or "").parent / "off"))
    async with off.client() as client:
        for method, path in STORED:
            assert (await send(method, path)).status_code == 400


def test_every_operation_is_tested(description: Description) -> None:
    assert description.operations == {
        *(("GET", path) for path in READ),
        *STORED,
        *(("POST", path) for path in MINIMAL),
    }


@pytest.mark.parametrize(
    ("path", "name", "allowed", "refused"),
    [
        (FILES, "limit", 10_000, 10_001),
        (FILES, "order", "asc", "up"),
        (FILES, "purpose", "batch", None),
        (BATCHES, "limit", 100, 0),
        (BATCHES, "after", "batch_x", "x" * 257),
    ],
)
async def test_parameters_of_queries_are_described(
    stack: Stack, description: Description, path: str, name: str, allowed: Any, refused: Any
) -> None:
    allows = description.query(path)[name]
    assert (allows(allowed), allows(refused)) == (True, False)
    if name == "after" or refused is None:
        return  # it depends on what is stored
    async with stack.client() as client:
        assert (await client.get(path, params={name: allowed})).status_code == 200
        assert (await client.get(path, params={name: refused})).status_code == 400


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
