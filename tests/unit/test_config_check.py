"""Every mistake is explained before anything starts: tiny checkpoints, each broken in one way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from eft_serve.checkpoints.weights import INDEX, SINGLE
from eft_serve.config import AppConfig
from eft_serve.config_check import ClusterResources, Problem, check, load_any
from eft_serve.config_cli import app as cli

ROOT = Path(__file__).parent.parent.parent
VOCAB = {"a": 0, "b": 1, "c": 2}
CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 8,
    "eos_token_id": 2,
}
TENSORS = {"embed": np.zeros((8, 4), np.float32), "head": np.ones((4, 8), np.float16)}


def checkpoint(path: Path, vocab: dict[str, int] | None = None, **config: Any) -> Path:
    """A directory that looks like a model's."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab or VOCAB}}))
    save_file(TENSORS, path / SINGLE)
    return path


def sharded(path: Path) -> Path:
    """The same in two files."""
    (checkpoint(path) / SINGLE).unlink()
    for file, name in (("one.safetensors", "embed"), ("two.safetensors", "head")):
        save_file({name: TENSORS[name]}, path / file)
    weight_map = {"embed": "one.safetensors", "head": "two.safetensors"}
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def problems(path: Path, **model: Any) -> list[Problem]:
    return check(AppConfig.parse({"models": {"m": {"path": str(path)} | model}}))


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, found
    return found[0]


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def test_whole_checkpoints_have_no_problem(model: Path, tmp_path: Path) -> None:
    assert problems(model) == []
    assert problems(sharded(tmp_path / "sharded")) == []
    assert problems(model, tensor_parallel=2, max_model_len=128, kv_cache_tokens=128) == []


@pytest.mark.parametrize("path", sorted((ROOT / "deployments").glob("zoo*.yaml")), ids=lambda path: path.stem)
def test_the_embedded_family_has_no_problem_on_two_cores(path: Path) -> None:
    assert check(load_any(path), ClusterResources(num_cpus=2)) == []


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    problem = only(problems(tmp_path / "nowhere"))
    assert problem.path == "models.m.path"
    assert "nowhere is not a directory" in problem.message
    config = AppConfig.parse({"models": {"m": {"path": "zoo:base-huge"}}})
    assert "no such model" in only(check(config)).message


@pytest.mark.parametrize(
    ("file", "said"),
    [("config.json", "has no config.json"), (SINGLE, "has neither"), ("tokenizer.json", "has no tokenizer")],
)
def test_a_missing_file(model: Path, file: str, said: str) -> None:
    (model / file).unlink()
    assert said in only(problems(model)).message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ud800", "[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_json_that_is_none(model: Path, file: str, text: str) -> None:
    (model / file).write_bytes(text.encode(errors="surrogatepass"))
    problem = only(problems(model))
    assert file in problem.message
    assert problem.severity == "error"


def test_all_mistakes_of_a_checkpoint_are_named_at_once(model: Path) -> None:
    for file in (SINGLE, "tokenizer.json"):
        (model / file).unlink()
    found = problems(model, max_model_len=129, tensor_parallel=3)
    assert [problem.path.rpartition(".")[2] for problem in found] == [
        "path",
        "path",
        "tensor_parallel",
        "max_model_len",
    ]


def test_truncated_weights_are_found_wherever_they_are_cut(model: Path) -> None:
    whole = (model / SINGLE).read_bytes()
    for size in {0, 4, 8, 20, *range(8, len(whole), 37), len(whole) - 1}:
        (model / SINGLE).write_bytes(whole[:size])
        assert "truncated or corrupt" in only(problems(model)).message, size


def test_every_broken_shard_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path / "sharded")
    cut(path / "one.safetensors", 100)
    (path / "two.safetensors").unlink()
    one, two = problems(path)
    assert "one.safetensors is truncated" in one.message
    assert "two.safetensors is missing" in two.message


def test_a_shard_without_its_tensor(tmp_path: Path) -> None:
    path = sharded(tmp_path / "sharded")
    save_file({"other": TENSORS["head"]}, path / "two.safetensors")
    assert "lacks 1 tensors" in only(problems(path)).message


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]}])
def test_an_index_without_files(tmp_path: Path, index: dict[str, Any]) -> None:
    path = sharded(tmp_path / "sharded")
    (path / INDEX).write_text(json.dumps(index))
    assert "has no weight_map" in only(problems(path)).message


def test_pickled_weights_and_a_tokenizer_that_cannot_be_compared_are_warnings(model: Path) -> None:
    (model / SINGLE).rename(model / "pytorch_model.bin")
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    assert [problem.severity for problem in problems(model)] == ["warning", "warning"]


FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "num_key_value_heads": None,
}
FALCON_7B: dict[str, Any] = FALCON | {"multi_query": True, "new_decoder_architecture": False}


