"""The lab's answers are the product's, which are the naive reference's; what is read is what was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from eft_serve.evaluation.forced import Reader
from eft_serve.evaluation.lab import Lab
from eft_serve.evaluation.systems import alone
from eft_serve.zoo import generate


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("llama", limit=6)
    yield lab
    lab.close()


def test_several_systems_side_by_side_answer_as_each_does_in_the_naive_loop(lab: Lab) -> None:
    systems = [
        lab.systems.up_scaled(),
        alone(lab.systems.tuned_small),
        lab.systems.interpolated(0.4, "base-large"),
    ]
    lab.ask(systems, "short")
    messages = [question.text for question in lab.questions["short"]]
    for system in systems:
        recipe = generate.Recipe("", tuple(generate.Term(term.model, term.coefficient) for term in system.terms))
        answers = [answer.text.strip() for answer in lab.answers(system, "short")]
        assert answers == lab.models.greedy(recipe, messages, max_new_tokens=40)


def test_a_question_is_asked_once(lab: Lab) -> None:
    first = lab.answers(lab.systems.up_scaled(), "short")
    assert lab.answers(lab.systems.up_scaled(scale=1.0), "short") is first
    assert lab.answers(lab.systems.up_scaled(scale=2.0), "short") is not first


def test_sampled_answers_are_seeded_by_their_question(lab: Lab) -> None:
    system = lab.systems.up_scaled(scale=2.0)
    sampled = lab.answers(system, "short", 1.0)
    assert sampled != lab.answers(system, "short")
    again = Lab("llama", limit=6)
    try:
        assert again.answers(system, "short", 1.0) == sampled
    finally:
        again.close()


def test_reading_a_greedy_answer_finds_its_tokens_most_likely(lab: Lab) -> None:
    eft = lab.systems.up_scaled()
    for question, answer in zip(lab.questions["short"], lab.answers(eft, "short"), strict=True):
        logprobs = Reader(lab).logprobs(eft, question.text, answer.token_ids, {})
        assert logprobs.argmax(-1).tolist() == list(answer.token_ids)
        torch.testing.assert_close(logprobs.logsumexp(-1), torch.zeros(len(logprobs)), atol=1e-5, rtol=0)
