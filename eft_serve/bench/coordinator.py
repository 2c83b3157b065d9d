"""`eft-serve bench coordinator`: what a decode step costs the coordinator, beside copying its logits.

The real coordinator and the real transport over engines that answer at once with peaked logits. The sides take turns
in every round, and ratios are medians over the rounds. The floor copies once, on as many threads, as many bytes as a
step combines. At batch 64 these are far more than a cache holds; at small sizes the floor's copies come from the
cache, as a step's logits, which another core has just written, need not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from eft_serve.bench import documents, report
from eft_serve.bench.fanout import EFT, ROLES
from eft_serve.bench.local_stack import LocalStack
from eft_serve.bench.peaked_engine import PeakedEngine
from eft_serve.bench.word_vocabulary import Words
from eft_serve.config import CoordinatorConfig
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.structured_output import GrammarCompiler
from eft_serve.types import GenerationRequest, SamplingParams

GREEDY, PLAIN, GRAMMAR = "greedy", "t1", "grammar"
SIDES: Mapping[str, Mapping[str, Any]] = {  # sampling parameters
    GREEDY: {"temperature": 0.0},
    PLAIN: {"temperature": 1.0},
    "top_p": {"temperature": 0.7, "top_p": 0.9},
}
CONTROLS: Mapping[str, Mapping[str, Any]] = {  # with those of the plain side, to which they are compared
    "logprobs": {**SIDES[PLAIN], "logprobs": 5},
    "penalties": {
        **SIDES[PLAIN],
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": tuple((token_id, 1.0) for token_id in range(1000, 1050)),
    },
    GRAMMAR: SIDES[PLAIN],  # each request's own, see `_request`
}
PHASES = ("combine", "process", "sample")
HEADLINE_VOCAB_SIZE = 128_256
WARM_UP_STEPS = 2
NUM_COPIES = 5


class Coordinator(LocalStack):
    """One over three engines of this vocabulary that answer at once."""

    def __init__(self, vocab_size: int, max_batch: int) -> None:
        builds = {role: (PeakedEngine.build, (role, vocab_size)) for role in ROLES}
        config = CoordinatorConfig(max_num_seqs=max_batch)
        self._vocabularies = dict.fromkeys(ROLES, Words(vocab_size))
        super().__init__(builds, self._vocabularies, config)

    def measure(self, side: str, batch: int, num_steps: int) -> tuple[float, float]:
        """Seconds of the median step with so many requests, and of a step's combining and sampling on average."""
        num_tokens = WARM_UP_STEPS + num_steps
        requests = [self._request(index, side, num_tokens) for index in range(batch)]
        self.tokens = {request.request_id: [] for request in requests}
        for request in requests:
            self.loop.submit(request)
        self.loop.receive()
        for _ in range(WARM_UP_STEPS):
            self.step()
        before = self._combine_and_sample_s()
        seconds = [self.step() for _ in range(num_steps)]
        part = self._combine_and_sample_s() - before
        self.loop.step()  # tells the engines that all of it is over
        if any(len(token_ids) != num_tokens for token_ids in self.tokens.values()):
            raise RuntimeError(f"not all of {batch} requests took part in every step")
        return statistics.median(seconds), part / num_steps

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        """Made when a side first needs it: it takes seconds."""
        return GrammarCompiler(self._vocabularies)  # type: ignore[arg-type]

    def _request(self, index: int, side: str, num_tokens: int) -> Request:
        settings = dict(SIDES.get(side) or CONTROLS[side])
        logprobs = settings.pop("logprobs", None)
        if side == GRAMMAR:  # documents that are at different places in the same step
            settings["grammar"] = documents.grammar(index)
        sampling = SamplingParams(seed=index, max_tokens=num_tokens, ignore_eos=True, **settings)
        generation = GenerationRequest(
            request_id=str(index),
            combination=EFT,
            prompts={role: [1] for role in ROLES},
            sampling=sampling,
            logprobs=logprobs,
        )
        request = Request.create(generation, time.monotonic())
        return self._grammars.matched(request) if side == GRAMMAR else request

    def _combine_and_sample_s(self) -> float:
        """Of all steps until now."""
        return sum(self._phase_s(phase) for phase in PHASES)

    def _phase_s(self, phase: str) -> float:
        seconds = self.loop.metrics.registry.get_sample_value("eft_step_seconds_sum", {"phase": phase})
        if seconds is None:
            raise RuntimeError(f"no step has timed its phase {phase!r}")
        return seconds


