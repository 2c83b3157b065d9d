"""Two questions to a served family: does a long prompt stall those who are being answered, and is a prompt that was
seen before answered sooner."""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

from eft_serve.bench import report
from eft_serve.bench.client import Client
from eft_serve.bench.load import Prompts, Wanted
from eft_serve.bench.timeline import overlapping_itls_s, percentile_ms

NUM_STREAMS, STREAM_PROMPT, STREAM_TOKENS = 8, 64, 1600
LONG_PROMPT, LONG_PROMPT_TIMES = 2000, 5
SETTLE_S, MIN_WINDOW_S = 0.3, 0.5
PAIRS, REPEATED_PROMPT = 10, 512
LONG_SEED, REPEATED_SEED = 3, 4

Window = tuple[float, float]


async def long_prompt(client: Client) -> dict[str, Any]:
    """ITL p99 of running streams while a long prompt is prefilled beside them, and while none is.

    Raises:
        RuntimeError: the streams ended too early to say anything, or a request failed.
    """
    prompts = Prompts(LONG_SEED)
    load = [Wanted(prompts.take(STREAM_PROMPT), STREAM_TOKENS) for _ in range(NUM_STREAMS)]
    # Made beforehand: making one takes as long as many a token, and nobody would note when those arrive.
    long_ones = [Wanted(prompts.take(LONG_PROMPT), 1) for _ in range(LONG_PROMPT_TIMES)]
    streaming = asyncio.create_task(client.replay(load, NUM_STREAMS))
    await asyncio.sleep(MIN_WINDOW_S)
    windows: dict[str, list[Window]] = {"without": [], "with": []}
    for long_one in long_ones:
        await asyncio.sleep(SETTLE_S)
        quiet_s = client.now_s
        await asyncio.sleep(MIN_WINDOW_S)
        windows["without"].append((quiet_s, client.now_s))
        answer = (await client.complete(long_one)).succeeded()
        windows["with"].append((answer.arrival_s, answer.tokens[0][0]))
    if streaming.done():
        raise RuntimeError("the streams ended before the last long prompt was answered")
    timelines = [timeline.succeeded() for timeline in await streaming]
    p99 = {
        side: percentile_ms([itl for window in each for itl in overlapping_itls_s(timelines, *window)], 99)
        for side, each in windows.items()
    }
    report.show(
        f"{NUM_STREAMS} streams, {LONG_PROMPT_TIMES} times a prompt of {LONG_PROMPT} tokens beside them",
        ["that prompt", "ITL ms, p99", "window s"],
        [[side, p99[side], round(statistics.median(b - a for a, b in windows[side]), 2)] for side in windows],
    )
    return {"itl_p99_ms": p99, "itl_p99_ratio": round(p99["with"] / p99["without"], 3)}


async def repeated_prefix(client: Client) -> dict[str, Any]:
    """TTFT of a prompt over that of the same prompt again, nothing else running; the median over several prompts."""
    prompts = Prompts(REPEATED_SEED)
    pairs = []
    for _ in range(PAIRS):
        wanted = Wanted(prompts.take(REPEATED_PROMPT), 1)
        first, again = [(await client.complete(wanted)).succeeded() for _ in range(2)]
        pairs.append((first.ttft_s, again.ttft_s))
    ratio = round(statistics.median(first / again for first, again in pairs), 3)
    medians = [round(statistics.median(side) * 1e3, 2) for side in zip(*pairs, strict=True)]
    report.show(
        f"A prompt of {REPEATED_PROMPT} tokens, {PAIRS} different ones",
        ["", "TTFT ms, p50"],
        zip(("first", "again"), medians, strict=True),
    )
    return {"ttft_first_over_repeat": ratio}
