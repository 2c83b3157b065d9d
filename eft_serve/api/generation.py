"""A generation from admission to the last byte, for chat and text completions alike.

All of it happens while the response is sent, so that one place holds the tenant's quota, the deadline and the client's
connection, and gives up all three however it ends. An error before the first token has its own status; afterwards it is
the stream's last event, and no `[DONE]` follows.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eft_serve.api import sse
from eft_serve.api.context import Context
from eft_serve.api.errors import CLIENT_CLOSED_REQUEST, domain_body, internal_body, json_response
from eft_serve.api.formats import Choice, Envelope, Format, JsonObject
from eft_serve.api.metrics import TokenClock
from eft_serve.api.prompts import Prompts
from eft_serve.api.schemas import GenerationBody, choice_seed
from eft_serve.api.streams import Indexed, checked, merged, while_connected
from eft_serve.ensemble import Ensemble, Term
from eft_serve.errors import ContextLengthError, DeadlineError, EftServeError, InvalidRequestError
from eft_serve.tenancy.tenants import Tenant
from eft_serve.types import GenerationRequest

STALLED_CLIENT_S = 5.0  # beyond the deadline, for the last event to be read

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A validated request of a tenant, not yet tokenised."""

    request_id: str  # for the log; the client may have chosen it
    tenant: Tenant
    ensemble: Ensemble
    body: GenerationBody
    format: Format
    prompt_param: str
    default_max_tokens: int
    render: Callable[[Sequence[Term]], Awaitable[Prompts]]
    arrival: float  # seconds of the event loop's clock


@dataclass(slots=True)
class Progress:
    """What became of a call so far."""

    choices: list[Choice]
    num_prompt_tokens: int = 0
    status: int = 200
    answered: bool = False  # all was sent; that the connection ends then is no news
    opened: set[int] = field(default_factory=set)

    @property
    def num_generated(self) -> int:
        return sum(c.num_tokens for c in self.choices)


