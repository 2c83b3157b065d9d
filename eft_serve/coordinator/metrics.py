"""The decode loop's metrics, in seconds on one process's monotonic clock."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eft_serve.coordinator.gather import Gathered
from eft_serve.coordinator.scheduler import Scheduler, SchedulerOutput
from eft_serve.types import RequestEnd, StepResult

_DECADE = (1, 1.5, 2, 3, 4, 5, 6.5, 8)
STEP_BUCKETS = [step / parts for parts in (10_000, 1000, 100, 10, 1) for step in _DECADE] + [10.0, 30.0, 60.0]


class CoordinatorMetrics:
    """One coordinator's metrics, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.step_seconds = Histogram(
            "eft_step_seconds",
            "One decode step, split into phases",
            ["phase"],  # schedule, fan_out, combine, process, sample, describe, advance; and emit, beside fan_out
            registry=self.registry,
            buckets=STEP_BUCKETS,
        )
        self.model_step_seconds = Histogram(
            "eft_model_step_seconds",
            "From the fan-out to one model replica's answer",
            ["model"],
            registry=self.registry,
            buckets=STEP_BUCKETS,
        )
        self.model_forward_seconds = Histogram(
            "eft_model_forward_seconds",
            "Of that, inside the engine's forward",
            ["model"],
            registry=self.registry,
            buckets=STEP_BUCKETS,
        )
        self.queue_seconds = Histogram(
            "eft_request_queue_seconds",
            "From a request's arrival at the coordinator to its first token",
            registry=self.registry,
            buckets=STEP_BUCKETS,
        )
        self.running = Gauge("eft_num_requests_running", "Requests being decoded", registry=self.registry)
        self.waiting = Gauge("eft_num_requests_waiting", "Requests waiting to be decoded", registry=self.registry)
        self.computed_tokens = Counter(
            "eft_computed_tokens",
            "Tokens that models were asked to compute, those found in a cache included",
            ["model"],
            registry=self.registry,
        )
        self.generated_tokens = Counter("eft_generated_tokens", "Tokens drawn", registry=self.registry)
        self.scored_tokens = Counter("eft_scored_tokens", "Given tokens that were scored", registry=self.registry)
        self.decode_passes = Counter(
            "eft_decode_passes", "Steps that gave a request tokens, of requests that ended", registry=self.registry
        )
        self.drafted_tokens = Counter(
            "eft_drafted_tokens", "Draft tokens, of requests that ended", registry=self.registry
        )
        self.accepted_tokens = Counter(
            "eft_accepted_tokens", "Draft tokens that became output, of requests that ended", registry=self.registry
        )
        self.finished = Counter(
            "eft_requests_finished", "Requests ended, by reason", ["reason"], registry=self.registry
        )
        self.preemptions = Counter("eft_preemptions", "Requests preempted for KV room", registry=self.registry)
        self.cache_misses = Counter(
            "eft_cache_misses", "Steps answered with fewer cached tokens than assumed", registry=self.registry
        )
        self.replica_failures = Counter(
            "eft_replica_failures", "Replica calls that failed", ["model"], registry=self.registry
        )

    def timed(self, phase: str) -> AbstractContextManager[object]:
        """Times a phase of a step."""
        return self.step_seconds.labels(phase).time()

    def observe_phase(self, phase: str, seconds: float) -> None:
        """Record the duration of a phase of a step."""
        self.step_seconds.labels(phase).observe(seconds)

    def observe_queues(self, scheduler: Scheduler) -> None:
        """Record running and waiting requests, and preemptions since the last call."""
        self.running.set(len(scheduler.running))
        self.waiting.set(len(scheduler.waiting))
        self.preemptions.inc(scheduler.take_num_preemptions())

    def observe_step(self, scheduled: SchedulerOutput, results: Mapping[str, StepResult], gathered: Gathered) -> None:
        """Record the replicas' answers."""
        self.cache_misses.inc(gathered.num_cache_misses)
        for replica_id, entries in scheduled.entries.items():
            model, result = entries[0].sequence.model, results[replica_id]
            if replica_id in gathered.failed_replicas:
                self.replica_failures.labels(model).inc()
                continue
            self.model_step_seconds.labels(model).observe(result.seconds)
            self.model_forward_seconds.labels(model).observe(result.forward_seconds)
            num_tokens = sum(entry.step.max_computed or len(entry.step.token_ids) for entry in entries)
            self.computed_tokens.labels(model).inc(num_tokens)

    def observe_end(self, end: RequestEnd) -> None:
        """Record a finished request."""
        self.finished.labels(end.reason).inc()
        spec_decode = end.usage.spec_decode
        self.decode_passes.inc(spec_decode.num_passes)
        self.drafted_tokens.inc(spec_decode.num_drafted)
        self.accepted_tokens.inc(spec_decode.num_accepted)
