"""What a server counts of its messages; knows nothing of where the numbers are scraped."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter


class ServerMetrics:
    """One server's metrics in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.socket_bytes = Counter(
            "eft_socket_logits_bytes", "Logits sent by socket, for want of shared memory", registry=self.registry
        )
