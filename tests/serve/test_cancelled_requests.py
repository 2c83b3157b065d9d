"""A thousand clients that go away at any moment leave nothing behind in any model."""

from __future__ import annotations

import asyncio
import json
import random
import time
from urllib.parse import urlsplit

from harness import Served

NUM_REQUESTS = 1000
AT_ONCE = 32
LONGEST_STAY_S = 1.0
SETTLE_S = 30.0
HELD = (
    "eft_num_requests_running",
    "eft_num_requests_waiting",
    "eft_engine_num_sequences",
    "eft_engine_kv_used_tokens",
)


async def come_and_go(served: Served, rng: random.Random, gate: asyncio.Semaphore) -> None:
    """Ask for a long answer and leave: before it begins, in the middle of the prompt, or while tokens come."""
    url = urlsplit(served.url)
    body = {
        "model": rng.choice(["eft", "eft", "narrow", "base-large"]),
        "prompt": [rng.randrange(3, 3000) for _ in range(rng.choice([3, 40, 400]))],
        "max_tokens": 150,
        "ignore_eos": True,
        "stream": True,
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {served.keys['tests']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    async with gate:
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(head.encode() + content)
        await writer.drain()
        await asyncio.sleep(rng.uniform(0, LONGEST_STAY_S))
        writer.transport.abort()


async def all_of_them(served: Served) -> None:
    rng, gate = random.Random(0), asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(come_and_go(served, rng, gate) for _ in range(NUM_REQUESTS)))


def test_a_thousand_cancelled_requests_leave_no_block_taken(served: Served) -> None:
    drawn = served.total("eft_generated_tokens_total")
    aborted = served.total("eft_requests_finished_total", reason="abort")
    asyncio.run(all_of_them(served))
    deadline = time.monotonic() + SETTLE_S
    while any(left := {name: served.total(name) for name in HELD}.values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(left), dict(zip(HELD, left, strict=True))
    assert (
        served.total("eft_requests_finished_total", reason="abort") > aborted + NUM_REQUESTS / 10
    )  # those that had begun
    assert served.total("eft_generated_tokens_total") > drawn, "nobody stayed for a token"
