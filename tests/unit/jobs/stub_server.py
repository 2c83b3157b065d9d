"""An HTTP server that answers as eft-serve does, on a loopback port, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response


@dataclass
class Stub:
    """What the server does, and what it saw."""

    url: str = ""
    delay_s: float = 0.0
    refusals: dict[str, list[tuple[int, dict[str, str]]]] = field(default_factory=dict)  # by prompt, before it answers
    asked: Counter[str] = field(default_factory=Counter)  # by prompt
    answered: Counter[str] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)
    running: int = 0
    most_running: int = 0

    async def answer(self, request: Request) -> Response:
        body: dict[str, Any] = await request.json()
        prompt = body["prompt"]
        self.asked[prompt] += 1
        self.keys.add(request.headers.get("authorization"))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.delay_s)
        self.running -= 1
        if waiting := self.refusals.get(prompt):
            status, headers = waiting.pop(0)
            return PlainTextResponse("later", status, headers)
        if prompt == "bad":
            return JSONResponse({"error": {"message": "bad prompt"}}, 400)
        self.answered[prompt] += 1
        text = prompt.encode("ascii", "replace").decode()
        return JSONResponse({"choices": [{"text": f"answer to {text}"}]}, headers={"x-request-id": f"req-{text}"})


@contextmanager
def serve_stub(stub: Stub) -> Iterator[Stub]:
    """The server for as long as the block lasts."""
    app = FastAPI()
    app.add_api_route("/v1/completions", stub.answer, methods=["POST"])
    listener = socket.create_server(("127.0.0.1", 0))
    stub.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield stub
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
