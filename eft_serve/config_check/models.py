"""Checks one model: its files, and its settings against them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eft_serve.checkpoints.config_fields import BATCH_DEPENDENT_ROPE, CONTEXT_FIELDS, HEADS_FIELDS, KV_HEADS_FIELDS
from eft_serve.checkpoints.json_file import BrokenFileError, read_json
from eft_serve.checkpoints.tokenizer import token_ids
from eft_serve.config import ZOO_PREFIX, ModelConfig
from eft_serve.config_check.problem import Problem
from eft_serve.config_check.weights import weight_problems


def model_problems(name: str, model: ModelConfig) -> Iterator[Problem]:
    """Every problem with this model by itself."""
    where = f"models.{name}"
    yield from _placement_problems(where, model)
    if not model.checkpoint.is_dir():
        hint = "the embedded family has no such model" if model.path.startswith(ZOO_PREFIX) else "copy the model there"
        yield Problem(f"{where}.path", f"{model.checkpoint} is not a directory; {hint} or correct the path")
        return
    yield from weight_problems(where, model.checkpoint)
    config: dict[str, Any] = {}
    if not (model.checkpoint / "config.json").is_file():
        yield Problem(f"{where}.path", f"{model.checkpoint} has no config.json; save the model with save_pretrained")
    else:
        try:
            config = read_json(model.checkpoint / "config.json")
        except BrokenFileError as error:
            yield Problem(f"{where}.path", f"{error}; copy or save the checkpoint again")
    yield from _tokenizer_problems(where, model.checkpoint, config)
    yield from _split_problems(where, model, config)
    yield from _length_problems(where, model, config)


def _placement_problems(where: str, model: ModelConfig) -> Iterator[Problem]:
    ranks, gpus = model.tensor_parallel, model.resources.num_gpus
    if ranks > 1 and gpus not in (0, ranks):
        message = f"{gpus:g} for tensor_parallel: {ranks}; give one GPU to each rank, or 0 to run on the CPU"
        yield Problem(f"{where}.resources.num_gpus", message)
    if model.device == "cuda" and not gpus:
        message = "0, so that Ray hides every GPU from a model with device: cuda; give it GPUs, or set device: cpu"
        yield Problem(f"{where}.resources.num_gpus", message)


def _tokenizer_problems(where: str, directory: Path, config: dict[str, Any]) -> Iterator[Problem]:
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        if any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
            message = f"{directory} has no tokenizer.json, so that its vocabulary is compared only when serving starts"
            yield Problem(f"{where}.path", f"{message}; save the fast tokenizer too", "warning")
        else:
            yield Problem(f"{where}.path", f"{directory} has no tokenizer; save it there with save_pretrained")
        return
    try:
        ids = token_ids(directory)
    except BrokenFileError as error:
        yield Problem(f"{where}.path", f"{error}; copy or save the tokenizer again")
        return
    highest = max(ids.values())
    if len(set(ids.values())) != highest + 1:
        yield Problem(f"{where}.path", f"{tokenizer}: ids have gaps, {len(ids)} tokens up to id {highest}; repair it")
    rows = config.get("vocab_size")
    if isinstance(rows, int) and rows <= highest:
        unknown = sorted((i, token) for token, i in ids.items() if i >= rows)
        named = ", ".join(f"{token!r} ({i})" for i, token in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        yield Problem(
            f"{where}.path",
            f"the tokenizer has {len(unknown)} tokens that the model, with a vocab_size of {rows}, has not: {named}; "
            "they are never generated, and a prompt with one of them is refused",
            "warning",
        )


def _split_problems(where: str, model: ModelConfig, config: dict[str, Any]) -> Iterator[Problem]:
    ranks = model.tensor_parallel
    if ranks == 1 or not config:
        return
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture", False):
        message = f"{ranks}: Falcon models of the old decoder architecture (Falcon-7B) cannot be split; set 1"
        yield Problem(f"{where}.tensor_parallel", message)
        return
    if config.get("model_type") == "bloom" or (config.get("model_type") == "falcon" and config.get("alibi")):
        yield Problem(f"{where}.tensor_parallel", f"{ranks}: ALiBi models cannot be split; set 1")
        return
    heads = _first(config, HEADS_FIELDS)
    kv_heads = _first(config, KV_HEADS_FIELDS) or heads
    if heads and kv_heads and (heads % ranks or kv_heads % ranks):
        message = f"{ranks} does not divide {heads} attention heads and {kv_heads} key-value heads"
        yield Problem(f"{where}.tensor_parallel", f"{message}; choose a divisor of both")


def _length_problems(where: str, model: ModelConfig, config: dict[str, Any]) -> Iterator[Problem]:
    own = _first(config, CONTEXT_FIELDS)
    if own and model.max_model_len and model.max_model_len > own:
        message = f"{model.max_model_len} is beyond the {own} tokens that the checkpoint was made for; lower it"
        yield Problem(f"{where}.max_model_len", message)
    yield from _rope_problems(where, model, config, own)
    longest = model.max_model_len or own
    if longest and model.kv_cache_tokens and model.kv_cache_tokens < longest:
        message = f"{model.kv_cache_tokens} cannot hold one sequence of {longest} tokens; raise it or set max_model_len"
        yield Problem(f"{where}.kv_cache_tokens", message, "warning")


def _rope_problems(where: str, model: ModelConfig, config: dict[str, Any], own: int | None) -> Iterator[Problem]:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict):
        return
    kind = rope.get("rope_type") or rope.get("type")
    limit = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or own
    if kind not in BATCH_DEPENDENT_ROPE or not limit:
        return
    if model.max_model_len is None or model.max_model_len > limit:
        message = (
            f"the checkpoint's rotary embedding ({kind}) depends on the longest sequence of a batch beyond {limit}"
        )
        yield Problem(f"{where}.max_model_len", f"{message}, so that requests would change one another; set {limit}")


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
