"""The coefficients are EFT's formula, collected by model."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eft_serve.config import AppConfig
from eft_serve.config_recipes import AS_ITSELF, MAX_KNOB, PromptConfig, RecipeConfig
from eft_serve.ensemble import Ensemble, Knobs, Prompted, resolve_recipe
from eft_serve.errors import InvalidRequestError
from eft_serve.types import Combination, Reward, Term

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


def terms(recipe: RecipeConfig, knobs: Knobs, *, every: bool = False) -> tuple[Term, ...]:
    return resolve_recipe(recipe, knobs, every=every).terms


def coefficients(
    recipe: RecipeConfig, scale: float | None = None, weights: dict[str, float] | None = None
) -> dict[str, float]:
    return {term.name: term.coefficient for term in terms(recipe, Knobs(scale=scale, weights=weights))}


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


def role(model: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, **fields}


def names(base: object, reference: object, *tuned: object) -> list[str]:
    recipe = RecipeConfig.model_validate({"base": base, "reference": reference, "tuned": tuned})
    return [term.name for term in terms(recipe, Knobs(scale=0.3, weights={t.knob: 0.1 for t in recipe.tuned}))]


def test_one_model_with_several_prompts_is_a_term_for_each() -> None:
    told = {"system_prompt": "Be brief."}
    assert names("m", "m", role("m", **told)) == ["m", "m@tuned"]
    assert names("m", role("m", **told), "t") == ["m", "m@reference", "t"]
    assert names(role("m", **told), "r", role("m", **told)) == ["m", "r"]
    assert names(role("m", **told), role("m", response_prefix=" So"), "m") == ["m@base", "m@reference", "m"]
    assert names("b", "r", role("t", name="brief", **told), role("t", name="plain")) == ["b", "r", "t@brief", "t"]
    others = [role("t", reference=role("r", **told)), role("u", reference=role("r", response_prefix=" So"))]
    assert names("b", "r", *others) == ["b", "r", "t", "u", "r@t/reference", "r@u/reference"]


def test_context_steering_is_one_model_twice() -> None:
    told = role("m", system_prompt="Be brief.")
    recipe = RecipeConfig.model_validate({"base": "m", "reference": "m", "tuned": told})
    steered = (Term("m", "m", -0.5), Term("m@tuned", "m", 1.5, weight=1.5))
    assert terms(recipe, Knobs(weights={"m": 1.5})) == steered
    assert terms(recipe, Knobs(weights={"m": 0.0})) == (Term("m", "m", 1.0),)
    prompting = Ensemble("steered", recipe.models, recipe).prompting
    assert prompting == {"m": AS_ITSELF, "m@tuned": PromptConfig(system_prompt="Be brief.")}


def test_every_term_that_may_run_has_prompt_settings() -> None:
    told = PromptConfig(response_prefix=" So")
    recipe = RecipeConfig.model_validate(
        {"base": "b", "reference": "r", "tuned": role("t", reference=role("r", response_prefix=" So"))}
    )
    ensemble = Ensemble("r", recipe.models, recipe)
    assert ensemble.prompting == {"b": AS_ITSELF, "r": AS_ITSELF, "t": AS_ITSELF, "r@t/reference": told}
    assert list(ensemble.prompting) == [term.name for term in ensemble.resolve(every=True).terms]
    assert Ensemble("m", ("m",)).prompting == {"m": AS_ITSELF}


PLAIN_TRUNCATION = [
    ({}, {"large": (1, 1), "small": (-1, -1), "chat": (1, 0)}),
    ({"scale": 0.0}, {"chat": (1, 0)}),
    ({"scale": 0.5, "weights": {"chat": 0.0}}, {"large": (0.5, 0.5), "small": (0.5, -0.5)}),
    ({"weights": {"chat": 0.0}}, {"large": (1, 1), "small": (0, -1)}),
]


@pytest.mark.parametrize(("knobs", "expected"), PLAIN_TRUNCATION)
def test_truncation_runs_what_either_part_needs(
    knobs: dict[str, Any], expected: dict[str, tuple[float, float]]
) -> None:
    truncated = resolve_recipe(UP_SCALING, Knobs(truncate_top_p=0.9, **knobs))
    assert truncated.truncate_top_p == 0.9
    assert {term.name: (term.coefficient, term.ratio) for term in truncated.terms} == expected
    assert all(term.ratio == 0 for term in terms(UP_SCALING, Knobs(truncate_top_p=1.0, **knobs)))


@given(beta=KNOBS, alpha=KNOBS, gamma=KNOBS, top_p=st.sampled_from([0.9, 1.0]))
def test_the_parts_of_a_truncated_combination(beta: float, alpha: float, gamma: float, top_p: float) -> None:
    """Outside the nucleus it is the combination at scale 0; the rest is the ratio alone."""
    knobs = Knobs(scale=beta, weights={"helpful": alpha, "harmless": gamma}, truncate_top_p=top_p)
    running = {term.name: term for term in terms(TWO_TUNED, knobs)}
    plain = coefficients(TWO_TUNED, beta, {"helpful": alpha, "harmless": gamma})
    assert {name: t.coefficient for name, t in running.items() if t.coefficient} == plain
    if top_p < 1:
        unscaled = coefficients(TWO_TUNED, 0.0, {"helpful": alpha, "harmless": gamma})
        outside = {name: t.unscaled for name, t in running.items()}
        assert outside == pytest.approx({name: unscaled.get(name, 0.0) for name in running}, abs=1e-6)
        assert set(unscaled) <= set(running)
        ratio = {name: t.ratio for name, t in running.items() if t.ratio}
        assert ratio == ({"large": beta, "small": -beta} if abs(beta) >= 1e-9 else {})


BOUNDED = RecipeConfig.model_validate(
    {
        "base": "large",
        "reference": "small",
        "tuned": ["chat", {"model": "law", "name": "lawyer", "weight": 0.5}],
        "truncate_top_p": 0.9,
        "bounds": {"scale": [1, 1], "weights": {"lawyer": [0, 0.8]}, "truncate_top_p": [0.5, 1]},
    }
)


@pytest.mark.parametrize(
    ("knobs", "param", "said"),
    [
        (Knobs(scale=1.01), "eft.scale", "1 to 1"),
        (Knobs(weights={"lawyer": 0.81}), "eft.weights.lawyer", "0 to 0.8"),
        (Knobs(weights={"lawyer": math.nan}), "eft.weights.lawyer", "0 to 0.8"),
        (Knobs(weights={"law": 0.5}), "eft.weights", "not among this recipe's fine-tunings ['chat', 'lawyer']"),
        (Knobs(truncate_top_p=0.4), "eft.truncate_top_p", "0.5 to 1"),
        (Knobs(truncate_top_p=math.nan), "eft.truncate_top_p", "0.5 to 1"),
    ],
)
def test_a_recipe_bounds_what_requests_may_ask_for(knobs: Knobs, param: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(said)) as caught:
        resolve_recipe(BOUNDED, knobs)
    assert caught.value.param == param


def test_within_the_bounds_a_request_has_its_way() -> None:
    running = terms(BOUNDED, Knobs(scale=1.0, weights={"lawyer": 0.8, "chat": -3}, truncate_top_p=1.0))
    assert [(t.name, t.coefficient) for t in running] == [
        ("large", 1.0),
        ("small", pytest.approx(2.2)),
        ("chat", -3.0),
        ("law", 0.8),
    ]
    assert resolve_recipe(BOUNDED).truncate_top_p == 0.9
    assert resolve_recipe(BOUNDED, Knobs(truncate_top_p=0.5)).truncate_top_p == 0.5


@pytest.mark.parametrize("knob", [math.nan, math.inf, -math.inf, MAX_KNOB * 1.01, -MAX_KNOB * 1.01])
def test_knobs_beyond_reason_are_refused(knob: float) -> None:
    with pytest.raises(InvalidRequestError, match="bounds, -100 to 100") as scale:
        coefficients(UP_SCALING, scale=knob)
    assert scale.value.param == "eft.scale"
    with pytest.raises(InvalidRequestError, match="bounds, -100 to 100") as weight:
        coefficients(UP_SCALING, weights={"chat": knob})
    assert weight.value.param == "eft.weights.chat"


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
    assert recipe.resolve(Knobs(scale=0.0)) == Combination((Term("chat", "chat", 1.0, weight=1.0),), recipe="up")
    assert plain is not None
    assert plain.resolve() == plain.resolve(every=True) == Combination((Term("small", "small", 1.0),), recipe="small")
    assert Ensemble.find(config, "nobody") is None
    with pytest.raises(InvalidRequestError, match="plain model"):
        plain.resolve(Knobs(scale=1.0))
    with pytest.raises(InvalidRequestError, match="plain model") as caught:
        plain.resolve(Knobs(weights={}))
    assert caught.value.param == "eft"


def test_an_adapter_is_a_term_of_the_deployment_that_it_shares() -> None:
    models = {"large": {"path": "l"}, "small": {"path": "s"}, "chat": {"model": "small", "adapter": "c"}}
    config = AppConfig.parse({"models": models, "recipes": {"up": UP_SCALING.model_dump()}})
    recipe, alone = Ensemble.find(config, "up"), Ensemble.find(config, "chat")
    assert recipe is not None
    assert recipe.resolve().terms == (
        Term("large", "large", 1.0),
        Term("small", "small", -1.0),
        Term("chat", "small", 1.0, adapter="chat", weight=1.0),
    )
    assert alone is not None
    assert alone.resolve().terms == (Term("chat", "small", 1.0, adapter="chat"),)


@given(beta=KNOBS, alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_every_term_is_those_that_count_and_the_others(beta: float, alpha: float) -> None:
    knobs = Knobs(scale=beta, weights={"helpful": alpha})
    every = terms(TWO_TUNED, knobs, every=True)
    assert [term.name for term in every] == list(TWO_TUNED.models)
    assert tuple(term for term in every if term.counts) == terms(TWO_TUNED, knobs)


def test_rewards_are_the_fine_tunings_over_the_names_of_every_term() -> None:
    told = role("chat", name="told", system_prompt="Be brief.", weight=0.0)
    recipe = RecipeConfig.model_validate({"base": "large", "reference": "small", "tuned": ["chat", told]})
    knobs = Knobs(weights={"chat": 1.5})
    combination = resolve_recipe(recipe, knobs, every=True)
    assert combination.rewards == (
        Reward("chat", "chat", "small", 1.5),
        Reward("told", "chat@told", "small", 0.0),
    )
    assert [term.name for term in combination.terms] == ["large", "small", "chat", "chat@told"]
    assert resolve_recipe(recipe, knobs).rewards == (), "not every term runs"
    other = resolve_recipe(TWO_TUNED, every=True).rewards
    assert [(r.name, r.reference) for r in other] == [("helpful", "small"), ("harmless", "other")]


def prompted(recipe: RecipeConfig, **prompts: object) -> tuple[Ensemble, Prompted]:
    ensemble = Ensemble("r", recipe.models, recipe)
    return ensemble, ensemble.prompted({name.replace("_", "/"): prompt for name, prompt in prompts.items()})


SAME_TWICE = RecipeConfig.model_validate(
    {"base": "m", "reference": "m", "tuned": {"model": "t", "weight": 0.5}, "scale": 1.5}
)


def test_roles_of_one_model_with_different_prompts_are_terms_of_their_own() -> None:
    ensemble, given = prompted(SAME_TWICE, reference="x")
    assert ensemble.resolve().terms == (Term("m", "m", 0.5), Term("t", "t", 0.5, weight=0.5))
    split = (Term("m", "m", 1.5), Term("m@reference", "m", -1.0), Term("t", "t", 0.5, weight=0.5))
    assert ensemble.resolve(prompted=given).terms == split
    parts = ensemble.parts(given)
    assert {name: part.prompt for name, part in parts.items()} == {"m": None, "m@reference": "reference", "t": None}
    assert list(parts) == [term.name for term in ensemble.resolve(prompted=given, every=True).terms]


def test_roles_with_equal_prompts_stay_one_term() -> None:
    ensemble, given = prompted(SAME_TWICE, reference=["x"], base=["x"])
    assert ensemble.resolve(prompted=given).terms == ensemble.resolve().terms
    assert ensemble.parts(given)["m"].prompt == "reference", "one of the equal prompts is read"
    ensemble, given = prompted(SAME_TWICE, reference=["x"], base=["y"])
    assert [term.name for term in ensemble.resolve(prompted=given).terms] == ["m@base", "m@reference", "t"]


def test_a_prompt_of_its_own_changes_no_name_where_a_model_reads_one_prompt() -> None:
    ensemble, given = prompted(UP_SCALING, base="x", tuned="y")
    assert ensemble.resolve(prompted=given) == ensemble.resolve()
    prompts = {name: part.prompt for name, part in ensemble.parts(given).items()}
    assert prompts == {"large": "base", "small": None, "chat": "tuned"}


def test_truncation_and_rewards_follow_the_terms_of_prompted_roles() -> None:
    recipe = RecipeConfig.model_validate({"base": "m", "reference": "m", "tuned": "m"})
    ensemble, given = prompted(recipe, reference="x", tuned="y")
    combination = ensemble.resolve(Knobs(truncate_top_p=0.9), prompted=given, every=True)
    assert {t.name: (t.coefficient, t.ratio, t.weight) for t in combination.terms} == {
        "m": (1, 1, 0),
        "m@reference": (-1, -1, 0),
        "m@tuned": (1, 0, 1),
    }
    assert combination.rewards == (Reward("m", "m@tuned", "m@reference", 1.0),)


def test_a_reference_of_its_own_is_prompted_by_its_own_name() -> None:
    ensemble, given = prompted(TWO_TUNED, harmless="x", harmless_reference="y", reference="z")
    prompts = {name: part.prompt for name, part in ensemble.parts(given).items()}
    own = {"harmless": "harmless", "other": "harmless/reference", "small": "reference"}
    assert prompts == {"large": None, "helpful": None} | own


@given(beta=KNOBS, alpha=KNOBS, gamma=KNOBS, values=st.lists(st.floats(-30, 30), min_size=4, max_size=4))
def test_prompted_terms_equal_the_formula_written_out(
    beta: float, alpha: float, gamma: float, values: list[float]
) -> None:
    """One model in every role, each of which reads a prompt of its own."""
    tuned = [{"model": "m", "name": "a"}, {"model": "m", "name": "b", "weight": 0.0}]
    recipe = RecipeConfig.model_validate({"base": "m", "reference": "m", "tuned": tuned})
    ensemble, by_role = prompted(recipe, base=0, reference=1, a=2, b=3)
    combination = ensemble.resolve(Knobs(scale=beta, weights={"a": alpha, "b": gamma}), prompted=by_role)
    logprobs = dict(zip(["m@base", "m@reference", "m@a", "m@b"], values, strict=True))
    base, ref, first, second = values
    expected = ref + beta * (base - ref) + alpha * (first - ref) + gamma * (second - ref)
    assert sum(t.coefficient * logprobs[t.name] for t in combination.terms) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("recipe", "prompts", "param", "said"),
    [
        (UP_SCALING, {"large": "x"}, "large", "not a role of this recipe; a request may prompt ['base', 'reference', "),
        (UP_SCALING, {"chat/reference": "x"}, "chat/reference", "not a role"),
        (TWO_TUNED, {"tuned": "x"}, "tuned", "not a role"),
        (UP_SCALING, {"tuned": "x", "chat": "x"}, "chat", "under another name too"),
        (None, {"base": "x"}, "base", "plain model"),
    ],
)
def test_a_prompt_of_what_is_no_role_is_refused(
    recipe: RecipeConfig | None, prompts: dict[str, str], param: str, said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(said)) as caught:
        Ensemble("r", ("large",), recipe).prompted(prompts)
    assert caught.value.param == f"eft.prompts.{param}"


def test_a_recipe_says_which_roles_a_request_may_prompt() -> None:
    data = {"base": "large", "reference": "small", "tuned": "chat"}
    ensemble, given = prompted(RecipeConfig.model_validate(data | {"bounds": {"prompts": ["tuned"]}}), chat="x")
    assert given == {2: "chat"}
    with pytest.raises(InvalidRequestError, match=re.escape("fixed by this recipe; a request may prompt ['chat', 't")):
        ensemble.prompted({"base": "x"})
    closed = RecipeConfig.model_validate(data | {"bounds": {"prompts": []}})
    with pytest.raises(InvalidRequestError, match="none of its roles"):
        prompted(closed, base="x")
    with pytest.raises(ValueError, match=re.escape("bounds.prompts: 'large' is not a role of this recipe; give some")):
        RecipeConfig.model_validate(data | {"bounds": {"prompts": ["base", "large"]}})


def test_a_fine_tuning_of_a_model_called_base_is_prompted_as_tuned() -> None:
    recipe = RecipeConfig.model_validate({"base": "other", "reference": "reference", "tuned": "base"})
    assert recipe.role_names == {"base": 0, "reference": 1, "tuned": 2}
