"""The models of a recipe share one vocabulary, or the application does not start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eft_serve.config import ZOO_CHECKPOINTS, AppConfig
from eft_serve.coordinator.vocabularies import load_vocabularies
from eft_serve.errors import ConfigError

SMALL = ZOO_CHECKPOINTS / "base-small"


def config(path: Path, tuned: object = "tuned") -> AppConfig:
    recipe = {"base": "base", "reference": "small", "tuned": tuned}
    models = {"base": ZOO_CHECKPOINTS / "base-large", "small": SMALL, "tuned": path}
    return AppConfig.parse({"models": {m: {"path": str(p)} for m, p in models.items()}, "recipes": {"up": recipe}})


def test_models_that_share_their_tokens_are_loaded() -> None:
    loaded = load_vocabularies(config(ZOO_CHECKPOINTS / "tuned-small"))
    assert list(loaded) == ["base", "small", "tuned"]


@pytest.mark.parametrize("tuned", ["tuned", {"model": "base", "reference": {"model": "tuned", "system_prompt": "x"}}])
def test_models_of_a_recipe_that_differ_in_a_token_are_refused_by_name(tmp_path: Path, tuned: object) -> None:
    copy = Path(shutil.copytree(SMALL, tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = (token for token, token_id in ids.items() if token_id in (2000, 2001))
    ids[first], ids[second] = ids[second], ids[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError) as refusal:
        load_vocabularies(config(copy, tuned))
    for named in ("recipes.up", "base", "tuned", "2000"):
        assert named in refusal.value.message


def test_an_adapter_has_the_vocabulary_of_its_deployment() -> None:
    models = {"base": {"path": "zoo:base-large"}, "small": {"path": "zoo:base-small"}}
    recipe = {"base": "base", "reference": "small", "tuned": [{"model": "law"}]}
    adapter = {"law": {"model": "small", "adapter": "/nowhere"}}
    loaded = load_vocabularies(AppConfig.parse({"models": models | adapter, "recipes": {"up": recipe}}))
    assert list(loaded) == ["base", "small"]
