"""Batches whose server stops, hangs, wakes or dies: another one goes on, and no request is answered twice."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fakes import deltas, make_config
from batch_fakes import CHAT, NEVER, QUICK, Server, asked, create, ended, lines_of, reached, request, upload
from waiting import until

from eft_serve.batches import watch
from eft_serve.batches.answers import Answer, AnswerLog
from eft_serve.batches.ids import tenant_directory
from eft_serve.batches.ledger import Ledger
from eft_serve.batches.records import End, Lease, Spec
from eft_serve.batches.store import ObjectStore
from eft_serve.batches.watch import Timing
from eft_serve.types import Delta, GenerationRequest


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


async def test_a_server_that_hangs_loses_its_batch_and_its_late_answers_count_once(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eft_serve.batches.run.FLUSH_BYTES", 1)  # each answer is a part, written at once
    config = make_config(tmp_path, files_url=url, batch_concurrency=2)
    one, two = Server(config), Server(config)

    def late(_: GenerationRequest) -> list[Delta]:
        one.service.pause_s = 1.5 if asked(one) > 3 else 0.0
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
        log = Ledger(ObjectStore(url)).answers((tenant_directory("anonymous"), batch.id))
        done = await ended(other, batch.id)
        before = await lines_of(other, done.output_file_id)
        await until(lambda: asked(one) == 5 and one.service.num_running == 0)  # it was answered late
        gate.set()
        assert await ended(client, batch.id) == done
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


async def test_a_batch_that_always_breaks_off_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_LEASES", 2)

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("eft_serve.batches.outputs.Outputs.write", broken)
    async with server.running() as client:
        batch = await ended(client, (await create(client, [request("a")])).id)
    assert batch.errors is not None
    assert [e.code for e in batch.errors.data or []] == ["internal_error"]
