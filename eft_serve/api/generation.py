"""Generated answers, for chat and text completions alike.

An error before the first token has its own status; afterwards it is the stream's last event, and no `[DONE]` follows.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from eft_serve.api import sse
from eft_serve.api.answering import ModelResponse, num_described
from eft_serve.api.components import ComponentsFormat
from eft_serve.api.context import Context
from eft_serve.api.errors import domain_body, internal_body
from eft_serve.api.formats import Choice, Envelope, JsonObject
from eft_serve.api.metrics import TokenClock
from eft_serve.api.model_tokenizer import ModelTokenizer
from eft_serve.api.preparing import GenerationCall, PromptSource, prepare
from eft_serve.api.shown_prompts import ShownPrompt
from eft_serve.api.streams import Indexed
from eft_serve.errors import EftServeError
from eft_serve.types import Delta, FinishReason, GenerationRequest

logger = logging.getLogger(__name__)


class GenerationResponse(ModelResponse):
    """Generates while it answers; see `ModelResponse`."""

    keeps_streams: ClassVar[bool] = False  # whether what is streamed is also kept
    _call: GenerationCall

    def __init__(self, context: Context, call: GenerationCall) -> None:
        keeps = self.keeps_streams or not call.body.stream
        super().__init__(context, call, call.format.prefix, call.num_answers, keeps=keeps)
        options = call.body.stream_options
        self._envelope = Envelope(
            call.format,
            self._id,
            int(time.time()),
            call.body.model,
            with_usage=bool(options and options.include_usage),
            with_running_usage=bool(options and options.include_usage and options.continuous_usage_stats),
            with_report=call.body.eft.report,
            with_token_ids=bool(call.body.return_token_ids),
            with_reward=call.body.is_ranked,
            num_choices=call.body.num_choices,
            num_candidates=call.body.num_candidates,
        )
        self._clock = TokenClock(context.metrics, call.ensemble.name, call.arrival)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._call.body
        param = "prompt" if len(self._call.prompts) > 1 else "best_of" if body.is_ranked else "n"
        async with self._context.limits.admit(self._call.tenant, self._call.num_answers, param):
            requests = await self._prepare()
            if body.stream:
                async with aclosing(self._deltas(requests)) as deltas:
                    await self._stream(deltas, send)
                return
            await self._run_all(requests)
        candidates = self._progress.choices
        shown = list(candidates)
        if body.is_ranked:
            of_each = [candidates[i : i + body.num_candidates] for i in range(0, len(candidates), body.num_candidates)]
            shown = [choice for of_one in of_each for choice in best(of_one, body.num_choices)]

        def whole() -> JsonObject:
            return self._envelope.whole(shown, self._progress.num_prompt_tokens, candidates)

        await self._send_whole(whole, scope, receive, send)

    async def _prepare(self) -> Sequence[GenerationRequest]:
        call, body = self._call, self._call.body
        prepared = await prepare(self._context, call, self._id, max(0.0, self._deadline - self._now()))
        counted = prepared.combination.counted
        tokenizer = self._context.renderer.tokenizer(counted.model)
        hidden = frozenset() if body.skip_special_tokens is False else frozenset(tokenizer.special.values())
        changes: dict[str, Any] = {"counted_model": counted.adapter or counted.model}
        if body.eft.components is not None:
            shown = ComponentsFormat.of(prepared.combination, self._context.renderer, body.eft.components)
            changes["components"] = shown
        if body.num_logprobs is not None:
            changes["logprobs"] = call.format.logprobs(body.num_logprobs, tokenizer.bytes_of, hidden)
        if body.echoes or body.prompt_logprobs is not None:
            changes["prompts"] = [
                ShownPrompt(
                    token_ids=token_ids,
                    text=self._echo(source, token_ids, tokenizer) if body.echoes else None,
                    num_top=body.prompt_logprobs,
                    bytes_of=tokenizer.bytes_of,
                )
                for source, token_ids in zip(call.prompts, prepared.prompts, strict=True)
            ]
        self._envelope = dataclasses.replace(self._envelope, **changes)
        self._progress.num_prompt_tokens = sum(map(len, prepared.prompts))
        return prepared.requests

    def _echo(self, source: PromptSource, token_ids: Sequence[int], tokenizer: ModelTokenizer) -> str:
        body = self._call.body
        skip_special_tokens = body.skip_special_tokens is not False
        if source.echo is not None and skip_special_tokens and body.truncate_prompt_tokens is None:
            return source.echo
        return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def _output(self, index: int, request: GenerationRequest) -> AsyncGenerator[Indexed, None]:
        return super()._output(index, request) if needs_models(request) else _nothing(index)

    def _note(self, index: int, delta: Delta) -> None:
        self._clock.saw(index, delta, self._now())
        super()._note(index, delta)

    async def _stream(self, deltas: AsyncGenerator[Indexed, None], send: Send) -> None:
        first = await anext(deltas)
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        try:
            await self._send_item(send, first)
            async for item in deltas:
                await self._send_item(send, item)
            end = await self._ending()
        except EftServeError as error:
            self._progress.status = error.status
            end = self._failing(domain_body(error))
        except OSError as error:
            raise ClientDisconnect from error
        except Exception:
            logger.exception("request %s failed in mid-stream", self._call.request_id)
            self._progress.status = 500
            end = self._failing(internal_body())
        self._progress.answered = True
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _events(self, item: Indexed) -> list[JsonObject]:
        index, delta = item
        ends = self._call.body.is_ranked and delta.finish_reason is not None
        reward = self._progress.choices[index].reward if ends else None
        parts: list[JsonObject] = []
        if index not in self._progress.opened:
            self._progress.opened.add(index)
            opening = self._envelope.opening(index, self._progress.choices[index])
            parts += [opening] if opening else []
            self._progress.choices[index].prompt_logprobs = []
        parts += self._envelope.parts(index, delta, reward)
        progress = self._progress
        return [self._envelope.chunk(part, progress.num_prompt_tokens, progress.choices) for part in parts]

    async def _ending(self) -> bytes:
        """The last events of a stream."""
        if not self._envelope.with_usage:
            return sse.DONE
        progress = self._progress
        return self._encode(self._envelope.usage_chunk(progress.num_prompt_tokens, progress.choices)) + sse.DONE

    def _failing(self, body: JsonObject) -> bytes:
        """The last event of a stream that fails with this error."""
        return self._encode(body)

    @staticmethod
    def _encode(event: JsonObject) -> bytes:
        return sse.encode(event)

    async def _send_item(self, send: Send, item: Indexed) -> None:
        index, delta = item
        if not delta.token_ids and not delta.text and delta.finish_reason is None:
            return  # a part of the prompt's log-probabilities, which are sent with the first token
        size = num_described(delta.components or ()) + num_described(self._progress.choices[index].prompt_logprobs)
        body = await self._made(lambda: b"".join(map(self._encode, self._events(item))), size)
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})


def needs_models(request: GenerationRequest) -> bool:
    """Whether there is a token to generate or to score."""
    num_prompt_tokens = len(request.prompts[request.combination.counted.name])
    return request.sampling.max_tokens > 0 or (request.prompt_logprobs is not None and num_prompt_tokens > 1)


async def _nothing(index: int) -> AsyncGenerator[Indexed, None]:
    yield index, Delta(text="", token_ids=[], finish_reason=FinishReason.LENGTH)


def best(candidates: Sequence[Choice], count: int) -> list[Choice]:
    """`count` of them, the largest reward first, and of equal ones the earlier first."""
    return sorted(candidates, key=lambda choice: -choice.reward)[:count]
