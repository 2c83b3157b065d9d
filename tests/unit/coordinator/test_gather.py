"""What one answer means for its request."""

from __future__ import annotations

import pytest
import torch

from eft_serve.coordinator.gather import Gathered, gather
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.scheduler import ScheduledStep, SchedulerOutput
from eft_serve.types import (
    Combination,
    Draft,
    GenerationRequest,
    ModelUsage,
    SamplingParams,
    SequenceStep,
    Speculative,
    StepOutput,
    StepResult,
    Term,
)

PROMPT = list(range(50))


@pytest.fixture
def request_() -> Request:
    alone = Combination((Term("base", "base", 1.0),))
    generation = GenerationRequest(
        request_id="r", combination=alone, prompts={"base": PROMPT}, sampling=SamplingParams()
    )
    return Request.create(generation, now=0.0)


def answer(request: Request, position: int, num_computed_tokens: int) -> Gathered:
    """The outcome of a step to token 30, answered with so many tokens at time 7."""
    sequence = request.sequences[0]
    step = SequenceStep(sequence.sequence_id, position, PROMPT[position:30], num_logits=0)
    scheduled = SchedulerOutput(entries={"base-0": [ScheduledStep(request, sequence, step)]})
    output = StepOutput(sequence.sequence_id, num_computed_tokens=num_computed_tokens)
    return gather(scheduled, {"base-0": StepResult(outputs=[output])}, now=7.0)


def test_an_engine_that_got_part_of_the_way_made_progress(request_: Request) -> None:
    gathered = answer(request_, position=0, num_computed_tokens=16)
    assert request_.sequences[0].num_computed_tokens == 16
    assert request_.last_progress == 7.0
    assert (gathered.num_cache_misses, gathered.errors) == (0, {})


@pytest.mark.parametrize("num_computed", [20, 16, 0])
def test_an_answer_without_new_tokens_is_no_progress(request_: Request, num_computed: int) -> None:
    gathered = answer(request_, position=20, num_computed_tokens=num_computed)
    assert request_.sequences[0].num_computed_tokens == num_computed
    assert request_.last_progress == 0.0
    assert gathered.num_cache_misses == 1


def test_an_engine_that_claims_to_hold_what_was_never_sent_is_not_believed(request_: Request) -> None:
    gathered = answer(request_, position=0, num_computed_tokens=30)
    assert "30 tokens" in str(gathered.errors[request_])


def drafted(request: Request, token_ids: list[int], confidences: list[float], asked: int) -> None:
    sequence = request.sequences[0]
    draft = Draft(asked, 0, 100, SamplingParams(temperature=0.0))
    step = SequenceStep(sequence.sequence_id, 0, PROMPT, num_logits=1, draft=draft)
    logits = torch.zeros(len(token_ids), 100)
    output = StepOutput(sequence.sequence_id, logits=logits, drafted=token_ids, confidences=confidences)
    scheduled = SchedulerOutput(entries={"base-0": [ScheduledStep(request, sequence, step)]}, to_sample=[request])
    gather(scheduled, {"base-0": StepResult(outputs=[output])}, now=7.0)


@pytest.mark.parametrize(
    ("taken", "confidence"), [([], 0.125), ([5], 0.25), ([5, 6], 0.5), ([5, 9], 1.0), ([9], 1.0), ([5, 6, 7], 1.0)]
)
def test_the_drafter_gets_the_confidence_of_the_draft_tokens_before_its_own(
    request_: Request, taken: list[int], confidence: float
) -> None:
    drafted(request_, [5, 6, 7], [0.5, 0.5, 0.5], asked=4)
    if taken:
        request_.take(taken)
    draft = request_.speculation.draft(count=2, position=3, num_ids=100)
    assert draft.confidence == confidence
    assert draft.min_confidence == Speculative().min_confidence


def test_logits_of_another_width_than_those_before_end_their_own_request(request_: Request) -> None:
    sequence = request_.sequences[0]
    sequence.rows = torch.zeros(1, 100)
    step = SequenceStep(sequence.sequence_id, 0, PROMPT, num_logits=1)
    output = StepOutput(sequence.sequence_id, logits=torch.zeros(1, 101))
    scheduled = SchedulerOutput(entries={"base-0": [ScheduledStep(request_, sequence, step)]}, to_sample=[request_])
    gathered = gather(scheduled, {"base-0": StepResult(outputs=[output])}, now=7.0)
    assert "[1, 101] now" in str(gathered.errors[request_])
    assert gathered.ready == []


def test_a_prompt_that_waited_for_room_counts_the_cached_tokens_of_its_start(request_: Request) -> None:
    sequence = request_.sequences[0]
    step = SequenceStep(sequence.sequence_id, 0, PROMPT, num_logits=0)
    for output in (
        StepOutput(sequence.sequence_id, num_computed_tokens=0),
        StepOutput(sequence.sequence_id, num_computed_tokens=40, num_cached_tokens=32),
    ):
        scheduled = SchedulerOutput(entries={"base-0": [ScheduledStep(request_, sequence, step)]})
        gather(scheduled, {"base-0": StepResult(outputs=[output])}, now=7.0)
    assert sequence.usage == ModelUsage(prompt_tokens=50, cached_tokens=32, computed_tokens=8)
