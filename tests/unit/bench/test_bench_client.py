"""The load client against a small HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.bench.client import BadAnswerError, Client, EventReader, read_tokens
from eft_serve.bench.load import Wanted

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(*token_ids: int) -> bytes:
    body = {"choices": [{"index": 0, "text": "", "token_ids": list(token_ids)}]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
CHUNKS = chunk(event(1, 2)), chunk(event(3) + DONE)
CHUNK_ENDS = len(HEAD + CHUNKS[0]), len(HEAD + CHUNKS[0] + CHUNKS[1])
WHOLE = HEAD + CHUNKS[0] + CHUNKS[1] + chunk(b"")


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[Client]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await answer(json.loads(await reader.readexactly(length)), writer)
        writer.close()
        await writer.wait_closed()

    started = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with started:
        yield Client(f"http://127.0.0.1:{started.sockets[0].getsockname()[1]}", "eft", "key")


async def slowly(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """As many tokens as were asked for, 10 ms apart."""
    writer.write(HEAD)
    for token in range(body["max_tokens"]):
        await asyncio.sleep(0.01)
        writer.write(chunk(event(token)))
    writer.write(chunk(DONE) + chunk(b""))


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12))
def test_events_are_the_same_however_the_bytes_arrive(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    pieces = [(float(n), WHOLE[a:b]) for n, (a, b) in enumerate(pairwise(edges))]
    tokens = read_tokens(pieces)
    assert [ids for _, ids in tokens] == [[1, 2], [3]]
    for (at, _), end in zip(tokens, CHUNK_ENDS, strict=True):  # each has the time of the piece with its last byte
        assert edges[int(at)] < end <= edges[int(at) + 1]


def test_an_event_waits_for_its_last_byte() -> None:
    reader = EventReader()
    first = HEAD + chunk(event(1))
    assert reader.feed(first[:-1]) == []
    assert len(reader.feed(first[-1:])) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'HTTP/1.1 503 Busy\r\ncontent-length: 11\r\n\r\n{"error":1}', "503 Busy"),
        (HEAD.replace(b"200 OK", b"503 Busy") + chunk(b"{}") + chunk(b""), "503 Busy"),
        (HEAD + chunk(event(1)), "broke off"),
        (HEAD + chunk(b'data: {"error": {"message": "base is gone"}}\n\n'), "base is gone"),
        (b"", "broke off"),
    ],
)
def test_anything_but_a_whole_stream_is_a_failure(answer: bytes, message: str) -> None:
    with pytest.raises(BadAnswerError, match=message):
        read_tokens([(0.0, answer)])


async def test_a_request_is_sent_and_its_tokens_are_timed() -> None:
    seen: list[dict[str, Any]] = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        seen.append(body)
        await slowly(body, writer)

    async with server(answer) as client:
        timeline = await client.complete(Wanted([5, 6], 4))
    assert timeline.failure is None
    assert timeline.token_ids == [0, 1, 2, 3]
    assert timeline.ttft_s >= 0.01
    assert all(itl >= 0.005 for itl in timeline.itls_s)
    assert seen[0]["prompt"] == [5, 6]
    assert seen[0] | {"prompt": None} == {
        "model": "eft",
        "prompt": None,
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


async def test_fewer_tokens_than_asked_for_are_a_failure() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await slowly(body | {"max_tokens": 2}, writer)

    async with server(answer) as client:
        timeline = await client.complete(Wanted([5], 3))
    assert timeline.failure == "2 tokens came, 3 were asked for"


async def test_at_most_so_many_are_in_flight_and_waiting_counts() -> None:
    in_flight = most = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await slowly(body, writer)
        in_flight -= 1

    load = [Wanted([5], 5) for _ in range(6)]
    async with server(answer) as client:
        timelines = await client.replay(load, concurrency=2)
    assert most == 2
    assert all(t.failure is None for t in timelines)
    assert timelines[0].ttft_s < 0.05 < 0.1 <= timelines[-1].ttft_s  # two others of 50 ms went before it


async def test_requests_are_sent_when_they_arrive() -> None:
    async with server(slowly) as client:
        early, late = await client.replay([Wanted([5], 1), Wanted([5], 1, arrival_s=0.2)], concurrency=2)
    assert late.arrival_s - early.arrival_s == pytest.approx(0.2)
    assert late.tokens[0][0] >= late.arrival_s + 0.01
    assert late.ttft_s < 0.15
