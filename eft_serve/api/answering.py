"""An answer from admission to the last byte, for every endpoint that runs models.

All of it happens while the response is sent, so that one place holds the tenant's quota, the deadline and the client's
connection, and gives up all three however it ends. What is asked of the models and how the answer looks is up to the
endpoints.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eft_serve.api.context import Context
from eft_serve.api.errors import CLIENT_CLOSED_REQUEST, json_response
from eft_serve.api.formats import Choice, JsonObject
from eft_serve.api.streams import Indexed, checked, merged, while_connected
from eft_serve.ensemble import Ensemble
from eft_serve.errors import DeadlineError, EftServeError
from eft_serve.tenancy.tenants import Tenant
from eft_serve.types import Delta, GenerationRequest, TokenComponents

STALLED_CLIENT_S = 5.0  # beyond the deadline, for the last event to be read
INLINE_COMPONENTS = 256  # log-probabilities of tokens: about a millisecond of work

Made = TypeVar("Made")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A validated request of a tenant, not yet tokenised."""

    request_id: str  # for the log; the client may have chosen it
    tenant: Tenant
    ensemble: Ensemble
    arrival: float  # seconds of the event loop's clock


@dataclass(slots=True)
class Progress:
    """The state of a call so far."""

    choices: list[Choice]  # one for each request to the models
    num_prompt_tokens: int = 0
    status: int = 200
    answered: bool = False  # everything was sent; the connection may end now
    opened: set[int] = field(default_factory=set)

    @property
    def num_generated(self) -> int:
        return sum(c.num_tokens for c in self.choices)


class ModelResponse(Response):
    """Runs models while it answers.

    Args:
        context: the application's collaborators.
        call: what is asked for.
        prefix: of the answer's id.
        num_choices: how many requests to the models it takes.
        keeps: whether it is answered as a whole.
    """

    def __init__(self, context: Context, call: Call, prefix: str, num_choices: int, *, keeps: bool = True) -> None:
        super().__init__()
        self._context = context
        self._call = call
        # The id is ours, not the client's: two requests under one id would share state in the engines.
        self._id = prefix + uuid.uuid4().hex
        self._deadline = call.arrival + context.service.config.server.request_timeout_s
        self._progress = Progress([Choice(keeps) for _ in range(num_choices)])

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
        raise NotImplementedError

    async def _run_all(self, requests: Sequence[GenerationRequest]) -> None:
        """Read everything that the models generate."""
        async with aclosing(self._deltas(requests)) as deltas:
            async for _ in deltas:
                pass

    async def _send_whole(self, body: Callable[[], JsonObject], scope: Scope, receive: Receive, send: Send) -> None:
        """Send the object that `body` makes of the choices."""
        response = await self._made(partial(_response, body))
        self._progress.answered = True
        await response(scope, receive, send)

    async def _made(self, make: Callable[[], Made], size: int | None = None) -> Made:
        """What `make` makes of the choices; where that is much, in a thread, or it would stall every stream.

        Args:
            size: log-probabilities; None: those of all choices.
        """
        if size is None:
            choices = self._progress.choices
            size = sum(num_described(choice.components) + num_described(choice.prompt_logprobs) for choice in choices)
        return make() if size <= INLINE_COMPONENTS else await asyncio.to_thread(make)

    async def _deltas(self, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Indexed, None]:
        """What the models generate, within the deadline, noted in the progress as it comes."""
        streams = [self._output(i, request) for i, request in enumerate(requests)]
        source = streams[0] if len(streams) == 1 else merged(streams)
        async with aclosing(source):
            while (item := await self._next(source)) is not None:
                self._note(*item)
                yield item

    def _output(self, index: int, request: GenerationRequest) -> AsyncGenerator[Indexed, None]:
        return checked(index, self._context.service.generate(request))

    def _note(self, index: int, delta: Delta) -> None:
        self._progress.choices[index].add(delta)

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


def num_described(tokens: Iterable[TokenComponents]) -> int:
    """Log-probabilities of tokens, and of alternatives to them."""
    return sum(1 + len(token.top) for token in tokens)


def _response(body: Callable[[], JsonObject]) -> Response:
    return json_response(body())