class GenerationResponse(Response):
    """Generates while it answers.

    Args:
        context: the application's collaborators.
        call: what to generate.
    """

    def __init__(self, context: Context, call: Call) -> None:
        super().__init__()
        self._context = context
        self._call = call
        # The id is ours, not the client's: two requests under one id would share state in the engines.
        self._id = call.format.prefix + uuid.uuid4().hex
        options = call.body.stream_options
        self._envelope = Envelope(
            call.format,
            self._id,
            int(time.time()),
            call.body.model,
            with_usage=bool(options and options.include_usage),
            with_report=call.body.eft.report,
            with_token_ids=bool(call.body.return_token_ids),
        )
        self._deadline = call.arrival + context.service.config.server.request_timeout_s
        self._clock = TokenClock(context.metrics, call.ensemble.name, call.arrival)
        self._progress = Progress([Choice() for _ in range(call.body.num_choices)])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timeout_s = self._deadline + STALLED_CLIENT_S - self._now()
        try:
            await while_connected(receive, self._answer(scope, receive, send), timeout_s)
        except EftServeError as error:
            self._progress.status = error.status
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            if not self._progress.answered:
                self._progress.status = CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            self._progress.status = 500
            raise
        finally:
            self._settle()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        async with self._context.limits.admit(call.tenant, call.body.num_choices):
            requests = await self._prepare()
            async with aclosing(self._deltas(requests)) as deltas:
                if call.body.stream:
                    await self._stream(deltas, send)
                    return
                async for _ in deltas:
                    pass
        body = self._envelope.whole(self._progress.choices, self._progress.num_prompt_tokens)
        self._progress.answered = True
        await json_response(body)(scope, receive, send)

    async def _prepare(self) -> list[GenerationRequest]:
        body, eft = self._call.body, self._call.body.eft
        terms = self._call.ensemble.terms(eft.knobs)
        speculative = self._call.ensemble.speculative(eft.speculative.changes)
        prompts = await self._call.render(terms)
        max_tokens = self._max_tokens(terms, prompts)
        self._progress.num_prompt_tokens = len(prompts[terms[0].name])
        seeds = [choice_seed(body.seed, i) for i in range(body.num_choices)]
        return [
            GenerationRequest(
                request_id=f"{self._id}-{i}",
                recipe=self._call.ensemble.name,
                prompts=prompts,
                sampling=body.sampling(max_tokens, seed),
                knobs=eft.knobs,
                speculative=speculative,
                tenant=self._call.tenant.name,
                timeout_s=max(0.0, self._deadline - self._now()),
            )
            for i, seed in enumerate(seeds)
        ]

    def _max_tokens(self, terms: Sequence[Term], prompts: Prompts) -> int:
        """The tokens asked for, or the default as far as every model's context has room for it."""
        param, requested = self._call.prompt_param, self._call.body.requested_tokens
        contexts = {term.name: self._context.service.max_model_len(term.model) for term in terms}
        name = min(contexts, key=lambda name: contexts[name] - len(prompts[name]))
        room = contexts[name] - len(prompts[name])
        if not all(prompts.values()):
            raise InvalidRequestError(f"{param}: must hold at least one token", param=param)
        if room < (requested or 1):
            where = f"{len(prompts[name])} tokens for {name!r}, whose context is {contexts[name]}"
            wanted = f" and max_tokens is {requested}" if requested else ""
            raise ContextLengthError(f"{param}: has {where}{wanted}; shorten one of them", param=param)
        return requested or min(self._call.default_max_tokens, room)

    async def _deltas(self, requests: list[GenerationRequest]) -> AsyncGenerator[Indexed, None]:
        """What the models say, within the deadline, noted in the progress as it comes."""
        streams = [checked(i, self._context.service.generate(request)) for i, request in enumerate(requests)]
        source = streams[0] if len(streams) == 1 else merged(streams)
        async with aclosing(source):
            while (item := await self._next(source)) is not None:
                index, delta = item
                self._clock.saw(index, delta, self._now())
                choice = self._progress.choices[index]
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                choice.finish_reason = delta.finish_reason
                choice.report = delta.report or choice.report
                yield item

    async def _next(self, source: AsyncGenerator[Indexed, None]) -> Indexed | None:
        timeout = asyncio.timeout_at(self._deadline)
        try:
            async with timeout:
                return await anext(source, None)
        except TimeoutError as error:
            if not timeout.expired():
                raise
            limit = self._context.service.config.server.request_timeout_s
            raise DeadlineError(f"the request took longer than {limit:g} s; ask for fewer tokens") from error

    async def _stream(self, deltas: AsyncGenerator[Indexed, None], send: Send) -> None:
        first = await anext(deltas)
        await send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        try:
            await self._send_events(send, self._events(first))
            async for item in deltas:
                await self._send_events(send, self._events(item))
            if self._envelope.with_usage:
                progress = self._progress
                chunk = self._envelope.usage_chunk(progress.num_prompt_tokens, progress.choices)
                await self._send_events(send, [chunk])
            end = sse.DONE
        except EftServeError as error:
            self._progress.status = error.status
            end = sse.encode(domain_body(error))
        except OSError as error:
            raise ClientDisconnect from error
        except Exception:
            logger.exception("request %s failed in mid-stream", self._call.request_id)
            self._progress.status = 500
            end = sse.encode(internal_body())
        self._progress.answered = True
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _events(self, item: Indexed) -> list[JsonObject]:
        index, delta = item
        parts = self._envelope.parts(index, delta)
        if index not in self._progress.opened:
            self._progress.opened.add(index)
            opening = self._call.format.opening(index)
            parts = [opening, *parts] if opening else parts
        return [self._envelope.chunk(part) for part in parts]

    @staticmethod
    async def _send_events(send: Send, events: list[JsonObject]) -> None:
        if events:
            body = b"".join(map(sse.encode, events))
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def _settle(self) -> None:
        progress, tenant, recipe = self._progress, self._call.tenant.name, self._call.ensemble.name
        seconds = self._now() - self._call.arrival
        if progress.status == 200:
            self._context.metrics.e2e_latency.labels(recipe).observe(seconds)
        num_prompt_tokens = progress.num_prompt_tokens
        self._context.usage.record(tenant, recipe, progress.status, num_prompt_tokens, progress.num_generated)
        logger.info(
            "request %s (%s): tenant %s, %s, status %d, %d + %d tokens, %.3f s",
            self._call.request_id,
            self._id,
            tenant,
            recipe,
            progress.status,
            num_prompt_tokens,
            progress.num_generated,
            seconds,
        )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
