"""`/health`, `/ready`, `/metrics`, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from api_fakes import Stack, chat, make_config
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from eft_serve.api.metrics import BUCKETS, ApiMetrics, TokenClock
from eft_serve.api.sse import encode
from eft_serve.coordinator.metrics import STEP_BUCKETS
from eft_serve.types import Delta


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


async def test_ready_names_what_is_missing_and_health_does_not_care(stack: Stack) -> None:
    async with stack.client(peer="10.0.0.9") as client:
        assert (await client.get("/ready")).status_code == 200
        stack.service.missing = "large"
        response = await client.get("/ready")
        assert (await client.get("/health")).status_code == 200
    assert response.status_code == 503
    assert "'large'" in response.json()["error"]["message"]


async def test_metrics_are_those_of_every_process_and_have_no_callers_strings(stack: Stack) -> None:
    async with stack.client() as client:
        await client.post("/v1/chat/completions", json=chat())
        await client.post("/v1/chat/completions", json=chat(model="evil-label"))
        await client.get("/evil-path")
        text = (await client.get("/metrics")).text
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert "eft_engine_steps_total" in families
    assert "evil" not in text
    assert stack.metric("eft_http_requests_total", route="/v1/chat/completions", status="200") == 1
    assert stack.metric("eft_http_requests_total", route="/v1/chat/completions", status="404") == 1
    assert stack.metric("eft_http_requests_total", route="unmatched", status="404") == 1
    assert stack.metric("eft_http_requests_running") == 0
    assert stack.metric("eft_e2e_request_latency_seconds_count", recipe="up") == 1
    assert stack.metric("eft_time_to_first_token_seconds_count", recipe="up") == 1
    assert stack.metric("eft_inter_token_latency_seconds_count", recipe="up") == 2
    assert stack.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status="200") == 1
    assert stack.metric("eft_tenant_prompt_tokens_total", tenant="anonymous") == 20
    assert stack.metric("eft_tenant_generation_tokens_total", tenant="anonymous") == 5


def test_tokens_that_arrive_together_share_the_time_they_took() -> None:
    registry = CollectorRegistry()
    clock = TokenClock(ApiMetrics(registry), "up", arrival=10.0)
    clock.saw(0, Delta(text="", token_ids=[1, 2]), now=10.5)
    clock.saw(0, Delta(text="x", token_ids=[]), now=10.6)
    clock.saw(1, Delta(text="", token_ids=[1]), now=10.7)
    clock.saw(0, Delta(text="", token_ids=[1, 2, 3]), now=10.8)

    def sample(name: str, part: str) -> float | None:
        return registry.get_sample_value(f"eft_{name}_seconds_{part}", {"recipe": "up"})

    assert (sample("time_to_first_token", "count"), sample("time_to_first_token", "sum")) == (1, 0.5)
    assert sample("inter_token_latency", "count") == 3
    assert sample("inter_token_latency", "sum") == pytest.approx(0.3)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_a_head_request_has_the_status_of_a_get(stack: Stack, path: str) -> None:
    async with stack.client() as client:
        assert (await client.head(path)).status_code == (await client.get(path)).status_code == 200


def test_the_edges_of_histograms_read_as_they_were_meant() -> None:
    assert [edge for edge in (*BUCKETS, *STEP_BUCKETS) if len(repr(edge)) > 7] == []


def test_an_event_is_one_line_for_those_too_who_split_at_unicodes_line_breaks() -> None:
    text = "a\u2028b\u2029c\x85d\ne"
    event = encode({"content": text})
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event.removeprefix(b"data: ")) == {"content": text}
