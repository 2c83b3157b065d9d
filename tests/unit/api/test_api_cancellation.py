"""Whoever goes away, stops reading or takes too long leaves nothing running behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Connection, Stack, chat, events, make_config

from eft_serve.api import answering
from eft_serve.api.streams import merged
from eft_serve.tenancy.store import create_tenant
from eft_serve.types import Delta

HANGING = [Delta(text="He", token_ids=[1, 2])]
LIMIT_S = 5.0


@pytest.fixture
def tenants_file(tmp_path: Path) -> tuple[Path, str]:
    file = tmp_path / "tenants.yaml"
    return file, create_tenant(file, "acme", max_concurrent_requests=3)


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_frees_everything(
    tmp_path: Path, tenants_file: tuple[Path, str], stream: bool, num_choices: int
) -> None:
    file, key = tenants_file
    stack = Stack(make_config(tmp_path, tenants_file=str(file)), lambda _: HANGING)
    limits = stack.app.state.context.limits
    headers = {"authorization": f"Bearer {key}"}
    connection = Connection(stack.app, "/v1/chat/completions", chat(stream=stream, n=num_choices), headers)
    serving = asyncio.create_task(connection.run())
    async with asyncio.timeout(LIMIT_S):
        await stack.service.first_delta_sent.wait()
        await asyncio.sleep(0.02)
        assert stack.service.num_running == limits.num_running("acme") == num_choices
        connection.gone.set()
        await serving
    assert (stack.service.num_running, stack.service.num_closed_early) == (0, num_choices)
    assert limits.num_running("acme") == 0
    assert [m["type"] for m in connection.messages[:1]] == (["http.response.start"] if stream else [])
    assert stack.metric("eft_tenant_requests_total", tenant="acme", recipe="up", status="499") == 1
    assert stack.metric("eft_tenant_generation_tokens_total", tenant="acme") == 2 * num_choices
    assert stack.metric("eft_http_requests_running") == 0


async def test_a_disconnect_before_the_first_token_frees_everything(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path), lambda _: [])
    connection = Connection(stack.app, "/v1/chat/completions", chat(stream=True))
    serving = asyncio.create_task(connection.run())
    async with asyncio.timeout(LIMIT_S):
        while not stack.service.num_running:
            await asyncio.sleep(0.001)
        connection.gone.set()
        await serving
    assert (stack.service.num_running, stack.service.num_closed_early, connection.messages) == (0, 1, [])


async def test_a_cancelled_server_task_frees_everything(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path), lambda _: HANGING)
    serving = asyncio.create_task(Connection(stack.app, "/v1/chat/completions", chat(stream=True)).run())
    async with asyncio.timeout(LIMIT_S):
        await stack.service.first_delta_sent.wait()
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    assert (stack.service.num_running, stack.service.num_closed_early) == (0, 1)


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_the_deadline_ends_a_request_with_a_typed_error(tmp_path: Path, num_choices: int) -> None:
    stack = Stack(make_config(tmp_path, request_timeout_s=0.1), lambda _: HANGING)
    async with asyncio.timeout(LIMIT_S), stack.client() as client:
        whole = await client.post("/v1/chat/completions", json=chat(n=num_choices))
        streamed = await client.post("/v1/chat/completions", json=chat(n=num_choices, stream=True))
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert streamed.status_code == 200
    assert events(streamed)[-1] == whole.json()
    assert stack.service.num_running == 0


async def test_a_client_that_stops_reading_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "STALLED_CLIENT_S", 0.05)
    stack = Stack(make_config(tmp_path, request_timeout_s=0.05), lambda _: HANGING)
    connection = Connection(stack.app, "/v1/chat/completions", chat(stream=True))
    connection.reading.clear()
    async with asyncio.timeout(LIMIT_S):
        await connection.run()
    assert (stack.service.num_running, stack.service.num_closed_early) == (0, 1)


async def test_a_body_that_never_comes_runs_into_the_deadline(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path, request_timeout_s=0.05))
    connection = Connection(stack.app, "/v1/chat/completions", chat())
    connection._sent_body = True
    async with asyncio.timeout(LIMIT_S):
        await connection.run()
    assert connection.messages[0]["status"] == 504


async def test_tokens_are_sent_as_they_come(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path), lambda _: HANGING)
    connection = Connection(stack.app, "/v1/completions", {"model": "up", "prompt": "a", "stream": True})
    serving = asyncio.create_task(connection.run())
    async with asyncio.timeout(LIMIT_S):
        while len(connection.messages) < 2:
            await asyncio.sleep(0.001)
        assert b'"text":"He"' in connection.messages[1]["body"]
        assert connection.messages[1]["more_body"]
        connection.gone.set()
        await serving


async def test_an_answer_is_counted_as_such_when_the_connection_ends_with_it(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path))
    connection = Connection(stack.app, "/v1/chat/completions", chat())
    deliver = connection._send

    async def deliver_and_hang_up(message: Any) -> None:
        await deliver(message)
        if message["type"] == "http.response.body":
            connection.gone.set()
            await asyncio.sleep(0.01)

    connection._send = deliver_and_hang_up  # type: ignore[method-assign]
    await connection.run()
    assert stack.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status="200") == 1


async def test_one_failing_choice_ends_all(tmp_path: Path) -> None:
    stack = Stack(make_config(tmp_path))
    stack.service.answer = lambda r: [ValueError("no")] if r.request_id.endswith("-1") else HANGING
    async with asyncio.timeout(LIMIT_S), stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(n=3))
    assert response.status_code == 500
    assert stack.service.num_running == 0


async def test_merging_waits_for_a_slow_reader_and_loses_nothing() -> None:
    produced = 0

    async def count(index: int) -> AsyncGenerator[tuple[int, Delta], None]:
        nonlocal produced
        for token in range(50):
            produced += 1
            yield index, Delta(text="", token_ids=[token])

    got: dict[int, list[int]] = {0: [], 1: []}
    async for index, delta in merged([count(0), count(1)]):
        got[index] += delta.token_ids
        assert produced - sum(map(len, got.values())) <= 4  # the queue and one in each hand
    assert got == {0: list(range(50)), 1: list(range(50))}
