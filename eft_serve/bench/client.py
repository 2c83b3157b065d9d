"""A client that takes little from the server with which it shares the cores: it notes what arrives and when.

Reading what arrived waits until nothing is being measured. One connection a request, HTTP/1.1.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from typing import cast
from urllib.parse import urlsplit

from eft_serve.bench.load import Wanted
from eft_serve.bench.timeline import Timeline, TokensAt

REQUEST_TIMEOUT_S = 120.0
Piece = tuple[float, bytes]  # time.perf_counter() and what arrived then


class Client:
    """Sends greedy streaming completions to one server; times are seconds since this client was made."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._model = model
        self._key = key
        self._start = time.perf_counter()

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._start

    async def replay(self, load: Sequence[Wanted], concurrency: int) -> list[Timeline]:
        """All requests at their times, `concurrency` at most in flight; the wait for a place counts as theirs."""
        gate = asyncio.Semaphore(concurrency)
        start_s = self.now_s

        async def one(wanted: Wanted) -> list[Piece]:
            await asyncio.sleep(wanted.arrival_s - (self.now_s - start_s))
            async with gate:
                return await self._exchange(wanted)

        answers = await asyncio.gather(*map(one, load))
        return [self._timeline(w, start_s + w.arrival_s, pieces) for w, pieces in zip(load, answers, strict=True)]

    async def complete(self, wanted: Wanted) -> Timeline:
        """One request, now."""
        arrival_s = self.now_s
        return self._timeline(wanted, arrival_s, await self._exchange(wanted))

    async def _exchange(self, wanted: Wanted) -> list[Piece]:
        recorder = Recorder(self._request(wanted))
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: recorder, self._host, self._port)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await recorder.closed
        finally:
            transport.close()
        return recorder.pieces

    def _request(self, wanted: Wanted) -> bytes:
        body = {
            "model": self._model,
            "prompt": wanted.prompt,
            "max_tokens": wanted.num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nConnection: close\r\n"
            f"Authorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def _timeline(self, wanted: Wanted, arrival_s: float, pieces: Iterable[Piece]) -> Timeline:
        try:
            tokens = [(at - self._start, ids) for at, ids in read_tokens(pieces)]
        except BadAnswerError as error:
            return Timeline(arrival_s, failure=str(error))
        got = sum(len(ids) for _, ids in tokens)
        wrong = None if got == wanted.num_tokens else f"{got} tokens came, {wanted.num_tokens} were asked for"
        return Timeline(arrival_s, tokens, wrong)


class Recorder(asyncio.Protocol):
    """Sends a request and keeps what arrives until the server closes the connection."""

    def __init__(self, request: bytes) -> None:
        self.pieces: list[Piece] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)  # an answer that broke off is found when it is read


class BadAnswerError(Exception):
    """Not a whole stream of tokens; the message says what came instead."""


def read_tokens(pieces: Iterable[Piece]) -> list[TokensAt]:
    """The token ids of a recorded answer, each with the time at which its event was complete.

    Raises:
        BadAnswerError: the answer is no success, holds an error, or broke off.
    """
    reader = EventReader()
    tokens: list[TokensAt] = []
    done = False
    for at, data in pieces:
        for event in reader.feed(data):
            if event == b"[DONE]":
                done = True
                continue
            body = json.loads(event)
            if "error" in body:
                raise BadAnswerError(str(body["error"]))
            ids = [token for choice in body["choices"] for token in choice.get("token_ids", ())]
            if ids:
                tokens.append((at, ids))
    if not done:
        raise BadAnswerError(f"the answer broke off: {reader.rest!r}")
    return tokens


class EventReader:
    """Server-sent events out of a chunked HTTP/1.1 response, whatever the pieces in which it arrives."""

    def __init__(self) -> None:
        self._raw = b""  # not yet understood
        self._body = b""  # of an event that is not complete
        self._in_body = False

    @property
    def rest(self) -> str:
        """What no event was made of, for messages."""
        return (self._body + self._raw)[-500:].decode(errors="replace")

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that these bytes complete."""
        self._raw += data
        if not self._in_body:
            head, found, rest = self._raw.partition(b"\r\n\r\n")
            if not found or not head.startswith(b"HTTP/1.1 200") or b"chunked" not in head.lower():
                return []  # an error's body is left for the message
            self._in_body, self._raw = True, rest
        while (chunk := self._take_chunk()) is not None:
            self._body += chunk
        *events, self._body = self._body.split(b"\n\n")
        return [event.removeprefix(b"data: ") for event in events]

    def _take_chunk(self) -> bytes | None:
        size, found, rest = self._raw.partition(b"\r\n")
        if not found or len(rest) < (length := int(size, 16)) + 2:
            return None
        self._raw = rest[length + 2 :]
        return rest[:length] or None
