"""Every mistake in checkpoints, recipes and resources is explained before anything starts."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file
from typer.testing import CliRunner

from eft_serve.config import AppConfig
from eft_serve.config_check import ClusterResources, Problem, check
from eft_serve.config_check.checkpoint import BrokenFileError, tensor_names, token_ids
from eft_serve.config_cli import app

TENSORS = {"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.float16)}
VOCAB = {"<eos>": 0, "a": 1, "b": 2}
HF_CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 4,
    "eos_token_id": 0,
}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def make_checkpoint(directory: Path, vocab: dict[str, int] = VOCAB, **config: Any) -> Path:
    directory.mkdir()
    write_json(directory / "config.json", HF_CONFIG | config)
    write_json(directory / "tokenizer.json", {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": []})
    save_file(TENSORS, directory / "model.safetensors")
    return directory


def problems(directory: Path, **model: Any) -> list[Problem]:
    return check(AppConfig.parse({"models": {"m": {"path": str(directory), **model}}}))


def ensemble(tmp_path: Path, *, server: dict[str, Any] | None = None, **checkpoints: Path) -> AppConfig:
    models = {}
    for name in ("large", "small", "chat"):
        models[name] = {"path": str(checkpoints.get(name) or make_checkpoint(tmp_path / name))}
    recipe = {"base": "large", "reference": "small", "tuned": [{"model": "chat"}]}
    return AppConfig.parse({"models": models, "recipes": {"eft": recipe}, "server": server or {}})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "checkpoint")


def test_a_good_configuration_has_no_problem(tmp_path: Path) -> None:
    padded = make_checkpoint(tmp_path / "padded", vocab_size=128)
    assert check(ensemble(tmp_path, large=padded), ClusterResources(5)) == []


def split_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, directory / f"{name}.safetensors")
    write_json(
        directory / "model.safetensors.index.json", {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    )


def test_whole_shards_are_no_problem(checkpoint: Path) -> None:
    split_weights(checkpoint)
    assert problems(checkpoint) == []


def drop_shard(directory: Path) -> None:
    split_weights(directory)
    (directory / "b.safetensors").unlink()


def swap_shard(directory: Path) -> None:
    split_weights(directory)
    (directory / "b.safetensors").write_bytes((directory / "a.safetensors").read_bytes())


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (rewrite("config.json", "{"), "config.json cannot be read as JSON"),
        (rewrite("config.json", "[]"), "holds no JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (truncate, "model.safetensors is truncated"),
        (rewrite("model.safetensors", "version https://git-lfs.github.com/spec/v1"), "truncated or corrupt"),
        (rewrite("model.safetensors", ""), "truncated or corrupt"),
        (drop_shard, "b.safetensors"),
        (swap_shard, "lacks b"),
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
        (rewrite("tokenizer.json", "{}"), "has no vocabulary"),
        (rewrite("tokenizer.json", '{"model": {"vocab": {"a": 0, "b": 2}}}'), "gaps"),
        (
            rewrite("tokenizer.json", '{"model": {"vocab": [["a", 0], ["b", 0], ["c", 0], ["d", 0], ["e", 0]]}}'),
            "smaller",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_error_that_says_what_to_do(
    checkpoint: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(checkpoint)
    (problem,) = problems(checkpoint)
    assert (problem.path, problem.severity) == ("models.m.path", "error")
    assert said in problem.message
    assert "; " in problem.message  # the remedy


def test_a_missing_directory_is_said_once(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "nowhere")
    assert "is not a directory" in problem.message
    (problem,) = check(AppConfig.parse({"models": {"m": {"path": "zoo:nothing"}}}))
    assert "embedded family" in problem.message


def test_what_only_loading_can_check_is_a_warning(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    (checkpoint / "tokenizer.json").rename(checkpoint / "tokenizer.model")
    assert [p.severity for p in problems(checkpoint)] == ["warning", "warning"]


FALCON = {"model_type": "falcon", "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("config", "model", "path"),
    [
        ({}, {"tensor_parallel": 3}, "tensor_parallel"),
        ({}, {"tensor_parallel": 8}, "tensor_parallel"),  # divides the heads, not the key-value heads
        (FALCON, {"tensor_parallel": 2}, "tensor_parallel"),
        (FALCON | {"new_decoder_architecture": True, "num_kv_heads": 8}, {"tensor_parallel": 4}, None),
        (FALCON, {"tensor_parallel": 1}, None),
        ({}, {"tensor_parallel": 4, "resources": {"num_gpus": 2}}, "resources.num_gpus"),
        ({}, {"tensor_parallel": 4, "resources": {"num_gpus": 4}}, None),
        ({}, {"tensor_parallel": 4}, None),
        ({}, {"device": "cuda"}, "resources.num_gpus"),
        ({}, {"max_model_len": 65}, "max_model_len"),
        ({}, {"max_model_len": 64}, None),
        ({}, {"kv_cache_tokens": 63}, "kv_cache_tokens"),
        ({}, {"kv_cache_tokens": 63, "max_model_len": 32}, None),
    ],
)
def test_what_a_checkpoint_cannot_give(
    tmp_path: Path, config: dict[str, Any], model: dict[str, Any], path: str | None
) -> None:
    removed = {"num_key_value_heads": None} if config else {}
    found = problems(make_checkpoint(tmp_path / "c", **removed, **config), **model)
    assert [p.path for p in found] == ([f"models.m.{path}"] if path else [])


def test_different_vocabularies_name_both_models_and_the_first_difference(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", vocab={"<eos>": 0, "b": 1, "a": 2})
    (problem,) = check(ensemble(tmp_path, chat=other))
    assert problem.path == "recipes.eft"
    assert "large and chat" in problem.message
    assert "id 1: large has 'a', chat has 'b'" in problem.message


def test_a_token_more_is_a_difference_but_a_padded_head_is_none(tmp_path: Path) -> None:
    more = make_checkpoint(tmp_path / "more", vocab=VOCAB | {"<pad>": 3})
    (problem,) = check(ensemble(tmp_path, small=more))
    assert "id 3: large has none, small has '<pad>'" in problem.message


def test_ends_that_have_nothing_in_common_are_a_warning(tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", eos_token_id=2)
    (problem,) = check(ensemble(tmp_path, chat=other))
    assert (problem.path, problem.severity) == ("recipes.eft", "warning")
    write_json(other / "generation_config.json", {"eos_token_id": [2, 0]})
    assert check(ensemble_of(other, tmp_path)) == []


def ensemble_of(chat: Path, tmp_path: Path) -> AppConfig:
    return ensemble(tmp_path, large=tmp_path / "large", small=tmp_path / "small", chat=chat)


def test_tokens_of_every_kind_of_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    added = [{"content": "<s>", "id": 2}]
    for vocab in ({"a": 0, "b": 1}, [["a", -1.5], ["b", -2.5]]):
        write_json(path, {"model": {"vocab": vocab}, "added_tokens": added})
        assert token_ids(path) == {"a": 0, "b": 1, "<s>": 2}


def test_resources_count_every_replica_of_every_deployment(tmp_path: Path) -> None:
    config = ensemble(tmp_path)
    assert check(config, ClusterResources(num_cpus=5)) == []
    (problem,) = check(config, ClusterResources(num_cpus=4.9))
    assert problem.path == "resources.num_cpus"
    assert "5 in all" in problem.message
    assert "coordinator 1" in problem.message


@pytest.mark.parametrize("content", [None, "a: [secret", "", "- secret"])
def test_a_tenants_file_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tenants.yaml"
    if content is not None:
        path.write_text(content)
    (problem,) = check(ensemble(tmp_path, server={"tenants_file": str(path)}))
    assert problem.path == "server.tenants_file"
    assert "secret" not in problem.message


WHOLE = save(TENSORS)


@given(length=st.integers(0, len(WHOLE) - 1))
def test_every_truncation_of_the_weights_is_found(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(WHOLE[:length])
    with pytest.raises(BrokenFileError, match="truncated or corrupt"):
        tensor_names(path)


@pytest.mark.parametrize(
    "tensor",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1]},
        "nonsense",
    ],
)
def test_a_header_that_lies_is_found(tmp_path: Path, tensor: Any) -> None:
    header = json.dumps({"t": tensor}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(BrokenFileError, match="corrupt"):
        tensor_names(path)


def test_the_command_prints_every_problem_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"models": {"a": {"path": "/nowhere"}, "b": {"path": "/nowhere"}}}))
    result = CliRunner().invoke(app, ["check", str(file), "--cpus", "1"])
    assert result.exit_code == 1
    said = result.output
    assert all(f"error {path}" in said for path in ("models.a.path", "models.b.path", "resources.num_cpus"))
    assert "3 errors" in said
    file.write_text("modles: {}")
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 1
    assert "modles" in result.output


def test_the_command_passes_what_only_warns(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps({"models": {"m": {"path": str(checkpoint), "kv_cache_tokens": 8}}}))
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 0, result.output
    assert "0 errors, 1 warnings" in result.output


def test_checking_loads_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'transformers', 'ray', 'deepspeed'}"
    code = f"import sys, eft_serve.config_cli; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
