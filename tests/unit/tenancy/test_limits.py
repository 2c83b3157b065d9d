"""A tenant's limits are its own, named when reached, and always given back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from eft_serve.errors import InvalidRequestError, RateLimitError
from eft_serve.tenancy.limits import AdmissionLimits
from eft_serve.tenancy.tenants import Tenant
from eft_serve.tenancy.usage import UsageCounters

TWO_AT_ONCE = Tenant(name="two", max_concurrent_requests=2)
THREE_A_MINUTE = Tenant(name="three", requests_per_minute=3)


async def test_requests_per_minute() -> None:
    limits = AdmissionLimits()
    for _ in range(3):
        async with limits.admit(THREE_A_MINUTE):
            pass
    with pytest.raises(RateLimitError, match="requests_per_minute: 3") as caught:
        async with limits.admit(THREE_A_MINUTE):
            pass
    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s <= 60
    async with limits.admit(Tenant(name="other", requests_per_minute=3)):
        pass


async def test_requests_at_once() -> None:
    limits = AdmissionLimits()
    async with limits.admit(TWO_AT_ONCE), limits.admit(TWO_AT_ONCE):
        with pytest.raises(RateLimitError, match="max_concurrent_requests: 2"):
            async with limits.admit(TWO_AT_ONCE):
                pass
        async with limits.admit(Tenant(name="free")):
            pass
    async with limits.admit(TWO_AT_ONCE, num_choices=2):
        assert limits.num_running("two") == 2
    with pytest.raises(InvalidRequestError, match="n: 3"):
        async with limits.admit(TWO_AT_ONCE, num_choices=3):
            pass
    assert limits.num_running("two") == 0


async def test_a_request_refused_for_concurrency_does_not_use_up_the_minute() -> None:
    limits, tenant = AdmissionLimits(), Tenant(name="both", requests_per_minute=2, max_concurrent_requests=1)
    async with limits.admit(tenant):
        for _ in range(5):
            with pytest.raises(RateLimitError, match="max_concurrent"):
                async with limits.admit(tenant):
                    pass
    async with limits.admit(tenant):
        pass


async def test_errors_and_cancellation_give_the_quota_back() -> None:
    limits = AdmissionLimits()
    with pytest.raises(ZeroDivisionError):
        async with limits.admit(TWO_AT_ONCE):
            raise ZeroDivisionError

    async def hold() -> None:
        async with limits.admit(TWO_AT_ONCE):
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await asyncio.sleep(0)
    assert limits.num_running("two") == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert limits.num_running("two") == 0


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 4)), max_size=30), st.data())
async def test_never_more_than_the_limit_and_none_left_over(wanted: list[tuple[str, int]], data: st.DataObject) -> None:
    limits = AdmissionLimits()
    running: list[tuple[str, int, AsyncExitStack]] = []
    for name, num_choices in wanted:
        ends: bool = data.draw(st.booleans())
        if running and ends:
            await running.pop(data.draw(st.integers(0, len(running) - 1)))[2].aclose()
        stack = AsyncExitStack()
        before = sum(n for t, n, _ in running if t == name)
        try:
            await stack.enter_async_context(limits.admit(Tenant(name=name, max_concurrent_requests=5), num_choices))
        except RateLimitError:
            assert before + num_choices > 5
        else:
            running.append((name, num_choices, stack))
        for tenant in ("a", "b"):
            assert limits.num_running(tenant) == sum(n for t, n, _ in running if t == tenant) <= 5
    for _, _, stack in running:
        await stack.aclose()
    assert limits.num_running("a") == limits.num_running("b") == 0


def test_usage_adds_up_by_tenant() -> None:
    registry = CollectorRegistry()
    usage = UsageCounters(registry)
    usage.record("acme", "up", 200, prompt_tokens=5, generation_tokens=7)
    usage.record("acme", "down", 499, prompt_tokens=1, generation_tokens=2)
    usage.record("globex", "up", 200, prompt_tokens=100, generation_tokens=100)
    assert registry.get_sample_value("eft_tenant_prompt_tokens_total", {"tenant": "acme"}) == 6
    assert registry.get_sample_value("eft_tenant_generation_tokens_total", {"tenant": "acme"}) == 9
    labels = {"tenant": "acme", "recipe": "down", "status": "499"}
    assert registry.get_sample_value("eft_tenant_requests_total", labels) == 1
