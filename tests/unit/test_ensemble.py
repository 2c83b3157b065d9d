"""The coefficients are EFT's formula, collected by model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.config import MAX_KNOB, AppConfig, RecipeConfig
from eft_serve.ensemble import Ensemble, Term, coefficients
from eft_serve.errors import InvalidRequestError

KNOBS = st.floats(-MAX_KNOB, MAX_KNOB)
UP_SCALING = RecipeConfig.model_validate({"base": "large", "reference": "small", "tuned": [{"model": "chat"}]})
TWO_TUNED = RecipeConfig.model_validate(
    {
        "base": "large",
        "reference": "small",
        "tuned": [{"model": "helpful", "weight": 0.5}, {"model": "harmless", "weight": 0.5, "reference": "other"}],
        "scale": 2.0,
    }
)


def test_up_scaling_runs_three_models_in_the_recipes_order() -> None:
    got = coefficients(UP_SCALING)
    assert list(got.items()) == [("large", 1.0), ("small", -1.0), ("chat", 1.0)]


@pytest.mark.parametrize(
    ("scale", "weight", "expected"),
    [
        (1.0, 0.0, {"large": 1.0}),
        (0.0, 1.0, {"chat": 1.0}),
        (0.0, 0.0, {"small": 1.0}),
        (1.5, 1.0, {"large": 1.5, "small": -1.5, "chat": 1.0}),
        (1.0, -0.5, {"large": 1.0, "small": 0.5, "chat": -0.5}),
    ],
)
def test_only_models_with_a_coefficient_run(scale: float, weight: float, expected: dict[str, float]) -> None:
    assert coefficients(UP_SCALING, scale, {"chat": weight}) == pytest.approx(expected)


def test_weights_not_named_keep_the_recipes_own() -> None:
    got = coefficients(TWO_TUNED, weights={"helpful": 1.0})
    assert got == pytest.approx({"large": 2.0, "small": -2.0, "helpful": 1.0, "harmless": 0.5, "other": -0.5})


@given(beta=KNOBS, alpha=KNOBS, gamma=KNOBS, values=st.lists(st.floats(-30, 30), min_size=5, max_size=5))
def test_equals_the_formula_written_out(beta: float, alpha: float, gamma: float, values: list[float]) -> None:
    logprobs = dict(zip(TWO_TUNED.models, values, strict=True))
    got = coefficients(TWO_TUNED, beta, {"helpful": alpha, "harmless": gamma})
    ref = logprobs["small"]
    expected = (
        ref
        + beta * (logprobs["large"] - ref)
        + alpha * (logprobs["helpful"] - ref)
        + gamma * (logprobs["harmless"] - logprobs["other"])
    )
    assert sum(c * logprobs[m] for m, c in got.items()) == pytest.approx(expected, abs=1e-6)
    assert sum(got.values()) == pytest.approx(1.0, abs=1e-6)
    assert got
    assert all(c != 0 for c in got.values())


def test_a_models_parts_add_up_and_what_cancels_does_not_run() -> None:
    same = RecipeConfig.model_validate({"base": "m", "reference": "m", "tuned": [{"model": "t", "weight": 0.1}]})
    assert coefficients(same) == pytest.approx({"m": 0.9, "t": 0.1})
    tuned_is_base = RecipeConfig.model_validate({"base": "b", "reference": "r", "tuned": [{"model": "b"}]})
    assert coefficients(tuned_is_base, scale=0.1, weights={"b": -0.1}) == {"r": 1.0}


@pytest.mark.parametrize("knob", [math.nan, math.inf, -math.inf, MAX_KNOB * 1.01, -MAX_KNOB * 1.01])
def test_knobs_beyond_reason_are_refused(knob: float) -> None:
    with pytest.raises(InvalidRequestError, match="must be a number") as scale:
        coefficients(UP_SCALING, scale=knob)
    assert scale.value.param == "eft.scale"
    with pytest.raises(InvalidRequestError, match="must be a number") as weight:
        coefficients(UP_SCALING, weights={"chat": knob})
    assert weight.value.param == "eft.weights"


@pytest.mark.parametrize("name", ["large", "small", "nobody"])
def test_a_weight_of_what_is_not_tuned_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        coefficients(UP_SCALING, weights={name: 1.0})
    assert caught.value.param == "eft.weights"


def test_a_name_is_a_recipe_or_a_plain_model_or_nothing() -> None:
    config = AppConfig.parse(
        {"models": {m: {"path": m} for m in UP_SCALING.models}, "recipes": {"up": UP_SCALING.model_dump()}}
    )
    recipe, plain = Ensemble.find(config, "up"), Ensemble.find(config, "small")
    assert recipe is not None
    assert recipe.models == ("large", "small", "chat")
    assert recipe.terms(scale=0.0) == (Term("chat", "chat", 1.0, weight=1.0),)
    assert plain is not None
    assert plain.terms() == (Term("small", "small", 1.0),)
    assert Ensemble.find(config, "nobody") is None
    with pytest.raises(InvalidRequestError, match="plain model"):
        plain.terms(scale=1.0)
    with pytest.raises(InvalidRequestError, match="plain model") as caught:
        plain.terms(weights={})
    assert caught.value.param == "eft"
