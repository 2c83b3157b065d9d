"""What one answer means for its request."""

from __future__ import annotations

import pytest

from eft_serve.coordinator.gather import Gathered, gather
from eft_serve.coordinator.request import Request
from eft_serve.coordinator.scheduler import Entry, Plan
from eft_serve.ensemble import Term
from eft_serve.types import GenerationRequest, SamplingParams, SequenceStep, StepOutput, StepResult

PROMPT = list(range(50))


@pytest.fixture
def request_() -> Request:
    generation = GenerationRequest(request_id="r", recipe="eft", prompts={"base": PROMPT}, sampling=SamplingParams())
    return Request.create(generation, [Term("base", "base", 1.0)], now=0.0)


def answer(request: Request, position: int, held: int) -> Gathered:
    """The outcome of a step to token 30, answered with `held` at time 7."""
    sequence = request.sequences[0]
    step = SequenceStep(sequence.sequence_id, position, PROMPT[position:30], num_logits=0)
    plan = Plan(entries={"base-0": [Entry(request, sequence, step)]})
    return gather(plan, {"base-0": StepResult(outputs=[StepOutput(sequence.sequence_id, held=held)])}, now=7.0)


def test_an_engine_that_got_part_of_the_way_made_progress(request_: Request) -> None:
    gathered = answer(request_, position=0, held=16)
    assert request_.sequences[0].num_computed == 16
    assert request_.last_progress == 7.0
    assert (gathered.num_held, gathered.errors) == (0, {})


@pytest.mark.parametrize("held", [20, 16, 0])
def test_an_engine_that_got_nowhere_did_not(request_: Request, held: int) -> None:
    gathered = answer(request_, position=20, held=held)
    assert request_.sequences[0].num_computed == held
    assert request_.last_progress == 0.0
    assert gathered.num_held == 1


def test_an_engine_that_claims_to_hold_what_was_never_sent_is_not_believed(request_: Request) -> None:
    gathered = answer(request_, position=0, held=30)
    assert "30 tokens" in str(gathered.errors[request_])
