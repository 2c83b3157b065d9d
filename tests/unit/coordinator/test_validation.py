"""A request that would break a step, or combine other than it says, is refused by name before it begins."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.config_recipes import MAX_KNOB, RecipeConfig
from eft_serve.coordinator.request import Request
from eft_serve.ensemble import Knobs, resolve_recipe
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Combination, GenerationRequest, Reward, SamplingParams, Speculative, Term

BASE, TUNED = Term("base", "base", 0.5, ratio=0.5), Term("tuned", "tuned", 0.5, weight=0.5)
REWARD = Reward("tuned", "tuned", "base", 0.5)
SOUND = GenerationRequest(
    request_id="r",
    combination=Combination((BASE, TUNED), 0.9, (REWARD,)),
    prompts={"base": [1], "tuned": [2]},
    sampling=SamplingParams(),
)
NO_NUMBERS = [math.nan, math.inf, -math.inf, 1e300]


def with_combination(**changes: Any) -> GenerationRequest:
    return msgspec.structs.replace(SOUND, combination=msgspec.structs.replace(SOUND.combination, **changes))


def with_term(**changes: Any) -> GenerationRequest:
    return with_combination(terms=(BASE, msgspec.structs.replace(TUNED, **changes)))


def with_reward(**changes: Any) -> GenerationRequest:
    return with_combination(rewards=(REWARD, msgspec.structs.replace(REWARD, **changes)))


def refusal(generation: GenerationRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        Request.create(generation, now=0.0)
    return caught.value


def test_a_sound_request_begins_with_a_sequence_for_each_term() -> None:
    request = Request.create(SOUND, now=3.0)
    assert [(s.sequence_id, s.term, s.prompt_token_ids) for s in request.sequences] == [
        ("r/base", BASE, [1]),
        ("r/tuned", TUNED, [2]),
    ]
    assert (request.arrival, request.combination) == (3.0, SOUND.combination)


@pytest.mark.parametrize(
    ("generation", "param", "said"),
    [
        (with_combination(terms=(), rewards=()), "terms", "no term has a coefficient"),
        (with_combination(terms=(Term("base", "base", 0.0),), rewards=()), "terms", "no term has a coefficient"),
        (with_combination(terms=(BASE, BASE, TUNED)), "terms", "given twice"),
        (with_combination(terms=(BASE, TUNED, Term("base", "other", 1.0))), "terms", "given twice"),
        (with_combination(terms=(BASE, TUNED, Term("third", "base", 1.0))), "prompts", "'third'"),
        (msgspec.structs.replace(SOUND, prompts={}), "prompts", "'base'"),
        (msgspec.structs.replace(SOUND, prompts={"base": [1], "tuned": []}), "prompts", "'tuned'"),
        (with_reward(tuned="nobody"), "rewards", "'nobody'"),
        (with_reward(reference="nobody"), "rewards", "'nobody'"),
        (msgspec.structs.replace(SOUND, forced_token_ids=[]), "completion", "at least one token"),
        (msgspec.structs.replace(SOUND, sampling=SamplingParams(max_tokens=0)), "max_tokens", "not between 1 and"),
    ],
)
def test_a_combination_that_does_not_fit_together_is_refused_by_field(
    generation: GenerationRequest, param: str, said: str
) -> None:
    error = refusal(generation)
    assert error.param == param
    assert said in error.message


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("field", ["coefficient", "ratio", "weight"])
def test_a_term_whose_numbers_float32_does_not_hold_is_refused(field: str, value: float) -> None:
    error = refusal(with_term(**{field: value}))
    assert error.param == "terms"
    assert "'tuned'" in error.message


def test_a_term_whose_two_parts_cancel_beyond_float32_is_refused() -> None:
    assert refusal(with_term(coefficient=3e38, ratio=-3e38)).param == "terms"


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_reward_whose_weight_float32_does_not_hold_is_refused(value: float) -> None:
    assert refusal(with_reward(weight=value)).param == "rewards"


@pytest.mark.parametrize("value", [-0.1, 1.1, *NO_NUMBERS])
def test_a_nucleus_that_is_no_probability_is_refused(value: float) -> None:
    assert refusal(with_combination(truncate_top_p=value)).param == "truncate_top_p"


KNOBS = st.floats(-MAX_KNOB, MAX_KNOB)


@given(scale=KNOBS, first=KNOBS, second=KNOBS, top_p=st.floats(0, 1), every=st.booleans())
def test_whatever_a_recipe_resolves_to_is_sound(
    scale: float, first: float, second: float, top_p: float, every: bool
) -> None:
    tuned = ["chat", {"model": "chat", "name": "told", "system_prompt": "Be brief.", "reference": "other"}]
    recipe = RecipeConfig.model_validate({"base": "large", "reference": "small", "tuned": tuned})
    knobs = Knobs(scale=scale, weights={"chat": first, "told": second}, truncate_top_p=top_p)
    combination = resolve_recipe(recipe, knobs, every=every)
    prompts = {term.name: [1] for term in combination.terms}
    request = Request.create(msgspec.structs.replace(SOUND, combination=combination, prompts=prompts), now=0.0)
    assert len(request.sequences) == len(combination.terms)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"request_id": "a/b"}, "request_id"),
        ({"request_id": ""}, "request_id"),
        ({"sampling": SamplingParams(max_tokens=2**63)}, "max_tokens"),
        ({"sampling": SamplingParams(max_tokens=-1)}, "max_tokens"),
        ({"timeout_s": math.nan}, "timeout_s"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"components": -1}, "components"),
        ({"components": 10**6}, "components"),
        ({"speculative": Speculative(num_tokens=10**9)}, "speculative.num_tokens"),
        ({"speculative": Speculative(num_tokens=0)}, "speculative.num_tokens"),
        ({"speculative": Speculative(min_confidence=math.nan)}, "speculative.min_confidence"),
    ],
)
def test_a_size_out_of_range_is_refused_by_field(changes: dict[str, Any], param: str) -> None:
    assert refusal(msgspec.structs.replace(SOUND, **changes)).param == param
