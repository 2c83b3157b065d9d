"""`/v1/responses`, mostly as OpenAI's own clients ask it: the `response` object, its events, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
import uvicorn
from api_fakes import Connection, Stack, deltas, make_config
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from eft_serve.errors import EngineError
from eft_serve.types import Delta, FinishReason, GenerationRequest, ModelUsage, TokenComponents, Usage

EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
PROMPT = len("<s>") - 2 + len("User: hi\nAssistant:")  # of the first model
LOGPROBS = "message.output_text.logprobs"


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(make_config(tmp_path, default_max_tokens=77))


async def post(stack: Stack, **body: Any) -> httpx.Response:
    """A request, which asks `up` to answer `hi` unless told otherwise."""
    async with stack.client() as client:
        return await client.post("/v1/responses", json={"model": "up", "input": "hi"} | body)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; each must have a line with its own type as its name."""
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def prompts(stack: Stack, model: str = "small") -> str:
    """The last request's prompt of this model; a token of the fakes is a byte, and its id one more."""
    ids = stack.service.requests[-1].prompts[model]
    renderer: Any = stack.app.state.context.renderer
    return str(renderer.tokenizer(model).tokenizer.decode(ids, skip_special_tokens=True))


async def test_a_whole_answer_has_openais_shape(stack: Stack) -> None:
    response = await post(stack, metadata={"a": "b"}, user="me", temperature=0)
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("resp_")
    message = body["output"][0]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}],
    }
    assert body["usage"] == {
        "input_tokens": PROMPT,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": PROMPT + 5,
    }
    said = {"object": "response", "status": "completed", "model": "up", "error": None, "incomplete_details": None}
    echoed = {"metadata": {"a": "b"}, "user": "me", "temperature": 0, "top_p": 1, "store": False, "tools": []}
    assert {name: body[name] for name in said | echoed} == said | echoed
    assert body["completed_at"] >= body["created_at"] > 1_700_000_000
    missing = {n for n, field in Response.model_fields.items() if field.is_required()} - body.keys()
    assert not missing


async def test_openais_client_reads_a_whole_answer(stack: Stack) -> None:
    response = await stack.openai().responses.create(model="up", input="hi", instructions="Be brief.")
    assert (response.output_text, response.status, response.instructions) == ("Hello", "completed", "Be brief.")
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    assert stack.service.requests[0].sampling.max_tokens == 77


