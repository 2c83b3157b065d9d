"""Configurations: valid ones are frozen data, mistakes are all named, and the documentation knows every field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from eft_serve.config import ZOO_CHECKPOINTS, AppConfig, ModelConfig
from eft_serve.config_check import load_any
from eft_serve.config_recipes import RecipeConfig
from eft_serve.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "configuration.md"

MODELS: dict[str, Any] = {name: {"path": f"/models/{name}"} for name in ("large", "small", "chat")}
RECIPE: dict[str, Any] = {"base": "large", "reference": "small", "tuned": [{"model": "chat"}]}


def app(**changes: Any) -> dict[str, Any]:
    return {"models": MODELS, "recipes": {"eft": RECIPE}} | changes


def test_a_configuration_has_its_defaults_and_cannot_be_changed() -> None:
    config = AppConfig.parse(app())
    assert config.recipes["eft"].scale == config.recipes["eft"].tuned[0].weight == 1.0
    assert config.recipes["eft"].models == ("large", "small", "chat")
    assert config.coordinator.num_replicas == 1
    with pytest.raises(ValidationError):
        config.deployments["large"].path = "elsewhere"


def test_one_model_without_a_recipe_is_enough() -> None:
    assert AppConfig.parse({"models": {"alone": {"path": "x"}}}).recipes == {}


def test_a_reference_of_its_own_is_one_of_the_recipes_models() -> None:
    tuned = [{"model": "chat"}, {"model": "other", "reference": "other-base", "weight": -0.5}]
    models = MODELS | {name: {"path": name} for name in ("other", "other-base")}
    config = AppConfig.parse({"models": models, "recipes": {"eft": RECIPE | {"tuned": tuned}}})
    assert config.recipes["eft"].models == ("large", "small", "chat", "other", "other-base")


def test_a_bare_name_is_a_model_prompted_in_its_own_way() -> None:
    written = {"base": "large", "reference": "small", "tuned": "chat"}
    in_full = {"base": {"model": "large"}, "reference": {"model": "small"}, "tuned": [{"model": "chat"}]}
    config = AppConfig.parse(app(recipes={"eft": written}))
    assert config == AppConfig.parse(app(recipes={"eft": in_full}))
    assert AppConfig.parse(config.model_dump(mode="json")) == config


def test_a_zoo_path_is_inside_the_package() -> None:
    assert ModelConfig(path="zoo:base-small").checkpoint == ZOO_CHECKPOINTS / "base-small"
    assert ModelConfig(path="~/model").checkpoint == Path.home() / "model"


def test_an_adapter_shares_what_its_model_has() -> None:
    adapters = {
        "law": {"model": "small", "adapter": "/adapters/law"},
        "terse": {"model": "small", "adapter": "~/terse"},
    }
    recipe = RECIPE | {"tuned": [{"model": "law"}]}
    config = AppConfig.parse({"models": MODELS | adapters, "recipes": {"eft": recipe}})
    assert list(config.deployments) == ["large", "small", "chat"]
    assert [config.deployment_of(name) for name in config.models] == ["large", "small", "chat", "small", "small"]
    assert config.adapters_of("small") == {"law": Path("/adapters/law"), "terse": Path.home() / "terse"}
    assert config.adapters_of("large") == {}
    assert config.checkpoint_of("law") == config.checkpoint_of("small") == Path("/models/small")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("unknown key", app(model={}), "model: Extra inputs"),
    ("unknown key of a model", app(models=MODELS | {"large": {"path": "x", "tp": 2}}), "models.large.tp: Extra inputs"),
    (
        "an adapter of nobody",
        app(models=MODELS | {"law": {"model": "smal", "adapter": "x"}}),
        "models.law.model: 'smal' is unknown; models with a path are ['chat', 'large', 'small']",
    ),
    (
        "an adapter of an adapter",
        app(models=MODELS | {"a": {"model": "small", "adapter": "x"}, "b": {"model": "a", "adapter": "x"}}),
        "models.b.model: 'a' is an adapter itself; models with a path are ['chat', 'large', 'small']",
    ),
    ("an adapter of no model", app(models=MODELS | {"law": {"adapter": "x"}}), "models.law.model: Field required"),
    (
        "an adapter with a path",
        app(models=MODELS | {"law": {"model": "small", "adapter": "x", "path": "y"}}),
        "models.law.path: Extra inputs",
    ),
    (
        "a step that does not hold a token of an adapter and of its model",
        app(
            models=MODELS | {"law": {"model": "small", "adapter": "x"}},
            recipes={"eft": RECIPE | {"tuned": [{"model": "law"}]}},
            coordinator={"max_num_batched_tokens": 1},
        ),
        "coordinator.max_num_batched_tokens: 1 is fewer than the 2 prompts that small reads in recipes.eft",
    ),
    ("no models", app(models={}, recipes={}), "models: "),
    ("a model without a path", app(models=MODELS | {"large": {}}), "models.large.path: Field required"),
    ("unknown model", app(recipes={"eft": RECIPE | {"base": "larg"}}), "recipes.eft: unknown model 'larg'"),
    ("unknown reference", app(recipes={"eft": RECIPE | {"reference": "smal"}}), "unknown model 'smal'"),
    ("unknown tuned", app(recipes={"eft": RECIPE | {"tuned": [{"model": "chatt"}]}}), "unknown model 'chatt'"),
    ("name clash", app(recipes={"large": RECIPE}), "recipes.large: a model has this name too"),
    ("twice", app(recipes={"eft": RECIPE | {"tuned": [{"model": "chat"}] * 2}}), "a name is given twice"),
    (
        "a name of two",
        app(recipes={"eft": RECIPE | {"tuned": ["chat", {"model": "small", "name": "chat"}]}}),
        "given twice",
    ),
    (
        "a role's name",
        app(recipes={"eft": RECIPE | {"tuned": {"model": "chat", "name": "base"}}}),
        "is the name of a role",
    ),
    (
        "bounds of nobody",
        app(recipes={"eft": RECIPE | {"bounds": {"weights": {"large": [0, 1]}}}}),
        "'large' is not among",
    ),
    ("bounds upside down", app(recipes={"eft": RECIPE | {"bounds": {"scale": [1, 0]}}}), "eft.bounds.scale: "),
    ("bounds beyond use", app(recipes={"eft": RECIPE | {"bounds": {"scale": [0, 101]}}}), "eft.bounds.scale.1: "),
    (
        "a scale out of its bounds",
        app(recipes={"eft": RECIPE | {"bounds": {"scale": [0, 0.5]}}}),
        "scale: the recipe's own 1",
    ),
    (
        "a weight out of its bounds",
        app(recipes={"eft": RECIPE | {"bounds": {"weights": {"chat": [2, 3]}}}}),
        "the weight of chat: the recipe's own 1 is outside its bounds, 2 to 3",
    ),
    (
        "a truncation out of its bounds",
        app(recipes={"eft": RECIPE | {"bounds": {"truncate_top_p": [0.5, 0.9]}}}),
        "truncate_top_p: the recipe's own 1 is outside",
    ),
    ("no probability", app(recipes={"eft": RECIPE | {"truncate_top_p": 1.1}}), "recipes.eft.truncate_top_p: "),
    (
        "a typo in a role",
        app(recipes={"eft": RECIPE | {"base": {"model": "large", "sytem_prompt": ""}}}),
        "sytem_prompt",
    ),
    ("no tuned", app(recipes={"eft": RECIPE | {"tuned": []}}), "recipes.eft.tuned: "),
    ("infinite scale", app(recipes={"eft": RECIPE | {"scale": float("inf")}}), "recipes.eft.scale: "),
    ("a scale that is no number", app(recipes={"eft": RECIPE | {"scale": float("nan")}}), "recipes.eft.scale: "),
    (
        "a weight far beyond use",
        app(recipes={"eft": RECIPE | {"tuned": [{"model": "chat", "weight": 101}]}}),
        "recipes.eft.tuned.0.weight: ",
    ),
    ("a name with a blank", app(models=MODELS | {"my model": {"path": "x"}}), "my model"),
    ("no ranks", app(models=MODELS | {"large": {"path": "x", "tensor_parallel": 0}}), "models.large.tensor_parallel: "),
    ("unknown dtype", app(models=MODELS | {"large": {"path": "x", "dtype": "int8"}}), "models.large.dtype: "),
    (
        "steps that cannot hold a token of every prompt",
        app(
            recipes={"eft": RECIPE | {"tuned": {"model": "small", "system_prompt": "x"}}},
            coordinator={"max_num_batched_tokens": 1},
        ),
        "coordinator.max_num_batched_tokens: 1 is fewer than the 2 prompts that small reads in recipes.eft",
    ),
    (
        "steps that cannot hold a token of every prompt that a request may give",
        app(
            recipes={"eft": RECIPE | {"base": "small", "bounds": {"prompts": ["reference"]}}},
            coordinator={"max_num_batched_tokens": 1},
        ),
        "coordinator.max_num_batched_tokens: 1 is fewer than the 2 prompts that small reads in recipes.eft",
    ),
    (
        "a prompt of what is no role",
        app(recipes={"eft": RECIPE | {"bounds": {"prompts": ["small"]}}}),
        "recipes.eft: Value error, bounds.prompts: 'small' is not a role of this recipe",
    ),
    ("no time", app(coordinator={"step_timeout_s": 0}), "coordinator.step_timeout_s: "),
    ("an origin with a path", app(server={"cors_origins": ["https://a.example/"]}), "server.cors_origins.0: "),
    ("an origin without a scheme", app(server={"cors_origins": ["a.example"]}), "server.cors_origins.0: "),
    ("no origin at all", app(server={"cors_origins": ["null"]}), "server.cors_origins.0: "),
    ("an origin in capitals", app(server={"cors_origins": ["https://A.example"]}), "server.cors_origins.0: "),
    ("a default port", app(server={"cors_origins": ["https://a.example:443"]}), "write it without :443"),
    (
        "all origins without tenants",
        app(server={"cors_origins": ["*"]}),
        "server: Value error, cors_origins: '*' needs",
    ),
    (
        "all origins and one more",
        app(server={"cors_origins": ["*", "https://a.example"], "tenants_file": "t.yaml"}),
        "server: Value error, cors_origins: '*' is every origin",
    ),
    ("negative CPUs", app(server={"resources": {"num_cpus": -1}}), "server.resources.num_cpus: "),
]


@pytest.mark.parametrize(("data", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_mistake_is_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        AppConfig.parse(data)


@pytest.mark.parametrize(
    "origin",
    ["https://chat.example", "http://localhost:3000", "http://[::1]:80443", "app://obsidian.md", "tauri://a_b"],
)
def test_an_origin_is_taken_as_browsers_send_it(origin: str) -> None:
    assert AppConfig.parse(app(server={"cors_origins": [origin]})).server.cors_origins == (origin,)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse(app(coordinater={}, server={"tenants": "x"}), source="my.yaml")
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["my.yaml", "server.tenants"], ["my.yaml", "coordinater"]]


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_any(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("models: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml: cannot be read as YAML"):
        load_any(tmp_path / "broken.yaml")


def sections(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A configuration class and all below it."""
    yield kind
    for field in kind.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            found = waiting.pop()
            if isinstance(found, type) and issubclass(found, BaseModel):
                yield from sections(found)
            waiting.extend(get_args(found))


def test_the_documentation_names_every_field_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.MULTILINE))
    fields = {name for kind in sections(AppConfig) for name in kind.model_fields}
    assert len(fields) > 30
    assert documented == fields


def test_the_documentations_example_is_valid_and_uses_every_field() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    data = yaml.safe_load(next(block for block in blocks if block.startswith("models:")))
    AppConfig.parse(data, source="docs/configuration.md")
    assert keys_of(data) >= {name for kind in sections(AppConfig) for name in kind.model_fields}


def test_the_recipes_of_the_documentation_are_those_of_the_example() -> None:
    document = (ROOT / "docs" / "recipes.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    data = {name: recipe for block in blocks for name, recipe in yaml.safe_load(block).items()}
    example = load_any(ROOT / "deployments" / "zoo-recipes.yaml")
    written = {name: RecipeConfig.model_validate(recipe) for name, recipe in data.items()}
    assert written == example.recipes
    named = set(re.findall(r"\| `([\w-]+)` \|$", document, re.MULTILINE))
    assert named == set(example.recipes)


def keys_of(data: Any) -> set[str]:
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return set(data if isinstance(data, dict) else ()).union(*map(keys_of, children))
