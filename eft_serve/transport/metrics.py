"""What a server counts of its messages; knows nothing of where the numbers are scraped."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram


class ServerMetrics:
    """One server's metrics in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.messages_per_forward = Histogram(
            "eft_messages_per_forward",
            "Coordinators' messages that became one forward",
            registry=self.registry,
            buckets=(1, 2, 3, 4, 6, 8, 16, 32),
        )
        self.wait_seconds = Counter(
            "eft_merge_wait_seconds", "Time that messages waited for others to join them", registry=self.registry
        )
        self.socket_bytes = Counter(
            "eft_socket_logits_bytes", "Logits sent by socket, for want of shared memory", registry=self.registry
        )
