"""Configurations: refused whole and at once, with every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from eft_serve.config import ZOO_CHECKPOINTS, AppConfig, ModelConfig
from eft_serve.config_check import load_any
from eft_serve.errors import ConfigError

MODELS = {name: {"path": f"/models/{name}"} for name in ("large", "small", "chat")}
RECIPE = {"base": "large", "reference": "small", "tuned": [{"model": "chat"}]}
CONFIG: dict[str, Any] = {"models": MODELS, "recipes": {"eft": RECIPE}}


def deploy(config: Any, **changes: Any) -> dict[str, Any]:
    application = {"name": "eft-serve", "import_path": "deployments.eft:app", "args": {"config": config}}
    return {"applications": [application | changes]}


def write(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipes_models_are_each_named_once_base_first() -> None:
    tuned = [{"model": "chat"}, {"model": "code", "reference": "mid"}]
    models = MODELS | {name: {"path": name} for name in ("code", "mid")}
    config = AppConfig.parse({"models": models, "recipes": {"eft": RECIPE | {"tuned": tuned}}})
    assert config.recipes["eft"].models == ("large", "small", "chat", "code", "mid")
    assert config.recipes["eft"].scale == config.recipes["eft"].tuned[0].weight == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {}}, ["models"]),
        ({"modles": {}, "recipe": {}}, ["modles", "recipe"]),
        ({"models": MODELS | {"a b": {"path": "x"}}}, ["a b"]),
        (
            {"models": MODELS | {"x": {"path": "x", "tensor_parallel": 0, "dtype": "int4"}}},
            ["tensor_parallel", "dtype"],
        ),
        ({"models": MODELS | {"x": {"path": "x", "resources": {"gpus": 1}}}}, ["resources.gpus"]),
        ({"recipes": {"eft": RECIPE | {"base": "lagre"}}}, ["recipes.eft", "lagre", "large"]),
        ({"recipes": {"eft": RECIPE | {"tuned": []}}}, ["tuned"]),
        ({"recipes": {"eft": RECIPE | {"tuned": [{"model": "chat"}, {"model": "chat"}]}}}, ["named twice"]),
        ({"recipes": {"eft": RECIPE | {"scale": float("nan")}}}, ["scale"]),
        ({"recipes": {"eft": RECIPE | {"scale": 101}}}, ["scale"]),
        ({"recipes": {"large": RECIPE}}, ["recipes.large", "rename"]),
        ({"coordinator": {"step_timeout_s": 0}}, ["coordinator.step_timeout_s"]),
    ],
)
def test_mistakes_are_refused_and_all_named(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        AppConfig.parse(CONFIG | changes, source="file.yaml")
    assert all(line.startswith("file.yaml: ") for line in refusal.value.message.splitlines())
    assert [word for word in said if word not in refusal.value.message] == []


def test_a_configuration_never_changes() -> None:
    config = AppConfig.parse(CONFIG)
    with pytest.raises(ValidationError, match="frozen"):
        config.models["large"].path = "elsewhere"  # type: ignore[misc]


def test_a_zoo_path_is_in_the_package() -> None:
    assert ModelConfig(path="zoo:base-large").checkpoint == ZOO_CHECKPOINTS / "base-large"
    assert ModelConfig(path="/models/x").checkpoint == Path("/models/x")


def test_both_shapes_of_a_file_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare = write(tmp_path / "bare.yaml", CONFIG)
    inline = write(tmp_path / "inline.yaml", deploy(CONFIG))
    by_name = write(tmp_path / "by-name.yaml", deploy("bare.yaml"))
    expected = AppConfig.parse(CONFIG)
    assert load_any(bare) == load_any(inline) == load_any(by_name) == AppConfig.load(bare) == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (deploy(CONFIG) | {"http_option": {}}, ["http_option"]),
        (deploy(CONFIG) | {"http_options": {"prot": 1}}, ["http_options", "prot"]),
        (deploy(CONFIG) | {"http_options": None}, ["http_options: must be a mapping"]),
        (deploy(CONFIG, rout_prefix="/", arg={}), ["rout_prefix", "'arg'"]),
        (deploy(CONFIG, args={"confg": {}}), ["'confg'", "args.config: missing"]),
        (deploy(CONFIG, args=None), ["args: must be a mapping"]),
        ({"applications": []}, ["exactly one"]),
        ({"applications": deploy(CONFIG)["applications"] * 2}, ["exactly one"]),
        (deploy(CONFIG | {"modles": {}}), ["modles"]),
        (deploy("self.yaml"), ["names another file again"]),
        (deploy("missing.yaml"), ["missing.yaml"]),
        ([1], ["top level"]),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, said: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        load_any(write(tmp_path / "self.yaml", data))
    assert [word for word in said if word not in refusal.value.message] == []


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", None])
def test_what_is_no_yaml_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        load_any(path)
