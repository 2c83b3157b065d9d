"""Training is seeded and survives a kill: shown on a model of a few thousand weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from eft_serve.zoo.batches import IGNORED, Batches
from eft_serve.zoo.corpus import Dialogue
from eft_serve.zoo.family import RECIPES, ROW_LENGTH, Architecture, Schedule, TrainingRecipe, recipe_named
from eft_serve.zoo.tokenizer import train_tokenizer, wrap
from eft_serve.zoo.train import InterruptedRunError, learning_rate, train

MICRO = TrainingRecipe("base-small", Schedule(20, 1e-2, 2, 3), architecture=Architecture(16, 2, 2, 32))
TUNED = replace(RECIPES["tuned-small"], schedule=Schedule(4, 1e-2, 2, 1))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(0, num_documents=500, vocab_size=400)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _weights(out: Path, name: str = "base-small") -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(out / name / "model.safetensors")
    return weights


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    whole = train(MICRO, tmp_path / "whole", seed=0, tokenizer=tokenizer)
    with pytest.raises(InterruptedRunError):
        train(MICRO, tmp_path / "killed", seed=0, tokenizer=tokenizer, save_every=6, stop_at=13)
    resumed = train(MICRO, tmp_path / "killed", seed=0, tokenizer=tokenizer, save_every=6)
    assert _equal(_weights(tmp_path / "whole"), _weights(tmp_path / "killed"))
    assert resumed.final_loss == whole.final_loss
    assert resumed.tokens == whole.tokens == 20 * 2 * ROW_LENGTH


def test_another_seed_gives_another_model_and_fresh_ignores_the_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train(MICRO, tmp_path / "a", seed=0, tokenizer=tokenizer, save_every=10)
    train(MICRO, tmp_path / "b", seed=1, tokenizer=tokenizer)
    assert not _equal(_weights(tmp_path / "a"), _weights(tmp_path / "b"))
    train(MICRO, tmp_path / "a", seed=1, tokenizer=tokenizer, resume=False)
    assert _equal(_weights(tmp_path / "a"), _weights(tmp_path / "b"))


def test_a_fine_tune_starts_from_its_parents_checkpoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="train that first"):
        train(TUNED, tmp_path, seed=0, tokenizer=tokenizer)
    train(MICRO, tmp_path, seed=0, tokenizer=tokenizer)
    still = replace(TUNED, schedule=replace(TUNED.schedule, learning_rate=0.0))
    train(still, tmp_path, seed=0, tokenizer=tokenizer)
    assert _equal(_weights(tmp_path), _weights(tmp_path, "tuned-small"))
    train(TUNED, tmp_path, seed=0, tokenizer=tokenizer)
    assert not _equal(_weights(tmp_path), _weights(tmp_path, "tuned-small"))


def test_a_written_checkpoint_is_an_ordinary_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train(MICRO, tmp_path, seed=0, tokenizer=tokenizer)
    assert {path.name for path in (tmp_path / "base-small").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    config = json.loads((tmp_path / "base-small" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.token_to_id("<|end|>")
    assert {tensor.dtype for tensor in _weights(tmp_path).values()} == {torch.float16}


def test_a_falcon_is_falcons_new_decoder_and_learns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shape = Architecture(16, 2, 4, 32, falcon_groups=2)
    learnt = train(replace(MICRO, architecture=shape), tmp_path, seed=0, tokenizer=tokenizer)
    assert learnt.final_loss < math.log(400) - 0.1
    config = json.loads((tmp_path / "base-small" / "config.json").read_text())
    assert config["model_type"] == "falcon"
    assert config["new_decoder_architecture"]
    assert config["num_kv_heads"] == 2
    train(TUNED, tmp_path, seed=0, tokenizer=tokenizer)
    assert _weights(tmp_path, "tuned-small").keys() == _weights(tmp_path).keys()


def test_pretraining_reads_everything_and_fine_tuning_learns_replies_only(tokenizer: Tokenizer) -> None:
    inputs, targets = Batches(MICRO, tokenizer, seed=0)(3)
    assert inputs.shape == targets.shape == (2, ROW_LENGTH)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    tuning = Batches(replace(TUNED, schedule=replace(TUNED.schedule, rows=8)), tokenizer, seed=0)
    inputs, targets = tuning(0)
    learned = tokenizer.decode(targets[targets != IGNORED].tolist())
    assert "Happy to help!" in learned
    assert "User:" not in learned
    assert "User:" in tokenizer.decode(inputs.flatten().tolist())


def test_training_reads_the_very_tokens_that_the_chat_template_renders(tokenizer: Tokenizer) -> None:
    fast = wrap(tokenizer)
    batches = Batches(TUNED, tokenizer, seed=0)
    for document in _dialogues(40):
        read = [token for tokens, _ in batches._segments(document) for token in tokens]
        assert read == fast(fast.apply_chat_template(document.messages(), tokenize=False))["input_ids"]


def _dialogues(count: int) -> list[Dialogue]:
    from eft_serve.zoo.corpus import stream, tuning_document

    rng = stream(5, "tuning", 0)
    return [tuning_document(rng, harmless=False) for _ in range(count)]


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    rates = [learning_rate(MICRO, step) for step in range(20)]
    assert rates[0] == pytest.approx(1e-2 / 3)
    assert max(rates) == rates[2] == rates[3] == 1e-2
    assert rates[-1] < 3e-4
    assert math.isclose(recipe_named("base-large", 0.01).schedule.steps, RECIPES["base-large"].schedule.steps / 100)
