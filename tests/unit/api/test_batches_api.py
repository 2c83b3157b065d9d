"""`/v1/batches` by OpenAI's own client: from the upload to the answers, whatever happens to the servers."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import deltas, make_config
from batch_fakes import CHAT, NEVER, Server, asked, create, ended, lines_of, request
from waiting import until

from eft_serve.batches.ids import tenant_directory
from eft_serve.batches.ledger import Ledger
from eft_serve.batches.store import ObjectStore
from eft_serve.errors import RateLimitError, UnavailableError
from eft_serve.tenancy.store import create_tenant


async def test_a_file_of_requests_is_answered_line_by_line(tmp_path: Path, url: str) -> None:
    server = Server(make_config(tmp_path, files_url=url))
    async with server.running() as client:
        lines = [request("a"), "", request("b"), request("unknown", model="nope"), request("c", n=0)]
        batch = await create(client, lines, metadata={"who": "me"})
        assert (batch.status, batch.object, batch.completion_window) == ("validating", "batch", "24h")
        assert batch.expires_at == batch.created_at + 24 * 3600
        assert (batch.output_file_id, batch.error_file_id, batch.errors) == (None, None, None)
        batch = await ended(client, batch.id)
        assert (batch.status, batch.endpoint, batch.metadata) == ("completed", CHAT, {"who": "me"})
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (4, 2, 2)
        assert (
            batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
        )
        output = {line["custom_id"]: line for line in await lines_of(client, batch.output_file_id)}
        errors = {line["custom_id"]: line for line in await lines_of(client, batch.error_file_id)}
        assert (set(output), set(errors)) == ({"a", "b"}, {"unknown", "c"})
        assert output["b"]["id"] == "line-3"
        assert output["b"]["error"] is None
        response = output["b"]["response"]
        assert (response["status_code"], response["request_id"]) == (200, f"{batch.id}-3")
        assert response["body"]["choices"][0]["message"]["content"] == "Hello"
        assert errors["unknown"]["response"]["status_code"] == 404
        assert errors["c"]["response"]["body"]["error"]["param"] == "n"
        # the outputs are files like any other
        names = {file.id: (file.filename, file.purpose) async for file in client.files.list(purpose="batch_output")}
        assert names == {
            batch.output_file_id: (f"{batch.id}_output.jsonl", "batch_output"),
            batch.error_file_id: (f"{batch.id}_error.jsonl", "batch_output"),
        }
    assert server.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status="200") == 2
    assert list((Ledger(ObjectStore(url))).open_batches()) == []


async def test_a_batch_without_errors_or_without_answers_has_one_file(server: Server) -> None:
    async with server.running() as client:
        good = await ended(client, (await create(client, [request("a")])).id)
        bad = await ended(client, (await create(client, [request("a", n=0)])).id)
    assert good.output_file_id is not None
    assert good.error_file_id is None
    assert (bad.status, bad.output_file_id) == ("completed", None)
    assert bad.error_file_id is not None


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["not JSON", request("a")], [("invalid_json_line", 1, None)]),
        (["[1]"], [("invalid_json_line", 1, None)]),
        (
            [request("a"), request("b"), request("a"), request("a")],
            [("duplicate_custom_id", n, "custom_id") for n in (3, 4)],
        ),
        ([request("a"), request("b", url="/v1/completions")], [("url_mismatch", 2, "url")]),
        ([request("a", url="/v1/embeddings")], [("invalid_line", 1, "url")]),
        ([request("a", stream=True)], [("invalid_line", 1, "body.stream")]),
        (['{"\\ud800": 1}'], [("invalid_line", 1, "\\ud800")]),
        (["", "  "], [("empty_file", None, "input_file_id")]),
        ([" " * (4 * 2**20) + "x", request("a")], [("line_too_long", 1, None)]),
        (["x"] * 1000, [("invalid_json_line", n, None) for n in range(1, 101)]),
    ],
    ids=["text", "list", "duplicate", "other url", "no url", "stream", "surrogate", "blank", "long", "many"],
)
async def test_a_file_that_cannot_be_run_fails_with_an_error_for_each_line(
    server: Server, lines: list[str], found: list[tuple[str, int | None, str | None]]
) -> None:
    async with server.running() as client:
        batch = await ended(client, (await create(client, lines)).id)
        assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
        assert batch.failed_at is not None
        assert batch.errors is not None
        assert [(e.code, e.line, e.param) for e in batch.errors.data or []] == found
        assert all(e.message and len(e.message) <= 500 for e in batch.errors.data or [])
    assert asked(server) == 0


async def test_more_lines_than_openai_takes_fail_the_batch(server: Server) -> None:
    async with server.running() as client:
        line = request("{}")
        batch = await create(client, (line.replace("{}", str(i)) for i in range(50_001)))
        batch = await ended(client, batch.id)
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data or []] == ["too_many_tasks"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, f"metadata.{'k' * 65}"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ],
)
async def test_what_a_batch_may_not_be_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    async with server.running() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await create(client, [request("a")], **fields)
        assert caught.value.param == param
        assert [batch async for batch in client.batches.list()] == []


@pytest.mark.parametrize("file_id", ["file-" + "0" * 32, "../../etc/passwd", "file-..", "x" * 300, ""])
async def test_an_input_file_that_is_not_there_is_named(server: Server, file_id: str) -> None:
    async with server.running() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    assert caught.value.status_code == (404 if len(file_id) <= 256 else 400)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["param"] == "input_file_id"


async def test_an_output_is_no_input(server: Server) -> None:
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request("a")])).id)
        assert batch.output_file_id is not None
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.create(input_file_id=batch.output_file_id, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


async def test_batches_are_listed_the_newest_first_in_pages(server: Server) -> None:
    async with server.running() as client:
        made = []
        for i in range(5):
            made.append((await create(client, [request(str(i))])).id)
            await asyncio.sleep(0.002)
        page = await client.batches.list(limit=2)
        assert ([b.id for b in page.data], page.has_more) == ([made[4], made[3]], True)
        assert [b.id async for b in client.batches.list(limit=2)] == made[::-1]
        for query, param in ({"after": "batch_x"}, "after"), ({"limit": 101}, "limit"), ({"limit": 0}, "limit"):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.batches.list(**query)
            assert caught.value.param == param


async def test_a_batch_is_cancelled_mid_way_and_keeps_what_it_has(tmp_path: Path) -> None:
    server = Server(make_config(tmp_path, files_url=str(tmp_path / "store"), batch_concurrency=2))
    server.service.answer = lambda _: deltas("x") if asked(server) <= 3 else []
    async with server.running() as client:
        batch = await create(client, [request(str(i)) for i in range(50)])
        await until(lambda: server.service.num_running == 2)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status in ("cancelling", "cancelled")
        assert cancelling.cancelling_at is not None
        batch = await ended(client, batch.id)
        assert (batch.status, server.service.num_running, asked(server)) == ("cancelled", 0, 5)
        assert batch.cancelled_at is not None
        answered = {line["custom_id"] for line in await lines_of(client, batch.output_file_id)}
        errors = await lines_of(client, batch.error_file_id)
        assert (len(answered), {line["error"]["code"] for line in errors}) == (3, {"batch_cancelled"})
        assert answered | {line["custom_id"] for line in errors} == {str(i) for i in range(50)}
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed, len(errors)) == (50, 3, 47, 47)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.cancel(batch.id)
        assert caught.value.param == "batch_id"


async def test_a_tenant_has_so_many_open_batches(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft_serve.batches.ledger.MAX_OPEN", 2)
    client = server.openai()  # nothing runs them
    first, _ = [await create(client, [request("a")]) for _ in range(2)]
    with pytest.raises(openai.BadRequestError) as caught:
        await create(client, [request("a")])
    assert caught.value.code == "quota_exceeded"
    async with server.running():
        await ended(client, first.id)
        await create(client, [request("a")])


async def test_busy_models_and_limits_are_waited_for(server: Server) -> None:
    failures: list[Exception] = [UnavailableError("no replica"), RateLimitError("later", retry_after_s=0.1)]
    server.service.answer = lambda _: [failures.pop()] if failures else deltas("x")
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request("a")])).id)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, asked(server)) == (1, 3)


async def test_an_exception_ends_its_line_only(server: Server) -> None:
    server.service.answer = lambda r: [RuntimeError("a bug")] if asked(server) == 1 else deltas("x")
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request("a"), request("b")])).id)
        errors = await lines_of(client, batch.error_file_id)
    assert (batch.status, batch.output_file_id is None) == ("completed", False)
    assert [line["response"]["status_code"] for line in errors] == [500]
    assert "a bug" not in json.dumps(errors)


async def test_what_has_no_answer_at_the_deadline_expires(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft_serve.batches.records.WINDOW_S", 2)
    server.service.answer = lambda _: deltas("x") if asked(server) == 1 else []
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request(str(i)) for i in range(12)])).id)
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert len(await lines_of(client, batch.output_file_id)) == 1
        errors = await lines_of(client, batch.error_file_id)
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert len({line["custom_id"] for line in errors}) == len(errors) == 11
    assert server.service.num_running == 0


async def test_lines_may_end_in_any_way_and_begin_with_a_mark(server: Server) -> None:
    data = "\ufeff" + request("a") + "\r\n\r\n" + request("ü") + "\n\n" + request("c")
    async with server.running() as client:
        file = await client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        batch = await ended(client, batch.id)
        lines = await lines_of(client, batch.output_file_id)
    assert {line["custom_id"] for line in lines} == {"a", "ü", "c"}


async def test_a_batch_leaves_room_for_the_others(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    key = create_tenant(tenants, "acme", max_concurrent_requests=4)
    config = make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants), batch_concurrency=3)
    server = Server(config, NEVER)
    async with server.running():
        client = server.openai(key)
        await create(client, [request(str(i)) for i in range(20)])
        await create(client, [request(str(i)) for i in range(20)])
        await until(lambda: server.service.num_running == 2)
        await asyncio.sleep(0.2)
        assert server.service.num_running == 2  # half of the tenant's four


async def test_a_batch_begins_half_as_many_requests_a_minute_as_the_tenant_may(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    key = create_tenant(tenants, "acme", requests_per_minute=240)
    server = Server(make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants)))
    async with server.running():
        client = server.openai(key)
        started = time.monotonic()
        await ended(client, (await create(client, [request(str(i)) for i in range(4)])).id)
        assert time.monotonic() - started > 3 * 60 / 120


async def test_a_tenants_batches_take_turns_and_other_tenants_do_not_wait(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    keys = [create_tenant(tenants, name) for name in ("acme", "globex")]
    config = make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants))
    server = Server(config, NEVER)
    async with server.running():
        acme, globex = map(server.openai, keys)
        first, second = [await create(acme, [request("a")]) for _ in range(2)]
        await create(globex, [request("a")])
        await until(lambda: server.service.num_running == 2)
        assert sorted(r.tenant for r in server.service.requests) == ["acme", "globex"]
        assert (await acme.batches.retrieve(second.id)).status == "validating"
        await acme.batches.cancel(second.id)  # needs no turn
        assert (await ended(acme, second.id)).status == "cancelled"
        assert (await acme.batches.retrieve(first.id)).status == "in_progress"


async def test_batches_of_tenants_are_apart(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    keys = {name: create_tenant(tenants, name, [recipe]) for name, recipe in (("acme", "up"), ("ACME", "down"))}
    config = make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants))
    server = Server(config)
    async with server.running():
        mine, others = server.openai(keys["acme"]), server.openai(keys["ACME"])
        batch = await ended(mine, (await create(mine, [request("a"), request("b", model="down")])).id)
        assert batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        assert [r.tenant for r in server.service.requests] == ["acme"]
        assert [b.id async for b in others.batches.list()] == []
        unknown = "batch_" + "0" * 32
        for call in (others.batches.retrieve, others.batches.cancel):
            messages = []
            for batch_id in (batch.id, unknown):
                with pytest.raises(openai.NotFoundError) as caught:
                    await call(batch_id)
                messages.append(caught.value.message.replace(batch_id, "ID"))
            assert messages[0] == messages[1]
        file_id = batch.input_file_id
        for stolen in (file_id, f"../../{tenant_directory('acme')}/files/{file_id}"):
            with pytest.raises(openai.NotFoundError) as caught:
                await others.batches.create(input_file_id=stolen, endpoint=CHAT, completion_window="24h")
            assert caught.value.param == "input_file_id"
        with pytest.raises(openai.BadRequestError) as wrong:
            await others.batches.list(after=batch.id)
        assert wrong.value.param == "after"


@pytest.mark.parametrize("gone", ["tenant", "keys", "tenants"])
async def test_a_tenant_that_may_not_ask_any_more_has_no_requests_made(tmp_path: Path, gone: str) -> None:
    tenants = tmp_path / "tenants.yaml"
    key = create_tenant(tenants, "acme")
    config = make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants))
    batch = await create(Server(config).openai(key), [request("a")])
    tenants.write_text("tenants: {acme: {keys: [], recipes: ['*']}}" if gone == "keys" else "tenants: {}")
    if gone == "tenants":
        config = make_config(tmp_path, files_url=str(tmp_path / "store"))
    server = Server(config)
    async with server.running():
        ledger = Ledger(ObjectStore(str(tmp_path / "store")))
        await until(lambda: ledger.get("acme", batch.id).status == "failed")
    assert [mistake["code"] for mistake in ledger.get("acme", batch.id).as_json()["errors"]["data"]] == [
        "invalid_api_key"
    ]
    assert asked(server) == 0


async def test_no_header_makes_a_request_one_of_the_servers_own(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    create_tenant(tenants, "acme")
    server = Server(make_config(tmp_path, tenants_file=str(tenants)))
    async with server.client() as client:
        headers = {"eft_serve.tenant": "acme", "eft-serve-tenant": "acme"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 401
