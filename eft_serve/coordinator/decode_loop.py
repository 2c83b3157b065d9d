"""The decode loop: schedule, fan out, gather, combine, sample, emit; requests join and leave at every step.

It runs in a thread of its own and owns all its state; other threads reach it through its inbox. It knows neither Ray
nor sockets: the models are a `LogitsBackend`, the readers a callback.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import eq

import torch

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.backend import LogitsBackend
from eft_serve.coordinator.gather import Gathered, gather
from eft_serve.coordinator.metrics import CoordinatorMetrics
from eft_serve.coordinator.output import OutputStream, failed
from eft_serve.coordinator.replicas import ReplicaTable
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.sampler import Sampler, SamplerOutput
from eft_serve.coordinator.scheduler import Scheduler, SchedulerOutput
from eft_serve.errors import DeadlineError, EftServeError, EngineError, UnavailableError
from eft_serve.numerics.backends import choose_backend
from eft_serve.types import Delta, Endpoint, FinishReason, SequenceStep, StepBatch, StepResult

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5  # an empty loop looks at its stop flag so often
STALL_WAIT_S = 0.02  # a loop that cannot step anybody tries again after so long
PROBE_TIMEOUT_S = 1.0  # for the one-token step that probes a replica; everybody waits for it

Emit = Callable[[Sequence[tuple[str, Delta]]], None]


class DecodeLoop:
    """Decodes every request of one coordinator."""

    def __init__(
        self,
        config: CoordinatorConfig,
        backend: LogitsBackend,
        vocabularies: Mapping[str, Vocabulary],  # by model
        emit: Emit,  # called in the loop's thread, at most once a step
        metrics: CoordinatorMetrics,
    ) -> None:
        self.config = config
        self.backend = backend
        self.vocabularies = vocabularies
        self.emit = emit
        self.metrics = metrics
        self.replicas = ReplicaTable(share=config.num_replicas)
        self.scheduler = Scheduler(config, self.replicas)
        self.sampler = Sampler(choose_backend(config.device), torch.get_num_threads(), self._observe_phase)
        self.error: BaseException | None = None  # what ended the thread, if anything did
        self._requests: dict[str, tuple[Request, OutputStream]] = {}
        self._deltas: list[tuple[str, Callable[[], Delta]]] = []  # not emitted yet, nor even detokenized
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._last_schedule = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    # From any thread.

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop after the present step; requests that are left end with an error."""
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def submit(self, request: Request) -> None:
        """Its deltas come through `emit`, the last with a finish reason, even when it cannot be served at all."""
        self._inbox.put(lambda: self._submit(request))

    def abort(self, request_id: str) -> None:
        """Free what it holds in every model; nothing more is emitted for it. Unknown ids are ignored."""
        self._inbox.put(lambda: self._abort(request_id))

    def set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        """All replicas that there are now; each is used once it has answered a step."""
        self._inbox.put(lambda: self._set_replicas(endpoints))

    @property
    def missing_models(self) -> list[str]:
        """Models of which no replica has answered a step."""
        healthy = self.replicas.healthy_models
        return [model for model in self.vocabularies if model not in healthy]

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    # The loop's own thread.

    def _run(self) -> None:
        try:
            wait_s = IDLE_WAIT_S
            while not self._stopping:
                self.receive(wait_s)
                stepped = self.step()
                wait_s = 0.0 if stepped else STALL_WAIT_S if len(self.scheduler) else IDLE_WAIT_S
        except BaseException as error:
            logger.exception("the decode loop died")
            self.error = error
        finally:
            self.receive()
            self._fail_all(UnavailableError("the coordinator is stopping; send the request again"))
            self.backend.close()

    def step(self) -> bool:
        """One decode step; false when there was nothing to compute."""
        now = time.monotonic()
        with self._timed("schedule"):
            self._probe(self.replicas.due(now))
            self._fail_overdue(now)
            self._fail_stalled(self._last_schedule)  # who only waited for a turn was told apart then
            scheduled, self._last_schedule = self.scheduler.schedule(now), now
            batches = scheduled.batches()
        if batches:
            sent = time.monotonic()
            with self._timed("fan_out"):
                results = self.backend.fan_out(batches, self.config.step_timeout_s, meanwhile=self._flush)
            if scheduled.entries:
                self.scheduler.observe(scheduled, time.monotonic() - sent)
            ready = self._absorb(scheduled, results)
            drawn = self.sampler.sample(ready)
            is_urgent = not all(request.output_token_ids for request in ready)  # nobody waits for a first token
            with self._timed("advance"):
                self._advance(ready, drawn)
        if not batches or is_urgent:  # else while the models compute the next step
            self._flush()
        return bool(batches)

    def _absorb(self, scheduled: SchedulerOutput, results: Mapping[str, StepResult]) -> list[Request]:
        now = time.monotonic()
        gathered = gather(scheduled, results, now)
        self._observe(scheduled, results, gathered)
        for replica_id, failure in gathered.failed_replicas.items():
            logger.warning("replica %s failed: %s", replica_id, failure)
            self.scheduler.lose_replica(replica_id, now)
            self.replicas.give_back_freed(replica_id, scheduled.freed.get(replica_id, ()))
        for request, error in gathered.errors.items():
            self._end(request.request_id, FinishReason.ERROR, error)
        return [request for request in gathered.ready if request.request_id in self._requests]

    def _advance(self, requests: Sequence[Request], drawn: Sequence[SamplerOutput | EftServeError]) -> None:
        """Give every request its tokens; end those that they end."""
        now, num_taken = time.monotonic(), 0
        for request, taken in zip(requests, drawn, strict=True):
            request_id = request.request_id
            if isinstance(taken, EftServeError):
                self._end(request_id, FinishReason.ERROR, taken)
                continue
            if not request.output_token_ids:
                self.metrics.queue_seconds.observe(now - request.arrival)
            self._count(request, taken.token_ids)
            request.take(taken.token_ids)
            request.last_progress = now
            output = self._requests[request_id][1]
            token_ids, reason = output.take(taken.token_ids)
            num_taken += len(token_ids)
            components = None if taken.components is None else taken.components[: len(token_ids)]
            report = None if reason is None else request.speculation.stats
            self._deltas.append((request_id, partial(output.delta, token_ids, reason, components, report)))
            if reason is not None:
                self._end(request_id, reason)
        self.metrics.generated_tokens.inc(num_taken)

    def _count(self, request: Request, tokens: list[int]) -> None:
        if not request.is_forced:
            request.speculation.count(sum(map(eq, request.draft_token_ids[: request.num_rows], tokens)))

    def receive(self, wait_s: float = 0.0) -> None:
        """Do what other threads have asked for until now, waiting so long for the first."""
        try:
            self._inbox.get(timeout=wait_s)() if wait_s else self._inbox.get_nowait()()
        except queue.Empty:
            return
        for _ in range(self._inbox.qsize()):  # not until it is empty: others may fill it as fast
            self._inbox.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, request: Request) -> None:
        try:
            vocabularies = [self.vocabularies[sequence.model] for sequence in request.sequences]
            request.num_ids = min(vocabulary.num_tokens for vocabulary in vocabularies)
            request.check_forced()
            request.limit(self.replicas.context_left(request))
        except EftServeError as error:
            self._deltas.append((request.request_id, partial(failed, error)))
            return
        self._requests[request.request_id] = (request, OutputStream.of(request, vocabularies))
        self.scheduler.add(request)

    def _end(self, request_id: str, reason: FinishReason, error: EftServeError | None = None) -> None:
        request, _ = self._requests.pop(request_id, (None, None))
        if request is None:
            return
        self.scheduler.finish(request)
        self.metrics.finished.labels(reason).inc()
        self.metrics.count_draft_tokens(request.speculation.stats)
        if error is not None:
            self._deltas.append((request_id, partial(failed, error)))

    def _abort(self, request_id: str) -> None:
        self._end(request_id, FinishReason.ABORT)
        self._deltas = [delta for delta in self._deltas if delta[0] != request_id]

    def _fail_overdue(self, now: float) -> None:
        for request in self.scheduler.requests:
            if now > request.deadline:
                error = DeadlineError(f"the request took longer than {request.generation.timeout_s:g} s")
                self._end(request.request_id, FinishReason.ERROR, error)

    def _fail_stalled(self, now: float) -> None:
        for request in self.scheduler.find_stalled(now, self.config.recovery_timeout_s):
            missing = [m for m in sorted(request.models) if m not in self.replicas.healthy_models]
            waited_for = ", ".join(missing) or "room in its models"
            error = UnavailableError(f"waited {self.config.recovery_timeout_s:g} s in vain for {waited_for}")
            self._end(request.request_id, FinishReason.ERROR, error)

    def _fail_all(self, error: EftServeError) -> None:
        for request_id in list(self._requests):
            self._end(request_id, FinishReason.ERROR, error)
        self._flush()

    def _flush(self) -> None:
        self.metrics.running.set(len(self.scheduler.running))
        self.metrics.waiting.set(len(self.scheduler.waiting))
        if self._deltas:
            with self._timed("emit"):
                deltas, self._deltas = self._deltas, []
                self.emit([(request_id, self._detokenized(request_id, delta)) for request_id, delta in deltas])

    def _detokenized(self, request_id: str, detokenize: Callable[[], Delta]) -> Delta:
        try:
            return detokenize()
        except Exception as error:  # a tokenizer's: this request's end, and nobody else's
            logger.exception("the text of request %s cannot be decoded", request_id)
            self._end(request_id, FinishReason.ERROR)
            return failed(EngineError(f"request {request_id}: its text cannot be decoded: {error}"))

    def _set_replicas(self, endpoints: Mapping[str, Endpoint]) -> None:
        self.backend.set_replicas(endpoints)
        for replica_id in self.replicas.update(endpoints):
            logger.warning("replica %s is gone", replica_id)
            self.scheduler.lose_replica(replica_id, time.monotonic())

    def _probe(self, replica_ids: Sequence[str]) -> None:
        """One token through each that is new or has failed: it is used, and its model ready, once it has answered."""
        if not replica_ids:
            return
        probe = SequenceStep(f"probe/{uuid.uuid4().hex}", 0, [0], num_logits=1)
        results = self.backend.fan_out(
            dict.fromkeys(replica_ids, StepBatch(steps=[probe])), PROBE_TIMEOUT_S, self._flush
        )
        for replica_id, result in results.items():
            reason = result.failure or result.outputs[0].error
            if reason is None:  # "no room now" is an answer too
                self.replicas.replicas[replica_id].succeed()
                self.replicas.freed[replica_id].append(probe.sequence_id)
            else:
                logger.warning("replica %s did not answer one token: %s", replica_id, reason)
                self.replicas.replicas[replica_id].fail(time.monotonic())

    def _observe(self, scheduled: SchedulerOutput, results: Mapping[str, StepResult], gathered: Gathered) -> None:
        self.metrics.cache_misses.inc(gathered.num_cache_misses)
        self.metrics.preemptions.inc(self.scheduler.take_num_preemptions())
        for replica_id, entries in scheduled.entries.items():
            model = entries[0].sequence.model
            result = results[replica_id]
            if replica_id in gathered.failed_replicas:
                self.metrics.replica_failures.labels(model).inc()
            else:
                self.metrics.model_step_seconds.labels(model).observe(result.seconds)
                self.metrics.model_forward_seconds.labels(model).observe(result.forward_seconds)
                num_tokens = sum(entry.step.max_computed or len(entry.step.token_ids) for entry in entries)
                self.metrics.computed_tokens.labels(model).inc(num_tokens)

    def _observe_phase(self, phase: str, seconds: float) -> None:
        self.metrics.step_seconds.labels(phase).observe(seconds)

    def _timed(self, phase: str) -> AbstractContextManager[object]:
        return self.metrics.step_seconds.labels(phase).time()
