"""The open requests of a coordinator: their outputs, how they end, and the deltas to emit.

A request ends once, here, whatever the reason, and gives one `RequestEnd`. This module knows neither replicas nor
steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.coordinator.output import OutputStream, failed
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import SamplerOutput
from eft_serve.errors import DeadlineError, EftServeError, EngineError, InvalidRequestError, to_failure
from eft_serve.types import Delta, EventKind, FinishReason, RequestEnd

logger = logging.getLogger(__name__)

OnEnd = Callable[[Request, RequestEnd], None]


class RequestTable:
    """Every request, from its arrival to its end.

    Args:
        on_end: called once for each request, after it has left the table.
    """

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self._open: dict[str, tuple[Request, OutputStream]] = {}
        self._deltas: list[tuple[Request, Callable[[], Delta]]] = []  # neither emitted nor detokenized yet
        self._undecodable: dict[Request, EngineError] = {}  # to be ended

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request: Request) -> bool:
        found = self._open.get(request.request_id)
        return found is not None and found[0] is request

    @property
    def has_deltas(self) -> bool:
        """Whether there are deltas to emit."""
        return bool(self._deltas)

    def add(self, request: Request, vocabularies: list[Vocabulary]) -> None:
        """Add a request.

        Args:
            vocabularies: of its terms, in their order.

        Raises:
            EngineError: the end of its prompt cannot be decoded.
            InvalidRequestError: its id is open already.
        """
        if request.request_id in self._open:
            raise InvalidRequestError(f"request_id: {request.request_id!r} is open already", param="request_id")
        with _decoding(request.request_id):
            self._open[request.request_id] = (request, OutputStream.of(request, vocabularies))

    def take(self, request: Request, drawn: SamplerOutput, now: float) -> int:
        """Append sampled tokens, and end the request where they end it; returns how many became output."""
        if len(request.output_token_ids) < request.num_scored:
            self._take_prompt(request, drawn, now)
            return 0
        output = self._open[request.request_id][1]
        try:
            with _decoding(request.request_id):
                token_ids, reason = output.take(drawn.token_ids)
        except EftServeError as error:
            self.fail(request, error)
            return 0
        if len(request.output_token_ids) == request.num_scored:
            request.timeline.add(EventKind.FIRST_TOKEN, now)
        request.count_accepted(token_ids)
        request.take(drawn.token_ids)
        if drawn.is_cut:
            request.drop_draft_tokens()  # the next step finds that nothing is possible, if there is one
        request.last_progress = now
        components = None if drawn.components is None else drawn.components[: len(token_ids)]
        usage = None if reason is None else self.end(request, reason).usage
        self._deltas.append((request, partial(output.delta, token_ids, reason, components, usage)))
        return len(token_ids)

    def _take_prompt(self, request: Request, drawn: SamplerOutput, now: float) -> None:
        """Append scored tokens of the prompt; they end a request that wants no other."""
        request.take(drawn.token_ids)
        request.last_progress = now
        reason = None if request.num_left else FinishReason.LENGTH
        delta = Delta(
            text="",
            token_ids=[],
            finish_reason=reason,
            usage=None if reason is None else self.end(request, reason).usage,
            prompt_logprobs=drawn.components or [],
        )
        self._deltas.append((request, lambda: delta))

    def refuse(self, request: Request, error: EftServeError) -> None:
        """End a request that cannot be served."""
        self._account(request, 0, FinishReason.ERROR, error)
        self._deltas.append((request, partial(failed, error)))

    def fail(self, request: Request, error: EftServeError) -> None:
        """End an open request with an error."""
        self.end(request, FinishReason.ERROR, error)
        self._deltas.append((request, partial(failed, error)))

    def abort(self, request_id: str) -> None:
        """End it without a delta, because its reader is gone; unknown ids are ignored."""
        if request_id in self._open:
            self.end(self._open[request_id][0], FinishReason.ABORT)
        self._deltas = [delta for delta in self._deltas if delta[0].request_id != request_id]

    def end(self, request: Request, reason: FinishReason, error: EftServeError | None = None) -> RequestEnd:
        """Remove it; the caller adds the last delta, if any."""
        _, output = self._open.pop(request.request_id)
        return self._account(request, output.num_tokens, reason, error)

    def end_overdue(self, now: float) -> None:
        """End requests past their deadline."""
        for request in self._requests():
            if now > request.deadline:
                self.fail(request, DeadlineError(f"the request took longer than {request.generation.timeout_s:g} s"))

    def end_all(self, error: EftServeError) -> None:
        """End everybody."""
        for request in self._requests():
            self.fail(request, error)

    def end_undecodable(self) -> None:
        """End requests whose text could not be decoded.

        Not at once: deltas are taken while a step is computed, which the request's usage has to count.
        """
        undecodable, self._undecodable = self._undecodable, {}
        for request, error in undecodable.items():
            if request in self:
                self.fail(request, error)

    def take_deltas(self) -> list[tuple[Request, Delta]]:
        """The deltas not emitted yet, with their requests and in order."""
        deltas, self._deltas = self._deltas, []
        taken = []
        for request, detokenize in deltas:
            try:
                with _decoding(request.request_id):
                    delta = detokenize()
            except EngineError as error:
                self._undecodable.setdefault(request, error)
                continue
            if request not in self._undecodable or delta.failure is not None:
                taken.append((request, delta))
        return taken

    def _requests(self) -> Sequence[Request]:
        return [request for request, _ in self._open.values()]

    def _account(
        self, request: Request, completion_tokens: int, reason: FinishReason, error: EftServeError | None
    ) -> RequestEnd:
        now, generation = time.monotonic(), request.generation
        request.timeline.add(EventKind.ENDED, now)
        end = RequestEnd(
            request_id=request.request_id,
            tenant=generation.tenant,
            recipe=generation.combination.recipe,
            reason=reason,
            failure=None if error is None else to_failure(error),
            usage=request.usage(completion_tokens, now),
            queued_at=request.timeline.queued_at,
            timeline=tuple(request.timeline.events),
        )
        self._on_end(request, end)
        return end


@contextmanager
def _decoding(request_id: str) -> Iterator[None]:
    """A tokenizer's error ends its own request only: here it becomes an `EngineError`."""
    try:
        yield
    except EftServeError:
        raise
    except BaseException as cause:  # a panic of the tokenizers library is no Exception
        logger.exception("the text of request %s cannot be decoded", request_id)
        raise EngineError(f"request {request_id}: its text cannot be decoded: {cause}") from cause
