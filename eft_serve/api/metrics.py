"""What the HTTP surface measures of itself: seconds on this process's monotonic clock.

Labels are route templates and configured names, never a string that a caller chose.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from eft_serve.types import Delta

STEPS = (1, 1.5, 2, 3, 4, 5, 6.5, 8)
DECADES = (1000, 100, 10, 1)
BUCKETS = (*(step / parts for parts in DECADES for step in STEPS), 10.0, 20.0, 30.0, 60.0)  # exact as decimals


class ApiMetrics:
    """The HTTP metrics of one process.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.http_requests = Counter(
            "eft_http_requests", "Requests answered, by route and status", ["route", "status"], registry=registry
        )
        self.running = Gauge("eft_http_requests_running", "Requests not yet answered to the end", registry=registry)
        self.e2e_latency = self._histogram(
            "eft_e2e_request_latency_seconds", "From arrival to the last byte handed over", registry
        )
        self.time_to_first_token = self._histogram(
            "eft_time_to_first_token_seconds", "From arrival to the first token of any choice", registry
        )
        self.inter_token_latency = self._histogram(
            "eft_inter_token_latency_seconds",
            "Between tokens of a choice at the ingress; k tokens arriving together after t seconds count as k of t/k",
            registry,
        )

    @staticmethod
    def _histogram(name: str, help_text: str, registry: CollectorRegistry) -> Histogram:
        return Histogram(name, help_text, ["recipe"], registry=registry, buckets=BUCKETS)


class TokenClock:
    """Times the tokens of one request.

    Args:
        metrics: where it observes.
        recipe: the label, a configured name.
        arrival: when the request arrived, in seconds of the clock that `saw` is given.
    """

    def __init__(self, metrics: ApiMetrics, recipe: str, arrival: float) -> None:
        self._first = metrics.time_to_first_token.labels(recipe)
        self._between = metrics.inter_token_latency.labels(recipe)
        self._arrival = arrival
        self._last: dict[int, float] = {}

    def saw(self, choice: int, delta: Delta, now: float) -> None:
        """A delta of a choice arrived."""
        if not delta.token_ids:
            return
        if not self._last:
            self._first.observe(now - self._arrival)
        if choice in self._last:
            share = (now - self._last[choice]) / len(delta.token_ids)
            for _ in delta.token_ids:
                self._between.observe(share)
        self._last[choice] = now
