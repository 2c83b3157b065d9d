"""The tokens of a checkpoint: its ends of text, and files that do not tell them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from eft_serve.checkpoints.tokenizer import load_tokenizer, token_ids
from eft_serve.checkpoints.vocabulary import Vocabulary
from eft_serve.config import ZOO_CHECKPOINTS
from eft_serve.errors import CheckpointError

SMALL = ZOO_CHECKPOINTS / "base-small"


def copy_of_small(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL, tmp_path / "copy"))


def test_tokens_ends_and_text_of_the_embedded_family() -> None:
    small = Vocabulary.load(SMALL)
    assert small.num_tokens == 3072
    assert small.eos_token_ids == {small.tokenizer.eos_token_id}
    text = "The capital of Peru is Lima , they say ."
    assert small.decode(small.tokenizer(text)["input_ids"]) == text


def test_some_special_tokens_are_shown_and_others_skipped() -> None:
    small = Vocabulary.load(SMALL)
    pad, end = small.ids["<|pad|>"], small.ids["<|end|>"]
    ids = [pad, *small.tokenizer(" Lima")["input_ids"], end]
    assert small.decode(ids) == " Lima"
    assert small.with_special_tokens_of([end]).decode(ids) == " Lima<|end|>"
    assert small.with_special_tokens.decode(ids) == "<|pad|> Lima<|end|>"


def test_several_ends_are_read_from_the_generation_config(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    vocabulary = Vocabulary.load(copy)
    assert vocabulary.eos_token_ids == {1, 7, vocabulary.tokenizer.eos_token_id}, "as vLLM"


@pytest.mark.parametrize("ends", [3072, [1, 3072], [2**40]])
def test_an_end_token_that_the_model_does_not_have_is_refused(tmp_path: Path, ends: object) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"the end token \d+ is none of its 3072 tokens"):
        Vocabulary.load(copy)


def test_an_empty_list_of_end_tokens_names_none(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    (copy / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    vocabulary = Vocabulary.load(copy)
    assert vocabulary.eos_token_ids == {7, vocabulary.tokenizer.eos_token_id}


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(CheckpointError, match=str(copy)):
        Vocabulary.load(copy)


@pytest.mark.parametrize("ends", ["</s>", [1, "</s>"], {"id": 1}, -1, "2", True, [1.0]])
def test_an_end_token_that_is_no_id_is_refused_with_its_file(tmp_path: Path, ends: object) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is"):
        Vocabulary.load(copy)


def test_end_tokens_that_no_file_names_are_the_tokenizers(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").unlink()
    (copy / "config.json").write_text("{}")
    vocabulary = Vocabulary.load(copy)
    assert vocabulary.eos_token_ids == {vocabulary.tokenizer.eos_token_id}


def test_a_generation_config_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as JSON"):
        Vocabulary.load(copy)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_token": "[PAD]"},
        {"pad_token": "[PAD]", "mask_token": {"content": "[M]", "special": True, "__type": "AddedToken"}},
        {"additional_special_tokens": ["<|a|>", "<|b|>"], "pad_token": "[PAD]"},
        {"extra_special_tokens": ["<|a|>"]},
        {"extra_special_tokens": {"image_token": "<img>"}},
        {"added_tokens_decoder": {"3072": {"content": "[X]", "special": True}}},
    ],
)
def test_tokens_by_the_files_are_those_of_transformers(tmp_path: Path, settings: dict[str, object]) -> None:
    copy = copy_of_small(tmp_path)
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert token_ids(copy) == load_tokenizer(copy).get_vocab()


def test_tokens_beyond_the_output_head_are_not_the_models(tmp_path: Path) -> None:
    copy = copy_of_small(tmp_path)
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "[PAD]"}))
    vocabulary = Vocabulary.load(copy)
    assert len(vocabulary.tokenizer.get_vocab()) == 3073
    assert (vocabulary.num_tokens, "[PAD]" in vocabulary.ids) == (3072, False)


@pytest.mark.parametrize("rows", ["3072", 0, -1, 3072.5, True])
def test_a_number_of_rows_that_is_none_is_refused_with_its_file(tmp_path: Path, rows: object) -> None:
    copy = copy_of_small(tmp_path)
    (copy / "config.json").write_text(json.dumps({"vocab_size": rows}))
    with pytest.raises(CheckpointError, match=r"config\.json: vocab_size is"):
        Vocabulary.load(copy)
