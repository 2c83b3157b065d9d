"""Merges the metrics of all processes: each sample gets the label `process`, so that nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self.families


def merge(expositions: Mapping[str, str]) -> str:
    """Merge Prometheus texts, by process, into one.

    Sums over `process` give the application's totals; a restarted process has another name, so counters never appear
    to decrease.
    """
    families: dict[str, Metric] = {}
    for process, text in expositions.items():
        for family in text_string_to_metric_families(text):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [s._replace(labels={**s.labels, "process": process}) for s in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry).decode()


def exposition(processes: Mapping[str, str], num_silent: int) -> bytes:
    """The processes' texts, by process, as one Prometheus text that also says how many processes did not answer."""
    up = "".join(f'eft_process_up{{process="{process}"}} 1\n' for process in processes)
    return (
        merge(processes)
        + "# HELP eft_process_up Processes whose metrics are in this scrape\n# TYPE eft_process_up gauge\n"
        + up
        + "# HELP eft_process_silent Replicas and deployments that did not answer this scrape\n"
        + f"# TYPE eft_process_silent gauge\neft_process_silent {num_silent}\n"
    ).encode()
