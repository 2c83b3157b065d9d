"""Hostile bodies are refused by name, within a second, and neither the process nor its other requests notice."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from pathlib import Path

import httpx
import psutil
import pytest
from api_fakes import Connection, Stack, chat
from hostile_bodies import HARMLESS, HOSTILE, Hostile
from openapi_checks import Description, make_stack

from eft_serve.types import Delta

MAX_SECONDS = 1.0  # of computing
MAX_PAUSE_S = 0.15  # of the event loop, of computing; 0.04 is usual, and 0.26 if it parses 4 MB itself
MAX_GROWTH = 96 * 2**20  # bytes; all bodies together are twice that


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Stack:
    return make_stack(tmp_path_factory.mktemp("hostile"), max_file_bytes=2**20)


@pytest.fixture(scope="module")
def description(stack: Stack) -> Description:
    return Description(stack.app)


async def post(stack: Stack, body: Hostile) -> httpx.Response:
    async with stack.client() as client:
        return await client.post(body.path, content=body.content, headers={"content-type": body.content_type})


def test_there_are_many_and_each_is_another_one() -> None:
    assert len(HOSTILE) >= 80
    assert len({body.name for body in HOSTILE}) == len(HOSTILE)


@pytest.mark.parametrize("body", [*HOSTILE, *HARMLESS], ids=str)
async def test_a_hostile_body_is_answered_by_name_within_a_second(
    stack: Stack, description: Description, body: Hostile
) -> None:
    started = time.process_time()  # the machine may be shared
    response = await asyncio.wait_for(post(stack, body), 10 * MAX_SECONDS)
    seconds = time.process_time() - started
    error = response.json().get("error", {"param": None})
    assert (response.status_code, error["param"]) == (body.status, body.param), error
    assert len(response.content) < 2000 or body in HARMLESS
    assert seconds < MAX_SECONDS
    description.check(response, body.path)


async def longest_pause(done: asyncio.Event) -> float:
    """Seconds that this process computed while its event loop stood still, at most; until it is done."""
    longest, last = 0.0, time.process_time()
    while not done.is_set():
        await asyncio.sleep(0.002)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest


async def test_a_bystander_streams_on_beside_them_and_memory_stays_flat(tmp_path: Path) -> None:
    token = Delta(text="a", token_ids=[66])
    stack = make_stack(tmp_path, lambda _: itertools.repeat(token), max_file_bytes=2**20)
    stack.service.pause_s = 0.005

    async def attack() -> None:
        for body in HOSTILE:
            assert (await post(stack, body)).status_code == body.status

    await attack()  # what is loaded once is loaded
    gc.collect()
    gc.freeze()  # a collection takes the longer the more modules a test run has loaded
    bystander, done = Connection(stack.app, "/v1/chat/completions", chat(stream=True)), asyncio.Event()
    streaming, pausing = asyncio.create_task(bystander.run()), asyncio.create_task(longest_pause(done))
    before = psutil.Process().memory_info().rss
    try:
        await attack()
    finally:
        gc.unfreeze()
        done.set()
        bystander.gone.set()
        await streaming
    gc.collect()
    growth = psutil.Process().memory_info().rss - before
    assert growth < MAX_GROWTH
    assert await pausing < MAX_PAUSE_S
    assert len(bystander.messages) > 100, "its tokens went on"