@pytest.mark.parametrize(
    ("config", "asked", "field", "said"),
    [
        ({}, {"tensor_parallel": 4}, "tensor_parallel", "does not divide 4 attention heads and 2 key-value heads"),
        ({"num_key_value_heads": None}, {"tensor_parallel": 3}, "tensor_parallel", "4 attention heads and 4 key-value"),
        (FALCON_7B, {"tensor_parallel": 2}, "tensor_parallel", "Falcon-7B"),
        (FALCON | {"new_decoder_architecture": True}, {"tensor_parallel": 4}, "tensor_parallel", "2 key-value heads"),
        ({"model_type": "bloom"}, {"tensor_parallel": 2}, "tensor_parallel", "ALiBi"),
        ({}, {"max_model_len": 129}, "max_model_len", "beyond the 128 tokens"),
        ({"rope_scaling": {"type": "dynamic"}}, {}, "max_model_len", "set 128"),
        ({}, {"tensor_parallel": 2, "resources": {"num_gpus": 1}}, "resources.num_gpus", "one GPU to each rank"),
        ({}, {"device": "cuda"}, "resources.num_gpus", "hides every GPU"),
    ],
)
def test_what_the_model_cannot_do(
    tmp_path: Path, config: dict[str, Any], asked: dict[str, Any], field: str, said: str
) -> None:
    problem = only(problems(checkpoint(tmp_path / "model", **config), **asked))
    assert (problem.path, problem.severity) == (f"models.m.{field}", "error")
    assert said in problem.message


def test_what_these_models_can_do(tmp_path: Path) -> None:
    assert problems(checkpoint(tmp_path / "7b", **FALCON_7B)) == []
    new = checkpoint(tmp_path / "40b", **FALCON, new_decoder_architecture=True)
    assert problems(new, tensor_parallel=2, resources={"num_gpus": 2}) == []
    dynamic = checkpoint(tmp_path / "dynamic", rope_scaling={"type": "dynamic"})
    assert problems(dynamic, max_model_len=128) == []


def test_tokens_that_only_the_tokenizer_has_are_a_warning_by_name(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", vocab_size=3)
    assert problems(path) == []
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    problem = only(problems(path))
    assert (problem.path, problem.severity) == ("models.m.path", "warning")
    assert "1 tokens that the model, with a vocab_size of 3, has not: '[PAD]' (3)" in problem.message


def test_models_whose_tokenizers_differ_in_tokens_that_none_of_them_has_fit_together(tmp_path: Path) -> None:
    paths = {name: checkpoint(tmp_path / name, vocab_size=3) for name in ("base", "reference", "tuned")}
    (paths["tuned"] / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert [problem.severity for problem in check(recipe(**paths))] == ["warning"]


def test_a_cache_below_one_sequence_is_a_warning(model: Path) -> None:
    problem = only(problems(model, kv_cache_tokens=64))
    assert (problem.path, problem.severity) == ("models.m.kv_cache_tokens", "warning")
    assert problems(model, kv_cache_tokens=64, max_model_len=64) == []


def recipe(**paths: Path) -> AppConfig:
    """base, tuned and reference at these paths."""
    models = {name: {"path": str(path), "resources": {"num_cpus": 0.1}} for name, path in paths.items()}
    return AppConfig.parse(
        {
            "models": models,
            "recipes": {"eft": {"base": "base", "reference": "reference", "tuned": [{"model": "tuned"}]}},
        }
    )


def test_one_tokenizer_with_different_padding_is_fine(tmp_path: Path) -> None:
    paths = {name: checkpoint(tmp_path / name, vocab_size=8 * i) for i, name in enumerate(("base", "reference"), 1)}
    unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
    paths["tuned"] = checkpoint(tmp_path / "tuned")
    (paths["tuned"] / "tokenizer.json").write_text(
        json.dumps(unigram | {"added_tokens": [{"id": 2, "content": "c", "special": True}]})
    )
    assert check(recipe(**paths)) == []


@pytest.mark.parametrize(
    ("vocab", "difference"),
    [
        ({"a": 0, "x": 1, "y": 2}, "id 1: base has 'b', tuned has 'x'"),
        ({"b": 0, "a": 1, "c": 2}, "id 0: base has 'a', tuned has 'b'"),
        (VOCAB | {"d": 3}, "id 3: base has none, tuned has 'd'"),
    ],
)
def test_vocabularies_that_differ_are_named_with_the_first_difference(
    tmp_path: Path, vocab: dict[str, int], difference: str
) -> None:
    config = recipe(
        base=checkpoint(tmp_path / "base"),
        reference=checkpoint(tmp_path / "reference"),
        tuned=checkpoint(tmp_path / "tuned", vocab),
    )
    problem = only(check(config))
    assert (problem.path, problem.severity) == ("recipes.eft", "error")
    assert difference in problem.message


def test_ids_with_gaps(tmp_path: Path) -> None:
    assert "ids have gaps" in only(problems(checkpoint(tmp_path / "model", {"a": 0, "b": 2}))).message


def test_models_that_end_a_text_differently_are_a_warning(tmp_path: Path) -> None:
    config = recipe(
        base=checkpoint(tmp_path / "base"),
        reference=checkpoint(tmp_path / "reference"),
        tuned=checkpoint(tmp_path / "tuned", eos_token_id=[1]),
    )
    problem = only(check(config))
    assert problem.severity == "warning"
    assert "base ends a text with [2], tuned with [1]" in problem.message


GENERATION = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (GENERATION, None),
        ("{% for m in messages %}", "is no chat template: Unexpected end of template"),
        ("{{ m.content", "is no chat template"),
        ("{{ 'x' | nobody }}", "No filter named 'nobody'"),
        (None, "No such file"),
    ],
)
def test_a_chat_template_that_does_not_parse(tmp_path: Path, template: str | None, said: str | None) -> None:
    path = tmp_path / "chat.jinja"
    if template is not None:
        path.write_text(template)
    config = recipe(**{name: checkpoint(tmp_path / name) for name in ("base", "reference", "tuned")})
    tuned = {"model": "tuned", "name": "told", "chat_template": str(path)}
    changed = config.model_dump() | {"recipes": {"eft": {"base": "base", "reference": "reference", "tuned": tuned}}}
    found = check(AppConfig.parse(changed))
    if said is None:
        assert found == []
    else:
        assert only(found).path == "recipes.eft.told.chat_template"
        assert str(path) in only(found).message
        assert said in only(found).message


