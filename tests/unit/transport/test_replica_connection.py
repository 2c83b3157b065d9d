"""Which answers a step may have."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from eft_serve.transport.replica_connection import _answers
from eft_serve.types import Draft, Grammar, SamplingParams, SequenceStep, StepOutput

STEP = SequenceStep("s", 0, [1, 2], 1, draft=Draft(3, 0, 8, SamplingParams(temperature=0.0)))


@pytest.mark.parametrize(
    ("num_rows", "drafted", "confidences", "fits"),
    [
        (2, [4, 5], [0.5, 0.5], True),
        (1, [4], [0.5], True),
        (2, [4, 5], [0.5], False),
        (2, [4, 5], [], False),
        (1, [4, 5], [0.5, 0.5], False),
        (1, [], [], False),
        (4, [4, 5, 6, 7], [0.5] * 4, False),
    ],
)
def test_draft_tokens_come_with_their_rows_and_confidences(
    num_rows: int, drafted: list[int], confidences: list[float], fits: bool
) -> None:
    output = StepOutput("s", logits=torch.zeros(num_rows, 8), drafted=drafted, confidences=confidences)
    assert _answers(output, STEP) == fits


def test_under_a_grammar_there_may_be_no_draft_token() -> None:
    assert STEP.draft is not None
    sampling = replace(STEP.draft.sampling, grammar=Grammar("start: /a/", "structured_outputs.regex"))
    step = replace(STEP, draft=replace(STEP.draft, sampling=sampling))
    assert _answers(StepOutput("s", logits=torch.zeros(1, 8)), step)
    assert not _answers(StepOutput("s", logits=torch.zeros(2, 8)), step)
    assert not _answers(StepOutput("s", logits=torch.zeros(1, 8), confidences=[0.5]), step)
    assert not _answers(StepOutput("s", logits=torch.zeros(4, 8), drafted=[4] * 4, confidences=[0.5] * 4), step)
