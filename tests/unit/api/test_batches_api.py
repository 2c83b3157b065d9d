"""`/v1/batches` by OpenAI's own client: from the upload to the answers, whatever happens to the servers."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import deltas, make_config
from batch_fakes import CHAT, QUICK, Server, create, ended, lines_of, reached, request, upload
from waiting import until

from eft_serve.batches import watch
from eft_serve.batches.answers import Answer, AnswerLog
from eft_serve.batches.ids import tenant_directory
from eft_serve.batches.ledger import Ledger
from eft_serve.batches.records import End, Lease, Spec
from eft_serve.batches.store import ObjectStore
from eft_serve.batches.watch import Timing
from eft_serve.errors import RateLimitError, UnavailableError
from eft_serve.tenancy.store import create_tenant
from eft_serve.types import Delta, GenerationRequest

NEVER: Callable[[GenerationRequest], Iterable[Delta | Exception]] = lambda _: []  # noqa: E731


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(make_config(tmp_path, files_url=str(tmp_path / "store")))


def asked(server: Server) -> int:
    return len(server.service.requests)


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
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata"),
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


async def test_any_server_cancels_and_retrieves(tmp_path: Path, url: str) -> None:
    config = make_config(tmp_path, files_url=url)
    one, two = Server(config, NEVER), Server(config, NEVER)
    async with one.running() as client:
        batch = await create(client, [request("a")])
        await until(lambda: one.service.num_running == 1)
        async with two.running() as other:
            assert (await other.batches.cancel(batch.id)).status == "cancelling"
            assert (await ended(other, batch.id)).status == "cancelled"
    assert asked(two) == 0


async def test_a_server_that_stops_lets_another_go_on_at_once(tmp_path: Path, url: str) -> None:
    config = make_config(tmp_path, files_url=url, batch_concurrency=1)
    patient = Timing(look_s=0.05, beat_s=0.05, lease_s=1000.0)
    one, two = Server(config, timing=patient), Server(config, timing=patient)
    one.service.answer = lambda _: deltas("one") if asked(one) <= 2 else []
    two.service.answer = lambda _: deltas("two")
    async with one.running() as client:
        batch = await create(client, [request(str(i)) for i in range(5)])
        await until(lambda: asked(one) == 3)
    async with two.running() as client:
        done = await ended(client, batch.id)
        answers = await lines_of(client, done.output_file_id)
    assert done.status == "completed"
    contents = sorted((a["custom_id"], a["response"]["body"]["choices"][0]["message"]["content"]) for a in answers)
    assert contents == [("0", "one"), ("1", "one"), ("2", "two"), ("3", "two"), ("4", "two")]
    assert asked(two) == 3


async def test_a_server_that_hangs_loses_its_batch_and_its_late_answers_count_once(tmp_path: Path, url: str) -> None:
    config = make_config(tmp_path, files_url=url, batch_concurrency=2)
    one, two = Server(config), Server(config)

    def late(_: GenerationRequest) -> list[Delta]:
        one.service.pause_s = 1.0 if asked(one) > 3 else 0.0
        return deltas("one")

    one.service.answer = late
    two.service.answer = lambda _: deltas("two")
    async with AsyncExitStack() as servers:
        client = await servers.enter_async_context(one.running())
        batch = await create(client, [request(str(i)) for i in range(8)])
        await until(lambda: asked(one) >= 4)
        other = await servers.enter_async_context(two.running())
        await reached(other, batch.id, lambda b: b.request_counts is not None and b.request_counts.completed == 3)
        gate = one.freeze()
        done = await ended(other, batch.id)
        before = await lines_of(other, done.output_file_id)
        await until(lambda: asked(one) > 5)  # it was answered late
        gate.set()
        await until(lambda: one.service.num_running == 0)
        assert await ended(client, batch.id) == done
        log = Ledger(ObjectStore(url)).answers((tenant_directory("anonymous"), batch.id))
        await until(lambda: log.parts() == [])
        assert await lines_of(client, done.output_file_id) == before
        files = [file.id async for file in client.files.list(purpose="batch_output")]
    assert (done.status, files) == ("completed", [done.output_file_id])
    assert sorted(line["custom_id"] for line in before) == [str(i) for i in range(8)]
    assert done.request_counts is not None
    assert done.request_counts.completed == 8


async def test_a_server_that_wakes_stops_when_another_has_its_batch(tmp_path: Path, url: str) -> None:
    config = make_config(tmp_path, files_url=url)
    one, two = Server(config, NEVER), Server(config, NEVER)
    async with AsyncExitStack() as servers:
        batch = await create(await servers.enter_async_context(one.running()), [request("a")])
        await until(lambda: one.service.num_running == 1)
        other = await servers.enter_async_context(two.running())
        gate = one.freeze()
        await until(lambda: two.service.num_running == 1)
        gate.set()
        await until(lambda: one.service.num_running == 0)
        assert (await other.batches.retrieve(batch.id)).status == "in_progress"
        assert two.service.num_running == 1


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


async def test_what_a_killed_server_left_is_finished_without_asking_again(tmp_path: Path, url: str) -> None:
    server = Server(make_config(tmp_path, files_url=url))
    store = ObjectStore(url)
    ledger = Ledger(store)
    # what a process leaves that was killed after one answer, and while it wrote its output
    spec_of: dict[str, Any] = {
        "tenant": "anonymous",
        "endpoint": CHAT,
        "metadata": None,
        "created_at": int(time.time()),
    }
    client = server.openai()
    spec = Spec(id="batch_" + "0" * 32, input_file_id=await upload(client, [request("a"), request("b")]), **spec_of)
    address = (tenant_directory("anonymous"), spec.id)
    orphan = await upload(client, [request("orphan")])
    ledger.create(spec)
    lease = Lease(beat=7, in_progress_at=1, finalizing_at=2, total=2, completed=1, output_file_id=orphan)
    assert ledger.take(address, 1, lease)
    ledger.answers(address).append(1, 0, [Answer(1, True, b'{"custom_id": "a"}')])
    ledger.answers(address).append(1, 1, [Answer(1, False, b'{"custom_id": "a, asked twice"}')])
    started = time.monotonic()
    async with server.running() as client:
        done = await ended(client, spec.id)
        answers = await lines_of(client, done.output_file_id)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(orphan)
    assert time.monotonic() - started > QUICK.lease_s
    assert (done.status, done.in_progress_at, asked(server)) == ("completed", 1, 1)
    assert [line["custom_id"] for line in answers] == ["a", "b"]
    assert done.error_file_id is None


async def test_what_a_killed_server_ended_and_did_not_close_is_closed(server: Server) -> None:
    spec = Spec(
        id="batch_" + "0" * 32, tenant="a", input_file_id="", endpoint=CHAT, metadata=None, created_at=int(time.time())
    )
    ledger, address = server.storage._ledger, (tenant_directory("a"), spec.id)
    ledger.create(spec)
    ledger.answers(address).append(1, 0, [Answer(1, True, b"{}")])
    assert ledger.end(address, End(outcome="failed", at=1, lease=Lease()))
    async with server.running():
        await until(lambda: list(ledger.open_batches()) == [])
    assert ledger.answers(address).parts() == []
    assert ledger.get("a", spec.id).status == "failed"


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


async def test_answers_outlive_a_store_that_fails_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = Timing(look_s=0.05, beat_s=30.0, lease_s=1000.0)
    server = Server(make_config(tmp_path, files_url=str(tmp_path / "store")), timing=patient)
    append, failures = AnswerLog.append, [OSError("the network is gone")]

    def failing_once(*arguments: Any) -> None:
        if failures:
            raise failures.pop()
        append(*arguments)

    monkeypatch.setattr(AnswerLog, "append", failing_once)
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request(str(i)) for i in range(4)])).id)
        assert len(await lines_of(client, batch.output_file_id)) == asked(server) == 4
    assert failures == []


async def test_lines_may_end_in_any_way_and_begin_with_a_mark(server: Server) -> None:
    data = "\ufeff" + request("a") + "\r\n\r\n" + request("ü") + "\n\n" + request("c")
    async with server.running() as client:
        file = await client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        batch = await ended(client, batch.id)
        lines = await lines_of(client, batch.output_file_id)
    assert {line["custom_id"] for line in lines} == {"a", "ü", "c"}


async def test_a_batch_that_always_breaks_off_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_LEASES", 2)

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("eft_serve.batches.run.BatchRun._write_files", broken)
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request("a")])).id)
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data or []] == ["internal_error"]


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