async def test_a_stream_has_openais_events_numbered_and_named(stack: Stack) -> None:
    response = await post(stack, stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(response)
    assert [event["type"] for event in events] == EVENTS
    assert [event["sequence_number"] for event in events] == list(range(len(EVENTS)))
    item = events[2]["item"]
    assert (item["status"], item["content"]) == ("in_progress", [])
    assert {event["item_id"] for event in events if "item_id" in event} == {item["id"]}
    ids = {event["response"]["id"] for event in events if "response" in event}
    assert len(ids) == 1
    assert [event["delta"] for event in events[4:6]] == ["Hel", "lo"]
    assert events[6]["text"] == events[7]["part"]["text"] == events[8]["item"]["content"][0]["text"] == "Hello"
    assert events[0]["response"]["usage"] is None
    last = events[-1]["response"]
    assert last["output"] == [events[8]["item"]]
    assert last["usage"]["total_tokens"] == PROMPT + 5


async def test_the_last_event_has_what_a_whole_answer_has(stack: Stack) -> None:
    request: dict[str, Any] = {"metadata": {"a": "b"}, "max_output_tokens": 20, "top_p": 0.5}
    whole = (await post(stack, **request)).json()
    streamed = events_of(await post(stack, stream=True, **request))[-1]["response"]
    for response in (whole, streamed):
        for name in ("id", "created_at", "completed_at"):
            del response[name]
        del response["output"][0]["id"]
    assert streamed == whole


async def test_openais_client_reads_a_stream(stack: Stack) -> None:
    stream = await stack.openai().responses.create(model="up", input="hi", stream=True)
    events: list[ResponseStreamEvent] = [event async for event in stream]
    assert [event.type for event in events] == EVENTS
    assert type(events[-1]).__name__ == "ResponseCompletedEvent"


@contextmanager
def served(stack: Stack) -> Iterator[str]:
    """The stack behind a real socket, for clients that block."""
    server = uvicorn.Server(uvicorn.Config(stack.app, port=0, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            pass
        yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def test_openais_blocking_client_and_its_helpers_read_answers(stack: Stack) -> None:
    with served(stack) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert client.responses.create(model="up", input="hi").output_text == "Hello"
        assert [e.type for e in client.responses.create(model="up", input="hi", stream=True)] == EVENTS
        with client.responses.stream(model="up", input="hi") as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        assert (snapshots, final.output_text) == (["Hel", "Hello"], "Hello")
        assert client.responses.parse(model="up", input="hi").output_text == "Hello"


async def test_openais_asynchronous_helpers_read_a_stream(stack: Stack) -> None:
    async with stack.openai().responses.stream(model="up", input="hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == "Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_the_limit_cut_off_is_incomplete_and_says_why(stack: Stack, stream: bool) -> None:
    stack.service.answer = lambda _: deltas("Hel", finish=FinishReason.LENGTH)
    response = await post(stack, max_output_tokens=3, stream=stream)
    events = events_of(response) if stream else [{"type": "response.incomplete", "response": response.json()}]
    assert events[-1]["type"] == "response.incomplete"
    body = events[-1]["response"]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (body["completed_at"], body["output"][0]["status"]) == (None, "incomplete")
    assert stack.service.requests[0].sampling.max_tokens == 3


async def test_an_answer_without_text_has_an_empty_part(stack: Stack) -> None:
    stack.service.answer = lambda _: [Delta(text="", token_ids=[7], finish_reason=FinishReason.STOP)]
    events = events_of(await post(stack, stream=True))
    assert [event["type"] for event in events] == [kind for kind in EVENTS if "delta" not in kind]
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


async def test_cached_tokens_are_counted(stack: Stack) -> None:
    usage = Usage(models={"large": ModelUsage(PROMPT, 16)}, seconds=1.0)
    end = Delta(text="a", token_ids=[7], finish_reason=FinishReason.STOP, usage=usage)
    stack.service.answer = lambda _: [end]
    body = (await post(stack)).json()
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 16


ANSWERED = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}],
}
CONVERSATIONS: list[tuple[dict[str, Any], str]] = [
    ({"input": "hi"}, "<|user|>hi\n<|assistant|>"),
    ({"input": [{"role": "user", "content": "hi"}]}, "<|user|>hi\n<|assistant|>"),
    (
        {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
        "<|user|>hi\n<|assistant|>",
    ),
    (
        {"input": [{"role": "user", "content": "a"}, ANSWERED, {"role": "user", "content": "b"}]},
        "<|user|>a\n<|assistant|>yes\n<|user|>b\n<|assistant|>",
    ),
    # an answer without `type`
    (
        {"input": [{"role": "assistant", "content": ANSWERED["content"]}, {"role": "user", "content": "b"}]},
        "<|assistant|>yes\n<|user|>b\n<|assistant|>",
    ),
    ({"input": "hi", "instructions": "I."}, "<|system|>I.\n<|user|>hi\n<|assistant|>"),
    # fields that other servers leave out, or have as null; a message with a text instead of parts
    (
        {"input": [{k: ANSWERED[k] for k in ("type", "role", "content")}, {"role": "user", "content": "b"}]},
        "<|assistant|>yes\n<|user|>b\n<|assistant|>",
    ),
    ({"input": [ANSWERED | {"id": None, "phase": None, "content": "yes"}]}, "<|assistant|>yes\n<|assistant|>"),
    ({"input": "hi", "instructions": ""}, "<|user|>hi\n<|assistant|>"),
    ({"input": [{"role": "developer", "content": "D."}]}, "<|system|>D.\n<|assistant|>"),
    (
        {"input": [{"role": "system", "content": "S."}, {"role": "user", "content": "hi"}], "instructions": "I."},
        "<|system|>I.\n\nS.\n<|user|>hi\n<|assistant|>",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]}]},
        "<|user|>a\nb\n<|assistant|>",
    ),
]


