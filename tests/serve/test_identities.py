"""What the formula promises, on the served stack: token for token, greedy and seeded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from harness import PREFIX, SYSTEM_PROMPT, Served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.testing import naive
from eft_serve.zoo.questions import held_out_questions

MAX_TOKENS = 14
QUESTIONS = [question.text for question in held_out_questions(12, seed=7)]
EXAMPLES = settings(max_examples=6, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])

knobs = st.sampled_from([-0.5, 0.3, 0.7, 1.3])
questions = st.sampled_from(QUESTIONS)
drawn = st.sampled_from([{"temperature": 0.0}, {"temperature": 1.0, "seed": 11}, {"temperature": 1.0, "seed": 12}])


@dataclass(frozen=True)
class System:
    """A recipe or model, and its knobs."""

    model: str
    eft: dict[str, Any] = field(default_factory=dict)

    def says(self, served: Served, question: str, sampling: dict[str, Any]) -> list[int]:
        completion = served.client().chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=MAX_TOKENS,
            extra_body={"return_token_ids": True, "eft": self.eft} if self.eft else {"return_token_ids": True},
            **sampling,
        )
        token_ids: list[int] = completion.choices[0].model_extra["token_ids"]
        assert token_ids
        return token_ids

    def continues(self, served: Served, prompt: str) -> list[int]:
        completion = served.client().completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"return_token_ids": True, "eft": self.eft},
        )
        token_ids: list[int] = completion.choices[0].model_extra["token_ids"]  # type: ignore[index]
        return token_ids


def eft(model: str, scale: float | None = None, truncate_top_p: float | None = None, **weights: float) -> System:
    """A recipe's weights by name, `_` for `-`."""
    by_name = {name.replace("_", "-"): weight for name, weight in weights.items()}
    asked = {"scale": scale, "weights": by_name or None, "truncate_top_p": truncate_top_p}
    return System(model, {name: value for name, value in asked.items() if value is not None})


IDENTITIES = {
    "scale 1 and weight 0 is the base": (eft("eft", 1.0, tuned_small=0.0), System("base-large")),
    "scale 0 and weight 1 is the tuned model": (eft("eft", 0.0, tuned_small=1.0), System("tuned-small")),
    "scale 0 and weight 0 is the reference": (eft("eft", 0.0, tuned_small=0.0), System("base-small")),
    "one end of an interpolation": (eft("interpolated", tuned_small=1.0, told=0.0), eft("eft")),
    "the other end": (eft("interpolated", tuned_small=0.0, told=1.0), eft("told")),
    "steering without weight": (eft("steered", base_large=0.0), System("base-large")),
    "truncation at 1": (eft("eft", truncate_top_p=1.0), eft("eft")),
    "truncation of nothing": (eft("eft", 0.0, truncate_top_p=0.5), System("tuned-small")),
}


@pytest.mark.parametrize(("one", "other"), IDENTITIES.values(), ids=IDENTITIES.keys())
@EXAMPLES
@given(question=questions, sampling=drawn)
def test_both_are_one_distribution(
    served: Served, one: System, other: System, question: str, sampling: dict[str, Any]
) -> None:
    assert one.says(served, question, sampling) == other.says(served, question, sampling)


@EXAMPLES
@given(question=questions, sampling=drawn, scale=knobs, weight=knobs)
def test_one_model_in_every_role_is_that_model(
    served: Served, question: str, sampling: dict[str, Any], scale: float, weight: float
) -> None:
    same = eft("same", scale, itself=weight)
    assert same.says(served, question, sampling) == System("base-large").says(served, question, sampling)


def test_the_knobs_matter(served: Served) -> None:
    """Else all identities would be of one thing."""
    systems = [
        System("base-large"),
        System("tuned-small"),
        eft("eft"),
        eft("told"),
        eft("steered"),
        eft("interpolated", tuned_small=0.5, told=0.5),
        eft("eft", truncate_top_p=0.1),
    ]
    said = {tuple(token for q in QUESTIONS for token in s.says(served, q, {"temperature": 0})) for s in systems}
    assert len(said) == len(systems)


@pytest.fixture(scope="module")
def vocabulary(served: Served) -> Vocabulary:
    return Vocabulary.load(served.config.checkpoint_of("base-large"))


@pytest.fixture(scope="module")
def models(served: Served) -> dict[str, PreTrainedModel]:
    names = ("base-large", "base-small", "tuned-small")
    return {name: naive.load(served.config.checkpoint_of(name)) for name in names}


def naively(
    models: dict[str, PreTrainedModel], vocabulary: Vocabulary, prompts: dict[str, str], **knobs: float
) -> list[int]:
    return naive.generate_emulated(
        models,
        {role: vocabulary.tokenizer(text)["input_ids"] for role, text in prompts.items()},
        max_tokens=MAX_TOKENS,
        num_tokens=vocabulary.num_tokens,
        eos_token_ids=vocabulary.eos_token_ids,
        **knobs,
    )


@EXAMPLES
@given(question=questions, weight=knobs)
def test_steering_by_a_system_prompt_is_the_naive_loop(
    served: Served, models: dict[str, PreTrainedModel], vocabulary: Vocabulary, question: str, weight: float
) -> None:
    roles = dict.fromkeys(("base", "reference", "tuned"), models["base-large"])
    steered = eft("steered", base_large=weight)
    plain = f"User: {question}\nAssistant:"
    told = f"System: {SYSTEM_PROMPT}\n{plain}{PREFIX}"
    expected = naively(roles, vocabulary, {"base": plain, "reference": plain, "tuned": told}, weight=weight)
    assert steered.says(served, question, {"temperature": 0}) == expected
    told = f"{SYSTEM_PROMPT}\n{question}{PREFIX}"
    expected = naively(roles, vocabulary, {"base": question, "reference": question, "tuned": told}, weight=weight)
    assert steered.continues(served, question) == expected


@EXAMPLES
@given(
    question=questions, scale=st.sampled_from([0.7, 1.0, 1.4]), weight=knobs, top_p=st.sampled_from([0.0, 0.5, 0.95])
)
def test_truncation_is_the_naive_loop(
    served: Served,
    models: dict[str, PreTrainedModel],
    vocabulary: Vocabulary,
    question: str,
    scale: float,
    weight: float,
    top_p: float,
) -> None:
    roles = {"base": models["base-large"], "reference": models["base-small"], "tuned": models["tuned-small"]}
    prompts = dict.fromkeys(roles, f"User: {question}\nAssistant:")
    expected = naively(roles, vocabulary, prompts, scale=scale, weight=weight, truncate_top_p=top_p)
    assert eft("eft", scale, top_p, tuned_small=weight).says(served, question, {"temperature": 0}) == expected
