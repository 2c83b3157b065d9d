"""`/v1/files` by OpenAI's own client: what is kept, for whom, and what is refused while it arrives."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import openai
import pytest
from api_fakes import make_config
from batch_fakes import Server, create, ended, request, upload
from waiting import until

from eft_serve.api.uploads import MAX_UPLOADS_OF_TENANT
from eft_serve.batches.files import DESCRIPTION
from eft_serve.batches.ids import FILE, new_id, tenant_directory
from eft_serve.batches.store import ObjectStore
from eft_serve.config import AppConfig
from eft_serve.errors import ConfigError
from eft_serve.tenancy.store import create_tenant

BOUNDARY = "x" * 20


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(make_config(tmp_path, files_url=str(tmp_path / "store"), max_file_bytes=2**20))


def stored(tmp_path: Path) -> list[str]:
    """What lies in the store."""
    return sorted(str(path) for path in (tmp_path / "store").rglob("*") if path.is_file())


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    extra = f'; filename="{filename}"' if filename is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
    return head.encode() + value + b"\r\n"


async def post(server: Server, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
    declared = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"} | headers
    async with server.client() as client:
        return await client.post("/v1/files", content=body, headers=declared)


END = f"--{BOUNDARY}--\r\n".encode()
PURPOSE = part("purpose", b"batch")


async def test_a_file_is_kept_read_listed_and_deleted(tmp_path: Path, url: str) -> None:
    client = Server(make_config(tmp_path, files_url=url)).openai()
    data = os.urandom(3 * 2**20 + 5)
    file = await client.files.create(file=("../../ünï \n.jsonl", data), purpose="batch")
    assert (file.object, file.bytes, file.purpose, file.status) == ("file", len(data), "batch", "processed")
    assert file.filename.startswith("../../ünï")
    assert await client.files.retrieve(file.id) == file
    content = await client.files.content(file.id)
    assert content.content == data
    assert content.response.headers["content-length"] == str(len(data))
    assert "\n" not in content.response.headers["content-disposition"]
    assert [each async for each in client.files.list()] == [file]
    deleted = await client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            await call(file.id)
        assert caught.value.param == "file_id"
    assert [each async for each in client.files.list()] == []


async def test_files_are_listed_in_pages_and_both_orders(server: Server) -> None:
    client = server.openai()
    made = []
    for i in range(5):
        made.append(await upload(client, [str(i)]))
        await asyncio.sleep(0.002)
    assert [f.id for f in (await client.files.list()).data] == made[::-1]
    assert [f.id async for f in client.files.list(limit=2, order="asc")] == made
    page = await client.files.list(limit=2, after=made[3])
    assert ([f.id for f in page.data], page.has_more) == (made[2:0:-1], True)
    assert (await client.files.list(purpose="batch_output")).data == []
    assert (await client.files.list(limit=5)).has_more is False


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=many", "limit"),
        ("order=up", "order"),
        ("after=file-x", "after"),
        ("after=..%2F..", "after"),
        ("before=file-x", "before"),
        ("limit=1&limit=2", "limit"),
    ],
)
async def test_a_wrong_query_is_named(server: Server, query: str, param: str) -> None:
    async with server.client() as client:
        response = await client.get(f"/v1/files?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (PURPOSE + part("file", b"x", "a") + END, 200, None),
        (part("file", b"x", "a") + PURPOSE + END, 200, None),
        (part("file", b"x", "") + PURPOSE + END, 200, None),
        (PURPOSE + END, 400, "file"),
        (END, 400, "purpose"),
        (b"", 400, "file"),
        (PURPOSE + part("file", b"x") + END, 400, "file"),
        (PURPOSE + part("file", b"", "a") + END, 400, "file"),
        (PURPOSE + part("file", b"x", "a" * 300) + END, 400, "file"),
        (part("file", b"x", "a") + END, 400, "purpose"),
        (part("purpose", b"fine-tune") + part("file", b"x", "a") + END, 400, "purpose"),
        (part("purpose", b"batch", "a") + END, 400, "purpose"),
        (PURPOSE + PURPOSE + part("file", b"x", "a") + END, 400, "purpose"),
        (PURPOSE + part("file", b"x", "a") + part("file", b"x", "a") + END, 400, "file"),
        (PURPOSE + part("expires_after[seconds]", b"3600") + part("file", b"x", "a") + END, 400, "expires_after"),
        (PURPOSE + part("nonsense", b"1") + part("file", b"x", "a") + END, 400, "nonsense"),
        (part("purpose", b"x" * 5000) + END, 400, "file"),
        (b"".join(part(str(i), b"1") for i in range(100)) + END, 400, "file"),
        (b"nonsense", 400, "file"),
        (f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n".encode() + END, 400, "file"),
        (f"--{BOUNDARY}\r\n{'a' * 100_000}: b\r\n\r\nx\r\n".encode() + END, 400, "file"),
    ],
)
async def test_a_form_is_checked_field_by_field(
    server: Server, tmp_path: Path, body: bytes, status: int, param: str | None
) -> None:
    response = await post(server, body)
    assert response.status_code == status, response.text
    assert response.json().get("error", {}).get("param") == param
    assert len(stored(tmp_path)) == (2 if status == 200 else 0)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "text/plain", ""])
async def test_what_is_no_form_is_refused(server: Server, kind: str) -> None:
    response = await post(server, b"{}", **{"content-type": kind})
    assert response.status_code in (400, 415)
    assert response.json()["error"]["param"] == "file"


async def test_a_form_that_is_cut_off_is_not_kept(server: Server, tmp_path: Path) -> None:
    response = await post(server, PURPOSE + part("file", b"x" * 1000, "a"))
    assert response.status_code == 400
    assert stored(tmp_path) == []


async def test_an_upload_that_is_too_large_ends_while_it_arrives(server: Server, tmp_path: Path) -> None:
    sent = 0

    async def gigabyte() -> AsyncIterator[bytes]:
        nonlocal sent
        yield PURPOSE + part("file", b"", "a")[:-2]
        for _ in range(2**14):
            sent += 2**16
            yield b"x" * 2**16

    tracemalloc.start()
    response = await post(server, gigabyte())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["param"]) == (413, "file")
    assert sent <= 2 * 2**20
    assert peak < 16 * 2**20
    assert stored(tmp_path) == []
    one_too_many = await post(server, PURPOSE + part("file", b"x" * (2**20 + 1), "a") + END)
    declared = await post(server, PURPOSE, **{"content-length": str(2**40)})
    assert (one_too_many.status_code, declared.status_code) == (413, 413)


async def test_a_tenant_uploads_few_files_at_once(server: Server) -> None:
    gate = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield PURPOSE
        await gate.wait()
        yield part("file", b"x", "a") + END

    uploads = [asyncio.create_task(post(server, slow())) for _ in range(MAX_UPLOADS_OF_TENANT)]
    await until(lambda: server.app.state.context.uploads._running["anonymous"] == MAX_UPLOADS_OF_TENANT)
    refused = await post(server, PURPOSE + part("file", b"x", "a") + END)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    gate.set()
    assert [response.status_code for response in await asyncio.gather(*uploads)] == [200] * MAX_UPLOADS_OF_TENANT
    assert (await post(server, PURPOSE + part("file", b"x", "a") + END)).status_code == 200


async def test_a_store_that_does_not_answer_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eft_serve.batches.service.CALL_S", 0.1)
    gate = server.freeze()
    async with server.client() as client:
        response = await client.get("/v1/files")
    gate.set()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "service_unavailable")


async def test_a_large_file_passes_through_little_memory(tmp_path: Path) -> None:
    server = Server(make_config(tmp_path, files_url=str(tmp_path / "store")))

    async def large() -> AsyncIterator[bytes]:
        yield PURPOSE + part("file", b"", "a")[:-2]
        for _ in range(100):
            yield b"x" * 2**20
        yield b"\r\n" + END

    tracemalloc.start()
    response = await post(server, large())
    content, size = (
        server.storage.content("anonymous", await server.storage.file("anonymous", response.json()["id"])),
        0,
    )
    async for piece in content:
        size += len(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert response.json()["bytes"] == size == 100 * 2**20
    assert peak < 16 * 2**20


async def test_a_tenant_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    client = Server(make_config(tmp_path, files_url=str(tmp_path / "store"), max_stored_bytes=1000)).openai()
    first = await client.files.create(file=("a", b"x" * 600), purpose="batch")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=("b", b"x" * 600), purpose="batch")
    assert (caught.value.param, caught.value.code) == ("file", "quota_exceeded")
    await client.files.delete(first.id)
    await client.files.create(file=("b", b"x" * 600), purpose="batch")


async def test_what_a_killed_upload_left_is_dropped_after_a_day(tmp_path: Path) -> None:
    client = Server(make_config(tmp_path, files_url=str(tmp_path / "store"))).openai()
    directory = tmp_path / "store" / "tenants" / tenant_directory("anonymous") / "files"
    directory.mkdir(parents=True)
    old, new = f"{FILE}{'0' * 32}.data", f"{new_id(FILE)}.data"
    for name in (old, new):
        (directory / name).write_bytes(b"x")
    file_id = await upload(client, ["x"])
    assert {path.name for path in directory.iterdir()} == {new, file_id + ".data", file_id + DESCRIPTION}


async def test_a_file_that_a_batch_reads_is_not_deleted(server: Server) -> None:
    server.service.answer = lambda _: []
    async with server.running() as client:
        batch = await create(client, [request("a")])
        with pytest.raises(openai.BadRequestError) as caught:
            await client.files.delete(batch.input_file_id)
        assert caught.value.param == "file_id"
        assert batch.id in caught.value.message
        await client.batches.cancel(batch.id)
        await ended(client, batch.id)
        await client.files.delete(batch.input_file_id)


async def test_files_of_tenants_are_apart(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.yaml"
    names = ("acme", "Acme", "..", "a.b", "a_b", "å" * 300)
    keys = [create_tenant(tenants, name) for name in names]
    server = Server(make_config(tmp_path, files_url=str(tmp_path / "store"), tenants_file=str(tenants)))
    clients = [server.openai(key) for key in keys]
    ids = [await upload(client, ["x"]) for client in clients]
    unknown = new_id(FILE)
    for client, own in zip(clients, ids, strict=True):
        assert [each.id async for each in client.files.list()] == [own]
        foreign = next(file_id for file_id in ids if file_id != own)
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            messages = []
            for file_id in (foreign, unknown):
                with pytest.raises(openai.NotFoundError) as caught:
                    await call(file_id)
                messages.append(caught.value.message.replace(file_id, "ID"))
            assert messages[0] == messages[1]
    assert all(str(tmp_path / "store" / "tenants") in path for path in stored(tmp_path))
    for path in ("/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/batches", "/v1/batches/x"):
        async with server.client() as nobody:
            assert (await nobody.get(path)).status_code == 401


@pytest.mark.parametrize(
    "file_id", ["file-..", "file-%2e%2e", "..", "file-" + "0" * 31 + "\u0663", "file-" + "0" * 32 + "%0a"]
)
@pytest.mark.parametrize("end", ["", "/content"])
async def test_an_id_is_never_a_path(server: Server, tmp_path: Path, file_id: str, end: str) -> None:
    directory = tmp_path / "store" / "tenants" / tenant_directory("anonymous") / "files"
    directory.mkdir(parents=True)
    description = b'{"id": "x", "bytes": 0, "created_at": 0, "filename": "x", "purpose": "batch"}'
    (directory / f"{unquote(file_id)}{DESCRIPTION}").write_bytes(description)
    async with server.client() as client:
        response = await client.get(f"/v1/files/{file_id}{end}")
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/files/x"),
        ("GET", "/v1/files/x/content"),
        ("DELETE", "/v1/files/x"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
        ("GET", "/v1/batches/x"),
        ("POST", "/v1/batches/x/cancel"),
    ],
)
async def test_without_the_setting_every_endpoint_names_it(tmp_path: Path, method: str, path: str) -> None:
    async with Server(make_config(tmp_path)).client() as client:
        response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "feature_disabled")
    assert "server.files_url" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://evil.example", 403), ("null", 403), ("http://localhost:3000", 403), ("http://localhost:8000", 200)],
)
async def test_without_keys_no_other_sites_page_uploads(server: Server, origin: str, status: int) -> None:
    response = await post(server, PURPOSE + part("file", b"x", "a") + END, origin=origin)
    assert response.status_code == status


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("relative/path", "files_url"),
        ("/proc/nowhere", "server.files_url"),
        ("nonsense://user:secret@host/x", "server.files_url"),
        ("http://localhost/x", "server.files_url"),
    ],
)
def test_a_store_that_cannot_be_used_stops_the_start(tmp_path: Path, url: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        Server(make_config(tmp_path, files_url=url))
    assert "secret" not in str(caught.value)


def test_of_two_creations_one_succeeds_and_is_whole(url: str) -> None:
    store = ObjectStore(url)
    assert [store.create("a/b", b"one"), store.create("a/b", b"two")] == [True, False]
    assert store.get("a/b") == b"one"
    store.put("a/b", b"three")
    assert (store.get("a/b"), store.names("a"), store.names("nothing"), store.find("a/c")) == (
        b"three",
        ["b"],
        [],
        None,
    )


def test_the_store_is_its_owners_only(tmp_path: Path) -> None:
    ObjectStore(str(tmp_path / "deep" / "store"))
    assert (tmp_path / "deep" / "store").stat().st_mode & 0o777 == 0o700


def test_settings_of_files_have_bounds(tmp_path: Path) -> None:
    config: dict[str, Any] = make_config(tmp_path).model_dump(mode="json")
    config["server"]["max_file_bytes"] = 0
    with pytest.raises(ConfigError, match="max_file_bytes"):
        AppConfig.parse(config)
