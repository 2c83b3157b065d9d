"""What an engine counts; knows nothing of where the numbers are scraped."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class EngineMetrics:
    """The engine's metrics, every one labelled with its model, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.forward_seconds = Histogram(
            "eft_engine_forward_seconds", "Time of one forward", ["model"], registry=self.registry, buckets=_SECONDS
        ).labels(model)
        self.tokens_computed = self._counter("tokens_computed", "Tokens put through the model")
        self.prefix_queried_tokens = self._counter(
            "prefix_queried_tokens", "Tokens of sequences that begin with a salt"
        )
        self.prefix_hit_tokens = self._counter("prefix_hit_tokens", "Of these, tokens found in the cache")
        self.cache_misses = self._counter("cache_misses", "Steps answered with the number of tokens held")
        self.evictions = self._counter("evictions", "Sequences evicted for room")
        self.expirations = self._counter("expirations", "Sequences whose lease ran out")
        self.num_sequences = self._gauge("num_sequences", "Sequences in the KV cache")
        self.kv_used_tokens = self._gauge("kv_used_tokens", "KV cache that sequences hold, in tokens of whole blocks")
        self.kv_capacity_tokens = self._gauge("kv_capacity_tokens", "KV cache in all, in tokens")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"eft_engine_{name}", text, ["model"], registry=self.registry).labels(self._model)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"eft_engine_{name}", text, ["model"], registry=self.registry).labels(self._model)
