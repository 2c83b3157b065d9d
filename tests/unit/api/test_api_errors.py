"""Every mistake is a typed error in OpenAI's shape, before anything runs; nothing inside shows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from api_fakes import Stack, chat, events, make_config

from eft_serve.api.body import MAX_BODY_BYTES
from eft_serve.errors import EftServeError, EngineError, RateLimitError, UnavailableError
from eft_serve.types import Delta, Failure, FinishReason


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path))


def message(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "hi"} | fields])


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        (chat(foo=1), "foo"),
        (chat(temperature="1"), "temperature"),
        (chat(temperature=2.1), "temperature"),
        (chat(temperature=True), "temperature"),
        (chat(top_p=0), "top_p"),
        (chat(top_k=1.5), "top_k"),
        (chat(n=0), "n"),
        (chat(n=17), "n"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=1, max_completion_tokens=2), "max_completion_tokens"),
        (chat(seed=2**63), "seed"),
        (chat(stop=""), "stop.0"),
        (chat(stop=["x"] * 17), "stop"),
        (chat(stream_options={"include_usage": True}), "stream_options"),
        (chat(stream=True, stream_options={"foo": True}), "stream_options.foo"),
        (chat(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_obfuscation"),
        (chat(messages=[]), "messages"),
        (message(role="robot"), "messages.0.role"),
        (message(content=None), "messages.0.content"),
        (message(content=[{"type": "image_url", "image_url": {}}]), "messages.0.content.0"),
        (message(tool_calls=[{}]), "messages.0.tool_calls.0.id"),
        (message(name=1), "messages.0.name"),
        (message(foo=1), "messages.0.foo"),
        (chat(eft={"foo": 1}), "eft.foo"),
        (chat(eft={"scale": 1e9}), "eft.scale"),
        (chat(eft={"weights": {"large": 1}}), "eft.weights"),
        (chat(eft={"weights": {"small-chat": -101}}), "eft.weights.small-chat"),
        (chat(eft={"truncate_top_p": 1.1}), "eft.truncate_top_p"),
        (chat(model="down", eft={"scale": 2.1}), "eft.scale"),
        (chat(model="small", eft={"scale": 1}), "eft"),
        (chat(logprobs=1), "logprobs"),
        (chat(top_logprobs=2), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (chat(max_tokens=2, min_tokens=3), "min_tokens"),
        (chat(min_tokens=-1), "min_tokens"),
        (chat(repetition_penalty=0), "repetition_penalty"),
        (chat(stop_token_ids=[0] * 129), "stop_token_ids"),
        (chat(stop_token_ids=["0"]), "stop_token_ids.0"),
        (chat(allowed_token_ids=[]), "allowed_token_ids"),
        (chat(bad_words=[""]), "bad_words.0"),
        (chat(max_tokens=2.5), "max_tokens"),
        (chat(eft={"logprobs_mode": "logits"}), "eft.logprobs_mode"),
        (chat(logprobs=True, eft={"logprobs_mode": "processed_logprobs", "components": True}), "eft.logprobs_mode"),
        (chat(prompt_logprobs=1), "prompt_logprobs"),
        (chat(use_beam_search=True), "use_beam_search"),
        (chat(tools=[{"type": "function"}]), "tools.0.function"),
        (chat(tool_choice="required"), "tool_choice"),
        (chat(response_format={"type": "xml"}), "response_format.type"),
        (chat(response_format={"type": "json_schema"}), "response_format"),
        (chat(logit_bias={"5": 101}), "logit_bias.5"),
        (chat(logit_bias={"five": 1}), "logit_bias.five"),
        (chat(logit_bias=[5]), "logit_bias"),
        (chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
        (chat(presence_penalty=2.1), "presence_penalty"),
        (chat(frequency_penalty=-3), "frequency_penalty"),
        (chat(modalities=["text", "audio"]), "modalities"),
        (chat(audio={}), "audio"),
        (chat(store=True), "store"),
        (chat(metadata={"a": 1}), "metadata.a"),
        (chat(service_tier="flex"), "service_tier"),
        (chat(n=2, best_of=1), "best_of"),
        (chat(best_of=17), "best_of"),
        (chat(best_of=0), "best_of"),
        (chat(best_of=True), "best_of"),
        (chat(best_of=2, stream=True), "best_of"),
        (chat(best_of=2, model="small"), "best_of"),
        (chat(best_of=2, eft={"weights": {"small-chat": 0}}), "best_of"),
        (chat(eft={"components": 21}), "eft.components"),
        (chat(eft={"components": -1}), "eft.components"),
        (chat(eft={"components": "all"}), "eft.components"),
        (chat(eft={"components": 1.5}), "eft.components"),
    ],
)
async def test_a_wrong_field_is_named(stack: Stack, request_body: dict[str, Any], param: str | None) -> None:
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=request_body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert (param or "") in error["message"]
    assert stack.service.requests == []


@pytest.mark.parametrize("field", ["suffix", "logits_processors", "cache_salt"])
async def test_completions_refuse_what_they_do_not_have(stack: Stack, field: str) -> None:
    value = {"suffix": "x", "logits_processors": [], "cache_salt": "x"}[field]
    async with stack.client() as client:
        response = await client.post("/v1/completions", json={"model": "up", "prompt": "a", field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    assert "leave it out" in response.json()["error"]["message"]


ANYWHERE = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": {},
    "bad_words": [],
    "stop_token_ids": [],
    "min_tokens": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "echo": False,
    "prompt_logprobs": None,
    "eft": None,
    "n": 1,
    "max_tokens": 5.0,
    "user": "someone",
    "use_beam_search": False,
    "length_penalty": 1.0,
}
CHAT_ONLY = {
    "logprobs": False,
    "top_logprobs": 0,
    "tools": [],
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "store": None,
    "service_tier": "auto",
    "modalities": ["text"],
    "metadata": {"team": "a"},
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "reasoning_effort": None,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
}


@pytest.mark.parametrize(
    ("path", "body", "nothing"),
    [
        ("chat/completions", chat(max_tokens=5, seed=1), ANYWHERE | CHAT_ONLY),
        ("completions", {"model": "up", "prompt": "a", "max_tokens": 5, "seed": 1}, ANYWHERE | {"logprobs": None}),
    ],
)
async def test_values_that_change_nothing_are_accepted_and_change_nothing(
    stack: Stack, path: str, body: dict[str, Any], nothing: dict[str, Any]
) -> None:
    async with stack.client() as client:
        for request in (body, body | nothing):
            response = await client.post(f"/v1/{path}", json=request)
            assert response.status_code == 200, response.text
    plain, same = (msgspec.structs.replace(request, request_id="", timeout_s=0.0) for request in stack.service.requests)
    assert plain == same


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"model": NaN}', {}, 400),
        (b'{"model": "\xff"}', {}, 400),
        (b'{"a":' * 100_000, {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"\x1f\x8b{}", {"content-encoding": "gzip"}, 415),
        (b'{"model": "' + b"x" * MAX_BODY_BYTES, {}, 413),
    ],
    ids=["cut", "list", "nan", "utf8", "deep", "text", "gzip", "large"],
)
async def test_a_body_that_is_no_json_object(
    stack: Stack, content: bytes, headers: dict[str, str], status: int
) -> None:
    async with stack.client() as client:
        response = await client.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"} | headers
        )
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/", 404),
    ],
)
async def test_unknown_paths_and_methods(stack: Stack, method: str, path: str, status: int) -> None:
    async with stack.client() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (UnavailableError("no replica of 'large'", retry_after_s=0.2), openai.InternalServerError),
        (RateLimitError("slow down", retry_after_s=3.2), openai.RateLimitError),
        (EngineError("out of memory"), openai.InternalServerError),
    ],
)
async def test_an_error_before_the_first_token_has_its_own_status(
    stack: Stack, failure: EftServeError, kind: type[openai.APIStatusError]
) -> None:
    stack.service.answer = lambda _: [failure]
    client = stack.openai()
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.completions.create(model="up", prompt="a", stream=stream)
        assert caught.value.status_code == failure.status
        assert failure.message in caught.value.message
        expected = {"no replica of 'large'": "1", "slow down": "4"}.get(failure.message)
        assert caught.value.response.headers.get("retry-after") == expected
    assert stack.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status=str(failure.status)) == 2


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "as data"])
async def test_an_error_in_mid_stream_is_the_last_event(stack: Stack, raised: bool) -> None:
    error = EngineError("the card fell out")
    failed = Delta(
        text="",
        token_ids=[],
        finish_reason=FinishReason.ERROR,
        failure=Failure(kind="EngineError", message=error.message),
    )
    stack.service.answer = lambda _: [Delta(text="He", token_ids=[1, 2]), error if raised else failed]
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(stream=True))
        whole = await client.post("/v1/chat/completions", json=chat())
    *_, text, last = events(response)
    assert text["choices"][0]["delta"] == {"content": "He"}
    assert last["error"] == {
        "message": "the card fell out",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert whole.status_code == 500
    assert whole.json() == last
    assert stack.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status="500") == 2
    assert stack.metric("eft_tenant_generation_tokens_total", tenant="anonymous") == 4


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_an_answer_that_was_given_up_is_never_passed_off_as_whole(stack: Stack, reason: FinishReason) -> None:
    stack.service.answer = lambda _: [
        Delta(text="He", token_ids=[1]),
        Delta(text="", token_ids=[], finish_reason=reason),
    ]
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat())
    assert response.status_code == 503


async def test_an_unexpected_failure_shows_nothing_and_is_logged(
    stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    stack.service.answer = lambda _: [ZeroDivisionError("secret detail")]
    headers = {"x-request-id": "my-request"}
    with caplog.at_level(logging.ERROR):
        async with stack.client(headers=headers) as client:
            first = await client.post("/v1/chat/completions", json=chat())
            stack.service.answer = lambda _: [Delta(text="a", token_ids=[1]), ZeroDivisionError("secret detail")]
            midway = await client.post("/v1/chat/completions", json=chat(stream=True))
    assert first.status_code == 500
    assert first.json()["error"]["code"] == "internal_error"
    assert first.headers["x-request-id"] == "my-request"
    assert events(midway)[-1] == first.json()
    assert "secret" not in first.text + midway.text
    assert sum("secret detail" in str(r.exc_info) and "my-request" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.parametrize("wanted", ["", "a b", "x" * 129, "a;b"])
async def test_a_strange_request_id_is_replaced(stack: Stack, wanted: str) -> None:
    async with stack.client(headers={"x-request-id": wanted}) as client:
        response = await client.get("/health")
    assert response.headers["x-request-id"] != wanted
    assert len(response.headers["x-request-id"]) == 32


async def test_a_template_that_refuses_says_so(stack: Stack) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}]
    async with stack.client() as client:
        response = await client.post("/v1/chat/completions", json=chat(messages=messages))
    assert response.status_code == 400
    assert "system comes first" in response.json()["error"]["message"]