@pytest.mark.parametrize(("body", "prompt"), CONVERSATIONS)
async def test_a_conversation_is_rendered_as_a_chat(stack: Stack, body: dict[str, Any], prompt: str) -> None:
    response = await post(stack, **body)
    assert response.status_code == 200, response.text
    assert prompts(stack) == prompt


async def test_an_answers_output_is_the_next_requests_input(stack: Stack) -> None:
    client = stack.openai()
    first = await client.responses.create(model="up", input="a")
    turn = [item.to_dict() for item in first.output]
    await client.responses.create(model="up", input=[*turn, {"role": "user", "content": "b"}])  # type: ignore[list-item]
    assert prompts(stack) == "<|assistant|>Hello\n<|user|>b\n<|assistant|>"


def with_tokens(_: GenerationRequest) -> list[Delta]:
    """One token with itself as the alternative, and what its models say."""
    alone = TokenComponents(7, -0.5, models=[-1.0, -2.0, -3.0], rewards=[0.5], reward=0.5)
    token = msgspec.structs.replace(alone, top=[alone])
    return [Delta(text="a", token_ids=[7], finish_reason=FinishReason.STOP, components=[token])]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_come_where_include_has_them(stack: Stack, stream: bool) -> None:
    stack.service.answer = with_tokens
    response = await post(stack, include=[LOGPROBS], top_logprobs=1, stream=stream)
    assert stack.service.requests[0].logprobs == 1
    body = events_of(response)[-1]["response"] if stream else response.json()
    token = body["output"][0]["content"][0]["logprobs"]
    alone = {"token": token[0]["token"], "logprob": -0.5, "bytes": token[0]["bytes"]}
    assert token == [alone | {"top_logprobs": [alone]}]
    assert body["top_logprobs"] == 1
    if stream:
        shown = [event["logprobs"] for event in events_of(response) if "output_text" in event["type"]]
        assert shown == [token, token]


@pytest.mark.parametrize("include", [[], [LOGPROBS]])
async def test_everything_has_the_types_that_openais_client_declares(stack: Stack, include: list[str]) -> None:
    stack.service.answer = with_tokens
    whole = await post(stack, include=include)
    TypeAdapter(Response).validate_python(whole.json())
    event_type: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events_of(await post(stack, include=include, stream=True)):
        event_type.validate_python(event)
    stack.service.answer = lambda _: [*deltas("Hel", "lo")[:1], EngineError("broken")]
    event_type.validate_python(events_of(await post(stack, stream=True))[-1])


async def test_our_own_and_vllms_parameters_reach_the_models(stack: Stack) -> None:
    extra = {"eft": {"scale": 0}, "top_k": 3, "min_p": 0.1, "seed": 5, "stop": "x", "repetition_penalty": 1.5}
    await stack.openai().responses.create(model="up", input="hi", temperature=0.5, top_p=0.9, extra_body=extra)
    request = stack.service.requests[0]
    assert [term.name for term in request.combination.terms] == ["small-chat"]
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.stop) == (3, 0.1, 5, ("x",))
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.5, 0.9, 1.5)


async def test_components_and_the_report_come_beside_what_openai_has(stack: Stack) -> None:
    stack.service.answer = with_tokens
    body = (await post(stack, eft={"components": True, "report": True})).json()
    part = body["output"][0]["content"][0]
    assert part["eft"]["tokens"][0]["models"] == {"large": -1.0, "small": -2.0, "small-chat": -3.0}
    assert part["logprobs"] == []
    assert body["usage"]["eft"]["drafted"] == 0


