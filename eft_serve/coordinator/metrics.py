"""What the decode loop measures of itself, in seconds on one process's monotonic clock."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eft_serve.types import SpecDecodeStats

_DECADE = (1, 1.5, 2, 3, 4, 5, 6.5, 8)
STEP_BUCKETS = [step * scale for scale in (1e-4, 1e-3, 1e-2, 1e-1, 1.0) for step in _DECADE] + [10.0, 30.0, 60.0]


class CoordinatorMetrics:
    """One coordinator's metrics in a registry of their own."""

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
            "Tokens sent to be computed, if not found in a cache",
            ["model"],
            registry=self.registry,
        )
        self.generated_tokens = Counter("eft_generated_tokens", "Tokens drawn", registry=self.registry)
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
            "eft_cache_misses", "Steps answered with fewer tokens held than assumed", registry=self.registry
        )
        self.replica_failures = Counter(
            "eft_replica_failures", "Replica calls that failed", ["model"], registry=self.registry
        )

    def count_draft_tokens(self, report: SpecDecodeStats) -> None:
        """Of a request that ended."""
        self.decode_passes.inc(report.num_passes)
        self.drafted_tokens.inc(report.num_drafted)
        self.accepted_tokens.inc(report.num_accepted)
