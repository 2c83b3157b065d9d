"""The experiment's answers are the product's, which are the naive reference's; what is read is what was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from eft_serve.evaluation.experiment import Experiment
from eft_serve.evaluation.forced import Scorer
from eft_serve.evaluation.systems import alone
from eft_serve.zoo import generate


@pytest.fixture(scope="module")
def experiment() -> Iterator[Experiment]:
    experiment = Experiment("llama", limit=6)
    yield experiment
    experiment.close()


def test_several_systems_side_by_side_answer_as_each_does_in_the_naive_loop(experiment: Experiment) -> None:
    systems = [
        experiment.systems.up_scaled(),
        alone(experiment.systems.tuned_small),
        experiment.systems.interpolated(0.4, "base-large"),
    ]
    experiment.ask(systems, "short")
    messages = [question.text for question in experiment.questions["short"]]
    for system in systems:
        recipe = generate.ModelRecipe(
            "", tuple(generate.WeightedModel(term.model, term.coefficient) for term in system.terms)
        )
        answers = [answer.text.strip() for answer in experiment.answers(system, "short")]
        assert answers == experiment.models.greedy(recipe, messages, max_new_tokens=40)


def test_a_question_is_asked_once(experiment: Experiment) -> None:
    first = experiment.answers(experiment.systems.up_scaled(), "short")
    assert experiment.answers(experiment.systems.up_scaled(scale=1.0), "short") is first
    assert experiment.answers(experiment.systems.up_scaled(scale=2.0), "short") is not first


def test_sampled_answers_are_seeded_by_their_question(experiment: Experiment) -> None:
    system = experiment.systems.up_scaled(scale=2.0)
    sampled = experiment.answers(system, "short", 1.0)
    assert sampled != experiment.answers(system, "short")
    again = Experiment("llama", limit=6)
    try:
        assert again.answers(system, "short", 1.0) == sampled
    finally:
        again.close()


def test_reading_a_greedy_answer_finds_its_tokens_most_likely(experiment: Experiment) -> None:
    eft = experiment.systems.up_scaled()
    for question, answer in zip(experiment.questions["short"], experiment.answers(eft, "short"), strict=True):
        logprobs = Scorer(experiment).logprobs(eft, question.text, answer.token_ids, {})
        assert logprobs.argmax(-1).tolist() == list(answer.token_ids)
        torch.testing.assert_close(logprobs.logsumexp(-1), torch.zeros(len(logprobs)), atol=1e-5, rtol=0)