async def test_the_form_of_the_text_reaches_the_coordinator_and_is_repeated(stack: Stack) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    own = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    body = (await post(stack, text={"format": own})).json()
    assert body["text"]["format"] == own
    any_object = (await post(stack, text={"format": {"type": "json_object"}})).json()
    assert any_object["text"]["format"] == {"type": "json_object"}
    first, second = (request.sampling.grammar for request in stack.service.requests)
    assert first is not None
    assert second is not None
    assert (first.param, second.param) == ("text.format.schema", "text.format")
    assert '"integer"' in first.definition


HARMLESS: list[dict[str, Any]] = [
    {"store": False, "background": False, "previous_response_id": None, "conversation": None, "prompt": None},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "max_tool_calls": None},
    {"text": {"format": {"type": "text"}}, "truncation": "disabled", "service_tier": "auto"},
    {"text": {}, "truncation": None, "reasoning": None, "stream_options": None, "include": []},
    {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": None, "summary": None}},
    {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "metadata": {}},
    {"max_output_tokens": 1.0, "top_logprobs": 0, "n": 1, "eft": None},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
]


@pytest.mark.parametrize("fields", HARMLESS)
async def test_values_that_change_nothing_are_accepted(stack: Stack, fields: dict[str, Any]) -> None:
    response = await post(stack, **fields)
    assert response.status_code == 200, response.text


IMAGE = {"type": "input_image", "image_url": "data:,", "detail": "auto"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"truncation": "auto"}, "truncation"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "stop": "x"}, "stop"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10_000}, "max_output_tokens"),
    ({"max_output_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ({"n": 2}, "n"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": ["everything"]}, "include.0"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0.content.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input.0.content.0.type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]}, "input.0.type"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
    ({"input": [{"role": "user", "content": "a" * 600}]}, "input"),
    ({"input": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "input"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{param}-{i}" for i, (_, param) in enumerate(REFUSED)])
async def test_what_cannot_be_done_is_refused_by_name(stack: Stack, fields: dict[str, Any], param: str) -> None:
    response = await post(stack, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].startswith(f"{param}: ")
    assert not stack.service.requests


async def test_an_error_before_the_first_token_has_its_own_status(stack: Stack) -> None:
    stack.service.answer = lambda _: [EngineError("broken")]
    with pytest.raises(openai.InternalServerError, match="broken"):
        await stack.openai().responses.create(model="up", input="hi", stream=True)


@pytest.mark.parametrize(("error", "said"), [(EngineError("broken"), "broken"), (RuntimeError("secret"), "log")])
async def test_an_error_in_mid_stream_is_a_failed_response_with_the_text_so_far(
    stack: Stack, error: Exception, said: str
) -> None:
    stack.service.answer = lambda _: [*deltas("Hel", "lo")[:1], error]
    stream = await stack.openai().responses.create(model="up", input="hi", stream=True)
    events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.output_text) == ("failed", "Hel")
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert said in last.response.error.message
    assert "secret" not in last.response.error.message
    assert last.sequence_number == len(events) - 1
    assert stack.metric("eft_tenant_requests_total", tenant="anonymous", recipe="up", status="500") == 1


async def test_responses_are_not_stored_and_asking_for_one_says_so(stack: Stack) -> None:
    client = stack.openai()
    response = await client.responses.create(model="up", input="hi")
    with pytest.raises(openai.NotFoundError, match="not stored"):
        await client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        await client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        await client.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        await client.responses.input_items.list(response.id)


async def test_a_client_that_goes_away_ends_its_request(stack: Stack) -> None:
    stack.service.answer = lambda _: deltas("Hel", "lo")[:1]  # and nothing more
    connection = Connection(stack.app, "/v1/responses", {"model": "up", "input": "hi", "stream": True})
    serving = asyncio.create_task(connection.run())
    async with asyncio.timeout(5):
        while not any(b"output_text.delta" in message.get("body", b"") for message in connection.messages):
            await asyncio.sleep(0.001)
        connection.gone.set()
        await serving
    assert (stack.service.num_running, stack.service.num_closed_early) == (0, 1)
