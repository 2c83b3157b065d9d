"""Answers to `POST /v1/responses`, whole or as a stream of typed events; see `generation`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from eft_serve.api import sse
from eft_serve.api.context import Context
from eft_serve.api.formats import JsonObject
from eft_serve.api.generation import GenerationResponse
from eft_serve.api.preparing import GenerationCall
from eft_serve.api.responses_format import ResponseEnvelope, ResponseEvents
from eft_serve.api.responses_schemas import ResponsesBody
from eft_serve.api.streams import Indexed


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesCall(GenerationCall):
    """A request for a response."""

    body: ResponsesBody


class ResponsesResponse(GenerationResponse):
    """Generates while it answers; a stream's last events repeat its text, so that is kept."""

    keeps_streams = True
    _call: ResponsesCall
    _envelope: ResponseEnvelope

    def __init__(self, context: Context, call: ResponsesCall) -> None:
        super().__init__(context, call)
        self._envelope = ResponseEnvelope(
            format=call.format,
            id=self._id,
            created=int(time.time()),
            model=call.body.model,
            with_report=call.body.eft.report,
            body=call.body,
        )
        self._wording = ResponseEvents()

    @staticmethod
    def _encode(event: JsonObject) -> bytes:
        return sse.encode(event, name=event["type"])

    def _events(self, item: Indexed) -> list[JsonObject]:
        index, delta = item
        opening = [] if index in self._progress.opened else self._wording.opening(self._envelope)
        self._progress.opened.add(index)
        return opening + self._wording.delta(self._envelope, delta)

    async def _ending(self) -> bytes:
        def make() -> bytes:
            num_prompt_tokens = self._progress.num_prompt_tokens
            events = self._wording.ending(self._envelope, self._progress.choices[0], num_prompt_tokens)
            return b"".join(map(self._encode, events))

        return await self._made(make)

    def _failing(self, body: dict[str, Any]) -> bytes:
        return self._encode(self._wording.failure(self._envelope, self._progress.choices[0], body["error"]))
