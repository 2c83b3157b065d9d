"""The decode loop: schedule, fan out, gather, sample, emit; requests join and leave at every step.

It runs in its own thread and owns all its state; other threads reach it through its inbox. It knows neither Ray nor
sockets: the models are a `LogitsBackend`, the readers are callbacks. The table of requests, the health of the replicas
and the metrics are modules of their own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.backend import LogitsBackend
from eft_serve.coordinator.controls import processors
from eft_serve.coordinator.gather import gather
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.replica_health import ReplicaHealth
from eft_serve.coordinator.replicas import ReplicaTable
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.request_table import RequestTable
from eft_serve.coordinator.sampler import Sampler, SamplerOutput
from eft_serve.coordinator.scheduler import Scheduler, SchedulerOutput
from eft_serve.errors import (
    CoordinatorLostError,
    EftServeError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from eft_serve.numerics.backends import choose_backend
from eft_serve.types import Delta, Endpoint, RequestEnd, StepResult

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5  # how often an idle loop checks its stop flag
STALL_WAIT_S = 0.02  # how often a loop that waits for a model tries again

Emit = Callable[[Sequence[tuple[Request, Delta]]], None]


class DecodeLoop:
    """Decodes every request of one coordinator.

    Args:
        backend: all replicas of all models.
        vocabularies: by model.
        emit: takes the deltas of a step, with their requests; called in the loop's thread.
        metrics: records every step and every finished request.
        on_end: takes the `RequestEnd` of each finished request; called in the loop's thread.
        on_stop: called once in the loop's thread, however it stops, before the requests that are left end.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        backend: LogitsBackend,
        vocabularies: Mapping[str, Vocabulary],
        emit: Emit,
        metrics: CoordinatorMetrics,
        on_end: Callable[[RequestEnd], None] = lambda end: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.vocabularies = vocabularies
        self.emit = emit
        self.metrics = metrics
        self.on_end = on_end
        self.on_stop = on_stop
        self.replicas = ReplicaTable(share=config.num_replicas)
        self.health = ReplicaHealth(self.replicas, backend, config.step_timeout_s)
        self.scheduler = Scheduler(config, self.replicas)
        self.requests = RequestTable(self._leave)
        self.sampler = Sampler(choose_backend(config.device), torch.get_num_threads(), metrics.observe_phase)
        self.error: BaseException | None = None  # what ended the thread; None while it runs
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._last_schedule = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the current step; open requests end with an error."""
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: Request) -> None:
        """Deltas come through `emit`, the last with a finish reason, even when the request cannot be served."""
        self._inbox.put(lambda: self._submit(request))

    def abort(self, request_id: str) -> None:
        """Free the request's cache in every model and emit nothing more for it. Unknown ids are ignored."""
        self._inbox.put(lambda: self.requests.abort(request_id))

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """All current replicas; each is used once it has answered a step."""
        self._inbox.put(lambda: self._set_replicas(endpoints))

    @property
    def missing_models(self) -> list[str]:
        """Models without a replica that has answered a step."""
        healthy = self.replicas.healthy_models
        return [model for model in self.vocabularies if model not in healthy]

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    # The loop's own thread.

    def _run(self) -> None:
        try:
            wait_s = IDLE_WAIT_S
            while not self._stopping:
                self.receive(wait_s)
                stepped = self.step()
                is_waiting = len(self.scheduler) or self.health.is_probing
                wait_s = 0.0 if stepped else STALL_WAIT_S if is_waiting else IDLE_WAIT_S
        except BaseException as error:
            logger.exception("the decode loop died")
            self.error = error
        finally:
            self._end_all()

    def step(self) -> bool:
        """One decode step; False when there was nothing to compute."""
        with self.metrics.timed("schedule"):
            scheduled = self._schedule(time.monotonic())
            batches = scheduled.batches()
        if batches:
            sent = time.monotonic()
            with self.metrics.timed("fan_out"):
                results = self.backend.fan_out(batches, self.config.step_timeout_s, meanwhile=self._emit)
            if scheduled.entries:
                self.scheduler.observe(scheduled, time.monotonic() - sent)
            ready = self._absorb(scheduled, results)
            drawn = self.sampler.sample(ready)
            is_urgent = not all(request.has_begun for request in ready)  # a first token does not wait
            with self.metrics.timed("advance"):
                self._advance(ready, drawn)
        if not batches or is_urgent:  # otherwise they are emitted while the models compute the next step
            self._emit()
        return bool(batches)

    def _schedule(self, now: float) -> SchedulerOutput:
        self.health.check(now)
        self.requests.end_undecodable()
        self.requests.end_overdue(now)
        # As of the last schedule, which marked requests that only wait for a turn; the step's own time does not count.
        for request in self.scheduler.find_stalled(self._last_schedule, self.config.recovery_timeout_s):
            self.requests.fail(request, self._stalled(request))
        self._last_schedule = now
        return self.scheduler.schedule(now)

    def _absorb(self, scheduled: SchedulerOutput, results: Mapping[str, StepResult]) -> list[Request]:
        """Apply the answers; returns the requests whose models have all given logits."""
        now = time.monotonic()
        gathered = gather(scheduled, results, now)
        self.metrics.observe_step(scheduled, results, gathered)
        for replica_id, failure in gathered.failed_replicas.items():
            logger.warning("replica %s failed: %s", replica_id, failure)
            self.scheduler.lose_replica(replica_id, now)
            self.replicas.give_back_freed(replica_id, scheduled.freed.get(replica_id, ()))
        for request, error in gathered.errors.items():
            if request in self.requests:
                self.requests.fail(request, error)
        self.requests.end_undecodable()
        return [request for request in gathered.ready if request in self.requests]

    def _advance(self, requests: Sequence[Request], drawn: Sequence[SamplerOutput | EftServeError]) -> None:
        """Append each request's new tokens; end the requests that they finish."""
        now, num_generated, num_scored = time.monotonic(), 0, 0
        for request, taken in zip(requests, drawn, strict=True):
            if isinstance(taken, EftServeError):
                self.requests.fail(request, taken)
                continue
            if not request.output_token_ids:
                self.metrics.queue_seconds.observe(now - request.arrival)
            is_forcing = request.is_forcing
            num_taken = self.requests.take(request, taken, now)
            num_scored += len(taken.token_ids) * is_forcing
            num_generated += num_taken * (not is_forcing)
        self.metrics.generated_tokens.inc(num_generated)
        self.metrics.scored_tokens.inc(num_scored)

    def _end_all(self) -> None:
        """Take what is queued, so that nobody waits for an answer, and end everybody."""
        self._inbox.put(self.on_stop)
        while not self._inbox.empty():  # only this thread takes from it
            try:
                self._inbox.get_nowait()()
            except Exception:  # the others still have to end
                logger.exception("a call to the decode loop failed while it was stopping")
        self.requests.end_all(CoordinatorLostError("the coordinator is stopping; send the request again"))
        self._emit()
        self.backend.close()

    def receive(self, wait_s: float = 0.0) -> None:
        """Run the calls that other threads have queued, waiting up to `wait_s` for the first."""
        try:
            self._inbox.get(timeout=wait_s)() if wait_s else self._inbox.get_nowait()()
        except queue.Empty:
            return
        for _ in range(self._inbox.qsize()):  # not until it is empty: other threads may fill it as fast
            self._inbox.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, request: Request) -> None:
        try:
            vocabularies = [self._vocabulary(sequence.model) for sequence in request.sequences]
            self._check_sequences(request)
            request.limit(self.replicas.context_left(request))  # before anything is done for each token
            request.set_vocabularies([vocabulary.num_tokens for vocabulary in vocabularies])
            request.processors = processors(request, vocabularies)
            self.requests.add(request, vocabularies)
        except EftServeError as error:
            self.requests.refuse(request, error)
        except Exception as error:  # one request's fault ends one request
            logger.exception("request %s could not be taken", request.request_id)
            self.requests.refuse(request, EngineError(f"request {request.request_id}: could not be taken: {error}"))
        else:
            self.scheduler.add(request)

    def _check_sequences(self, request: Request) -> None:
        """Refuse a request that can never be sampled: its sequences of a model need a token each in one step."""
        budget = self.config.max_num_batched_tokens
        model, count = Counter(sequence.model for sequence in request.sequences).most_common(1)[0]
        if count > budget:
            raise InvalidRequestError(
                f"model: it reads {count} prompts with model {model!r}, and coordinator.max_num_batched_tokens is "
                f"{budget}; raise it",
                param="model",
            )

    def _vocabulary(self, model: str) -> Vocabulary:
        if model not in self.vocabularies:
            raise ModelNotFoundError(f"model {model!r} is not served by this coordinator", param="model")
        return self.vocabularies[model]

    def _leave(self, request: Request, end: RequestEnd) -> None:
        """The request has ended: free its resources."""
        self.scheduler.finish(request)
        self.metrics.observe_end(end)
        self.on_end(end)

    def _stalled(self, request: Request) -> UnavailableError:
        missing = [model for model in sorted(request.models) if model not in self.replicas.healthy_models]
        waited_for = ", ".join(missing) or "room in its models"
        return UnavailableError(f"waited {self.config.recovery_timeout_s:g} s for {waited_for}; send the request again")

    def _emit(self) -> None:
        self.metrics.observe_queues(self.scheduler)
        if self.requests.has_deltas:
            with self.metrics.timed("emit"):
                self.emit(self.requests.take_deltas())

    def _set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.backend.set_replicas(endpoints)
        for replica_id in self.replicas.update(endpoints):
            logger.warning("replica %s is gone", replica_id)
            self.scheduler.lose_replica(replica_id, time.monotonic())
