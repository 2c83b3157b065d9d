"""When a request's tokens came, and what follows from that: TTFT, ITL, E2E, goodput. Pure arithmetic.

All times of one run are seconds since its start, on the clock of the one process that watched.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TokensAt = tuple[float, list[int]]  # when, and the ids that came together then


@dataclass(frozen=True, slots=True)
class Gap:
    """The wait before some tokens that came together."""

    start_s: float
    end_s: float
    num_tokens: int

    @property
    def per_token_s(self) -> float:
        return (self.end_s - self.start_s) / self.num_tokens


@dataclass(frozen=True, slots=True)
class Timeline:
    """One request as its sender saw it."""

    arrival_s: float  # when it was wanted; waiting for a free place counts
    tokens: Sequence[TokensAt] = ()
    failure: str | None = None

    def succeeded(self) -> Timeline:
        """Itself; RuntimeError when it failed."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        return self

    @property
    def token_ids(self) -> list[int]:
        return [token for _, ids in self.tokens for token in ids]

    @property
    def ttft_s(self) -> float:
        return self.tokens[0][0] - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.tokens[-1][0] - self.arrival_s

    @property
    def gaps(self) -> list[Gap]:
        """One for each arrival after the first; what came together with the first token waited for nothing."""
        return [
            Gap(before, after, len(ids))
            for (before, _), (after, ids) in zip(self.tokens, self.tokens[1:], strict=False)
        ]

    @property
    def itls_s(self) -> list[float]:
        """Of every token after the first arrival: k tokens that came together after t count as k of t/k."""
        return [gap.per_token_s for gap in self.gaps for _ in range(gap.num_tokens)]

    def met(self, ttft_s: float, itl_s: float) -> bool:
        """Whether it kept both targets, the second one on average over its own tokens."""
        itls = self.itls_s
        return self.failure is None and self.ttft_s <= ttft_s and sum(itls) <= itl_s * len(itls)


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    """Linear between neighbours, in milliseconds."""
    return round(float(np.percentile(seconds, percent)) * 1e3, 3)


def overlapping_itls_s(timelines: Iterable[Timeline], start_s: float, end_s: float) -> list[float]:
    """ITLs of all tokens whose wait fell, also in part, between two times."""
    gaps = (gap for timeline in timelines for gap in timeline.gaps)
    return [
        gap.per_token_s for gap in gaps if gap.end_s > start_s and gap.start_s < end_s for _ in range(gap.num_tokens)
    ]


def summarize(timelines: Sequence[Timeline], ttft_target_s: float, itl_target_s: float) -> dict[str, Any]:
    """The figures of one run. Rates are over the time from the first arrival to the last token.

    Raises:
        ValueError: no request succeeded.
    """
    done = [t for t in timelines if t.failure is None]
    if not done:
        raise ValueError(f"no request succeeded; the first: {timelines[0].failure if timelines else 'there were none'}")
    seconds = max(t.tokens[-1][0] for t in done) - min(t.arrival_s for t in timelines)
    itls = [itl for t in done for itl in t.itls_s]
    figures: dict[str, Any] = {}
    for name, values in (("ttft", [t.ttft_s for t in done]), ("itl", itls), ("e2e", [t.e2e_s for t in done])):
        figures |= {f"{name}_ms_p50": percentile_ms(values, 50), f"{name}_ms_p99": percentile_ms(values, 99)}
    return figures | {
        "num_requests_mean": round(sum(t.e2e_s for t in done) / seconds, 2),  # waiting or running
        "tokens_per_s": round(sum(len(t.token_ids) for t in done) / seconds, 2),
        "goodput_requests_per_s": round(sum(t.met(ttft_target_s, itl_target_s) for t in done) / seconds, 3),
        "failures": len(timelines) - len(done),
    }
