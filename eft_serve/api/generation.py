"""Generated answers, for chat and text completions alike.

An error before the first token has its own status; afterwards it is the stream's last event, and no `[DONE]` follows.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from eft_serve.api import sse
from eft_serve.api.answering import Call, ModelResponse
from eft_serve.api.components import ComponentsFormat
from eft_serve.api.context import Context
from eft_serve.api.errors import domain_body, internal_body
from eft_serve.api.formats import Choice, Envelope, Format, JsonObject
from eft_serve.api.metrics import TokenClock
from eft_serve.api.prompts import Prompting, Prompts
from eft_serve.api.schemas import GenerationBody, choice_seed
from eft_serve.api.streams import Indexed
from eft_serve.errors import ContextLengthError, EftServeError, InvalidRequestError
from eft_serve.types import Delta, GenerationRequest, Term

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationCall(Call):
    """A request for answers."""

    body: GenerationBody
    format: Format
    prompt_param: str
    default_max_tokens: int | None  # None: what the context has room for
    render: Callable[[Sequence[Term], Prompting], Awaitable[Prompts]]


class GenerationResponse(ModelResponse):
    """Generates while it answers; see `ModelResponse`."""

    keeps_streams: ClassVar[bool] = False  # whether what is streamed is also kept
    _call: GenerationCall

    def __init__(self, context: Context, call: GenerationCall) -> None:
        keeps = self.keeps_streams or not call.body.stream
        super().__init__(context, call, call.format.prefix, call.body.num_candidates, keeps=keeps)
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
        )
        self._clock = TokenClock(context.metrics, call.ensemble.name, call.arrival)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._call.body
        param = "best_of" if body.is_ranked else "n"
        async with self._context.limits.admit(self._call.tenant, body.num_candidates, param):
            requests = await self._prepare()
            if body.stream:
                async with aclosing(self._deltas(requests)) as deltas:
                    await self._stream(deltas, send)
                return
            await self._run_all(requests)
        candidates = self._progress.choices
        shown = best(candidates, body.num_choices) if body.is_ranked else candidates

        def whole() -> JsonObject:
            return self._envelope.whole(shown, self._progress.num_prompt_tokens, candidates)

        await self._send_whole(whole, scope, receive, send)

    async def _prepare(self) -> list[GenerationRequest]:
        call, body, eft = self._call, self._call.body, self._call.body.eft
        combination = call.ensemble.resolve(eft.knobs, every=body.components is not None)
        if body.is_ranked and not any(reward.weight for reward in combination.rewards):
            raise InvalidRequestError(
                f"best_of: model {call.ensemble.name!r} has no reward with a weight to rank by; leave it out",
                param="best_of",
            )
        if eft.components is not None:
            shown = ComponentsFormat.of(combination, self._context.renderer, eft.components)
            self._envelope = dataclasses.replace(self._envelope, components=shown)
        counted = combination.counted
        tokenizer = self._context.renderer.tokenizer(counted.model)
        if body.num_logprobs is not None:
            hidden = frozenset() if body.skip_special_tokens is False else frozenset(tokenizer.special.values())
            logprobs = call.format.logprobs(body.num_logprobs, tokenizer.bytes_of, hidden)
            self._envelope = dataclasses.replace(self._envelope, logprobs=logprobs)
        speculative = call.ensemble.speculative(eft.speculative.changes)
        prompts = await call.render(combination.terms, call.ensemble.prompting)
        max_tokens = self._max_tokens(combination.terms, prompts)
        if body.min_tokens and body.min_tokens > max_tokens:
            message = f"min_tokens: {body.min_tokens} is more than the {max_tokens} tokens that may be generated"
            raise InvalidRequestError(message, param="min_tokens")
        self._progress.num_prompt_tokens = len(prompts[counted.name])
        self._envelope = dataclasses.replace(self._envelope, counted_model=counted.adapter or counted.model)
        bad_words = await self._context.renderer.words(combination.terms, body.bad_words or ())
        special = tokenizer.special  # a stop string that is one never shows in the text
        stop_token_ids = [special[text] for text in body.stop or () if text in special]
        seeds = [choice_seed(body.seed, i) for i in range(body.num_candidates)]
        return [
            GenerationRequest(
                request_id=f"{self._id}-{i}",
                combination=combination,
                prompts=prompts,
                sampling=body.sampling(max_tokens, seed, bad_words, stop_token_ids),
                speculative=speculative,
                components=body.components,
                logprobs=body.num_logprobs,
                logprobs_mode=eft.logprobs_mode or "raw_logprobs",
                tenant=call.tenant.name,
                timeout_s=max(0.0, self._deadline - self._now()),
            )
            for i, seed in enumerate(seeds)
        ]

    def _max_tokens(self, terms: Sequence[Term], prompts: Prompts) -> int:
        """The tokens asked for, or the default if every model's context has room for it, else what fits."""
        param, requested = self._call.prompt_param, self._call.body.requested_tokens
        name, context = self._context.tightest(terms, prompts)
        room = context - len(prompts[name])
        if not all(prompts.values()):
            raise InvalidRequestError(f"{param}: must hold at least one token", param=param)
        has = f"{len(prompts[name])} tokens for {name!r}, whose context is {context}"
        if room < 1:
            raise ContextLengthError(f"{param}: has {has}; shorten it", param=param)
        if requested is not None and room < requested:
            limit = self._call.body.limit_param
            raise ContextLengthError(
                f"{limit}: {requested} is more than the {room} tokens that are left: the prompt has {has}; ask for "
                "fewer, or shorten the prompt",
                param=limit,
            )
        return requested or min(self._call.default_max_tokens or room, room)

    def _note(self, index: int, delta: Delta) -> None:
        self._clock.saw(index, delta, self._now())
        super()._note(index, delta)

    async def _stream(self, deltas: AsyncGenerator[Indexed, None], send: Send) -> None:
        first = await anext(deltas)
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        try:
            await self._send_events(send, self._events(first))
            async for item in deltas:
                await self._send_events(send, self._events(item))
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
        parts = self._envelope.parts(index, delta, reward)
        if index not in self._progress.opened:
            self._progress.opened.add(index)
            opening = self._call.format.opening(index)
            parts = [opening, *parts] if opening else parts
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

    async def _send_events(self, send: Send, events: list[JsonObject]) -> None:
        if events:
            body = b"".join(map(self._encode, events))
            await send({"type": "http.response.body", "body": body, "more_body": True})


def best(candidates: Sequence[Choice], count: int) -> list[Choice]:
    """`count` of them, the largest reward first, and of equal ones the earlier first."""
    return sorted(candidates, key=lambda choice: -choice.reward)[:count]
