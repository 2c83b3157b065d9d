"""A coordinator's server: takes requests from the ingresses, and sends each request's deltas to its ingress.

Its methods run in the threads of the submission server and of the decode loop.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import AppConfig
from eft_serve.coordinator.backend import LogitsBackend
from eft_serve.coordinator.decode_loop import DecodeLoop
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.structured_output import GrammarCompiler
from eft_serve.coordinator.validation import check_deployed
from eft_serve.errors import (
    CoordinatorLostError,
    EftServeError,
    EngineError,
    InvalidRequestError,
    UnavailableError,
    to_failure,
)
from eft_serve.transport.deltas import DeltaSender, Part, ReplyTo
from eft_serve.transport.submissions import Notice, SubmissionServer, Submit
from eft_serve.types import Delta, RequestEnd

COMPILING_THREADS = 2

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Subscriber:
    """Where a request's deltas go."""

    request: Request
    client: bytes  # of the submission server
    reply_to: ReplyTo
    num_sent: int = 0  # tokens; used by the decode loop's thread only

    @property
    def request_id(self) -> str:
        return self.request.request_id


class CoordinatorServer:
    """Owns the decode loop and the sockets to the ingresses.

    Args:
        config: the deployed models, and the limit of open requests.
        host: the interface to listen on.
    """

    def __init__(
        self,
        config: AppConfig,
        backend: LogitsBackend,
        vocabularies: Mapping[str, Vocabulary],  # by model
        metrics: CoordinatorMetrics,
        host: str = "127.0.0.1",
    ) -> None:
        self.config = config
        self._grammars = GrammarCompiler(vocabularies)
        self.subscribers: dict[str, Subscriber] = {}  # by request id
        self.submissions = SubmissionServer(self, host)
        self._compiling = ThreadPoolExecutor(COMPILING_THREADS, thread_name_prefix="grammars")
        self.decode_loop = DecodeLoop(
            config.coordinator,
            backend,
            vocabularies,
            self._emit,
            metrics,
            on_end=_log_end,
            on_stop=self.submissions.close,  # or the ingresses would hand what is left to this coordinator again
        )
        self._sender = DeltaSender()  # used by the decode loop's thread only
        self._ingresses: dict[str, ReplyTo] = {}  # by address

    # From any thread.

    def start(self) -> None:
        self.decode_loop.start()
        self.submissions.start()

    def connect_ingress(self, public_key: bytes, reply_to: ReplyTo) -> None:
        """Accept requests of this ingress; idempotent."""
        self._ingresses[reply_to.address] = reply_to
        self.submissions.allow(public_key)

    def close(self) -> None:
        """Stop, so that the ingresses hand the open requests to another coordinator; idempotent."""
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self.decode_loop.close()
        self._sender.close()
        self.submissions.close()

    # The submission server's thread.

    def submit(self, client: bytes, submission: Submit) -> None:
        """See `RequestHandler.submit`."""
        generation, limits = submission.request, self.config.coordinator
        is_full = len(self.subscribers) >= limits.max_num_seqs + limits.max_waiting  # the only limit of open requests
        if is_full and generation.resumption is None:  # what another coordinator had taken stays taken
            raise UnavailableError(f"more than {limits.max_waiting} requests are waiting; try again later")
        if generation.request_id in self.subscribers:
            raise InvalidRequestError(f"request_id: {generation.request_id!r} is open already", param="request_id")
        if (reply_to := self._ingresses.get(submission.reply_address)) is None:
            raise UnavailableError("the coordinator does not know this ingress yet; try again later")
        check_deployed(generation.combination, self.config)
        request = Request.create(generation, time.monotonic())
        num_sent = 0 if generation.resumption is None else generation.resumption.num_tokens
        subscriber = Subscriber(request, client, reply_to, num_sent)
        self.subscribers[generation.request_id] = subscriber
        if generation.sampling.grammar is None:
            self.decode_loop.submit(request)
        else:  # some take a second to compile, and the others must not wait for it
            self._compiling.submit(self._submit_with_grammar, subscriber)

    def _submit_with_grammar(self, subscriber: Subscriber) -> None:
        request = subscriber.request
        try:
            self._grammars.matched(request)
        except EftServeError as error:
            self._refuse(subscriber, error)
        except Exception as error:  # one request's fault ends one request
            logger.exception("the grammar of request %s cannot be compiled", request.request_id)
            self._refuse(subscriber, EngineError(f"request {request.request_id}: its grammar: {error}"))
        else:
            self.decode_loop.submit(request)
            if self.subscribers.get(request.request_id) is not subscriber:  # aborted meanwhile
                self.decode_loop.abort(request.request_id)

    def _refuse(self, subscriber: Subscriber, error: EftServeError) -> None:
        if self.subscribers.get(subscriber.request_id) is subscriber:
            del self.subscribers[subscriber.request_id]
            self.submissions.notify([(subscriber.client, Notice(subscriber.request_id, to_failure(error)))])

    def abort(self, client: bytes, request_id: str) -> None:
        """See `RequestHandler.abort`."""
        subscriber = self.subscribers.get(request_id)
        if subscriber is not None and subscriber.client == client:
            self._abort(subscriber)

    def _abort(self, subscriber: Subscriber) -> None:
        if self.subscribers.pop(subscriber.request_id, None) is not None:
            self.decode_loop.abort(subscriber.request_id)

    def clients(self) -> set[bytes]:
        """See `RequestHandler.clients`."""
        return {subscriber.client for subscriber in list(self.subscribers.values())}

    def lose(self, client: bytes) -> None:
        """See `RequestHandler.lose`."""
        lost = [subscriber for subscriber in list(self.subscribers.values()) if subscriber.client == client]
        if lost:
            logger.warning("an ingress is gone, and %d requests with it", len(lost))
        for subscriber in lost:
            self._abort(subscriber)

    # The decode loop's thread.

    def _emit(self, deltas: Sequence[tuple[Request, Delta]]) -> None:
        """One message to each ingress for all deltas of a step."""
        parts: dict[str, list[Part]] = defaultdict(list)  # by address
        concerned: dict[str, list[Subscriber]] = defaultdict(list)
        finished: list[Subscriber] = []
        for request, delta in deltas:
            subscriber = self.subscribers.get(request.request_id)
            if subscriber is not None and subscriber.request is request:  # otherwise its subscriber is gone
                parts[subscriber.reply_to.address].append((request.request_id, subscriber.num_sent, delta))
                concerned[subscriber.reply_to.address].append(subscriber)
                subscriber.num_sent += delta.num_tokens
                if delta.finish_reason is not None:
                    finished.append(subscriber)
        for address, subscribers in concerned.items():
            if not self._sender.send(subscribers[0].reply_to, parts[address]):
                logger.error("%s does not take its tokens", address)
                self._lose_tokens(subscribers)
        for subscriber in finished:
            self.subscribers.pop(subscriber.request_id, None)
        self.submissions.notify(
            (subscriber.client, Notice(subscriber.request_id, finished=True)) for subscriber in finished
        )

    def _lose_tokens(self, subscribers: Sequence[Subscriber]) -> None:
        failure = to_failure(CoordinatorLostError("the tokens could not be sent; send the request again"))
        self.submissions.notify(
            (subscriber.client, Notice(subscriber.request_id, failure)) for subscriber in subscribers
        )
        for subscriber in subscribers:
            self._abort(subscriber)


def _log_end(end: RequestEnd) -> None:
    if not logger.isEnabledFor(logging.DEBUG):
        return
    events = ", ".join(f"{event.kind} {event.seconds:.3f}" for event in end.timeline)
    logger.debug(
        "request %s of tenant %s ended (%s): %s; %s", end.request_id, end.tenant, end.reason, events, end.usage
    )
