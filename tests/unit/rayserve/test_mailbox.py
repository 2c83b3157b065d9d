"""A slow reader gets fewer and larger deltas, and loses nothing."""

from __future__ import annotations

import asyncio

from eft_serve.rayserve.mailbox import Mailbox, merge
from eft_serve.types import Delta, Failure, FinishReason


def delta(text: str, finish: FinishReason | None = None) -> Delta:
    return Delta(text=text, token_ids=[ord(c) for c in text], finish_reason=finish)


async def test_what_is_ready_comes_together_and_the_last_ends_it() -> None:
    mailbox = Mailbox()
    for text in "abc":
        mailbox.put(delta(text))
    reader = mailbox.read()
    assert await anext(reader) == delta("abc")
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put(delta("d"))
    mailbox.put(delta("e", FinishReason.STOP))
    assert await waiting == delta("de", FinishReason.STOP)
    assert [d async for d in reader] == []


def test_a_failure_survives_the_merge() -> None:
    failed = Delta(
        text="",
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        failure=Failure(kind="EngineError", message="m", param=None),
    )
    merged = merge([delta("a"), failed])
    assert (merged.text, merged.finish_reason, merged.failure) == ("a", FinishReason.ERROR, failed.failure)
