"""Model directories: read, checked, loaded whole or refused; knows nothing of DeepSpeed, caches or sequences.

Nothing is ever downloaded and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from eft_serve.config import ModelConfig
from eft_serve.errors import CheckpointError

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
_LOADING = Lock()  # transformers patches its own classes while it loads; two loads at once leave them patched


def read_config(path: Path) -> PretrainedConfig:
    """The directory's `config.json`.

    Raises:
        CheckpointError: the directory or the file is missing or broken, or its kind of model is not known.
    """
    if not path.is_dir():
        raise CheckpointError(f"path: {path} is not a directory; give a transformers model directory or zoo:NAME")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"path: {path} has no config.json; save the model there with save_pretrained")
    try:
        data = json.loads(config_file.read_text())
        model_type = data["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"path: {config_file} is not a transformers configuration: {error!r}") from error
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"path: {config_file}: model type {model_type!r} cannot be read by this transformers version: {error}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"path: {config_file}: model type {model_type!r} has no causal language model to serve")
    return config


def check_served(config: PretrainedConfig, model: ModelConfig) -> None:
    """Refuse what cannot be served exactly.

    Raises:
        CheckpointError: with the field and the remedy.
    """
    _check_rope(config, model)
    if model.tensor_parallel == 1:
        return
    if config.model_type == "falcon" and not getattr(config, "new_decoder_architecture", False):
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path}: DeepSpeed cannot split Falcon models of the "
            "old decoder architecture (Falcon-7B); set tensor_parallel: 1"
        )
    if config.model_type in ("falcon", "bloom") and getattr(config, "alibi", config.model_type == "bloom"):
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path}: ALiBi models are not split; set "
            "tensor_parallel: 1"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if heads % model.tensor_parallel or kv_heads % model.tensor_parallel:
        raise CheckpointError(
            f"tensor_parallel: {model.tensor_parallel} for {model.path} does not divide its {heads} attention heads "
            f"and {kv_heads} key-value heads; choose a divisor of both"
        )


def _check_rope(config: PretrainedConfig, model: ModelConfig) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(nested for nested in parameters.values() if isinstance(nested, dict))]:
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if rope.get("rope_type") not in _BATCH_DEPENDENT_ROPE or not limit:
            continue
        if model.max_model_len is None or model.max_model_len > limit:
            raise CheckpointError(
                f"max_model_len: {model.path} scales its rotary embedding by the longest sequence of a batch "
                f"({rope['rope_type']}), so that one request would change another; set max_model_len: {limit} or less"
            )


def context_limit(config: PretrainedConfig, model: ModelConfig) -> int | None:
    """Tokens one sequence may hold, by the configuration and the checkpoint; None when neither limits it."""
    own = next((value for name in _CONTEXT_FIELDS if (value := getattr(config, name, None))), None)
    asked = model.max_model_len
    if asked is not None and own is not None and asked > own:
        raise CheckpointError(f"max_model_len: {asked} exceeds the {own} tokens that {model.path} was made for")
    return asked or own


def load_model(path: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the CPU in `dtype`, for inference.

    Raises:
        CheckpointError: weights are missing, corrupt, of the wrong shape, or more or fewer than the model has.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with _LOADING:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(
            f"path: the weights of {path} cannot be loaded, copy or save the checkpoint again: {error}"
        ) from error
    model: PreTrainedModel
    model, info = loaded
    _check_loaded(path, info)
    return model


def _check_loaded(path: Path, info: dict[str, Any]) -> None:
    problems = {
        kind: sorted(str(key) for key in info.get(f"{kind}_keys", ()) or ()) for kind in ("missing", "unexpected")
    }
    problems["mismatched"] = sorted(str(key) for key in info.get("mismatched_keys", ()) or ())
    found = [f"{len(keys)} {kind} ({', '.join(keys[:3])} ...)" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"path: the weights of {path} are not those that its config.json describes: {'; '.join(found)}; save both "
            "from one model"
        )
