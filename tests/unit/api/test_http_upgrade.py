"""Requests that offer HTTP/2 (`Upgrade: h2c`), as bytes on a socket to the HTTP server that Ray Serve runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import uvicorn
from api_fakes import Stack, chat, make_config
from uvicorn.config import HTTP_PROTOCOLS

from eft_serve.rayserve.http_protocol import use_h11

BODY = json.dumps(chat()).encode()
OFFER = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
)
HEAD = OFFER + b"Content-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = OFFER + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


async def answer(server: uvicorn.Server, packets: list[bytes]) -> bytes:
    """The status line of the answer to a request in these packets."""
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for packet in packets:
            writer.write(packet)
            await writer.drain()
            await asyncio.sleep(0.02)  # otherwise they arrive as one
        return await asyncio.wait_for(reader.readline(), 5)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("packets", [[HEAD + BODY], [HEAD, BODY], [HEAD, BODY[:9], BODY[9:]], [CHUNKED]])
async def test_a_request_that_offers_http2_is_answered_in_http1_and_keeps_its_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packets: list[bytes]
) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])  # put back afterwards
    assert use_h11() == []
    stack = Stack(make_config(tmp_path))
    server = uvicorn.Server(uvicorn.Config(stack.app, port=0, lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        assert await answer(server, packets) == b"HTTP/1.1 200 OK\r\n"
    finally:
        server.should_exit = True
        await serving
    assert len(stack.service.requests) == 1
