"""Every mistake of an adapter is explained before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eft_serve.checkpoints.lora import CONFIG, WEIGHTS
from eft_serve.checkpoints.weights import INDEX, SINGLE
from eft_serve.config import AppConfig
from eft_serve.config_check import Problem, check

Tensors = dict[str, np.ndarray[Any, Any]]

RANK, HIDDEN, INNER = 2, 4, 6
MODEL = {"model_type": "llama", "vocab_size": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
ADAPTER: dict[str, Any] = {  # as peft 0.18 writes it
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "small",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 4,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "down_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def weights(prefix: str = "model.") -> Tensors:
    sizes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, INNER), "norm": (HIDDEN,)}
    tensors = {
        f"{prefix}layers.{i}.{m}.weight": np.zeros(size, np.float16) for i in range(2) for m, size in sizes.items()
    }
    return tensors | {"lm_head.weight": np.zeros((3, HIDDEN), np.float16)}


def updates() -> Tensors:
    found: Tensors = {}
    for layer in range(2):
        for module, inputs in (("self_attn.q_proj", HIDDEN), ("mlp.down_proj", INNER)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = np.ones((RANK, inputs), np.float32)
            found[f"{name}.lora_B.weight"] = np.ones((HIDDEN, RANK), np.float32)
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(MODEL))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}}}))
    save_file(weights(), path / SINGLE)
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "law"
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(ADAPTER))
    save_file(updates(), path / WEIGHTS)
    return path


def problems(model: Path, adapter: Path, **settings: Any) -> list[Problem]:
    models = {"small": {"path": str(model)} | settings, "law": {"model": "small", "adapter": str(adapter)}}
    recipe = {"base": "small", "reference": "small", "tuned": [{"model": "law"}]}
    return check(AppConfig.parse({"models": models, "recipes": {"eft": recipe}}))


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def edit_config(directory: Path, **fields: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(ADAPTER | fields))


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
FINE: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"target_modules": r"model\.layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)"},
    {"target_modules": None},
    {"target_modules": ["q_proj", "down_proj", "of_another_family"]},
]


@pytest.mark.parametrize("fields", FINE, ids=str)
def test_what_can_be_served_has_no_problem(model: Path, adapter: Path, fields: dict[str, Any]) -> None:
    edit_config(adapter, **fields)
    assert problems(model, adapter) == []


def test_a_checkpoint_in_several_files_or_without_the_first_part_of_its_names(model: Path, adapter: Path) -> None:
    (model / SINGLE).unlink()
    save_file(weights(prefix=""), model / "one.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights(prefix=""), "one.safetensors")}))
    assert problems(model, adapter) == []


def test_matrices_that_are_stored_the_other_way_round(model: Path, adapter: Path) -> None:
    save_file({name: np.ascontiguousarray(tensor.T) for name, tensor in weights().items()}, model / SINGLE)
    assert "fits" in only(problems(model, adapter)).message
    edit_config(adapter, fan_in_fan_out=True)
    assert problems(model, adapter) == []


def test_some_layers_only(model: Path, adapter: Path) -> None:
    edit(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name])
    assert "layers.1.mlp.down_proj.lora_A.weight is missing" in only(problems(model, adapter)).message
    edit_config(adapter, layers_to_transform=[0])
    assert problems(model, adapter) == []


CONFIGURED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"r": 0}, "r is 0"),
    ({"r": 3}, "[2, 6] where [3, 6] fits"),
    ({"lora_alpha": "many"}, "lora_alpha is 'many'"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"target_modules": "("}, "not a regular expression"),
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"use_dora": True}, "use_dora is True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is"),
    ({"target_parameters": ["experts"]}, "target_parameters is"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    ({"invented_later": {"x": 1}}, "invented_later is {'x': 1}, which is not computed"),
]


@pytest.mark.parametrize(("fields", "said"), CONFIGURED, ids=[said for _, said in CONFIGURED])
def test_what_would_not_be_computed(model: Path, adapter: Path, fields: dict[str, Any], said: str) -> None:
    edit_config(adapter, **fields)
    problem = only(problems(model, adapter))
    assert (problem.path, problem.severity) == ("models.law.adapter", "error")
    assert said in problem.message
    assert str(adapter) in problem.message


SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: (d / CONFIG).unlink(), f"has no {CONFIG}"),
    (lambda d: (d / WEIGHTS).rename(d / "adapter_model.bin"), f"has no {WEIGHTS}"),
    (lambda d: (d / CONFIG).write_text("{"), "cannot be read as JSON"),
    (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1]), "truncated or corrupt"),
    (lambda d: save_file({}, d / WEIGHTS), "there are no matrices in it"),
    (lambda d: edit(d, lambda t: t.pop(FIRST)), f"{FIRST} is missing"),
    (lambda d: edit(d, lambda t: t.update({FIRST: np.ones((RANK, 7), np.float32)})), "is [2, 7] where [2, 6] fits"),
    (
        lambda d: edit(d, lambda t: t.update({"base_model.model.x.lora_magnitude_vector": t[FIRST]})),
        "no matrix of a LoRA",
    ),
    (
        lambda d: edit(d, lambda t: t.update({f"base_model.model.lm_head.lora_{s}.weight": t[FIRST] for s in "AB"})),
        "lm_head is no matrix in a layer of the model",
    ),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILT, ids=[said for _, said in SPOILT])
def test_files_that_are_not_right(model: Path, adapter: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(adapter)
    problem = only(problems(model, adapter))
    assert (problem.path, problem.severity) == ("models.law.adapter", "error")
    assert said in problem.message
    assert str(adapter) in problem.message


def test_all_mistakes_of_its_configuration_are_named_at_once(model: Path, adapter: Path) -> None:
    edit_config(adapter, use_dora=True, bias="all", lora_alpha=None)
    message = only(problems(model, adapter)).message
    assert all(field in message for field in ("use_dora", "bias", "lora_alpha"))


def test_an_adapter_of_another_model_names_both(model: Path, adapter: Path) -> None:
    save_file({"model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float16)}, model / SINGLE)
    message = only(problems(model, adapter)).message
    assert f"{adapter} does not fit small ({model})" in message
    assert "and 2 more" in message


def test_a_directory_that_is_not_there(model: Path, tmp_path: Path) -> None:
    assert "nowhere is not a directory" in only(problems(model, tmp_path / "nowhere")).message


def test_ranks_do_not_split_adapters(model: Path, adapter: Path) -> None:
    problem = only(problems(model, adapter, tensor_parallel=2))
    assert (problem.path, problem.severity) == ("models.law.model", "error")
    assert "small has tensor_parallel: 2" in problem.message


def test_another_name_of_the_model_is_a_warning(model: Path, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="meta/large")
    problem = only(problems(model, adapter))
    assert problem.severity == "warning"
    assert "trained on meta/large" in problem.message


def test_a_model_whose_own_files_are_broken_is_named_alone(model: Path, adapter: Path) -> None:
    (model / SINGLE).unlink()
    assert only(problems(model, adapter)).path == "models.small.path"