class CopyFloor:
    """Copies as many bytes as a step of so many rows combines; all pages have been touched before."""

    def __init__(self, vocab_size: int, max_batch: int) -> None:
        self._sources = [torch.ones(max_batch, vocab_size) for _ in ROLES]
        self._copies = [torch.zeros(max_batch, vocab_size) for _ in ROLES]

    def measure(self, batch: int) -> float:
        """Seconds of the median copy."""
        return statistics.median(self._copy(batch) for _ in range(NUM_COPIES))

    def _copy(self, batch: int) -> float:
        started = time.perf_counter()
        for source, copy in zip(self._sources, self._copies, strict=True):
            copy[:batch].copy_(source[:batch])
        return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured in turn, in seconds."""

    step_s: Mapping[str, float]  # by side
    combine_and_sample_s: Mapping[str, float]  # by side
    floor_s: float


def measure(
    vocab_size: int, batches: Sequence[int], num_steps: int, num_rounds: int, names: Sequence[str] = (*SIDES,)
) -> dict[int, list[Round]]:
    """Rounds by batch, in which the sides take turns and another one is first each time."""
    rounds: dict[int, list[Round]] = {batch: [] for batch in batches}
    floor = CopyFloor(vocab_size, max(batches))
    coordinator = Coordinator(vocab_size, max(batches))
    try:
        for number in range(num_rounds):
            first = number % len(names)
            sides = [*names[first:], *names[:first]]
            for batch in batches:
                measured = {side: coordinator.measure(side, batch, num_steps) for side in sides}
                steps = {side: step for side, (step, _) in measured.items()}
                parts = {side: part for side, (_, part) in measured.items()}
                rounds[batch].append(Round(steps, parts, floor.measure(batch)))
    finally:
        coordinator.close()
    return rounds


def summarize(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds of one vocabulary and batch; a ratio is of what was measured in one round."""
    sides = [*rounds[0].step_s]
    sampled = [side for side in SIDES if side != GREEDY]
    return {
        "controls_over_plain": {
            side: _median(r.step_s[side] / r.step_s[PLAIN] for r in rounds) for side in sides if side in CONTROLS
        },
        "over_greedy": {side: _median(r.step_s[side] / r.step_s[GREEDY] for r in rounds) for side in sampled},
        "combine_and_sample_over_floor": {
            side: _median(r.combine_and_sample_s[side] / r.floor_s for r in rounds) for side in sides
        },
        "overhead_ms_p50": {side: _median(r.step_s[side] * 1e3 for r in rounds) for side in sides},
        "combine_and_sample_ms": {side: _median(r.combine_and_sample_s[side] * 1e3 for r in rounds) for side in sides},
        "floor_ms": _median(r.floor_s * 1e3 for r in rounds),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def result(summaries: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Of summaries by vocabulary and batch: ratios where the most is combined, and times of all."""
    vocab_size = HEADLINE_VOCAB_SIZE if HEADLINE_VOCAB_SIZE in summaries else max(summaries)
    batch = max(summaries[vocab_size])
    headline = summaries[vocab_size][batch]

    def of_all(key: str) -> dict[str, dict[str, Any]]:
        return {str(v): {str(b): summary[key] for b, summary in cells.items()} for v, cells in summaries.items()}

    return {
        "over_greedy": headline["over_greedy"],
        **({"controls_over_plain": headline["controls_over_plain"]} if headline["controls_over_plain"] else {}),
        "combine_and_sample_over_floor": headline["combine_and_sample_over_floor"],
        "at": {"batch": batch, "vocab": vocab_size},
        "overhead_ms_p50": of_all("overhead_ms_p50"),
        "combine_and_sample_ms": of_all("combine_and_sample_ms"),
        "floor_ms": of_all("floor_ms"),
    }


def run(
    vocab_sizes: Sequence[int],
    batches: Sequence[int],
    num_steps: int,
    num_rounds: int,
    threads: int,
    with_controls: bool = False,
) -> None:
    """Measure and print, a table for each vocabulary; the last line is JSON."""
    torch.set_num_threads(threads)
    names = (*SIDES, *CONTROLS) if with_controls else (*SIDES,)
    summaries = {}
    for vocab_size in vocab_sizes:
        rounds = measure(vocab_size, batches, num_steps, num_rounds, names)
        summaries[vocab_size] = {batch: summarize(each) for batch, each in rounds.items()}
        _show(vocab_size, summaries[vocab_size])
    report.finish({**result(summaries), "threads": threads})


def _show(vocab_size: int, summaries: Mapping[int, Mapping[str, Any]]) -> None:
    report.show(
        f"Decode step over models that answer at once, {vocab_size} tokens",
        ["batch", "side", "step ms, p50", "over greedy", "combine and sample ms", "floor ms", "over floor"],
        [
            [
                batch,
                side,
                summary["overhead_ms_p50"][side],
                summary["over_greedy"].get(side, ""),
                summary["combine_and_sample_ms"][side],
                summary["floor_ms"],
                summary["combine_and_sample_over_floor"][side],
            ]
            for batch, summary in summaries.items()
            for side in summary["overhead_ms_p50"]
        ],
    )
