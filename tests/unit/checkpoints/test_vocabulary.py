"""What the coordinator reads of a checkpoint's tokens, and that a recipe's models must share them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eft_serve.checkpoints.vocabulary import Vocabulary, load_vocabularies
from eft_serve.config import ZOO_CHECKPOINTS, AppConfig
from eft_serve.errors import CheckpointError, ConfigError

SMALL = ZOO_CHECKPOINTS / "base-small"


def config(path: Path, tuned: object = "tuned") -> AppConfig:
    recipe = {"base": "base", "reference": "small", "tuned": tuned}
    models = {"base": ZOO_CHECKPOINTS / "base-large", "small": SMALL, "tuned": path}
    return AppConfig.parse({"models": {m: {"path": str(p)} for m, p in models.items()}, "recipes": {"up": recipe}})


def copy_of_small(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL, tmp_path / "copy"))


def test_tokens_ends_and_text_of_the_embedded_family() -> None:
    vocabularies = load_vocabularies(config(ZOO_CHECKPOINTS / "tuned-small"))
    small = vocabularies["small"]
    assert small.num_tokens == 3072
    assert small.eos_token_ids == {small.tokenizer.eos_token_id}
    text = "The capital of Peru is Lima , they say ."
    assert small.decode(small.tokenizer(text)["input_ids"]) == text


def test_several_ends_are_read_from_the_generation_config(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert Vocabulary.load(copy).eos_token_ids == {1, 7}


@pytest.mark.parametrize("tuned", ["tuned", {"model": "base", "reference": {"model": "tuned", "system_prompt": "x"}}])
def test_models_of_a_recipe_that_differ_in_a_token_are_refused_by_name(tmp_path: Path, tuned: object) -> None:
    copy = copy_of_small(tmp_path)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = (token for token, token_id in ids.items() if token_id in (2000, 2001))
    ids[first], ids[second] = ids[second], ids[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError) as refusal:
        load_vocabularies(config(copy, tuned))
    for named in ("recipes.up", "base", "tuned", "2000"):
        assert named in refusal.value.message


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(CheckpointError, match=str(copy)):
        Vocabulary.load(copy)


def test_an_adapter_has_the_vocabulary_of_its_deployment() -> None:
    models = {"base": {"path": "zoo:base-large"}, "small": {"path": "zoo:base-small"}}
    recipe = {"base": "base", "reference": "small", "tuned": [{"model": "law"}]}
    adapter = {"law": {"model": "small", "adapter": "/nowhere"}}
    loaded = load_vocabularies(AppConfig.parse({"models": models | adapter, "recipes": {"up": recipe}}))
    assert list(loaded) == ["base", "small"]
