"""What the benchmarks should show, and whether they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Threshold:
    """One figure of one benchmark and its limit."""

    benchmark: str
    path: tuple[str, ...]  # of keys in that benchmark's JSON
    limit: float
    at_most: bool = True

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}"

    def measured(self, results: Mapping[str, Any]) -> float:
        """The figure; KeyError when the benchmark did not give it."""
        found: Any = results[self.benchmark]
        for key in self.path:
            found = found[key]
        return float(found)

    def met(self, results: Mapping[str, Any]) -> bool:
        measured = self.measured(results)
        return measured <= self.limit if self.at_most else measured >= self.limit


THRESHOLDS = (
    Threshold("fanout", ("step_over_slowest", "1"), 1.05),
    Threshold("fanout", ("step_over_slowest", "16"), 1.12),
    Threshold("fanout", ("overhead_ms_p50", "1"), 2.0),
    Threshold("coordinator", ("over_greedy", "t1"), 1.6),
    Threshold("coordinator", ("over_greedy", "top_p"), 1.6),
    Threshold("coordinator", ("combine_and_sample_over_floor", "greedy"), 1.2),
    Threshold("coordinator", ("combine_and_sample_over_floor", "t1"), 2.5),
    Threshold("coordinator", ("combine_and_sample_over_floor", "top_p"), 2.5),
    Threshold("engine", ("over_floor", "1"), 1.6),
    Threshold("engine", ("over_floor", "8"), 1.35),
    Threshold("engine", ("over_floor", "32"), 1.25),
    Threshold("engine", ("speedup_over_stock", "1"), 1.3, at_most=False),
    Threshold("engine", ("speedup_over_stock", "8"), 1.3, at_most=False),
    Threshold("context", ("growth", "context, batch 1"), 1.1),
    Threshold("context", ("growth", "context, batch 8"), 1.1),
    Threshold("context", ("growth", "batch, context 128"), 1.1),
    Threshold("speculate", ("zoo", "greedy", "speedup"), 1.8, at_most=False),
    Threshold("speculate", ("zoo", "t1", "speedup"), 1.4, at_most=False),
    Threshold("speculate", ("simulated", "tokens_per_s"), 16.5, at_most=False),
    Threshold("speculate", ("simulated", "tokens_per_s_overlap"), 18.0, at_most=False),
    Threshold("speculate", ("schema", "json_schema_over_free"), 0.8, at_most=False),
    Threshold("speculate", ("batched", "min_ratio"), 0.97, at_most=False),
    Threshold("serve", ("ratio",), 2.0, at_most=False),
    Threshold("serve", ("ours", "num_requests_mean"), 12.0, at_most=False),  # fewer: it was not kept full
    Threshold("serve", ("ours", "failures"), 0.0),
    Threshold("serve", ("itl_p99_ratio",), 2.5),
    Threshold("serve", ("ttft_first_over_repeat",), 4.0, at_most=False),
)
