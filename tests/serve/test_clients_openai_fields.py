"""Every field of `create` in OpenAI's client against the live application: served, or refused by its name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from clients import QUESTION, TOOL, Answer
from harness import Served
from openai.resources.chat import completions as chat_completions
from openai.resources.completions import Completions
from openai.resources.responses import Responses

TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
JSON_SCHEMA = {"name": "answer", "schema": Answer.model_json_schema(), "strict": True}

CHAT: dict[str, Any] = {"model": "tools", "messages": MESSAGES, "max_completion_tokens": 2, "temperature": 0}
SERVED_IN_CHATS: dict[str, list[Any]] = {
    "messages": [[*MESSAGES, {"role": "assistant", "content": "Lima"}, {"role": "developer", "content": "Be brief."}]],
    "model": ["eft", "base-large"],
    "frequency_penalty": [0.5],
    "logit_bias": [{"5": -1}],
    "logprobs": [True],
    "max_completion_tokens": [1],
    "max_tokens": [2],
    "metadata": [{"purpose": "test"}],
    "modalities": [["text"]],
    "n": [2],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [-0.5],
    "prompt_cache_key": ["key"],
    "reasoning_effort": ["none"],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": JSON_SCHEMA},
    ],
    "safety_identifier": ["somebody"],
    "seed": [7],
    "service_tier": ["auto", "default"],
    "stop": ["x", ["x", "y"]],
    "store": [False],
    "stream": [False, True],
    "temperature": [1.3],
    "tool_choice": ["none", "auto"],
    "tools": [[TOOL]],
    "top_p": [0.5],
    "user": ["somebody"],
}
TOGETHER_IN_CHATS: dict[str, dict[str, Any]] = {  # fields that need others
    "stream_options": {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
}
REFUSED_IN_CHATS: dict[str, Any] = {
    "audio": {"format": "wav", "voice": "alloy"},
    "function_call": "auto",
    "functions": [{"name": "weather"}],
    "modalities": ["text", "audio"],
    "moderation": {"model": "omni-moderation-latest"},
    "prediction": {"type": "content", "content": "Lima"},
    "prompt_cache_options": {"retention": "24h"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}

COMPLETION: dict[str, Any] = {"model": "eft", "prompt": QUESTION, "max_tokens": 2, "temperature": 0}
SERVED_IN_COMPLETIONS: dict[str, list[Any]] = {
    "model": ["base-large"],
    "prompt": [[QUESTION, QUESTION], [5, 6], [[5, 6], [7]]],
    "best_of": [2],
    "echo": [True],
    "frequency_penalty": [0.5],
    "logit_bias": [{"5": -1}],
    "logprobs": [2],
    "max_tokens": [1],
    "n": [2],
    "presence_penalty": [-0.5],
    "seed": [7],
    "stop": ["x", ["x", "y"]],
    "stream": [False, True],
    "temperature": [1.3],
    "top_p": [0.5],
    "user": ["somebody"],
}
TOGETHER_IN_COMPLETIONS: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}}
}
REFUSED_IN_COMPLETIONS: dict[str, Any] = {"suffix": "."}

RESPONSE: dict[str, Any] = {"model": "eft", "input": QUESTION, "max_output_tokens": 2, "temperature": 0}
SERVED_IN_RESPONSES: dict[str, list[Any]] = {
    "model": ["base-large"],
    "input": [MESSAGES, [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]],
    "background": [False],
    "include": [["message.output_text.logprobs"]],
    "instructions": ["Be brief."],
    "max_output_tokens": [1],
    "metadata": [{"purpose": "test"}],
    "parallel_tool_calls": [True],
    "prompt_cache_key": ["key"],
    "reasoning": [{"effort": "none"}],
    "safety_identifier": ["somebody"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "stream": [False, True],
    "temperature": [1.3],
    "text": [{"format": {"type": "text"}}, {"format": {"type": "json_schema", **JSON_SCHEMA}}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_p": [0.5],
    "truncation": ["disabled"],
    "user": ["somebody"],
}
TOGETHER_IN_RESPONSES: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True, "stream_options": {"include_obfuscation": False}},
    "top_logprobs": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
}
REFUSED_IN_RESPONSES: dict[str, Any] = {
    "access_programs": [{"type": "x"}],
    "background": True,
    "background_options": {"x": 1},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {"x": 1},
    "max_tool_calls": 1,
    "moderation": {"model": "omni-moderation-latest"},
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_options": {"retention": "24h"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "low"},
    "service_tier": "flex",
    "store": True,
    "tools": [{"type": "web_search"}],
    "truncation": "auto",
}


@dataclass(frozen=True)
class Endpoint:
    """One `create` of the client with a plain request, and what each of its fields is tried with."""

    create: Callable[..., Any]  # of the client's class for it
    resource: Callable[[openai.OpenAI], Any]
    base: dict[str, Any]
    served: dict[str, list[Any]]
    together: dict[str, dict[str, Any]]
    refused: dict[str, Any]

    def ask(self, client: openai.OpenAI, fields: dict[str, Any]) -> Any:
        return self.resource(client).create(**self.base | fields)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """What is served, a field at a time."""
        return [{name: value} for name, values in self.served.items() for value in values] + [*self.together.values()]


ENDPOINTS = {
    "chat": Endpoint(
        chat_completions.Completions.create,
        lambda client: client.chat.completions,
        CHAT,
        SERVED_IN_CHATS,
        TOGETHER_IN_CHATS,
        REFUSED_IN_CHATS,
    ),
    "completions": Endpoint(
        Completions.create,
        lambda client: client.completions,
        COMPLETION,
        SERVED_IN_COMPLETIONS,
        TOGETHER_IN_COMPLETIONS,
        REFUSED_IN_COMPLETIONS,
    ),
    "responses": Endpoint(
        Responses.create,
        lambda client: client.responses,
        RESPONSE,
        SERVED_IN_RESPONSES,
        TOGETHER_IN_RESPONSES,
        REFUSED_IN_RESPONSES,
    ),
}
SERVED = [
    pytest.param(name, fields, id=f"{name}-{json.dumps(fields)[:60]}")
    for name, endpoint in ENDPOINTS.items()
    for fields in endpoint.requests
]
REFUSED = [(name, *item) for name, endpoint in ENDPOINTS.items() for item in endpoint.refused.items()]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_the_client_is_tried_below(endpoint: str) -> None:
    tried = ENDPOINTS[endpoint]
    fields = set(inspect.signature(tried.create).parameters) - TRANSPORT
    assert fields == {*tried.served, *tried.together, *tried.refused}


@pytest.mark.parametrize(("endpoint", "fields"), SERVED)
def test_a_field_that_is_served_is_accepted(served: Served, endpoint: str, fields: dict[str, Any]) -> None:
    answer = ENDPOINTS[endpoint].ask(served.client(), fields)
    if fields.get("stream"):
        pieces = list(answer)
        assert len(pieces) > 1
        answer = pieces[-1].response if endpoint == "responses" else pieces[-1]
    usage = answer.usage
    streamed_without = fields.get("stream") and "stream_options" not in fields and endpoint != "responses"
    assert (usage is None) if streamed_without else usage.total_tokens > 0


@pytest.mark.parametrize(("endpoint", "field", "value"), REFUSED)
def test_a_field_that_is_not_served_is_refused_by_its_name(
    served: Served, endpoint: str, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ENDPOINTS[endpoint].ask(served.client(), {field: value})
    assert (refusal.value.param or "").split(".")[0] == field
    assert field in refusal.value.message
