"""Every process's metrics in one exposition, each sample once."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from eft_serve.serving.metrics import merge


def exposition(count: int, seconds: float) -> str:
    registry = CollectorRegistry()
    Counter("eft_things", "Things", ["kind"], registry=registry).labels("a").inc(count)
    Histogram("eft_wait_seconds", "Waiting", registry=registry, buckets=[0.1, 1.0]).observe(seconds)
    return generate_latest(registry).decode()


def test_samples_keep_their_values_and_gain_their_process() -> None:
    merged = merge({"one#1": exposition(2, 0.05), "one#2": exposition(3, 0.5)})
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert families["eft_things"].type == "counter"
    things = {(s.labels["process"], s.value) for s in families["eft_things"].samples if s.name == "eft_things_total"}
    assert things == {("one#1", 2.0), ("one#2", 3.0)}
    buckets = {
        (s.labels["process"], s.labels["le"]): s.value
        for s in families["eft_wait_seconds"].samples
        if s.name == "eft_wait_seconds_bucket"
    }
    assert buckets["one#1", "0.1"] == 1
    assert buckets["one#2", "0.1"] == 0
    assert merged.count("# TYPE eft_things_total counter") == 1


def test_nothing_merges_to_nothing() -> None:
    assert merge({}) == ""
