"""Calls from web pages: preflights, the headers that let a page read an answer, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from api_fakes import Stack, chat, deltas, make_config

from eft_serve.errors import UnavailableError
from eft_serve.tenancy.store import create_tenant

PAGE, OTHER = "https://chat.example", "https://evil.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type, x-stainless-lang",
}


def stack_of(tmp_path: Path, *origins: str, tenants: bool = False, **kwargs: Any) -> Stack:
    """A stack that answers pages of these origins."""
    server: dict[str, Any] = {"cors_origins": list(origins)}
    if tenants:
        create_tenant(tmp_path / "tenants.yaml", "acme", ["up"])
        server["tenants_file"] = str(tmp_path / "tenants.yaml")
    return Stack(make_config(tmp_path, **server), **kwargs)


@pytest.mark.parametrize("tenants", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics", "/nothing"])
async def test_a_preflight_of_a_named_origin_is_answered_without_a_key(
    tmp_path: Path, path: str, tenants: bool
) -> None:
    stack = stack_of(tmp_path, PAGE, tenants=tenants)
    async with stack.client(headers={"origin": PAGE}) as client:
        response = await client.options(path, headers=PREFLIGHT | {"access-control-request-private-network": "true"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
    assert {"GET", "POST", "DELETE"} <= set(response.headers["access-control-allow-methods"].split(", "))
    assert response.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-credentials" not in response.headers


async def test_a_page_of_a_named_origin_can_read_every_answer(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, PAGE)
    requests = [
        (200, chat(), deltas("a")),
        (200, chat(stream=True), deltas("a")),
        (400, chat(nonsense=1), []),
        (404, chat(model="nope"), []),
        (503, chat(), [UnavailableError("gone")]),
        (500, chat(), [RuntimeError("a fault of ours")]),
    ]
    async with stack.client(headers={"origin": PAGE}) as client:
        for status, body, answer in requests:
            stack.service.answer = lambda _, answer=answer: answer  # type: ignore[misc]
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            assert response.headers["vary"] == "Origin"
            exposed = set(response.headers["access-control-expose-headers"].split(", "))
            assert {"x-request-id", "retry-after"} <= exposed
            assert "access-control-allow-credentials" not in response.headers


async def test_a_page_without_a_key_can_read_that_it_needs_one(tmp_path: Path) -> None:
    async with stack_of(tmp_path, PAGE, tenants=True).client(headers={"origin": PAGE}) as client:
        response = await client.get("/v1/models")
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (401, PAGE)


async def test_pages_of_other_origins_get_no_permission(tmp_path: Path) -> None:
    async with stack_of(tmp_path, PAGE, tenants=True).client(headers={"origin": OTHER}) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        response = await client.get("/v1/models")
    assert preflight.status_code == 400
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in response.headers


async def test_by_default_no_page_gets_permission(tmp_path: Path) -> None:
    async with Stack(make_config(tmp_path)).client() as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": PAGE})
        response = await client.get("/v1/models")
    assert preflight.status_code == 405
    assert not [name for r in (preflight, response) for name in r.headers if name.startswith("access-control")]


async def test_with_tenants_all_origins_may_be_named_and_credentials_stay_off(tmp_path: Path) -> None:
    async with stack_of(tmp_path, "*", tenants=True).client(headers={"origin": OTHER}) as client:
        preflight = await client.options("/v1/chat/completions", headers=PREFLIGHT)
        response = await client.get("/v1/models", headers={"cookie": "a=b"})
    for answer in (preflight, response):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (PAGE, 200),
        ("http://localhost:8000", 200),  # the server's own
        (OTHER, 403),
        ("http://localhost:3000", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
        (PAGE + ".evil.example", 403),
    ],
)
async def test_without_tenants_only_pages_of_named_origins_are_answered(
    tmp_path: Path, origin: str, status: int
) -> None:
    stack = stack_of(tmp_path, PAGE)
    async with stack.client(headers={"origin": origin}) as client:
        response = await client.post("/v1/chat/completions", json=chat())
    assert response.status_code == status
    assert len(stack.service.requests) == (status == 200)
    if status == 403:
        assert "cors_origins" in response.json()["error"]["message"]


async def test_a_named_origin_does_not_widen_the_other_rules_without_tenants(tmp_path: Path) -> None:
    stack = stack_of(tmp_path, PAGE)
    async with stack.client(peer="10.0.0.7", headers={"origin": PAGE}) as client:
        remote = await client.get("/v1/models")
    async with stack.client(headers={"origin": PAGE, "host": "chat.example"}) as client:
        rebound = await client.get("/v1/models")
    assert (remote.status_code, rebound.status_code) == (403, 403)
