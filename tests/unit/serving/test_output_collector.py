"""A slow reader gets fewer and larger deltas, and loses nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from eft_serve.errors import UnavailableError
from eft_serve.serving.output_collector import OutputCollector, merge
from eft_serve.types import Delta, Failure, FinishReason, TokenComponents, Usage


def delta(text: str, finish: FinishReason | None = None) -> Delta:
    return Delta(text=text, token_ids=[ord(c) for c in text], finish_reason=finish)


async def test_what_is_ready_comes_together_and_the_last_ends_it() -> None:
    collector = OutputCollector()
    for num_before, text in enumerate("abc"):
        collector.put(num_before, delta(text))
    reader = collector.read()
    assert await anext(reader) == delta("abc")
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    assert not waiting.done()
    collector.put(3, delta("d"))
    assert not collector.complete
    collector.put(4, delta("e", FinishReason.STOP))
    assert collector.complete
    assert await waiting == delta("de", FinishReason.STOP)
    assert [d async for d in reader] == []


async def test_lost_tokens_are_an_error_after_what_came_before_them() -> None:
    collector = OutputCollector()
    collector.put(0, delta("ab"))
    collector.put(3, delta("d", FinishReason.STOP))
    reader = collector.read()
    assert await anext(reader) == delta("ab")
    with pytest.raises(UnavailableError, match="tokens 2 to 3 were lost"):
        await anext(reader)
    assert not collector.complete


async def test_the_end_of_the_coordinator_wakes_the_reader_and_comes_too_late_for_a_whole_answer() -> None:
    broken, whole = OutputCollector(), OutputCollector()
    waiting = asyncio.ensure_future(anext(broken.read()))
    await asyncio.sleep(0)
    broken.fail(UnavailableError("gone"))
    with pytest.raises(UnavailableError, match="gone"):
        await waiting
    whole.put(0, delta("a", FinishReason.STOP))
    whole.fail(UnavailableError("gone"))
    assert [d async for d in whole.read()] == [delta("a", FinishReason.STOP)]


async def test_what_came_while_a_slow_reader_was_busy_is_read_before_an_error() -> None:
    collector = OutputCollector()
    collector.put(0, delta("a"))
    reader = collector.read()
    assert await anext(reader) == delta("a")
    collector.put(1, delta("b", FinishReason.STOP))
    collector.fail(UnavailableError("gone"))
    assert [d async for d in reader] == [delta("b", FinishReason.STOP)]


def test_components_and_the_last_usage_survive_the_merge() -> None:
    def described(text: str, **last: Any) -> Delta:
        told = [TokenComponents(ord(c), -1.0, [], [], 0.0) for c in text]
        return Delta(text=text, token_ids=[ord(c) for c in text], components=told, **last)

    ends: dict[str, Any] = {"finish_reason": FinishReason.STOP, "usage": Usage(models={}, seconds=1.0)}
    assert merge([described("a"), described("bc"), described("d", **ends)]) == described("abcd", **ends)
    assert merge([delta("a"), delta("b")]).components is None


def test_a_failure_survives_the_merge() -> None:
    failed = Delta(
        text="",
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        failure=Failure(kind="EngineError", message="m", param=None),
    )
    merged = merge([delta("a"), failed])
    assert (merged.text, merged.finish_reason, merged.failure) == ("a", FinishReason.ERROR, failed.failure)


async def test_a_slow_reader_gets_the_text_before_a_failure_as_a_fast_one_does() -> None:
    collector = OutputCollector()
    failure = Failure(kind="EngineError", message="m")
    collector.put(0, Delta(text="a", token_ids=[1]))
    collector.put(1, Delta(text="b", token_ids=[2]))
    collector.put(2, Delta(text="", token_ids=[], finish_reason=FinishReason.ERROR, failure=failure))
    read = [(delta.text, delta.failure) async for delta in collector.read()]
    assert read == [("ab", None), ("", failure)]
