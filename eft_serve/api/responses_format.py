"""OpenAI's `response` object and the events of its stream; plain dictionaries, ready for the encoder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from eft_serve.api.formats import ChatFormat, Choice, Envelope, JsonObject
from eft_serve.api.responses_schemas import ResponsesBody
from eft_serve.types import Delta, FinishReason, TokenComponents

PLACE: JsonObject = {"output_index": 0, "content_index": 0}  # of the text; there is one message with one part


class ResponseFormat(ChatFormat):
    """Its ids; log-probabilities of tokens are as in chats."""

    prefix = "resp_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseEnvelope(Envelope):
    """Words one response, at every stage."""

    body: ResponsesBody

    @property
    def item_id(self) -> str:
        """Of its only output item."""
        return "msg_" + self.id.removeprefix(self.format.prefix)

    def whole(self, choices: Sequence[Choice], num_prompt_tokens: int, candidates: Sequence[Choice]) -> JsonObject:
        """The answer in one piece."""
        choice = choices[0]
        return self.ended(choice, self.answer(choice), num_prompt_tokens)

    def running(self) -> JsonObject:
        """The response before its first token."""
        return self._response("in_progress", [])

    def ended(self, choice: Choice, message: JsonObject, num_prompt_tokens: int) -> JsonObject:
        """The response after its last token."""
        status = _status(choice)
        response = self._response(status, [message]) | {"usage": self._response_usage(choice, num_prompt_tokens)}
        if status == "incomplete":
            return response | {"incomplete_details": {"reason": "max_output_tokens"}}
        return response | {"completed_at": int(time.time())}

    def failed(self, choice: Choice, error: JsonObject) -> JsonObject:
        """The response whose generation broke off, with the text so far and, as that may be much, no more of it."""
        code = "server_error" if error["type"] == "server_error" else "invalid_prompt"
        failure = {"code": code, "message": error["message"]}
        return self._response("failed", [self.message("incomplete", self.part(choice.text, ()))]) | {"error": failure}

    def message(self, status: str, *content: JsonObject) -> JsonObject:
        """The output item with these parts."""
        own = {"id": self.item_id, "type": "message", "role": "assistant", "status": status}
        return own | {"content": list(content)}

    def answer(self, choice: Choice) -> JsonObject:
        """The output item after the last token."""
        return self.message(_status(choice), self.part(choice.text, choice.components))

    def part(self, text: str, components: Sequence[TokenComponents]) -> JsonObject:
        """Text as a part of the message."""
        return {"type": "output_text", "text": text, "annotations": []} | self.of_tokens(components)

    def of_tokens(self, components: Sequence[TokenComponents]) -> JsonObject:
        """What is said of tokens besides their text."""
        extras = self._extras(0, (), components, None)
        content: list[JsonObject] = extras.pop("logprobs", {}).get("content", [])
        return {"logprobs": content} | extras

    def _response(self, status: str, output: list[JsonObject]) -> JsonObject:
        body = self.body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.text_format},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }

    def _response_usage(self, choice: Choice, num_prompt_tokens: int) -> JsonObject:
        used = self._usage(num_prompt_tokens, [choice])
        cached = used.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        } | ({"eft": used["eft"]} if "eft" in used else {})


class ResponseEvents:
    """Words the events of one stream, numbered from 0."""

    def __init__(self) -> None:
        self._numbers = count()

    def opening(self, envelope: ResponseEnvelope) -> list[JsonObject]:
        """Before the first text."""
        item, part = envelope.message("in_progress"), envelope.part("", ())
        return [
            self._event("response.created", response=envelope.running()),
            self._event("response.in_progress", response=envelope.running()),
            self._event("response.output_item.added", output_index=0, item=item),
            self._event("response.content_part.added", item_id=envelope.item_id, **PLACE, part=part),
        ]

    def delta(self, envelope: ResponseEnvelope, delta: Delta) -> list[JsonObject]:
        """A delta's text and tokens; none when it holds nothing to show."""
        shown = envelope.of_tokens(delta.components or ())
        if not delta.text and not any(shown.values()):
            return []
        place = {"item_id": envelope.item_id} | PLACE
        return [self._event("response.output_text.delta", **place, delta=delta.text, **shown)]

    def ending(self, envelope: ResponseEnvelope, choice: Choice, num_prompt_tokens: int) -> list[JsonObject]:
        """After the last text."""
        message = envelope.answer(choice)
        part = message["content"][0]
        place = {"item_id": envelope.item_id} | PLACE
        response = envelope.ended(choice, message, num_prompt_tokens)
        done = {"text": choice.text, "logprobs": part["logprobs"]}
        return [
            self._event("response.output_text.done", **place, **done),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{response['status']}", response=response),
        ]

    def failure(self, envelope: ResponseEnvelope, choice: Choice, error: JsonObject) -> JsonObject:
        """Instead of what would have followed."""
        return self._event("response.failed", response=envelope.failed(choice, error))

    def _event(self, kind: str, **fields: object) -> JsonObject:
        return {"type": kind, "sequence_number": next(self._numbers)} | fields


def _status(choice: Choice) -> str:
    return "completed" if choice.finish_reason == FinishReason.STOP else "incomplete"
