"""`eft-serve bench fanout`: what a decode step costs beyond its slowest model.

The real coordinator and the real transport over engines that only sleep. 1.0 would be a step that costs what its
slowest model costs; one model after the other would be the sum of the latencies over the largest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from eft_serve.bench import report
from eft_serve.bench.local_stack import LocalStack
from eft_serve.bench.sleeping_engine import SleepingEngine
from eft_serve.coordinator.request import Request
from eft_serve.types import Combination, GenerationRequest, SamplingParams, Term

ROLES = ("base", "tuned", "reference")
EFT = Combination((Term("base", "base", 1.0), Term("tuned", "tuned", 1.0), Term("reference", "reference", -1.0)))
WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Letters:
    """A vocabulary that detokenizes nothing."""

    num_tokens: int
    eos_token_ids: frozenset[int] = frozenset()

    def decode(self, token_ids: list[int]) -> str:
        return "a" * len(token_ids)


class SleepingModels(LocalStack):
    """Three sleeping engines and a coordinator over them, driven step by step."""

    def __init__(self, latencies_s: Sequence[float], vocab_size: int) -> None:
        builds = {
            role: (SleepingEngine.build, (role, latency, vocab_size))
            for role, latency in zip(ROLES, latencies_s, strict=True)
        }
        super().__init__(builds, dict.fromkeys(ROLES, Letters(vocab_size)))

    def measure(self, batch: int, num_steps: int) -> list[float]:
        """Seconds of each of so many decode steps with so many requests."""
        for index in range(batch):
            request = self._request(f"{batch}-{index}", WARM_UP_STEPS + num_steps)
            self.tokens[request.request_id] = []
            self.loop.submit(request)
        self.loop.receive()
        seconds = [self.step() for _ in range(WARM_UP_STEPS + num_steps)]
        self.loop.step()  # tells the engines that all of it is over
        return seconds[WARM_UP_STEPS:]

    @staticmethod
    def _request(request_id: str, max_tokens: int) -> Request:
        generation = GenerationRequest(
            request_id=request_id,
            combination=EFT,
            prompts={role: [1] for role in ROLES},
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
        )
        return Request.create(generation, time.monotonic())


def run(latencies_ms: Sequence[float], vocab_size: int, batches: Sequence[int], num_steps: int, rounds: int) -> None:
    """Interleave the batch sizes and both latencies over the rounds; print medians, the last line as JSON."""
    sleeping = SleepingModels([ms / 1e3 for ms in latencies_ms], vocab_size)
    instant = SleepingModels([0.0] * len(ROLES), vocab_size)
    seconds: dict[tuple[str, int], list[float]] = {}
    try:
        for _ in range(rounds):
            for batch in batches:
                seconds.setdefault(("sleeping", batch), []).extend(sleeping.measure(batch, num_steps))
                seconds.setdefault(("instant", batch), []).extend(instant.measure(batch, num_steps))
    finally:
        sleeping.close()
        instant.close()
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    slowest = max(latencies_ms) / 1e3
    over = {str(b): round(medians["sleeping", b] / slowest, 4) if slowest else None for b in batches}
    overhead = {str(b): round(medians["instant", b] * 1e3, 3) for b in batches}
    report.show(
        f"Decode step over sleeping models of {', '.join(map(str, latencies_ms))} ms, {vocab_size} tokens",
        ["batch", "step ms, p50", "over the slowest", "step ms at latency 0"],
        [[b, f"{medians['sleeping', b] * 1e3:.2f}", over[str(b)], overhead[str(b)]] for b in batches],
    )
    report.finish({"step_over_slowest": over, "overhead_ms_p50": overhead})
