"""Who is answered: tenants by key, and without tenants nobody but this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import Stack, chat, make_config

from eft_serve.api.auth import host_name, is_loopback
from eft_serve.errors import ConfigError
from eft_serve.tenancy.store import create_tenant


class Tenanted:
    """A stack with two tenants."""

    def __init__(self, tmp_path: Path) -> None:
        file = tmp_path / "tenants.yaml"
        self.acme = create_tenant(file, "acme", ["up", "small"], requests_per_minute=3)
        self.globex = create_tenant(file, "globex", ["down"], max_concurrent_requests=2)
        self.operator = create_tenant(file, "operator", [], metrics=True)
        self.stack = Stack(make_config(tmp_path, tenants_file=str(file)))

    def openai(self, key: str) -> openai.AsyncOpenAI:
        return self.stack.openai(key, peer="10.1.2.3", host="api.example")


@pytest.fixture
def tenanted(tmp_path: Path) -> Tenanted:
    return Tenanted(tmp_path)


async def test_a_tenant_sees_and_uses_its_own_recipes_only(tenanted: Tenanted) -> None:
    client = tenanted.openai(tenanted.acme)
    assert [m.id async for m in client.models.list()] == ["up", "small"]
    await client.completions.create(model="up", prompt="a")
    assert tenanted.stack.service.requests[0].tenant == "acme"
    with pytest.raises(openai.NotFoundError) as forbidden:
        await client.completions.create(model="down", prompt="a")
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="nope", prompt="a")
    assert forbidden.value.message.replace("down", "nope") == missing.value.message
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("down")


@pytest.mark.parametrize("header", [None, "Bearer eft-wrong", "Bearer", "Basic abc", "eft-wrong", "Bearer \u00e9"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/up", "/v1/chat/completions", "/v1/completions", "/metrics"])
async def test_every_wrong_key_is_the_same_error(tenanted: Tenanted, header: str | None, path: str) -> None:
    headers = {} if header is None else {b"authorization": header.encode()}
    async with tenanted.stack.client() as client:
        method = "POST" if "completions" in path else "GET"
        response = await client.request(method, path, headers=headers, content=b"not even JSON")
        reference = await client.get("/v1/models")
    assert (response.status_code, response.json()) == (401, reference.json())
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_probes_need_no_key_and_metrics_need_a_tenant_that_may(tenanted: Tenanted) -> None:
    async with tenanted.stack.client(peer="10.1.2.3") as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 200
        statuses = [
            (await client.get("/metrics", headers={"authorization": f"Bearer {key}"})).status_code
            for key in (tenanted.acme, tenanted.operator)
        ]
    assert statuses == [403, 200]


async def test_the_rate_limit_is_the_tenants_own(tenanted: Tenanted) -> None:
    acme, globex = tenanted.openai(tenanted.acme), tenanted.openai(tenanted.globex)
    for _ in range(3):
        await acme.completions.create(model="up", prompt="a")
    with pytest.raises(openai.RateLimitError) as caught:
        await acme.completions.create(model="up", prompt="a")
    assert "requests_per_minute" in caught.value.message
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    await globex.completions.create(model="down", prompt="a")


async def test_more_choices_than_may_ever_run_are_a_mistake_and_not_a_matter_of_waiting(tenanted: Tenanted) -> None:
    client = tenanted.openai(tenanted.globex)
    await client.completions.create(model="down", prompt="a", n=2)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model="down", prompt="a", n=3)
    assert caught.value.param == "n"


async def test_no_key_is_ever_logged(tenanted: Tenanted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await tenanted.openai(tenanted.acme).completions.create(model="up", prompt="a")
        with pytest.raises(openai.AuthenticationError) as caught:
            await tenanted.openai("eft-stolen-key").completions.create(model="up", prompt="a")
    logged = caplog.text + "".join(str(r.__dict__) for r in caplog.records if r.name.startswith("eft_serve"))
    assert "tenant acme" in logged
    assert tenanted.acme not in logged
    assert "stolen" not in logged + caught.value.message


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("127.9.9.9", {"host": "127.0.0.1:8000"}, 200),
        ("::1", {"host": "[::1]:8000"}, 200),
        ("::ffff:127.0.0.1", {}, 200),
        ("10.0.0.7", {}, 403),
        ("::ffff:10.0.0.7", {}, 403),
        ("fe80::1", {}, 403),
        ("10.0.0.7", {"x-forwarded-for": "127.0.0.1"}, 403),
        ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, 403),
        ("127.0.0.1", {"forwarded": "for=10.0.0.7"}, 403),
        ("127.0.0.1", {"host": "evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost.evil.example"}, 403),
        ("127.0.0.1", {"host": "[::1"}, 403),
    ],
)
async def test_without_tenants_only_this_machine_is_answered(
    tmp_path: Path, peer: str, headers: dict[str, Any], status: int
) -> None:
    stack = Stack(make_config(tmp_path))
    async with stack.client(peer) as client:
        response = await client.post("/v1/chat/completions", json=chat(), headers=headers)
        metrics = await client.get("/metrics", headers=headers)
    assert (response.status_code, metrics.status_code) == (status, status)
    if status == 403:
        assert "tenants_file" in response.json()["error"]["message"]


def test_host_names() -> None:
    assert [host_name(h) for h in ("a:80", "[::1]:80", "127.0.0.1", "", "[")] == ["a", "::1", "127.0.0.1", "", ""]
    assert not is_loopback("")


def test_a_missing_tenants_file_stops_the_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Stack(make_config(tmp_path, tenants_file=str(tmp_path / "nowhere.yaml")))
