"""Holds answers and requests against the application's own description."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import Any

import httpx
import msgspec
from api_fakes import MODELS, Answer, Stack, save_tokenizer
from fastapi import FastAPI
from jsonschema import Draft202012Validator

from eft_serve.config import AppConfig
from eft_serve.types import Delta, FinishReason, GenerationRequest, SpecDecodeStats, TokenComponents, Usage

EVENT_STREAM = "text/event-stream"
TOOL_TEMPLATE = (
    "{% if tools %}[{% for t in tools %}{{ t | tojson }}{% endfor %}]{% endif %}{{ style }}{% for m in messages %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_stack(tmp_path: Path, answer: Answer | None = None, **server: Any) -> Stack:
    """The application with all that it can do: tools, template arguments, files and batches."""
    paths = {model: save_tokenizer(tmp_path / model, template=TOOL_TEMPLATE) for model in MODELS}
    roles = {"base": "large", "reference": "small", "tuned": "small-chat"}
    config = {
        "models": {model: {"path": str(path)} for model, path in paths.items()},
        "recipes": {"up": {"tool_parser": "hermes", **roles}},
        "server": {"files_url": str(tmp_path / "store"), **server},
    }
    return Stack(AppConfig.parse(config), answer)


class Description:
    """`/openapi.json` of an application."""

    def __init__(self, app: FastAPI) -> None:
        self.document: dict[str, Any] = app.openapi()
        Draft202012Validator.check_schema({"$defs": self.document["components"]["schemas"]})

    @property
    def operations(self) -> set[tuple[str, str]]:
        """(method, path) of all that is described."""
        return {(method.upper(), path) for path, item in self.document["paths"].items() for method in item}

    def check(self, response: httpx.Response, path: str) -> None:
        """Raises where the answer has a status, content type, header or body that is not described."""
        described = self._operation(response.request.method, path)["responses"][str(response.status_code)]
        for header in described.get("headers", {}):
            assert header in response.headers
        media_type = response.headers["content-type"].partition(";")[0]
        schema = described["content"][media_type]["schema"]
        if media_type == EVENT_STREAM:
            data = schema["properties"]["data"]
            schema = data.get("anyOf", [data])[0]["contentSchema"]
        for body in _bodies(response, media_type):
            self._validator(schema).validate(body)

    def allows(self, path: str, body: Any) -> bool:
        """Whether the body is as described for this endpoint."""
        schema = self._operation("POST", path)["requestBody"]["content"]["application/json"]["schema"]
        return bool(self._validator(schema).is_valid(body))

    def query(self, path: str) -> dict[str, Callable[[Any], bool]]:
        """By parameter of a query, what it may be."""
        described = self._operation("GET", path)["parameters"]
        return {each["name"]: self._validator(each["schema"]).is_valid for each in described}

    def _operation(self, method: str, path: str) -> dict[str, Any]:
        operation: dict[str, Any] = self.document["paths"][path][method.lower()]
        return operation

    def _validator(self, schema: dict[str, Any]) -> Draft202012Validator:
        return Draft202012Validator(schema | {"components": self.document["components"]})


def _bodies(response: httpx.Response, media_type: str) -> list[Any]:
    if media_type != EVENT_STREAM:
        return [response.json() if media_type == "application/json" else response.text]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def full_answer(request: GenerationRequest) -> Iterable[Delta]:
    """Two tokens, or those that are given, with everything that an answer may be asked to report."""
    given = request.forced_token_ids or [66, 67]
    if request.prompt_logprobs is not None:
        prompt = next(iter(request.prompts.values()))
        likeliest = [TokenComponents(68, -0.1, [], [], 0.0), TokenComponents(69, -inf, [], [], 0.0)]
        others = likeliest[: request.prompt_logprobs]
        scored = [TokenComponents(token_id, -0.5, [], [], 0.0, others, 2) for token_id in prompt[1:]]
        done = FinishReason.LENGTH if request.sampling.max_tokens == 0 else None
        yield Delta(text="", token_ids=[], prompt_logprobs=scored, finish_reason=done)
        given = given[: request.sampling.max_tokens]
    terms, rewards = request.combination.terms, request.combination.rewards
    wanted = request.components if request.components is not None else request.logprobs
    for place, token_id in enumerate(given):
        alone = TokenComponents(token_id, -0.5, [-1.0] * len(terms), [0.5] * len(rewards), 0.5)
        impossible = TokenComponents(68, -inf, [-inf] * len(terms), [0.0] * len(rewards), 0.0)
        top = [alone, impossible][: wanted or 0]
        told = msgspec.structs.replace(alone, top=top)
        last = place == len(given) - 1
        yield Delta(
            text="a",
            token_ids=[token_id],
            components=None if wanted is None else [told],
            finish_reason=FinishReason.LENGTH if last else None,
            usage=Usage(models={}, seconds=1.0, spec_decode=SpecDecodeStats(1, 1, 2)) if last else None,
        )
