"""The live application through the `openai` client and plain HTTP: answers, streams, refusals, limits, metrics."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from harness import Served

NEVER_ENDING = 3500  # tokens; nearly all that the context holds
QUESTION = [{"role": "user", "content": "What is the capital of Peru?"}]
LONG: dict[str, Any] = {"max_tokens": NEVER_ENDING, "extra_body": {"ignore_eos": True}}


def chat(served: Served, tenant: str = "tests", **options: Any) -> Any:
    body = {"model": "eft", "messages": QUESTION, "temperature": 0, "max_tokens": 24, **options}
    return served.client(tenant).chat.completions.create(**body)


def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    whole = chat(served)
    chunks = list(chat(served, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_seeded_sampling_repeats_and_unseeded_does_not(served: Served) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    seeded = {chat(served, seed=7, **options).choices[0].message.content for _ in range(3)}
    unseeded = {chat(served, **options).choices[0].message.content for _ in range(3)}
    assert len(seeded) == 1
    assert len(unseeded) > 1


def test_knobs_per_request(served: Served) -> None:
    """scale 0, weight 1 is the tuned model; scale 1, weight 0 is the base."""
    for eft, model in (
        ({"scale": 0.0, "weights": {"tuned-small": 1.0}}, "tuned-small"),
        ({"scale": 1.0, "weights": {"tuned-small": 0.0}}, "base-large"),
    ):
        emulated = chat(served, extra_body={"eft": eft}).choices[0].message.content
        assert emulated == chat(served, model=model).choices[0].message.content


def test_models_are_those_that_the_tenant_may_use(served: Served) -> None:
    assert {m.id for m in served.client().models.list()} == {*served.config.recipes, *served.config.models}
    assert {m.id for m in served.client("only-eft").models.list()} == {"eft"}
    with pytest.raises(openai.NotFoundError):
        chat(served, "only-eft", model="base-large")


def test_a_wrong_key_and_no_key_are_refused(served: Served) -> None:
    with (
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="eft-" + "x" * 43, max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refusal,
    ):
        stranger.chat.completions.create(model="eft", messages=QUESTION)  # type: ignore[arg-type]
    assert "x" * 43 not in str(refusal.value)
    assert httpx.post(f"{served.url}/v1/chat/completions", json={}).status_code == 401
    assert httpx.get(f"{served.url}/v1/models").status_code == 401


def test_rate_and_concurrency_limits_answer_429_and_when_to_come_back(served: Served) -> None:
    for _ in range(2):
        chat(served, "slow", max_tokens=1)
    with pytest.raises(openai.RateLimitError) as refusal:
        chat(served, "slow", max_tokens=1)
    assert 1 <= int(refusal.value.response.headers["retry-after"]) <= 60
    assert refusal.value.response.json()["error"]["type"] == "rate_limit_error"
    running = chat(served, "narrow", stream=True, **LONG)
    next(running)
    with pytest.raises(openai.RateLimitError):
        chat(served, "narrow", max_tokens=1)
    running.close()
    eventually(lambda: chat(served, "narrow", max_tokens=1), until=lambda answer: answer is not None)


BAD = [
    ({"model": "nobody"}, 404, "model"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**6}, 400, "max_tokens"),
    ({"messages": [{"role": "user", "content": "word " * 20_000}]}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"eft": {"scale": 1e9}}, 400, "eft.scale"),
    ({"eft": {"weights": {"nobody": 1}}}, 400, "eft.weights"),
    ({"eft": {"size": 1}}, 400, "eft.size"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ({"temprature": 1}, 400, "temprature"),
]


@pytest.mark.parametrize(("change", "status", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_named_and_the_server_goes_on(
    served: Served, change: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": "eft", "messages": QUESTION, "temperature": 0, "max_tokens": 4, **change}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=served.headers(), timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["message"]
    assert chat(served, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": "eft", "temperature": NaN}', b"\xff\xfe"])
def test_malformed_json_is_400(served: Served, content: bytes) -> None:
    headers = {**served.headers(), "Content-Type": "application/json"}
    response = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_health_and_readiness(served: Served) -> None:
    health = httpx.get(f"{served.url}/health", headers={"X-Request-ID": "mine-1"})
    assert health.status_code == 200
    assert health.headers.get_list("x-request-id") == ["mine-1"]
    assert httpx.get(f"{served.url}/ready").status_code == 200


def test_one_scrape_shows_every_process_and_counts_each_token_once(served: Served) -> None:
    before = served.total("eft_tenant_generation_tokens_total", tenant="tests")
    drawn_before = served.total("eft_generated_tokens_total")
    used = sum(chat(served).usage.completion_tokens for _ in range(3))
    assert served.total("eft_tenant_generation_tokens_total", tenant="tests") - before == used
    assert served.total("eft_generated_tokens_total") - drawn_before == used
    scraped = served.samples()
    for phase in ("schedule", "fan_out", "combine", "sample", "emit"):
        assert any(name == "eft_step_seconds_count" and ("phase", phase) in pairs for name, pairs in scraped), phase
    for model in ("base-large", "base-small", "tuned-small"):
        assert served.total("eft_model_step_seconds_count", model=model) > 0
    for name in (
        "eft_time_to_first_token_seconds",
        "eft_inter_token_latency_seconds",
        "eft_e2e_request_latency_seconds",
    ):
        assert served.total(f"{name}_count") > 0
    replicas = sum(model.num_replicas for model in served.config.deployments.values())
    assert served.total("eft_process_up") == replicas + served.config.coordinator.num_replicas


def test_a_client_that_goes_away_frees_every_model(served: Served) -> None:
    async def leave() -> None:
        body = {"model": "eft", "messages": QUESTION, "max_tokens": NEVER_ENDING, "ignore_eos": True, "stream": True}
        async with (
            httpx.AsyncClient(base_url=served.url, headers=served.headers(), timeout=60) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if '"content"' in line:
                    return

    eventually(lambda: served.total("eft_num_requests_running"), until=lambda running: running == 0)
    aborted = served.total("eft_requests_finished_total", reason="abort")
    drawn = served.total("eft_generated_tokens_total")
    asyncio.run(leave())
    eventually(lambda: served.total("eft_num_requests_running"), until=lambda running: running == 0)
    eventually(lambda: served.total("eft_engine_num_sequences"), until=lambda count: count == 0)
    assert served.total("eft_requests_finished_total", reason="abort") == aborted + 1
    assert served.total("eft_generated_tokens_total") - drawn < NEVER_ENDING / 2


def test_a_stream_is_server_sent_events(served: Served) -> None:
    body = {"model": "eft", "messages": QUESTION, "max_tokens": 4, "temperature": 0, "stream": True}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=served.headers(), timeout=60)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])


def eventually(probe: Any, until: Any, timeout_s: float = 20.0) -> None:
    """Wait for what happens a moment later: an abort has to reach the engines."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            value = probe()
            if until(value):
                return
        except openai.RateLimitError as error:
            value = error
        assert time.monotonic() < deadline, f"still {value}"
        time.sleep(0.2)