def test_resources_that_are_not_there(tmp_path: Path) -> None:
    config = recipe(**{name: checkpoint(tmp_path / name) for name in ("base", "reference", "tuned")})
    assert check(config, ClusterResources(num_cpus=2.3)) == []  # three models of 0.1, coordinator and server of 1
    problem = only(check(config, ClusterResources(num_cpus=2.2)))
    assert problem.path == "resources.num_cpus"
    assert "2.3 in all (models.base 0.1, models.reference 0.1, models.tuned 0.1, coordinator 1, server 1)" in str(
        problem
    )
    models = {"m": {"path": str(tmp_path / "base"), "num_replicas": 3, "resources": {"num_gpus": 1}}}
    found = check(AppConfig.parse({"models": models}), ClusterResources(num_cpus=8, num_gpus=2))
    assert "3 in all (models.m 3), and the cluster has 2" in only(found).message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("tenants: {", "is not YAML"),
        ("tenants: 2026-02-30", "is not YAML"),
        ("tenants:\n  acme: {}\n  acme: {}", "a name is given twice"),
        ("", "holds no tenants"),
    ],
)
def test_a_tenants_file_that_cannot_be_used(tmp_path: Path, model: Path, text: str | None, said: str) -> None:
    file = tmp_path / "tenants.yaml"
    if text is not None:
        file.write_text(text)
    data = {"models": {"m": {"path": str(model)}}, "server": {"tenants_file": str(file)}}
    problem = only(check(AppConfig.parse(data)))
    assert problem.path == "server.tenants_file"
    assert said in problem.message
    assert "acme" not in problem.message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{tmp}/new/store", None),
        ("file://{tmp}/new/store", None),
        ("memory://store", None),
        ("{tmp}/taken/store", "cannot be made"),
        ("nonsense://user:secret@host/x", "cannot be used"),
    ],
)
def test_where_files_are_kept(tmp_path: Path, model: Path, url: str, said: str | None) -> None:
    (tmp_path / "taken").write_text("a file")
    data = {"models": {"m": {"path": str(model)}}, "server": {"files_url": url.format(tmp=tmp_path)}}
    problems = [p for p in check(AppConfig.parse(data)) if p.path == "server.files_url"]
    assert (said is None and problems == []) or (said is not None and said in only(problems).message)
    assert "secret" not in str(problems)
    assert not (tmp_path / "new").exists()


def write(path: Path, data: Any) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_the_command_says_ok_or_what_is_wrong(tmp_path: Path, model: Path) -> None:
    path = write(tmp_path / "file.yaml", {"models": {"m": {"path": str(model), "kv_cache_tokens": 1}}})
    fine = CliRunner().invoke(cli, ["check", str(path)])
    assert fine.exit_code == 0
    assert fine.output.splitlines()[0].startswith("warning models.m.kv_cache_tokens: ")
    assert re.match(r"ok .*: 1 models, 0 recipes, 3 CPUs, 0 GPUs; 0 errors, 1 warnings$", fine.output.splitlines()[1])
    short = CliRunner().invoke(cli, ["check", str(path), "--cpus", "2", "--gpus", "0"])
    assert short.exit_code == 1
    assert "error resources.num_cpus: 3 in all" in short.output
    assert "not ok" in short.output
    write(path, {"models": {}, "recipe[s]": {}})
    bad = CliRunner().invoke(cli, ["check", str(path)])
    assert bad.exit_code == 1
    assert [line.split(" ")[0] for line in bad.output.splitlines()] == ["error", "error"]
    assert "recipe[s]" in bad.output


def test_checking_needs_neither_torch_nor_ray() -> None:
    code = "import sys, eft_serve.config_cli; sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
