"""Directories that cannot be served are refused with the path and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, build_config, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from eft_serve.config import ModelConfig
from eft_serve.engine.engine import Engine
from eft_serve.engine.limits import context_limit
from eft_serve.errors import CheckpointError, EngineError


def refuse(path: Path | str, match: str, **settings: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Engine.load("m", ModelConfig(path=str(path), **settings))
    assert str(path) in caught.value.message


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model(build_config("llama"), tmp_path / "llama")


def edit_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    edit(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_missing_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "not a directory")


def test_missing_config(tmp_path: Path) -> None:
    refuse(tmp_path, r"no config\.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"llama"'])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refuse(tmp_path, "not a transformers configuration")


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    refuse(tmp_path, "'no-such-model'")


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    refuse(tmp_path, "'mine'")


def test_a_model_that_generates_nothing(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    refuse(tmp_path, "no causal language model")


def test_missing_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refuse(llama, "weights")


def test_corrupt_weights(llama: Path) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse(llama, "weights")


def test_a_weight_too_few(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(llama, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_weight_too_many(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.extra.weight": torch.zeros(1)}))
    refuse(llama, r"1 unexpected \(model\.extra\.weight")


def test_a_weight_of_another_shape(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights.update({"model.norm.weight": torch.zeros(5)}))
    refuse(llama, "weights")


def test_weights_that_compute_infinities(llama: Path) -> None:
    edit_weights(llama, lambda weights: weights["lm_head.weight"].fill_(torch.inf))
    refuse(llama, "infinities or NaN")


def test_a_model_with_another_state_than_keys_and_values(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    refuse(tmp_path, "another state than keys and values")


def test_a_context_beyond_the_checkpoints(llama: Path) -> None:
    refuse(llama, "max_model_len", max_model_len=CONTEXT + 1)


def test_a_rotary_embedding_that_depends_on_the_batch(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path = save_model(build_config("llama", rope_parameters=rope), tmp_path)
    refuse(path, "longest sequence of a batch")
    Engine.load("m", ModelConfig(path=str(path), max_model_len=CONTEXT)).close()


@pytest.mark.parametrize("architecture", ["falcon-mqa", "falcon-alibi", "bloom"])
def test_what_deepspeed_cannot_split(checkpoints: Callable[[str], Path], architecture: str) -> None:
    refuse(checkpoints(architecture), "tensor_parallel: 1", tensor_parallel=2)


def test_heads_that_do_not_divide(checkpoints: Callable[[str], Path]) -> None:
    refuse(checkpoints("llama"), "4 attention heads and 2 key-value heads", tensor_parallel=4)


def test_no_gpu_where_one_was_asked_for(llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="num_gpus: 1"):
        Engine.load("m", ModelConfig(path=str(llama), device="cuda"))


def test_half_precision_needs_a_gpu(llama: Path) -> None:
    with pytest.raises(EngineError, match="dtype: float16"):
        Engine.load("m", ModelConfig(path=str(llama), device="cpu", dtype="float16"))


def test_bloom_has_no_context_limit_of_its_own() -> None:
    assert context_limit(build_config("bloom"), ModelConfig(path="x")) is None
    assert context_limit(build_config("bloom"), ModelConfig(path="x", max_model_len=7)) == 7
